"""Values and scales as the whole numbers that blocks hold, once the scales are found.

Scales, codes and bytes are programs of their own, here and in the files of the types: what is computed in one and read
often in the next has to be held in between, and within a program no compiler can be made to hold it.
"""

import functools

import jax
import jax.numpy as jnp

from jaxft.convert.ggml.exact import half
from jaxft.convert.ggml.search import farthest, reciprocal_or_zero


def rounded_to(x: jax.Array, step: jax.Array, low: int, high: int) -> jax.Array:
    """The whole numbers from low to high nearest to x / step; 0 where the step is."""
    return jnp.clip(jnp.round(x * reciprocal_or_zero(step)), low, high)


@functools.partial(jax.jit, static_argnames="most")
def signed_scales(
    scales: jax.Array, step: jax.Array | None, zero: jax.Array, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bytes of what multiplies them, whole scales from −most to most − 1 (int32), and 1 / scale as it is read.

    step: what multiplies them; None: the scale farthest from zero becomes −most.
    """
    d_bytes, d = half(farthest(scales) / -most if step is None else step[None], zero)
    held = rounded_to(scales, d, -most, most - 1)
    return d_bytes, held.astype(jnp.int32), reciprocal_or_zero(d * held)


@jax.jit
def whole_codes(x: jax.Array, inverse: jax.Array, minimum: jax.Array | None, bounds: tuple[int, int]) -> jax.Array:
    """Values (…, n, G) as whole numbers within bounds, counted from the lower one: (n of all, G) uint8."""
    low, high = (jnp.asarray(bound, jnp.float32) for bound in bounds)
    shifted = x if minimum is None else x + minimum[..., None, :]
    codes = jnp.clip(jnp.round(shifted * inverse[..., None, :]), low, high) - low
    return codes.astype(jnp.uint8).reshape(-1, x.shape[-1])
