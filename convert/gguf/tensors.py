"""The tensors of a GGUF file under Hugging Face's names, dequantised and put back in order while they are read."""

from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.convert.ggml import TYPES, dequantize
from jaxft.convert.gguf.families import ARCHITECTURES, MODEL_TYPES, row_order
from jaxft.convert.gguf.read import Header, TensorInfo
from jaxft.convert.gguf.ropes import TENSORS as ROPE_TENSORS
from jaxft.convert.table import Name
from jaxft.errors import InputError

RESIDUALS = "jaxft.norm_residuals."  # + a tensor's name: what float32 rounding took off 1 + weight
PLAIN = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
FILE_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
HALF_FILES = {1: "f16", 32: "bf16"}  # general.file_type of files whose matrices are of 16 bits


class GgufTensor:
    """One tensor, read as safetensors' open files are: `get_slice(name)`, rows by slices, `get_tensor(name)`."""

    def __init__(self, header: Header, name: str, info: TensorInfo, norm: float, order: tuple[int, int] | None):
        self.header, self.name, self.info, self.norm, self.order = header, name, info, norm, order

    def get_slice(self, _: str) -> "GgufTensor":
        return self

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return FILE_DTYPES[self.dtype]

    @cached_property
    def dtype(self) -> str:
        """f32, f16 or bf16: what the values are given in. A vector that 16 bits hold is given as the matrices."""
        if self.info.type in PLAIN and not (self.info.type == "f32" and len(self.info.shape) == 1):
            return self.info.type
        half = HALF_FILES.get(self.header.metadata.get("general.file_type", -1))
        if self.info.type != "f32" or half is None:
            return "f32"
        values = self._vector()
        with np.errstate(over="ignore"):
            return half if np.array_equal(values.astype(PLAIN[half]).astype(np.float32), values) else "f32"

    def get_tensor(self, _: str) -> np.ndarray:
        if len(self.info.shape) == 1:
            return self._vector().astype(PLAIN[self.dtype])
        return self[0 : self.info.shape[0]]

    def __getitem__(self, rows: slice) -> np.ndarray:
        if len(self.info.shape) != 2:
            return self.get_tensor(self.name)[rows]
        start, stop, _ = rows.indices(self.info.shape[0])
        wanted = slice(start, stop) if self.order is None else stored_rows(np.arange(start, stop), *self.order)
        return self._read(wanted)

    def _read(self, wanted: Any) -> np.ndarray:
        kind, (rows, columns) = TYPES[self.info.type], self.info.shape
        data = np.memmap(self.header.path, np.uint8, "r", self.info.offset, (rows, self.info.size // rows))
        part = np.ascontiguousarray(data[wanted])
        if kind.name in PLAIN:
            return part.view(PLAIN[kind.name])
        return dequantize(part, kind.name, columns)

    def _vector(self) -> np.ndarray:
        """A vector as float32, in Hugging Face's order and without what norms are stored more."""
        info = self.info
        data = np.memmap(self.header.path, np.uint8, "r", info.offset, (info.size,))
        if info.type in PLAIN:
            values = np.array(data).view(PLAIN[info.type]).astype(np.float32)
        else:
            values = dequantize(np.array(data)[None], info.type, info.shape[0])[0]
        if self.norm:
            values = less_norm(values, self.norm, self.header.metadata.get(RESIDUALS + self.name))
        if self.order is not None:
            values = values[stored_rows(np.arange(len(values)), *self.order)]
        return values


def stored_rows(rows: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Where in a file the rows of q or k lie that Hugging Face has at `rows`: h and h + H/2 are neighbours there."""
    head, h = np.divmod(rows, head_dim)
    half, place = np.divmod(h, head_dim // 2)
    return head * head_dim + 2 * place + half


def more_norm(values: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray | None]:
    """(norm + values as float32, what that rounding took off or None where it took nothing)."""
    exact = values.astype(np.float64)
    stored = (exact + norm).astype(np.float32)
    residual = (exact - (stored.astype(np.float64) - norm)).astype(np.float32)
    return stored, residual if residual.any() else None


def less_norm(stored: np.ndarray, norm: float, residual: Any) -> np.ndarray:
    """What `more_norm` was given, as float32."""
    values = stored.astype(np.float64) - norm
    if residual is not None and np.shape(residual) == np.shape(stored):
        values = values + np.asarray(residual, np.float64)
    return values.astype(np.float32)


def open_tensors(header: Header, names: tuple[Name, ...], heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Hugging Face name -> tensor, for all of a file but the ropes'. Raises InputError for one that no table knows."""
    kind = ARCHITECTURES[MODEL_TYPES[header.metadata["general.architecture"]]]
    table = {name.gguf: name.hf for name in names}
    found = {}
    for stored, info in header.tensors.items():
        if stored in ROPE_TENSORS:
            continue
        parts = stored.split(".")
        layer = parts[1] if parts[0] == "blk" and len(parts) > 2 else None
        row = stored if layer is None else ".".join(["blk", "{i}", *parts[2:]])
        if row not in table:
            raise InputError(f"{header.path}: the tensor {stored} belongs to no part of this model")
        name = table[row].format(i=layer)
        norm = kind.norm if "norm" in stored else 0.0
        found[name] = GgufTensor(
            header, stored, info, norm, row_order(kind.interleaved, name, heads, kv_heads, head_dim)
        )
    return found


def read_plain(path: Path, info: TensorInfo) -> np.ndarray:
    """A small tensor whole, as float32."""
    data = np.array(np.memmap(path, np.uint8, "r", info.offset, (info.size,)))
    return dequantize(data[None], info.type, int(np.prod(info.shape))).reshape(info.shape)
