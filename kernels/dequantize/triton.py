"""NF4 read by our own Triton kernels (`triton_kernels.py`): what they serve, tile sizes, and their launches.

Triton and jax-triton are imported when a kernel is launched and not before.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.kernels import launch
from jaxft.kernels.dequantize.tables import NESTED_BLOCK, dynamic_map, nf4_levels
from jaxft.kernels.gpu import CARDS, check_installed

THREADS = 128
UNROLL = 4
DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_CAPABILITY = 75


ROWS = 16  # of x in a product: what a tensor core takes at least
PROGRAMS = 264  # two for each multiprocessor of an H200; a product with fewer tiles of rows is cut into parts
SMALLEST_PRODUCT_CAPABILITY = 80


@dataclass(frozen=True)
class Tile:
    """Rows of W and bytes of each that a program takes at a time (at most a block's), and how Triton compiles it."""

    rows: int
    bytes: int
    warps: int
    stages: int


# by card; compiled for all of them, not yet measured
TILES = {"large": Tile(64, 32, 4, 4), "small": Tile(64, 32, 4, 3)}


def check(n: int, dtype: jnp.dtype, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot serve."""
    if jnp.dtype(dtype).name not in DTYPES:
        raise NotImplementedError(f"dtype {jnp.dtype(dtype).name}: the kernel writes {', '.join(DTYPES)}")
    if n > 2**31 - 2**16:
        raise NotImplementedError(f"{n} values: the kernel counts in 32 bits")
    if capability < SMALLEST_CAPABILITY:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 7.5")
    check_installed()


def check_product(rows: int, dtype: jnp.dtype, shape: tuple[int, ...], block: int, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel of the product cannot serve."""
    if rows > ROWS:
        raise NotImplementedError(f"{rows} rows: the kernel takes up to {ROWS}")
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {jnp.dtype(dtype).name}: needs bfloat16 or float16")
    if shape[1] % block:
        raise NotImplementedError(f"{shape[1]} columns in blocks of {block}: needs rows of whole blocks")
    if math.prod(shape) > 2**31 - 2**16:
        raise NotImplementedError(f"{math.prod(shape)} values: the kernel counts in 32 bits")
    if capability < SMALLEST_PRODUCT_CAPABILITY:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 8.0 (tensor cores through Triton)")
    check_installed()


def tile_of(capability: int) -> Tile:
    """The tile of a product for a compute capability such as 89; an unknown one takes the smaller."""
    return TILES["large" if CARDS.get(capability) in ("hopper", "blackwell") else "small"]


def product_constants(
    shape: tuple[int, ...], block: int, double: bool, stacked: bool, tile: Tile
) -> tuple[dict[str, int | bool], int]:
    """The compile-time arguments of the product's kernel, in its order, and in how many parts it cuts the columns."""
    O, I = shape
    width = min(tile.bytes, block // 2)
    steps = I // 2 // width
    parts = min(steps, -(-PROGRAMS // -(-O // tile.rows)))
    each = -(-steps // parts)
    found = {"O": O, "I": I, "BLOCK": block, "NESTED": NESTED_BLOCK, "DOUBLE": double}
    return found | {"STACKED": stacked, "STEPS": each} | {"ROWS": ROWS, "BO": tile.rows, "BK": width}, -(-steps // each)


def _arrays(packed, scales, nested, offset, layer) -> tuple[jax.Array, ...]:
    """What both kernels read of a weight, in their order; an array that is not read is stood for by another."""
    second = (nested, offset.reshape(-1)) if nested is not None and offset is not None else (scales, scales)
    index = scales if layer is None else layer.reshape(1)
    return packed, scales, *second, index, jnp.asarray(nf4_levels()), jnp.asarray(dynamic_map())


def multiply_nf4(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    nested: jax.Array | None,
    offset: jax.Array | None,
    layer: jax.Array | None,
    shape: tuple[int, ...],
    block: int,
    capability: int,
    tile: Tile | None = None,
) -> jax.Array:
    """x Wᵀ for x (..., I) of at most `ROWS` rows: (..., O) in x's dtype; see `__init__`."""
    from jaxft.kernels.dequantize import triton_kernels

    O, I = shape
    lead = x.shape[:-1]
    rows = math.prod(lead)
    tile = tile or tile_of(capability)
    arguments, parts = product_constants(shape, block, nested is not None, layer is not None, tile)
    columns = jnp.pad(x.reshape(rows, I), ((0, ROWS - rows), (0, 0))).reshape(ROWS, I // 2, 2).transpose(2, 1, 0)
    out = launch.triton_call(
        columns, *_arrays(packed, scales, nested, offset, layer),
        kernel=triton_kernels.product, out_shape=jax.ShapeDtypeStruct((parts, O, ROWS), jnp.float32),
        name="multiply_nf4", grid=(-(-O // tile.rows), parts), num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=False, compute_capability=capability, **arguments,
    )  # fmt: skip
    return jnp.sum(out, axis=0)[:, :rows].T.astype(x.dtype).reshape(*lead, O)


def constants(n: int, block: int, double: bool, stacked: bool) -> dict[str, int | bool]:
    """The kernel's compile-time arguments, in its order."""
    return {
        "N": n, "BLOCK": block, "NESTED": NESTED_BLOCK, "DOUBLE": double, "STACKED": stacked, "UNROLL": UNROLL,
        "THREADS": THREADS,
    }  # fmt: skip


def dequantize_nf4(
    packed: jax.Array,
    scales: jax.Array,
    nested: jax.Array | None,
    offset: jax.Array | None,
    layer: jax.Array | None,
    shape: tuple[int, ...],
    block: int,
    dtype: jnp.dtype,
    capability: int,
) -> jax.Array:
    """level[code] · scale; see `__init__`. capability: compute capability of the device, 90 for 9.0."""

    from jaxft.kernels.dequantize import triton_kernels

    n = math.prod(shape)
    double = nested is not None and offset is not None
    out = launch.triton_call(
        *_arrays(packed, scales, nested, offset, layer),
        kernel=triton_kernels.nf4, out_shape=jax.ShapeDtypeStruct((n,), dtype), name="dequantize_nf4",
        grid=(-(-n // (UNROLL * THREADS * 8)),), num_warps=THREADS // 32, num_stages=1, enable_fp_fusion=False,
        compute_capability=capability, **constants(n, block, double, layer is not None),
    )  # fmt: skip
    return out.reshape(shape)
