"""NF4 read by our own Triton kernels (`triton_kernels.py`): what they serve, tile sizes, and their launches.

Triton and jax-triton are imported when a kernel is launched and not before.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.kernels import launch
from jaxft.kernels.dequantize.tables import NESTED_BLOCK, dynamic_map, nf4_levels
from jaxft.kernels.dequantize.weights import Held
from jaxft.kernels.gpu import check_installed

THREADS = 128
UNROLL = 4
MOST = 3  # weights of a launch
DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_CAPABILITY = 75


ROWS = 16  # of x in a product: of more, the dense weight and tensor cores take less time
ROWS_AT_A_TIME = 8  # that a program holds sums of
PROGRAMS = 1056  # eight for each multiprocessor of an H200; a product with fewer tiles of rows is cut into parts
GROUP = 32  # columns: the widest that a thread takes of a row
SMALLEST_PRODUCT_CAPABILITY = 80


@dataclass(frozen=True)
class Tile:
    """Rows of W and groups of each that a program takes at a time, 4-byte words (8 columns) a group, and its warps."""

    rows: int
    groups: int
    words: int
    warps: int


# by the rows of x that a program holds: without spilling on all cards; of few, the fastest of a sweep on an H200
FEW, MORE = Tile(64, 8, 4, 4), Tile(32, 16, 2, 4)


def check(n: int, dtype: jnp.dtype, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot serve."""
    if jnp.dtype(dtype).name not in DTYPES:
        raise NotImplementedError(f"dtype {jnp.dtype(dtype).name}: the kernel writes {', '.join(DTYPES)}")
    if n > 2**31 - 2**16:
        raise NotImplementedError(f"{n} values: the kernel counts in 32 bits")
    if capability < SMALLEST_CAPABILITY:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 7.5")
    check_installed()


def check_product(rows: int, dtype: jnp.dtype, shape: tuple[int, ...], capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel of the product cannot serve."""
    if rows > ROWS:
        raise NotImplementedError(f"{rows} rows: the kernel takes up to {ROWS}")
    if jnp.dtype(dtype).name not in DTYPES:
        raise NotImplementedError(f"dtype {jnp.dtype(dtype).name}: the kernel reads {', '.join(DTYPES)}")
    if shape[1] % GROUP:
        raise NotImplementedError(f"{shape[1]} columns: needs a multiple of {GROUP}")
    if math.prod(shape) > 2**31 - 2**16:
        raise NotImplementedError(f"{math.prod(shape)} values: the kernel counts in 32 bits")
    if capability < SMALLEST_PRODUCT_CAPABILITY:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 8.0 (bfloat16)")
    check_installed()


def at_a_time(rows: int) -> int:
    """The rows of x that a program of a product takes: all, or about half of them."""
    return -(-rows // -(-rows // ROWS_AT_A_TIME))


def tile_of(rows: int) -> Tile:
    """The tile of a product with so many rows of x."""
    return FEW if at_a_time(rows) <= 2 else MORE


def product_constants(
    rows: int, shape: tuple[int, ...], block: int, double: bool, stacked: bool, tile: Tile, programs: int = PROGRAMS
) -> tuple[dict[str, int | bool], tuple[int, int, int]]:
    """The compile-time arguments of the product's kernel, in its order, and its grid."""
    O, I = shape
    held = at_a_time(rows)
    tiles, steps = -(-O // tile.rows), -(-I // (8 * tile.words * tile.groups))
    each = -(-steps // min(steps, -(-programs // tiles)))
    found = {"O": O, "I": I, "BLOCK": block, "NESTED": NESTED_BLOCK, "DOUBLE": double, "STACKED": stacked, "M": rows}
    sizes = {"ROWS": held, "STEPS": each, "BO": tile.rows, "BG": tile.groups, "WORDS": tile.words}
    return found | sizes, (tiles, -(-steps // each), -(-rows // held))


def _arrays(weight: Held) -> tuple[jax.Array, ...]:
    """What both kernels read of a weight, in their order; an array that is not read is stood for by another."""
    packed, scales, nested, offset, layer, _ = weight
    second = (nested, offset.reshape(-1)) if nested is not None and offset is not None else (scales, scales)
    return packed, scales, *second, scales if layer is None else layer.reshape(1)


def _tables() -> tuple[jax.Array, jax.Array]:
    """What they read beside it."""
    return jnp.asarray(nf4_levels()), jnp.asarray(dynamic_map())


def multiply_nf4(
    x: jax.Array, weight: Held, block: int, capability: int, tile: Tile | None = None, programs: int = PROGRAMS,
    dtype: jnp.dtype | None = None,
) -> jax.Array:  # fmt: skip
    """x Wᵀ for x (..., I) of at most `ROWS` rows: (..., O) in `dtype`, x's own where None; see `__init__`.

    programs: about how many the kernel is cut into at least.
    """
    from jaxft.kernels.dequantize import triton_kernels

    O, I = weight.shape
    lead = x.shape[:-1]
    rows = math.prod(lead)
    tile = tile or tile_of(rows)
    double, stacked = weight.nested is not None, weight.layer is not None
    arguments, grid = product_constants(rows, weight.shape, block, double, stacked, tile, programs)
    dtype = dtype or x.dtype
    out = launch.triton_call(
        x.reshape(rows, I), *_arrays(weight), *_tables(), kernel=triton_kernels.product, name="multiply_nf4", grid=grid,
        out_shape=jax.ShapeDtypeStruct((grid[1], rows, O), dtype if grid[1] == 1 else jnp.float32),
        num_warps=tile.warps, num_stages=1, enable_fp_fusion=False, compute_capability=capability, **arguments,
    )  # fmt: skip
    total = out[0] if grid[1] == 1 else jnp.sum(out, axis=0).astype(dtype)
    return total.reshape(*lead, O)


def dequantize_nf4(
    weights: Sequence[Held], after: jax.Array | None, block: int, dtype: jnp.dtype, capability: int
) -> list[jax.Array]:
    """level[code] · scale of each weight, `MOST` of them a launch; see `__init__`. capability: compute capability of
    the device, 90 for 9.0.

    The kernel is handed `after` and does not read it: XLA drops a barrier's operand that nothing reads, and with it the
    order.
    """
    groups = [weights[first : first + MOST] for first in range(0, len(weights), MOST)]
    return [one for group in groups for one in _dequantize_nf4(group, after, block, dtype, capability)]


def _dequantize_nf4(weights, after, block, dtype, capability) -> list[jax.Array]:
    from jaxft.kernels.dequantize import triton_kernels

    count = len(weights)
    sizes = tuple(math.prod(weight.shape) for weight in weights)
    tiles = tuple(itertools.accumulate((-(-n // (UNROLL * THREADS * 8)) for n in sizes), initial=0))
    every = [_arrays(weight) for weight in launch.filled(weights, MOST)]
    no_outputs = {f"out{i}": None for i in range(count, MOST)}
    found = launch.triton_call(
        *itertools.chain(*zip(*every, strict=True)), *_tables(), weights[0].scales if after is None else after,
        kernel=triton_kernels.nf4, out_shape=[jax.ShapeDtypeStruct((n,), dtype) for n in sizes], name="dequantize_nf4",
        grid=(tiles[-1],), num_warps=THREADS // 32, num_stages=1, enable_fp_fusion=False, compute_capability=capability,
        COUNT=count, N=sizes, TILE=tiles, STACKED=tuple(weight.layer is not None for weight in weights), BLOCK=block,
        NESTED=NESTED_BLOCK, DOUBLE=weights[0].nested is not None, UNROLL=UNROLL, THREADS=THREADS, **no_outputs,
    )  # fmt: skip
    return [out.reshape(weight.shape) for out, weight in zip(found, weights, strict=True)]
