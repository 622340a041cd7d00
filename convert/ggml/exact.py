"""float32 arithmetic that gives the same bits on every backend, and the bytes that numbers are held in.

Compilers join a product and the sum after it, unrounded between them, and GPUs divide with an error of 2 ulp. What the
gguf package rounds twice is rounded twice here: `rounded` puts a bit operation between the two that no compiler can
see through, with a zero that comes in as an argument of the program.
"""

import jax
import jax.numpy as jnp

from jaxft.quant import TINY, _divide


def rounded(x: jax.Array, zero: jax.Array) -> jax.Array:
    """x as it is, rounded to float32: nothing is contracted across this. zero: () int32, an argument, 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) ^ zero
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x rounded to nearest; 0 for a zero and for what is below float32's normal range."""
    size = jnp.abs(x)
    safe = jnp.where(size < TINY, jnp.float32(1), size)
    return jnp.where(size < TINY, jnp.float32(0), jnp.sign(x) * _divide(jnp.ones_like(safe), safe))


def divided(x: jax.Array, by: int) -> jax.Array:
    """x / by for x ≥ 0, rounded to nearest; 0 below float32's normal range."""
    safe = jnp.where(x < TINY, jnp.float32(1), x)
    return jnp.where(x < TINY, jnp.float32(0), _divide(safe, jnp.full_like(safe, by)))


def half(x: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(G,) float32 rounded to float16: its two bytes, low one first, (2, G) uint8, and its value in float32."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16) ^ zero.astype(jnp.uint16)
    value = jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
    return jnp.stack([(bits & 255).astype(jnp.uint8), (bits >> 8).astype(jnp.uint8)]), value
