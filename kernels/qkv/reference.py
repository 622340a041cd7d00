"""The definition: one operation after the other."""

import jax

from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.norm_rope import norm_rope
from jaxft.kernels.rope import apply_rope


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
    products = linears(x, layers, dropout=dropout, key=key, implementation="reference")
    q, k, v = (product.reshape(*x.shape[:-1], -1, head_dim) for product in products)
    if norms is None:
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v
    q, k = (
        norm_rope(part, norm, cos, sin, eps=eps, implementation="reference")
        for part, norm in zip((q, k), norms, strict=True)
    )
    return q, k, v
