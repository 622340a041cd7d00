"""The definition of a linear layer with an optional low-rank branch, in plain jnp."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ for weight (O, I) as Hugging Face stores it; accumulated in float32, returned in x's dtype."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # float32 means float32, not TF32
    return jnp.einsum("...I,OI->...O", x, weight.astype(x.dtype), precision=precision)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes entries of x with probability rate and divides the others by 1 − rate."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    lora: tuple[jax.Array, jax.Array, jax.Array] | None,
    rate: float,
    key: jax.Array | None,
) -> jax.Array:
    """x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ; see `__init__`."""
    y = matmul(x, weight)
    if bias is not None:
        y = y + jax.lax.expand_dims(bias.astype(x.dtype), range(y.ndim - 1))
    if lora is not None:
        a, b, scale = lora
        branch = dropout(x, rate, key) if rate and key is not None else x
        y = y + matmul(matmul(branch, a), b) * scale.astype(x.dtype)
    return y
