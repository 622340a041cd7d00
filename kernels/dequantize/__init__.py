"""Dense weights from NF4 codes with block scales (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

import functools
import logging
import math

import jax
import jax.numpy as jnp

from jaxft.kernels.dequantize import reference, triton
from jaxft.kernels.dequantize.tables import BLOCK_SIZES, NESTED_BLOCK
from jaxft.kernels.gpu import device_capability

__all__ = ["dequantize_nf4"]

IMPLEMENTATIONS = ("triton", "reference")


def dequantize_nf4(
    packed: jax.Array,
    scales: jax.Array,
    nested: jax.Array | None,
    offset: jax.Array | None,
    *,
    shape: tuple[int, ...],
    block: int,
    dtype: jnp.dtype,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """level[code] · scale of its block, multiplied in float32 and rounded once: an array of `shape` and `dtype`.

    packed: (⌈n/2⌉,) uint8 with n = prod(shape), value 2i in the high nibble of byte i. scales: one a block of `block`
    values: float32, or uint8 codes of the 8-bit dynamic map with nested: (⌈blocks/256⌉,) float32 and offset: ()
    float32: scale = map[code] · nested + offset, each of the two operations rounded to float32.
    layer: () int32 where all four have a leading L; the weight is that row of them, in [0, L).
    implementation: "triton" (CUDA), "reference", or None: triton on a GPU where it is installed. Has no derivative.
    Raises ValueError where a shape or dtype does not fit, NotImplementedError where Triton cannot serve the device.
    """
    n = math.prod(shape)
    blocks = -(-n // block)
    expected: dict[str, tuple[jax.Array | None, tuple[int, ...], str]] = {
        "packed": (packed, (-(-n // 2),), "uint8"),
        "scales": (scales, (blocks,), "float32" if nested is None else "uint8"),
        "nested": (nested, (-(-blocks // NESTED_BLOCK),), "float32"),
        "offset": (offset, (), "float32"),
    }
    if block not in BLOCK_SIZES or (nested is None) != (offset is None):
        raise ValueError(f"block {block}: must be one of {BLOCK_SIZES}; nested and offset go together")
    for name, (array, size, kind) in expected.items():
        if array is not None and (array.shape[0 if layer is None else 1 :] != size or array.dtype != kind):
            raise ValueError(f"{name} is {array.dtype} {array.shape}; a weight of shape {shape} needs {kind} {size}")
    chosen = implementation or _default(n, jnp.dtype(dtype).name)
    if chosen == "reference":
        parts = (packed, scales, nested, offset)
        if layer is not None:
            parts = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), parts)
        return reference.dequantize_nf4(*parts, shape, block, dtype)
    if chosen != "triton":
        raise ValueError(f"implementation {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    triton.check(n, dtype)
    return triton.dequantize_nf4(packed, scales, nested, offset, layer, shape, block, dtype, device_capability())


@functools.cache
def _default(n: int, dtype: str) -> str:
    """ "triton" where the device and the size let it; a GPU without it is worth a warning."""
    try:
        triton.check(n, jnp.dtype(dtype))
        device_capability()
    except NotImplementedError as refusal:
        level = logging.INFO if jax.default_backend() == "cpu" else logging.WARNING
        logging.getLogger("jaxft").log(level, "NF4: reference (triton: %s)", refusal)
        return "reference"
    return "triton"
