"""Block formats of GGUF files: the unquantised ones and q8_0."""

from dataclasses import dataclass
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclass(frozen=True)
class GgmlType:
    """A type of tensor: rows are cut into blocks of `block` values, each `bytes` long."""

    name: str
    gguf: GGMLQuantizationType
    block: int
    bytes: int


TYPES = {
    name: GgmlType(name, GGMLQuantizationType[name.upper()], *GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]])
    for name in ("f32", "f16", "bf16", "q8_0")
}
QUANTS = tuple(TYPES)


def quantize(rows: Any, type: str, importance: Any = None) -> np.ndarray:
    return gguf.quantize(np.asarray(rows, np.float32), TYPES[type].gguf).view(np.uint8)


def dequantize(data: Any, type: str, columns: int) -> np.ndarray:
    kind = TYPES[type]
    rows = np.asarray(data, np.uint8).reshape(-1, columns // kind.block * kind.bytes)
    if type == "bf16":
        return rows.view(ml_dtypes.bfloat16).astype(np.float32)
    return gguf.dequantize(rows, kind.gguf).astype(np.float32, copy=False)


def tensor_type(quant: str, name: str, shape: tuple[int, ...], layers: int) -> str:
    if len(shape) == 1:
        return "f32"
    return "f16" if shape[-1] % TYPES[quant].block else quant


def file_type(quant: str) -> int:
    return int({"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[quant])
