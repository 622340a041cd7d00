"""The definition of NF4 dequantisation, in plain jnp."""

import math

import jax
import jax.numpy as jnp

from jaxft.kernels.dequantize.tables import NESTED_BLOCK, dynamic_map, nf4_levels


def block_scales(scales: jax.Array, nested: jax.Array | None, offset: jax.Array | None) -> jax.Array:
    """The float32 scale of every block, (blocks,)."""
    if nested is None or offset is None:
        return scales
    second = jnp.repeat(nested, NESTED_BLOCK)[: scales.size]
    product = jnp.asarray(dynamic_map())[scales] * second
    # the comparison keeps the compiler from joining product and sum into one operation with one rounding
    return jnp.where(product == product, product, jnp.float32(0)) + offset[None]


def dequantize_nf4(
    packed: jax.Array,
    scales: jax.Array,
    nested: jax.Array | None,
    offset: jax.Array | None,
    shape: tuple[int, ...],
    block: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """level[code] · scale; see `__init__`."""
    n = math.prod(shape)
    blocks = scales.size
    codes = jnp.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    levels = jnp.asarray(nf4_levels())[codes]
    levels = (
        jnp.pad(levels, (0, blocks * block - levels.size)) if levels.size < blocks * block else levels[: blocks * block]
    )
    values = levels.reshape(blocks, block) * block_scales(scales, nested, offset)[:, None]
    return values.astype(dtype).reshape(-1)[:n].reshape(shape)
