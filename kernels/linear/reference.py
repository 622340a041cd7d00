"""The definition of a linear layer with an optional low-rank branch, in plain jnp."""

import jax
import jax.numpy as jnp

from jaxft.quant import NF4, Int8, Weight, dense


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """x Wᵀ for weight (O, I) as Hugging Face stores it; accumulated in float32, returned in x's dtype."""
    if isinstance(weight, NF4 | Int8):
        return _quantized_matmul(x, weight)
    return jnp.einsum("...I,OI->...O", x, weight.astype(x.dtype), precision=_precision(x.dtype))


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None  # float32 means float32, not TF32


@jax.custom_vjp
def _quantized_matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """x Wᵀ for a quantised W, which has no gradient: backward keeps W as it is held, not the dense array."""
    return jnp.einsum("...I,OI->...O", x, dense(weight, x.dtype), precision=_precision(x.dtype))


def _quantized_forward(x: jax.Array, weight: Weight) -> tuple[jax.Array, Weight]:
    return _quantized_matmul(x, weight), weight


def _quantized_backward(weight: Weight, dy: jax.Array) -> tuple[jax.Array, None]:
    dx = jnp.einsum("...O,OI->...I", dy, dense(weight, dy.dtype, after=dy), precision=_precision(dy.dtype))
    return dx, None


_quantized_matmul.defvjp(_quantized_forward, _quantized_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes entries of x with probability rate and divides the others by 1 − rate."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def times_scale(b: jax.Array, scale: jax.Array) -> jax.Array:
    """s B in float32; b (..., O, R), scale (...)."""
    return b.astype(jnp.float32) * jnp.expand_dims(scale.astype(jnp.float32), (-2, -1))


def row_norms(weight: Weight, lora: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """‖W_o + s (B A)_o‖ of every row o, (O,) float32, computed in float32; a constant to the gradient."""
    weight, (a, b, scale) = jax.lax.stop_gradient((weight, lora))
    low_rank = matmul(times_scale(b, scale), a.T)
    return jnp.linalg.norm(dense(weight, jnp.float32) + low_rank, axis=1)


def linear(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    lora: tuple[jax.Array, jax.Array, jax.Array] | None,
    rate: float,
    key: jax.Array | None,
    magnitude: jax.Array | None = None,
) -> jax.Array:
    """x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ; see `__init__`, and `dora` for the rows' magnitudes, which multiply by c."""
    y = matmul(x, weight)
    if lora is not None:
        a, b, scale = lora
        branch = dropout(x, rate, key) if rate and key is not None else x
        low_rank = matmul(matmul(branch, a), b) * scale.astype(x.dtype)
        if magnitude is None:
            y = y + low_rank
        else:
            c = jnp.where(magnitude != 0, magnitude / row_norms(weight, lora), 1.0)
            c = jax.lax.expand_dims(c.astype(x.dtype), range(y.ndim - 1))
            y = y + (c - 1) * matmul(branch, weight) + c * low_rank
    if bias is not None:
        y = y + jax.lax.expand_dims(bias.astype(x.dtype), range(y.ndim - 1))
    return y
