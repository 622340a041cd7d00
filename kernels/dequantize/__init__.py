"""Dense weights from NF4 codes with block scales (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.kernels.dequantize import reference, triton
from jaxft.kernels.dequantize.tables import BLOCK_SIZES, NESTED_BLOCK
from jaxft.kernels.dequantize.weights import Held
from jaxft.kernels.gpu import serving
from jaxft.kernels.kept import later

__all__ = ["Held", "dequantize_nf4", "in_four_bits", "multiply_nf4"]

IMPLEMENTATIONS = ("triton", "reference")


def dequantize_nf4(
    weights: Sequence[Held],
    *,
    block: int,
    dtype: jnp.dtype,
    after: jax.Array | None = None,
    implementation: str | None = None,
) -> list[jax.Array]:
    """level[code] · scale of each weight, multiplied in float32 and rounded once: arrays of their shapes and `dtype`.

    block: values that share a scale, as all weights have them; all or none have `nested`. A GPU makes three weights a
    launch: their dense arrays are all there when the first is. after: an array that is computed before, of any shape
    and dtype. implementation: "triton" (one GPU), "reference", or None: the first that serves. Has no derivative.
    Raises ValueError where a shape or dtype does not fit, NotImplementedError where Triton was asked for and cannot
    serve.
    """
    _check(weights, block, implementation)
    if implementation != "reference" and weights:
        largest = max(math.prod(weight.shape) for weight in weights)
        capability = serving("dequantize_nf4", partial(triton.check, largest, jnp.dtype(dtype)), implementation)
        if capability is not None:
            return triton.dequantize_nf4(weights, after, block, dtype, capability)
    return [_by_reference(weight, after, block, dtype) for weight in weights]


def multiply_nf4(
    x: jax.Array, weight: Held, *, block: int, dtype: jnp.dtype | None = None, implementation: str | None = None
) -> jax.Array:
    """x Wᵀ for x (..., I) and the W (O, I) that `dequantize_nf4` gives in x's dtype: (..., O) in `dtype`, x's own where
    None, accumulated in float32.

    Where x has at most 16 rows and a GPU serves, W is read in 4 bits inside of the product and never written
    ("triton"); its values are then level · scale without the last rounding, to x's dtype: the scale multiplies the sum
    over a block's columns. Else W is made dense first ("reference"). Has no derivative. Raises as `dequantize_nf4`.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {x.shape}, the weight (O, I) {weight.shape}")
    _check([weight], block, implementation)
    capability = _reading_codes(x, weight.shape, implementation)
    if capability is not None:
        return triton.multiply_nf4(x, weight, block, capability, dtype=dtype)
    (matrix,) = dequantize_nf4([weight], block=block, dtype=x.dtype, implementation=implementation)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("...I,OI->...O", x, matrix, precision=precision, preferred_element_type=dtype or x.dtype)


def in_four_bits(x: jax.Array, shape: tuple[int, ...]) -> bool:
    """Whether `multiply_nf4` reads a W of shape (O, I) in its 4 bits, and does not make it dense."""
    return _reading_codes(x, shape, None) is not None


def _reading_codes(x: jax.Array, shape: tuple[int, ...], implementation: str | None) -> int | None:
    """The compute capability of the kernel that does so."""
    if implementation == "reference":
        return None
    check = partial(triton.check_product, math.prod(x.shape[:-1]), x.dtype, shape)
    return serving("multiply_nf4", check, implementation)


def _by_reference(weight: Held, after: jax.Array | None, block: int, dtype: jnp.dtype) -> jax.Array:
    parts, layer = weight[:4], weight.layer
    if after is not None:
        parts, layer = (later(parts, after), layer) if layer is None else (parts, later(layer, after))
    if layer is not None:
        parts = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), parts)
    return reference.dequantize_nf4(*parts, weight.shape, block, dtype)


def _check(weights: Sequence[Held], block: int, implementation: str | None) -> None:
    for weight in weights:
        _check_parts(weight, block)
    if len({weight.nested is None for weight in weights}) > 1:
        raise ValueError("nested: of the weights that are made dense together all have it, or none")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")


def _check_parts(weight: Held, block: int) -> None:
    """Raises ValueError where the arrays are not those of a weight of its shape."""
    packed, scales, nested, offset, layer, shape = weight
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
