"""The linear layers as one operation, then norm and rotation, each by the first way that serves."""

from collections.abc import Iterator

import jax

from jaxft.kernels.kept import kept_product
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.norm_rope import norm_rope
from jaxft.kernels.rope import apply_rope


def heads(products: tuple[jax.Array, ...], head_dim: int) -> Iterator[jax.Array]:
    """The products of q, k and v (..., T, · H) as (..., T, ·, H), named "attention_q" and so on
    for a rematerialisation policy."""
    for name, product in zip("qkv", products, strict=True):
        yield kept_product(product, f"attention_{name}").reshape(*product.shape[:-1], -1, head_dim)


def qkv(
    x: jax.Array,
    layers: tuple[Weights, Weights, Weights],
    norms: tuple[jax.Array, jax.Array] | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    head_dim: int,
    eps: float,
    dropout: float,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `qkv` of this folder."""
    q, k, v = heads(linears(x, layers, dropout=dropout, key=key), head_dim)
    if norms is None:
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v
    q, k = (norm_rope(part, norm, cos, sin, eps=eps) for part, norm in zip((q, k), norms, strict=True))
    return q, k, v
