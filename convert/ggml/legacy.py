"""q4_0, q4_1, q5_0, q5_1 and q8_0: blocks of 32 values with one scale, and for the `_1` an offset, in float16.

Bit for bit what the gguf package (0.19) and ggml's reference write. With an importance matrix the scale is searched
instead (`search`), as llama.cpp does; q8_0 takes no notice of it.
"""

import jax
import jax.numpy as jnp

from jaxft.convert.ggml.bits import as_bytes, nibbles, single_bits
from jaxft.convert.ggml.exact import divided, half, reciprocal, rounded

Parts = list[jax.Array]  # (bytes, G) uint8 each, in the order of the block


def q8_0(x: jax.Array, zero: jax.Array) -> Parts:
    """x (32, G) float32 as round(x · 127 / max|x|), halves away from zero."""
    scale = divided(jnp.max(jnp.abs(x), axis=0), 127)
    product = rounded(x * reciprocal(scale), zero)
    size = jnp.abs(product)
    whole = jnp.floor(size)
    whole = whole + jnp.floor(2 * (size - whole))
    return [half(scale, zero)[0], as_bytes(jnp.sign(product) * whole)]


def symmetric(x: jax.Array, zero: jax.Array, *, bits: int) -> Parts:
    """q4_0 and q5_0: the value farthest from zero becomes code 0, which stands for −2^(bits−1) scales."""
    middle = 2 ** (bits - 1)
    scale = farthest(x) * jnp.float32(-1 / middle)
    codes = _codes(rounded(x * reciprocal(scale), zero) + jnp.float32(middle + 0.5), bits)
    return [half(scale, zero)[0], *_packed(codes, bits)]


def offset(x: jax.Array, zero: jax.Array, *, bits: int) -> Parts:
    """q4_1 and q5_1: code 0 stands for the smallest value, the largest code for the largest."""
    low = jnp.min(x, axis=0)
    scale = divided(jnp.max(x, axis=0) - low, 2**bits - 1)
    codes = _codes(rounded((x - low) * reciprocal(scale), zero) + jnp.float32(0.5), bits)
    return [half(scale, zero)[0], half(low, zero)[0], *_packed(codes, bits)]


def farthest(x: jax.Array) -> jax.Array:
    """Of (n, G) the value with the largest |x| of each column, the first of equals, with its sign."""
    best = x[0]
    for row in x[1:]:
        best = jnp.where(jnp.abs(row) > jnp.abs(best), row, best)
    return best


def _codes(shifted: jax.Array, bits: int) -> jax.Array:
    return jnp.clip(jnp.floor(shifted), 0, 2**bits - 1).astype(jnp.uint8)


def _packed(codes: jax.Array, bits: int) -> Parts:
    if bits == 4:
        return [nibbles(codes, 16)]
    return [single_bits(codes >> 4, 1), nibbles(codes & 15, 16)]
