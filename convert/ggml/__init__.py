"""Block formats of GGUF files: quantisers that run on CPU and GPU, dequantisation, llama.cpp's mixtures of types."""

from jaxft.convert.ggml.mixture import QUANTS, file_type, tensor_type
from jaxft.convert.ggml.rows import dequantize, quantize
from jaxft.convert.ggml.types import TYPES, GgmlType

__all__ = ["QUANTS", "TYPES", "GgmlType", "dequantize", "file_type", "quantize", "tensor_type"]
