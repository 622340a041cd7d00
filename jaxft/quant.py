"""Weights in 4 and 8 bits as pytree leaves, bit for bit as bitsandbytes holds them, and how they are read.

NF4 with double quantisation (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) and the row-wise 8-bit weights of
LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339). What is rounded how is bitsandbytes' CPU build
(0.50.2, x86), measured: its CUDA build finds reciprocals with an approximate instruction, so that no two builds of it
agree in the last bit. Every operation here is exactly rounded, or made of integers, and so gives one result everywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.dequantize import Held, dequantize_nf4, in_four_bits, multiply_nf4
from jaxft.kernels.dequantize.tables import NESTED_BLOCK, dynamic_map, nf4_levels
from jaxft.kernels.kept import later

BLOCK = 64
QUANTIZATIONS = ("nf4", "int8")


class _Leaf:
    """What both kinds of leaf answer as an array would: shape, ndim, size of the weight that they stand for."""

    codes: Any
    weight_shape: tuple[int, int]
    _code_dims: ClassVar[int] = 1  # dimensions of `codes` that one weight has

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I), or (L, O, I) where the leaf is stacked."""
        return (*self.codes.shape[: len(self.codes.shape) - self._code_dims], *self.weight_shape)

    def __getitem__(self, index: Any) -> Any:
        """One weight of a stack by its number, or the leaf itself by `...`."""
        return jax.tree.map(lambda array: array[index], self)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4(_Leaf):
    """A weight (O, I), or with a leading L on every array a stack of them, in 4 bits a value.

    codes: (⌈O·I/2⌉,) uint8, value 2i of the row-major weight in the high nibble of byte i. scales: one a block of
    `block` values, uint8 codes of the dynamic map; nested: (⌈blocks/256⌉,) float32; offset: () float32, their mean.
    Without double quantisation scales are float32, nested and offset None. dtype: what was quantised. layer: () int32
    where the arrays are a whole stack's and this is one weight of it, so that a kernel reads it where it lies; else
    None.
    """

    codes: Any
    scales: Any
    nested: Any
    offset: Any
    weight_shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(default=BLOCK, metadata={"static": True})
    dtype: Any = dataclasses.field(default=jnp.dtype("bfloat16"), metadata={"static": True})
    layer: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I), or (L, O, I) where the leaf is a stack."""
        return self.weight_shape if self.layer is not None else super().shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(_Leaf):
    """A weight (O, I), or with a leading L a stack: codes (O, I) int8, scales (O,) float32, each row's largest |w|."""

    codes: Any
    scales: Any
    weight_shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(default=jnp.dtype("bfloat16"), metadata={"static": True})

    _code_dims: ClassVar[int] = 2


Quantized = NF4 | Int8
Weight = jax.Array | NF4 | Int8


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is one of the two kinds; for `jax.tree.map(…, is_leaf=is_quantized)` too."""
    return isinstance(leaf, NF4 | Int8)


def dense(
    weight: Weight, dtype: Any, *, after: jax.Array | None = None, implementation: str | None = None
) -> jax.Array:
    """The (O, I) array of a plain or quantised weight in `dtype`: what a matmul reads.

    A matmul whose backward is written by hand keeps the *weight* (the leaf) for backward, not the array that comes out
    of here, and calls this again there with after=dY, an array that is computed before: the dense arrays of all linear
    layers of a block would else be alive from its forward to its backward pass. A plain weight is only cast.
    Not differentiable for a quantised weight; it has no gradient.
    """
    return dense_together((weight,), dtype, after=after, implementation=implementation)[0]


def dense_together(
    weights: Sequence[Weight], dtype: Any, *, after: jax.Array | None = None, implementation: str | None = None
) -> tuple[jax.Array, ...]:
    """`dense` of each weight. Those in NF4 that are held alike, in block size and double quantisation, a GPU makes in
    one launch: their dense arrays are all there when the first is."""
    found: dict[int, jax.Array] = {}
    alike: dict[tuple[int, bool], list[int]] = {}
    for i, weight in enumerate(weights):
        if isinstance(weight, NF4 | Int8) and weight.ndim != 2:
            raise ValueError(f"a stack of shape {weight.shape} is read one layer at a time")
        if isinstance(weight, NF4):
            alike.setdefault((weight.block, weight.nested is None), []).append(i)
        else:
            found[i] = _dense_int8(weight, dtype, after) if isinstance(weight, Int8) else weight.astype(dtype)
    for (block, _), group in alike.items():
        made = dequantize_nf4(
            [_held(weights[i]) for i in group], block=block, dtype=jnp.dtype(dtype), after=after,
            implementation=implementation,
        )  # fmt: skip
        found |= zip(group, made, strict=True)
    return tuple(found[i] for i in range(len(weights)))


def _held(weight: Any) -> Held:
    """The arrays of an NF4 weight."""
    return Held(weight.codes, weight.scales, weight.nested, weight.offset, weight.layer, weight.weight_shape)


def _dense_int8(weight: Int8, dtype: Any, after: jax.Array | None) -> jax.Array:
    codes, scales = weight.codes, weight.scales
    if after is not None:
        codes, scales = later((codes, scales), after)
    rows = codes.astype(jnp.float32) * scales[:, None]
    return (rows * jnp.float32(7.874015718698502e-3)).astype(dtype)  # bitsandbytes' own constant for 1/127


def multiply(x: jax.Array, weight: Weight, dtype: Any = None, *, implementation: str | None = None) -> jax.Array:
    """x Wᵀ for x (..., I) and a plain or quantised weight (O, I): (..., O) in `dtype`, x's own where None, accumulated
    in float32.

    Of an NF4 weight a GPU reads the 4 bits themselves where x has few rows, as in generation. Not differentiable for a
    quantised weight.
    """
    if isinstance(weight, NF4) and weight.ndim == 2:
        return multiply_nf4(x, _held(weight), block=weight.block, dtype=dtype, implementation=implementation)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # float32 means float32, not TF32
    return jnp.einsum(
        "...I,OI->...O", x, dense(weight, x.dtype), precision=precision, preferred_element_type=dtype or x.dtype
    )


def reads_codes(x: jax.Array, weights: Sequence[Weight]) -> bool:
    """Whether `multiply` of x reads one of the weights in its 4 bits, and would lose by a dense copy of it."""
    return any(isinstance(weight, NF4) and in_four_bits(x, weight.weight_shape) for weight in weights)


def describe_leaf(kind: str, weight_shape: tuple[int, int], count: int | None, dtype: Any) -> Quantized:
    """A leaf of `jax.ShapeDtypeStruct` for `count` stacked weights (None: one). Raises ValueError for another kind."""
    one = _shapes(kind, weight_shape, jnp.dtype(dtype))
    return one if count is None else stacked(one, count)


@functools.cache
def _shapes(kind: str, weight_shape: tuple[int, int], dtype: jnp.dtype) -> Quantized:
    return jax.eval_shape(lambda w: quantize(w, kind), jax.ShapeDtypeStruct(weight_shape, dtype))


def stacked(leaf: Quantized, count: int) -> Quantized:
    """A leaf of shapes with a leading L = count on every array."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct((count, *array.shape), array.dtype), leaf)


def leaf_axes(leaf: Quantized, axes: tuple[str | None, ...]) -> Quantized:
    """The names of dimensions of every array of a leaf whose weight's are `axes`, ending in those of (O, I).

    NF4's arrays run over the flattened weight: they are split along their blocks, whatever the weight's own names are.
    """
    lead = axes[:-2]
    if isinstance(leaf, Int8):
        return dataclasses.replace(leaf, codes=axes, scales=axes[:-1])
    return dataclasses.replace(
        leaf,
        codes=(*lead, "blocks"),
        scales=(*lead, "blocks"),
        nested=None if leaf.nested is None else (*lead, None),
        offset=None if leaf.offset is None else lead,
    )


def quantize(weight: jax.Array, kind: str) -> Quantized:
    """`quantize_nf4` or `quantize_int8` by name. Raises ValueError for another name."""
    if kind == "nf4":
        return quantize_nf4(weight)
    if kind == "int8":
        return quantize_int8(weight)
    raise ValueError(f"quantization {kind!r}: must be one of {', '.join(QUANTIZATIONS)}")


def kind_of(leaf: Quantized) -> str:
    """The name under which `quantize` makes such a leaf."""
    return "nf4" if isinstance(leaf, NF4) else "int8"


def quantize_nf4(weight: jax.Array, *, block: int = BLOCK, double: bool = True) -> NF4:
    """A float weight (O, I) in its stored dtype as NF4; blocks run over the row-major values, the last may be short.

    A value is divided by its block's largest |value| and gets the nearest level (a tie the lower one); a block of
    zeros, or of numbers below float32's normal range, gets level 0. double: the scales in 8 bits too.
    """
    flat = weight.reshape(-1)
    full = flat.size - flat.size % block

    def full_blocks(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = rows.astype(jnp.float32)
        largest = jnp.max(jnp.abs(rows), axis=1)
        scaled = rows * _or_zero(largest, _divide(jnp.ones_like(largest), largest))[:, None]
        return _packed_levels(scaled), largest

    packed, largest = _in_pieces(full_blocks, flat[:full].reshape(-1, block))
    packed = packed.reshape(-1)
    if full < flat.size:  # bitsandbytes divides in a short block, where it multiplies by the reciprocal in a full one
        tail = flat[full:].astype(jnp.float32)
        last = jnp.max(jnp.abs(tail), keepdims=True)
        quotient = jnp.sign(tail) * _or_zero(jnp.abs(tail), _divide(jnp.abs(tail), jnp.broadcast_to(last, tail.shape)))
        quotient = jnp.pad(quotient, (0, tail.size % 2))  # half a byte is left over: level 0
        packed = jnp.concatenate([packed, _packed_levels(quotient[None])[0]])
        largest = jnp.concatenate([largest, last])
    if not double:
        return NF4(packed, largest, None, None, _matrix_shape(weight), block, weight.dtype)
    offset = _mean(largest)
    scales, nested = _quantize_scales(largest - offset[None])
    return NF4(packed, scales, nested, offset, _matrix_shape(weight), block, weight.dtype)


def quantize_int8(weight: jax.Array) -> Int8:
    """A float weight (O, I) as LLM.int8() has it: round(w · 127 / the row's largest |w|), of w rounded to float16."""

    def rows(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        half = part.astype(jnp.float16).astype(jnp.float32)  # bitsandbytes' own first step, whatever the dtype
        largest = jnp.max(jnp.abs(half), axis=1)
        # rounded twice, as torch computes 127 / x
        factor = _or_zero(largest, _divide(jnp.ones_like(largest), largest) * 127)
        return jnp.round(half * factor[:, None]).astype(jnp.int8), largest

    return Int8(*_in_pieces(rows, weight), _matrix_shape(weight), weight.dtype)


def _matrix_shape(weight: jax.Array) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def _in_pieces(function: Callable[[jax.Array], tuple[jax.Array, jax.Array]], rows: jax.Array) -> tuple[Any, Any]:
    """function(rows) for a function of single rows, a sixteenth at a time: its float32 copies are never of all rows."""
    count = next(k for k in (16, 8, 4, 2, 1) if len(rows) % k == 0)
    if count == 1 or rows.size < 2**20:
        return function(rows)
    # as plain bits: a compiler that has no bfloat16 would make a float32 copy of everything before the loop
    bits = jax.lax.bitcast_convert_type(rows, f"uint{8 * rows.dtype.itemsize}").reshape(count, -1, rows.shape[1])
    parts = jax.lax.map(lambda part: function(jax.lax.bitcast_convert_type(part, rows.dtype)), bits)
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), parts)


def _packed_levels(scaled: jax.Array) -> jax.Array:
    """The nearest level of values (…, 2k) in [−1, 1], two a byte: (…, k) uint8."""
    levels = nf4_levels()
    bounds = (levels[:-1] + levels[1:]) / np.float32(2)
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in bounds)
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


TINY = np.finfo(np.float32).tiny


def _or_zero(divisor: jax.Array, quotient: jax.Array) -> jax.Array:
    return jnp.where(divisor < TINY, jnp.zeros_like(quotient), quotient)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b for positive normal float32, rounded to nearest on every backend (a GPU's division may be off by 2 ulp).

    With mantissas A, B, Q of 24 bits, A · 2^s − Q · B is small, so that its low 32 bits are all of it; Q is moved by
    the nearest integer to that remainder over B.
    """
    quotient = a / b
    bits = jax.lax.bitcast_convert_type(quotient, jnp.int32)

    def mantissa(x: jax.Array) -> jax.Array:
        return (jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)

    A, B, Q = mantissa(a), mantissa(b), mantissa(quotient)
    # s is 23 or 24; the right one is where A · 2^s and Q · B, compared as floats, agree
    ratio = A.astype(jnp.float32) / (Q.astype(jnp.float32) * B.astype(jnp.float32) * jnp.float32(2**-23))
    remainder = jnp.where(ratio > 0.75, A << 23, A << 24) - Q * B
    remainder = jax.lax.bitcast_convert_type(remainder, jnp.int32)
    half = (B >> 1).astype(jnp.int32)  # |remainder| = B/2 would be a tie, which a quotient of floats never is
    whole = B.astype(jnp.int32)
    steps = jnp.zeros_like(bits)
    for k in range(3):
        above, below = remainder > half + k * whole, remainder < -half - k * whole
        steps = steps + above.astype(jnp.int32) - below.astype(jnp.int32)
    return jax.lax.bitcast_convert_type(bits + steps, jnp.float32)


def _in_order(rows: list[jax.Array]) -> jax.Array:
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def _mean(x: jax.Array) -> jax.Array:
    """The mean of (n,) float32 in the order of torch's CPU sum: four times eight lanes, in groups of groups of 16.

    A mean in another order differs in its last bit, and with it the scales of the whole weight.
    """
    n = x.size
    vectors = x[: n - n % 8].reshape(-1, 8)
    count = len(vectors) // 4
    step = max(16, 2 ** ((max(count - 1, 0)).bit_length() // 4))
    level = vectors[: count * 4].reshape(count, 32)
    rests = []
    for _ in range(3):  # full groups go up a level, the rest is summed at its own
        groups = len(level) // step
        rest = level[groups * step :]
        rests.append(_in_order([jnp.zeros(32, x.dtype), *rest]))
        grouped = level[: groups * step].reshape(groups, step, 32)
        level = _in_order([grouped[:, k] for k in range(step)])
    rests.append(_in_order([jnp.zeros(32, x.dtype), *level]))
    lanes = _in_order(rests).reshape(4, 8)
    lanes = _in_order([lanes[0], *vectors[count * 4 :], *lanes[1:]])
    total = _in_order([jnp.float32(0), *x[n - n % 8 :], *lanes])
    return jnp.where(total < TINY, jnp.float32(0), _divide(total, jnp.float32(n)))


def _quantize_scales(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes (n,) uint8 of the dynamic map and the largest |x| of every 256, float32.

    As bitsandbytes' CPU build: x over the largest goes to the nearest of 65,536 equal steps of [−1, 1], and that to the
    nearest entry. The difference to the nearest entry of x itself is at most 1.6e-5 of the largest.
    """
    n = x.size
    rows = jnp.pad(x, (0, -n % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = jnp.max(jnp.abs(rows), axis=1)
    scaled = rows * _or_zero(largest, _divide(jnp.ones_like(largest), largest))[:, None]
    entries = dynamic_map()
    middles = (entries[:-1] + entries[1:]) / np.float32(2)
    steps = (np.arange(65536, dtype=np.float32) / np.float32(65535)) * np.float32(2) - np.float32(1)
    table = np.searchsorted(middles, steps, side="left").astype(np.uint8)
    codes = jnp.where((largest == 0)[:, None], jnp.uint8(0), jnp.asarray(table)[_step_of(scaled)])
    return codes.reshape(-1)[:n], largest


def _step_of(x: jax.Array) -> jax.Array:
    """⌊(x + 1)/2 · 65535 + 1/2⌋ for x in [−1, 1], product and sum rounded to float32 once, as int32.

    In integers, because compilers differ in whether they round the product: with m = (x + 1) 2^24 the sum is
    (65535 m + 2^24) / 2^25, and the rounding carries where at most half an ulp is missing to the next whole number.
    """
    m = ((jnp.clip(x, -1, 1) + 1) * 2**24).astype(jnp.int32)
    low = (m & 511) * 65536 - m + 2**24
    whole = (m >> 9) + (low >> 25)
    missing = 2**25 - (low & (2**25 - 1))
    return whole + (missing <= (2 << (31 - jax.lax.clz(jnp.maximum(whole, 1))))).astype(jnp.int32)
