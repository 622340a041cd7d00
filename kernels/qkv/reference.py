"""The definition: one operation after the other."""

from collections.abc import Iterator

import jax

from jaxft.kernels.kept import kept_product
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.norm_rope import norm_rope
from jaxft.kernels.rope import apply_rope


def heads(products: tuple[jax.Array, ...], head_dim: int) -> Iterator[jax.Array]:
    """The products of q, k and v (..., T, · H) as (..., T, ·, H), named "attention_q" and so on for a rematerialisation
    policy."""
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
    implementation: str | None = "reference",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `qkv` of this folder; implementation: of the operations that it is made of."""
    products = linears(x, layers, dropout=dropout, key=key, implementation=implementation)
    return rotated(products, norms, cos, sin, head_dim=head_dim, eps=eps, implementation=implementation)


def rotated(
    products: tuple[jax.Array, ...],
    norms: tuple[jax.Array, jax.Array] | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    head_dim: int,
    eps: float,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v of the products that give them."""
    q, k, v = heads(products, head_dim)
    if norms is None:
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v
    q, k = (
        norm_rope(part, norm, cos, sin, eps=eps, implementation=implementation)
        for part, norm in zip((q, k), norms, strict=True)
    )
    return q, k, v
