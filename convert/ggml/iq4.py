"""iq4_nl and iq4_xs: four bits that stand for the entries of a table, denser near zero.

iq4_nl has a scale every 32 values, iq4_xs super-blocks of 256 with eight scales of six bits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.convert.ggml.bits import in_rows, nibbles
from jaxft.convert.ggml.codes import signed_scales
from jaxft.convert.ggml.exact import half
from jaxft.convert.ggml.search import MIDDLES, TABLE, reciprocal_or_zero, scaled

# the farthest value is put near one or the other end of the table
RATIOS = np.concatenate([-TABLE[:1], TABLE[0] + np.arange(-7, 8, dtype=np.float32)])


def iq4_nl(x: jax.Array, zero: jax.Array, importance: jax.Array | None = None) -> jax.Array:
    """x (32, G)."""
    d_bytes, inverse = _scale(scaled(x, _weights(x, importance), RATIOS, None), zero)
    return _nl_bytes(_indices(x, inverse), d_bytes)


def iq4_xs(x: jax.Array, zero: jax.Array, importance: jax.Array | None = None) -> jax.Array:
    """x (256, G)."""
    x = x.reshape(8, 32, -1)
    w = _weights(x, None if importance is None else importance.reshape(x.shape))
    d_bytes, held, inverse = signed_scales(scaled(x, w, RATIOS, None), None, zero, 32)
    return _xs_bytes(_indices(x, inverse), held, d_bytes)


@jax.jit
def _weights(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    if importance is None:
        return x * x
    axes = tuple(range(x.ndim - 1))
    return importance * jnp.sqrt(2 * jnp.mean(x * x, axis=axes, keepdims=True) + x * x)


@jax.jit
def _scale(scale: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    d_bytes, d = half(scale, zero)
    return d_bytes, reciprocal_or_zero(d)


@jax.jit
def _indices(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """Values (…, n, G) as places in the table: (n of all, G) uint8."""
    y = x * inverse[..., None, :]
    found = jnp.zeros(x.shape, jnp.uint8)
    for middle in MIDDLES:
        found = found + (y > middle).astype(jnp.uint8)
    return found.reshape(-1, x.shape[-1])


@jax.jit
def _nl_bytes(codes: jax.Array, d: jax.Array) -> jax.Array:
    return in_rows([d, nibbles(codes, 16)])


@jax.jit
def _xs_bytes(codes: jax.Array, scales: jax.Array, d: jax.Array) -> jax.Array:
    kept = (scales + 32).astype(jnp.uint8)
    high = kept >> 4
    high = jnp.stack([high[k] | (high[k + 1] << 2) | (high[k + 2] << 4) | (high[k + 3] << 6) for k in (0, 4)])
    low = (kept[0::2] & 15) | ((kept[1::2] & 15) << 4)
    return in_rows([d, high, low, nibbles(codes, 16)])
