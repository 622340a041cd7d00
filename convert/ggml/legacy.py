"""q4_0, q4_1, q5_0, q5_1 and q8_0: blocks of 32 values with one scale, and for the `_1` an offset, in float16.

Bit for bit what the gguf package (0.19) and ggml's reference write. With an importance matrix the scale is searched
instead (`search`), as llama.cpp does; q8_0 takes no notice of it.
"""

import functools

import jax
import jax.numpy as jnp

from jaxft.convert.ggml.bits import as_bytes, in_rows, nibbles, single_bits
from jaxft.convert.ggml.exact import divided, half, reciprocal, rounded
from jaxft.convert.ggml.search import FINE, affine, around, farthest, rounded_to, scaled


def q8_0(x: jax.Array, zero: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """x (32, G) float32 as round(x · 127 / max|x|), halves away from zero."""
    scale = _over_127(x)
    return _q8_0_bytes(x, scale, reciprocals(scale), zero)


def symmetric(x: jax.Array, zero: jax.Array, weights: jax.Array | None = None, *, bits: int) -> jax.Array:
    """q4_0 and q5_0: the value farthest from zero becomes code 0, which stands for −2^(bits−1) scales."""
    if weights is not None:
        middle = 2 ** (bits - 1)
        return _searched_bytes(x, scaled(x, weights, around(-middle), (-middle, middle - 1)), zero, bits)
    scale = _farthest_over(x, bits)
    return _symmetric_bytes(x, scale, reciprocals(scale), zero, bits)


def offset(x: jax.Array, zero: jax.Array, weights: jax.Array | None = None, *, bits: int) -> jax.Array:
    """q4_1 and q5_1: code 0 stands for the smallest value, the largest code for the largest."""
    if weights is not None:
        scale, minimum = affine(x, weights, 2**bits - 1, FINE)
        return _searched_offset_bytes(x, scale, -minimum, zero, bits)
    low, scale = _low_and_scale(x, bits)
    return _offset_bytes(x, low, scale, reciprocals(scale), zero, bits)


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
def _symmetric_bytes(x: jax.Array, scale: jax.Array, inverse: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    codes = _codes(rounded(x * inverse[None], zero) + jnp.float32(2 ** (bits - 1) + 0.5), bits)
    return in_rows([half(scale, zero)[0], *_packed(codes, bits)])


@functools.partial(jax.jit, static_argnames="bits")
def _offset_bytes(
    x: jax.Array, low: jax.Array, scale: jax.Array, inverse: jax.Array, zero: jax.Array, bits: int
) -> jax.Array:
    codes = _codes(rounded((x - low[None]) * inverse[None], zero) + jnp.float32(0.5), bits)
    return in_rows([half(scale, zero)[0], half(low, zero)[0], *_packed(codes, bits)])


@functools.partial(jax.jit, static_argnames="bits")
def _searched_bytes(x: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    middle = 2 ** (bits - 1)
    d_bytes, d = half(scale[None], zero)
    codes = (rounded_to(x, d, -middle, middle - 1) + middle).astype(jnp.uint8)
    return in_rows([d_bytes, *_packed(codes, bits)])


@functools.partial(jax.jit, static_argnames="bits")
def _searched_offset_bytes(x: jax.Array, scale: jax.Array, low: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    (d_bytes, d), (low_bytes, low) = half(scale[None], zero), half(low[None], zero)
    codes = rounded_to(x - low, d, 0, 2**bits - 1).astype(jnp.uint8)
    return in_rows([d_bytes, low_bytes, *_packed(codes, bits)])


def _codes(shifted: jax.Array, bits: int) -> jax.Array:
    return jnp.clip(jnp.floor(shifted), 0, 2**bits - 1).astype(jnp.uint8)


def _packed(codes: jax.Array, bits: int) -> list[jax.Array]:
    if bits == 4:
        return [nibbles(codes, 16)]
    return [single_bits(codes >> 4, 1), nibbles(codes & 15, 16)]
