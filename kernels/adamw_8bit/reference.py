"""The definition of an AdamW step on one tensor, or L stacked ones, whose moments are in 8 bits, in plain jnp."""

import jax
import jax.numpy as jnp

from jaxft.optim_8bit import BLOCK, Moment8, adam_step, dequantize, quantize


def adamw(
    param: jax.Array, grad: jax.Array, m: jax.Array, v: jax.Array, scalars: jax.Array, noise: jax.Array | None,
    b1: float, b2: float, eps: float, decay: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The step with float32 moments in grad's shape, whatever `finite` in the scalars says: param, m, v."""
    factor, rate, first, second, _ = scalars
    grad, held = grad.astype(jnp.float32) * factor, param.astype(jnp.float32)
    update, m, v = adam_step(grad, m, v, b1=b1, b2=b2, eps=eps, corrections=(first, second))
    value = held - rate * (update + decay * held)
    return (value.astype(param.dtype) if noise is None else to_bfloat16(value, noise)), m, v


def to_bfloat16(value: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 to bfloat16 by uint16 noise added below the last bit, and the lower half cut off: rounded up as often as
    it should. Non-finite values stay as they are."""
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32) + noise.astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(value), rounded, value).astype(jnp.bfloat16)


def adamw_8bit(
    param: jax.Array, grad: jax.Array, mu: Moment8, nu: Moment8, scalars: jax.Array, key: jax.Array,
    b1: float, b2: float, eps: float, decay: float,
) -> tuple[jax.Array, Moment8, Moment8]:  # fmt: skip
    """See `__init__`."""
    layers, blocks = mu.largest.shape
    size = param.size // layers

    def flat(moment: jax.Array) -> jax.Array:
        return moment.reshape(layers, blocks * BLOCK)[:, :size].reshape(param.shape)

    def blocked(moment: jax.Array) -> jax.Array:
        padded = jnp.pad(moment.reshape(layers, size), ((0, 0), (0, blocks * BLOCK - size)))
        return padded.reshape(layers, blocks, BLOCK)

    noise = jax.random.bits(key, param.shape, jnp.uint16) if param.dtype == jnp.bfloat16 else None
    after, m, v = adamw(
        param, grad, flat(dequantize(mu, True)), flat(dequantize(nu, False)), scalars, noise, b1, b2, eps, decay
    )
    new = after, quantize(blocked(m), True), quantize(blocked(v), False)
    return jax.tree.map(lambda new, old: jnp.where(scalars[4] != 0, new, old), new, (param, mu, nu))
