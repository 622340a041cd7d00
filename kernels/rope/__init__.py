"""Rotary position embedding, half-split layout as Hugging Face stores it (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

import jax

from jaxft.kernels.rope import reference


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each head of x by its position's angles.

    x: (B, T, N, H), H even; cos, sin: (B, T, H/2) float32, already multiplied by the attention scaling of the
    rope type. Computed in float32, returned in x's dtype. Raises ValueError on other shapes.
    """
    expected = (*x.shape[:2], x.shape[-1] // 2)
    if x.ndim != 4 or x.shape[-1] % 2 or cos.shape != expected or sin.shape != expected:
        raise ValueError(f"x has shape {x.shape}, cos {cos.shape}, sin {sin.shape}; need (B, T, N, H) and (B, T, H/2)")
    return reference.apply_rope(x, cos, sin)
