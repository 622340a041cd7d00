"""The 8-bit AdamW step by our own Triton kernel (`triton_kernels.py`): what it serves, its tables, and its launch.

Triton and jax-triton are imported when the kernel is launched and not before.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels import launch
from jaxft.kernels.dequantize.tables import dynamic_map
from jaxft.kernels.gpu import check_installed
from jaxft.optim_8bit import BLOCK, Moment8

LOWEST = 104 << 7  # the bucket of 2^-23, below every middle between two levels
LAST = (127 << 7) - LOWEST  # that of 1


@dataclass(frozen=True)
class Tile:
    """Blocks of 256 numbers that a program holds, and its warps; a warp takes whole blocks where it can."""

    rows: int
    warps: int


TILE = Tile(8, 4)


def check(param: jax.Array, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot serve."""
    if param.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"dtype {param.dtype}: needs bfloat16 or float32")
    if capability < 80:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 8.0 (bfloat16)")
    check_installed()


@functools.cache
def tables(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Levels (256,) float32, and what gives the code of a number x in −1 … 1 by one look, (buckets,) int32.

    |x|'s bucket is the upper half of its float32 bits, exponent and 7 bits of the mantissa: 128 buckets an octave,
    where levels are at most 71, so that a bucket holds at most one middle between two levels. A bucket's entry has the
    code below that middle above 17 bits that carry into it when the number's lower half is added and is above the
    middle's (none carries where there is no middle). The first entry is the bucket `LOWEST`'s and serves all below it:
    it holds no middle. Codes are those of |x|; a negative x's mirror them.
    """
    levels = dynamic_map(signed)
    middles = ((levels[:-1].astype(np.float64) + levels[1:]) / 2).astype(np.float32)
    bits = middles[middles > 0].view(np.uint32)
    buckets = (bits >> 16).astype(np.int64) - LOWEST
    assert buckets.min() > 0 and buckets.max() < LAST and len(set(buckets)) == len(buckets), "a bucket holds one middle"
    assert not signed or np.array_equal(-middles[126::-1], middles[127:254]), "negative levels mirror positive ones"
    lowest = 127 if signed else 0  # the code of 0
    entries = lowest + np.searchsorted(buckets, np.arange(LAST + 1), side="left") << 17
    entries[buckets] += 0x1FFFF - (bits & 0xFFFF).astype(np.int64)
    return levels, entries.astype(np.int32)


def adamw_8bit(
    param: jax.Array, grad: jax.Array, mu: Moment8, nu: Moment8, scalars: jax.Array, seed: jax.Array,
    b1: float, b2: float, eps: float, decay: float, capability: int, tile: Tile = TILE,
) -> tuple[jax.Array, Moment8, Moment8]:  # fmt: skip
    """See `__init__`; seed: (1,) uint32. The arrays that come back take the place of those that came."""
    from jaxft.kernels.adamw_8bit import triton_kernels

    layers, blocks = mu.largest.shape
    written = (param, mu.codes, mu.largest, nu.codes, nu.largest)
    known = [jnp.asarray(table) for signed in (True, False) for table in tables(signed)]
    after, *moments = launch.triton_call(
        param, grad, *written[1:], scalars, seed, *known,
        kernel=triton_kernels.step, out_shape=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in written),
        input_output_aliases=((0, 0), (2, 1), (3, 2), (4, 3), (5, 4)), grid=(-(-blocks // tile.rows), layers),
        num_warps=tile.warps, num_stages=1, compute_capability=capability, name="adamw_8bit",
        **constants(param.size // layers, blocks, b1, b2, eps, decay, param.dtype == jnp.bfloat16, tile),
    )  # fmt: skip
    return after, Moment8(*moments[:2]), Moment8(*moments[2:])


def constants(
    size: int, blocks: int, b1: float, b2: float, eps: float, decay: float, rounded: bool, tile: Tile = TILE
) -> dict[str, int | float | bool]:
    """The kernel's compile-time arguments, in its order."""
    return dict(
        SIZE=size, BLOCKS=blocks, ROWS=tile.rows, BLOCK=BLOCK, LOWEST=LOWEST, LAST=LAST,
        b1=float(b1), b2=float(b2), eps=float(eps), decay=float(decay), ROUND=rounded,
    )  # fmt: skip
