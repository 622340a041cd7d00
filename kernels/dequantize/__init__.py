"""Dense weights from NF4 codes with block scales (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.kernels.dequantize import reference, triton
from jaxft.kernels.dequantize.tables import BLOCK_SIZES, NESTED_BLOCK
from jaxft.kernels.gpu import serving
from jaxft.kernels.kept import later

__all__ = ["dequantize_nf4", "multiply_nf4"]

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
    after: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """level[code] · scale of its block, multiplied in float32 and rounded once: an array of `shape` and `dtype`.

    packed: (⌈n/2⌉,) uint8 with n = prod(shape), value 2i in the high nibble of byte i. scales: one a block of `block`
    values: float32, or uint8 codes of the 8-bit dynamic map with nested: (⌈blocks/256⌉,) float32 and offset: ()
    float32: scale = map[code] · nested + offset, each of the two operations rounded to float32.
    layer: () int32 where all four have a leading L; the weight is that row of them, in [0, L). after: an array that is
    computed before, of any shape and dtype. implementation: "triton" (one GPU), "reference", or None: the first that
    serves. Has no derivative. Raises
    ValueError where a shape or dtype does not fit, NotImplementedError where Triton was asked for and cannot serve.
    """
    _check_parts(packed, scales, nested, offset, layer, shape, block)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "reference":
        check = partial(triton.check, math.prod(shape), jnp.dtype(dtype))
        capability = serving("dequantize_nf4", check, implementation)
        if capability is not None:
            return triton.dequantize_nf4(packed, scales, nested, offset, layer, after, shape, block, dtype, capability)
    parts = (packed, scales, nested, offset)
    if after is not None:
        parts, layer = (later(parts, after), layer) if layer is None else (parts, later(layer, after))
    if layer is not None:
        parts = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), parts)
    return reference.dequantize_nf4(*parts, shape, block, dtype)


def multiply_nf4(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    nested: jax.Array | None,
    offset: jax.Array | None,
    *,
    shape: tuple[int, int],
    block: int,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x Wᵀ for x (..., I) and the W (O, I) that `dequantize_nf4` gives in x's dtype: (..., O), accumulated in float32.

    Where x has at most 16 rows and a GPU serves, W is read in 4 bits inside of the product and never written
    ("triton"); its values are then level · scale without the last rounding, to x's dtype: the scale multiplies the sum
    over a block's columns. Else W is made dense first ("reference"). Has no derivative. Raises as `dequantize_nf4`.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x has shape {x.shape}, the weight (O, I) {shape}")
    _check_parts(packed, scales, nested, offset, layer, shape, block)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "reference":
        check = partial(triton.check_product, math.prod(x.shape[:-1]), x.dtype, shape)
        capability = serving("multiply_nf4", check, implementation)
        if capability is not None:
            return triton.multiply_nf4(x, packed, scales, nested, offset, layer, shape, block, capability)
    weight = dequantize_nf4(
        packed, scales, nested, offset, shape=shape, block=block, dtype=x.dtype, layer=layer,
        implementation=implementation,
    )  # fmt: skip
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("...I,OI->...O", x, weight, precision=precision)


def _check_parts(packed, scales, nested, offset, layer, shape: tuple[int, ...], block: int) -> None:
    """Raises ValueError where the arrays are not those of a weight of `shape`."""
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
