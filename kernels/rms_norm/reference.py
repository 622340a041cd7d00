"""The definition of RMSNorm in plain jnp."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """y = x / sqrt(mean(x²) + eps) · weight, computed in float32 and returned in the dtype of x."""
    x32 = x.astype(jnp.float32)  # the mean of squares loses bits in bf16 at real widths
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)
