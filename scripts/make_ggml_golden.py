"""Writes tests/data/ggml_golden.json: the errors of llama.cpp's own quantisers and the mixtures of its own files.

    pip install llama-cpp-python==0.3.36      # builds llama.cpp, some minutes
    PYTHONPATH=. python scripts/make_ggml_golden.py .../site-packages/llama_cpp/lib

Errors are of the tensors of tests/ggml_cases.py, with and without importances. Mixtures are read off files that
llama.cpp's quantiser writes of models of `MODELS`' shapes: `llama_model_quantize` on a GGUF file with a few rows each.
"""

import ctypes
import json
import sys
import tempfile
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import gguf
import numpy as np

from jaxft.convert.ggml import QUANTS, TYPES, file_type
from tests.ggml_cases import MODELS, SIZES, TENSORS, column_weights, errors, model_tensors, runs, tensor

TARGET = Path(__file__).parents[1] / "tests" / "data" / "ggml_golden.json"


class Library:
    """libggml-base's quantisers, one thread."""

    def __init__(self, path: str | Path):
        self.chunk = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self.chunk.restype = c_size_t
        self.chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]

    def quantize(self, rows: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
        kind = TYPES[name]
        out = np.zeros((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        self.chunk(int(kind.gguf), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
        return out


class Importance(Structure):
    _fields_ = (("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t))


class Parameters(Structure):
    """llama_model_quantize_params of llama.cpp as llama-cpp-python 0.3.36 builds it."""

    _fields_ = (
        ("threads", c_int32), ("file_type", c_int), ("output_type", c_int), ("embedding_type", c_int),
        ("allow_requantize", c_bool), ("quantize_output", c_bool), ("only_copy", c_bool), ("pure", c_bool),
        ("keep_split", c_bool), ("dry_run", c_bool), ("importance", POINTER(Importance)), ("overrides", c_void_p),
        ("types", c_void_p), ("prune", c_void_p), ("buffer", c_size_t),
    )  # fmt: skip


def write_model(path: Path, model: tuple) -> None:
    architecture, layers, group, width, wide, _, _ = model
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(8)
    writer.add_head_count_kv(8 // group)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 8)
    writer.add_vocab_size(2)
    writer.add_file_type(0)
    random = np.random.default_rng(0)
    for name, shape in model_tensors(model).items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mixture(library: ctypes.CDLL, quant: str, source: Path, model: tuple) -> dict[str, str]:
    parameters: Parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = 1, int(file_type(quant))
    weights = {name: np.ones(shape[-1], np.float32) for name, shape in model_tensors(model).items() if len(shape) == 2}
    if model[-1]:
        entries = [Importance(k.encode(), v.ctypes.data_as(POINTER(c_float)), v.size) for k, v in weights.items()]
        parameters.importance = (Importance * (len(entries) + 1))(*entries, Importance(None, None, 0))
    target = source.with_suffix(".out.gguf")
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {quant}")
    found = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(target).tensors}
    return {name: found[name] for name in model_tensors(model)}


def main(directory: str) -> None:
    base = Library(Path(directory) / "libggml-base.so")
    rmse: dict = {}
    for name in (name for name in TYPES if TYPES[name].block > 1):
        for size in SIZES:
            for which in TENSORS:
                for weights in (None, column_weights()):
                    rows = tensor(which, size)
                    written = base.quantize(rows, name, weights)
                    found = gguf.dequantize(written, TYPES[name].gguf)
                    label = "plain" if weights is None else "weighted"
                    rmse.setdefault(name, {}).setdefault(size, {}).setdefault(which, {})[label] = float(
                        f"{errors(rows, found, weights):.6g}"
                    )
    ctypes.CDLL(str(Path(directory) / "libggml.so"), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(Path(directory) / "libllama.so"))
    library.llama_model_quantize_default_params.restype = Parameters
    quiet = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
    library.llama_log_set(quiet, None)
    mixtures: dict = {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.gguf"
            write_model(source, model)
            mixtures[name] = {quant: runs(mixture(library, quant, source, model)) for quant in QUANTS}
    TARGET.write_text(json.dumps({"rmse": rmse, "mixtures": mixtures}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rmse)} types and {len(mixtures)} models written to {TARGET}")


if __name__ == "__main__":
    main(*sys.argv[1:])
