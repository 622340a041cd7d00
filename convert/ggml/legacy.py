"""q4_0, q4_1, q5_0, q5_1 and q8_0: blocks of 32 values with one scale, and for the `_1` an offset, in float16.

Bit for bit what the gguf package (0.19) and ggml's reference write. With an importance matrix the scale is searched
instead (`search`), as llama.cpp does; q8_0 takes no notice of it.
"""

import functools

import jax
import jax.numpy as jnp

from jaxft.convert.ggml.bits import as_bytes, in_rows, nibbles, single_bits
from jaxft.convert.ggml.codes import whole_codes
from jaxft.convert.ggml.exact import divided, half, reciprocal, rounded
from jaxft.convert.ggml.search import FINE, affine, around, farthest, reciprocal_or_zero, scaled


def q8_0(x: jax.Array, zero: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """x (32, G) float32 as round(x · 127 / max|x|), halves away from zero."""
    scale = _over_127(x)
    return _q8_0_bytes(x, scale, reciprocals(scale), zero)


def symmetric(x: jax.Array, zero: jax.Array, weights: jax.Array | None = None, *, bits: int) -> jax.Array:
    """q4_0 and q5_0: the value farthest from zero becomes code 0, which stands for −2^(bits−1) scales."""
    middle = 2 ** (bits - 1)
    if weights is not None:
        bounds = (-middle, middle - 1)
        scale = scaled(x, weights, around(-middle), bounds)
        return _bytes(whole_codes(x, *_as_read(scale, None, zero), bounds), scale, None, zero, bits)
    scale = _farthest_over(x, bits)
    codes = _exact_codes(x, None, reciprocals(scale), zero, middle + 0.5, bits)
    return _bytes(codes, scale, None, zero, bits)


def offset(x: jax.Array, zero: jax.Array, weights: jax.Array | None = None, *, bits: int) -> jax.Array:
    """q4_1 and q5_1: code 0 stands for the smallest value, the largest code for the largest."""
    if weights is not None:
        scale, minimum = affine(x, weights, 2**bits - 1, FINE)
        return _bytes(whole_codes(x, *_as_read(scale, -minimum, zero), (0, 2**bits - 1)), scale, -minimum, zero, bits)
    low, scale = _low_and_scale(x, bits)
    return _bytes(_exact_codes(x, low, reciprocals(scale), zero, 0.5, bits), scale, low, zero, bits)


reciprocals = jax.jit(reciprocal)


@jax.jit
def _over_127(x: jax.Array) -> jax.Array:
    return divided(jnp.max(jnp.abs(x), axis=0), 127)


@functools.partial(jax.jit, static_argnames="bits")
def _farthest_over(x: jax.Array, bits: int) -> jax.Array:
    return farthest(x)[0] / -(2 ** (bits - 1))


@functools.partial(jax.jit, static_argnames="bits")
def _low_and_scale(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    low = jnp.min(x, axis=0)
    return low, divided(jnp.max(x, axis=0) - low, 2**bits - 1)


@jax.jit
def _q8_0_bytes(x: jax.Array, scale: jax.Array, inverse: jax.Array, zero: jax.Array) -> jax.Array:
    product = rounded(x * inverse[None], zero)
    size = jnp.abs(product)
    whole = jnp.floor(size)
    whole = whole + jnp.floor(2 * (size - whole))
    return in_rows([half(scale, zero)[0], as_bytes(jnp.sign(product) * whole)])


@functools.partial(jax.jit, static_argnames="bits")
def _exact_codes(
    x: jax.Array, low: jax.Array | None, inverse: jax.Array, zero: jax.Array, half_up: float, bits: int
) -> jax.Array:
    product = rounded((x if low is None else x - low[None]) * inverse[None], zero)
    return jnp.clip(jnp.floor(product + jnp.float32(half_up)), 0, 2**bits - 1).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="bits")
def _bytes(codes: jax.Array, scale: jax.Array, low: jax.Array | None, zero: jax.Array, bits: int) -> jax.Array:
    lows = [] if low is None else [half(low, zero)[0]]
    high = [single_bits(codes >> 4, 1)] if bits == 5 else []
    return in_rows([half(scale, zero)[0], *lows, *high, nibbles(codes & 15, 16)])


@jax.jit
def _as_read(scale: jax.Array, low: jax.Array | None, zero: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """1 / scale and the offset with what is held in float16."""
    return reciprocal_or_zero(half(scale, zero)[1]), None if low is None else -half(low, zero)[1]
