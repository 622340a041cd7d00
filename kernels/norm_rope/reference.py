"""The definition: one operation after the other."""

import jax

from jaxft.kernels.rms_norm import rms_norm
from jaxft.kernels.rope import apply_rope


def norm_rope(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, eps: float) -> jax.Array:
    """Normalises each head of x (B, T, N, H), multiplies it by weight (H,), rotates it."""
    return apply_rope(rms_norm(x, weight, eps=eps), cos, sin)
