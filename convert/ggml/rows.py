"""Rows of a weight into the bytes of a GGUF type and back, in pieces of bounded size, on the device there is."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxft.convert.ggml import legacy
from jaxft.convert.ggml.types import TYPES, GgmlType
from jaxft.errors import InputError

QUANTIZERS: dict[str, Callable[..., list[jax.Array]]] = {
    "q8_0": legacy.q8_0,
    "q4_0": functools.partial(legacy.symmetric, bits=4),
    "q5_0": functools.partial(legacy.symmetric, bits=5),
    "q4_1": functools.partial(legacy.offset, bits=4),
    "q5_1": functools.partial(legacy.offset, bits=5),
}
WEIGHTED: dict[str, Callable[..., list[jax.Array]]] = {}
PIECES = (2**14, 2**18, 2**22, 2**25)  # values in a piece: few sizes, so that few programs are compiled
LARGEST = {"cpu": 2**18}  # what stays in a CPU's cache; elsewhere the largest of all


def quantize(rows: Any, type: str, importance: Any = None) -> np.ndarray:
    """Rows (R, C) of floats, numpy's or JAX's, as the type's blocks: (R, bytes of a row) uint8.

    importance: (C,) float32, the columns' weights of an importance matrix, or None. Raises InputError for values that
    are not finite or beyond what float16 holds, and where C does not divide by the type's block.
    """
    kind = TYPES[type]
    count, columns = rows.shape
    out = np.empty((count, kind.row_bytes(columns)), np.uint8)
    if importance is not None:
        importance = _checked_importance(importance, columns)
    if kind.block == 1:
        _cast(rows, kind, out)
        return out
    largest = LARGEST.get(jax.default_backend(), PIECES[-1])
    step = max(1, min(count, largest // columns))
    blocks = columns // kind.block
    size = next((size for size in PIECES if size >= step * columns), step * columns) // kind.block
    weights = None if importance is None else _tiled(importance.reshape(blocks, kind.block), size)
    waiting: list[tuple[int, jax.Array, jax.Array]] = []
    for first, piece in _pieces(rows, step, size, kind.block):
        waiting.append((first, *_quantized(piece, weights, np.int32(0), kind.name, (step, blocks))))
        if len(waiting) > 1:  # one is computed while the one before it is fetched
            _fetch(out, step, kind, *waiting.pop(0))
    for left in waiting:
        _fetch(out, step, kind, *left)
    return out


def dequantize(data: Any, type: str, columns: int) -> np.ndarray:
    """Blocks, (R, bytes of a row) or flat uint8, as (R, columns) float32: the gguf package's own arithmetic."""
    kind = TYPES[type]
    rows = np.asarray(data, np.uint8).reshape(-1, kind.row_bytes(columns))
    if kind.name == "bf16":  # the package's own way is ten times slower
        return rows.view(ml_dtypes.bfloat16).astype(np.float32)
    return gguf.dequantize(rows, kind.gguf).astype(np.float32, copy=False)


def _pieces(rows: Any, step: int, size: int, block: int) -> Iterator[tuple[int, jax.Array]]:
    """`step` rows at a time as blocks, (size, block) in their own dtype, zeros after the last."""
    count = len(rows)
    on_device = isinstance(rows, jax.Array) and rows.devices() == {jax.devices()[0]} and jax.default_backend() != "cpu"
    whole = rows if on_device else np.asarray(rows)
    for first in range(0, count, step):
        if on_device and count >= step:
            start = min(first, count - step)  # the last piece goes back over some rows rather than being shorter
            yield start, _cut(whole, np.int32(start), step, size, block)
            continue
        piece = np.ascontiguousarray(whole[first : first + step]).reshape(-1, block)
        if len(piece) < size:
            piece = np.concatenate([piece, np.zeros((size - len(piece), block), piece.dtype)])
        yield first, jax.device_put(piece)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _cut(rows: jax.Array, first: jax.Array, step: int, size: int, block: int) -> jax.Array:
    piece = jax.lax.dynamic_slice_in_dim(rows, first, step).reshape(-1, block)
    return jnp.pad(piece, ((0, size - len(piece)), (0, 0)))


@functools.partial(jax.jit, static_argnums=1)
def _tiled(importance: jax.Array, size: int) -> jax.Array:
    """A row's weights (blocks, block) as those of `size` blocks of many rows: (block, size)."""
    return jnp.take(importance.T, jnp.arange(size) % len(importance), axis=1)


def _quantized(
    piece: jax.Array, weights: jax.Array | None, zero: Any, name: str, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    columns, largest = _columns(piece)
    if weights is None:
        return _program(columns, zero, name), largest
    return _weighted(columns, zero, weights, _row_energy(columns, *shape), name), largest


@jax.jit
def _columns(piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks (G, block) as (block, G) float32, and the largest |value|, NaN where there is one."""
    columns = piece.T.astype(jnp.float32)
    return columns, jnp.max(jnp.abs(columns))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _row_energy(columns: jax.Array, rows: int, blocks: int) -> jax.Array:
    """The mean of the squares of the row that a block lies in, (G,)."""
    squares = jnp.mean(columns * columns, axis=0)
    means = jnp.mean(squares[: rows * blocks].reshape(rows, blocks), axis=1)
    return jnp.pad(jnp.repeat(means, blocks), (0, columns.shape[1] - rows * blocks))


@functools.partial(jax.jit, static_argnums=2)
def _program(columns: jax.Array, zero: jax.Array, name: str) -> jax.Array:
    return jnp.concatenate(QUANTIZERS[name](columns, zero)).T


@functools.partial(jax.jit, static_argnums=4)
def _weighted(columns: jax.Array, zero: jax.Array, weights: jax.Array, energy: jax.Array, name: str) -> jax.Array:
    return jnp.concatenate(WEIGHTED[name](columns, zero, weights, energy)).T


def _fetch(out: np.ndarray, step: int, kind: GgmlType, first: int, blocks: jax.Array, largest: jax.Array) -> None:
    _check_range(float(largest), kind)
    target = out[first : first + step]
    target[:] = np.asarray(blocks)[: target.size // kind.bytes].reshape(target.shape)


def _cast(rows: Any, kind: GgmlType, out: np.ndarray) -> None:
    """f32, f16 and bf16, rounded to nearest even."""
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind.name]
    step = max(1, PIECES[-1] // rows.shape[1])
    for first in range(0, len(rows), step):
        piece = np.asarray(rows[first : first + step]).astype(np.float32, copy=False)
        _check_range(float(np.max(np.abs(piece))), kind)
        out[first : first + step] = piece.astype(dtype).view(np.uint8)


def _check_range(largest: float, kind: GgmlType) -> None:
    limit = np.inf if kind.name in ("f32", "bf16") else 65504.0
    if not math.isfinite(largest):
        raise InputError(f"{kind.name}: a value is not finite; weights with NaN or infinity cannot be written")
    if largest > limit:
        raise InputError(f"{kind.name}: a value of {largest:g} is beyond float16, in which its scales are held")


def _checked_importance(importance: Any, columns: int) -> np.ndarray:
    found = np.asarray(importance, np.float32)
    if found.shape != (columns,):
        raise InputError(f"importance has shape {found.shape}, rows are {columns} wide; it must be one number a column")
    if not np.all(np.isfinite(found) & (found >= 0)):
        raise InputError("importance has negative or non-finite numbers")
    return found
