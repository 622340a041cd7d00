"""A model as GGUF files: one pass over its weights, a few rows at a time, for all quantisations that are asked for."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import gguf
from jaxft.convert import hf
from jaxft.convert.ggml import TYPES, file_type, quantize, tensor_type
from jaxft.convert.gguf import config
from jaxft.convert.gguf.families import ARCHITECTURES, check_expressible, row_order
from jaxft.convert.gguf.tensors import RESIDUALS, more_norm, stored_rows
from jaxft.convert.gguf.vocabulary import Vocabulary
from jaxft.convert.merge import Source, has_tokenizer, merged_tensor, open_source
from jaxft.errors import InputError
from jaxft.load import adapter_tokenizer, find_directory, load_tokenizer
from jaxft.models import Model, describe_model, read_hf_config

Say = Callable[[str], None]


@dataclass(frozen=True)
class Origin:
    """What is exported: a model, an adapter merged into it or none, its tokenizer or none."""

    directory: Path
    adapter: Path | None
    source: Source
    tokenizer: Any

    @property
    def model(self) -> Model:
        return self.source.model


def open_origin(model: str, adapter: str | None) -> Origin:
    """Opens model, adapter and tokenizer; no weight is read. Raises InputError where one is missing or damaged."""
    directory = find_directory(model)
    described = describe_model(read_hf_config(directory))
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    if adapter is not None:
        found = find_directory(adapter)
        if tokenizer is not None:
            tokenizer, _ = adapter_tokenizer(found, described, tokenizer)
        return Origin(directory, found, open_source(directory, found), tokenizer)
    where = hf.open_model(directory, described.family.older, described.family.passed_over)
    stored, _ = hf.check_model(directory, where, described.family.names, described.shapes)
    return Origin(directory, None, Source(described, where, stored, {}, {}, {}), tokenizer)


def write_files(
    origin: Origin, files: dict[str, Path], vocabulary: Vocabulary | None, say: Say,
    importance: dict[str, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Writes one file a quantisation, each whole or not at all. files: quant -> path.

    Host memory stays below two chunks of `hf.CHUNK_BYTES` and their quantised bytes, or, where an adapter or 4-bit
    weights are merged, one tensor of the layers in float32 and its product. importance: GGUF tensor name -> a weight a
    column. Raises InputError for what GGUF or llama.cpp has no way to say; nothing is written then.
    """
    model = origin.model
    if model.config.model_type not in ARCHITECTURES:
        raise InputError(f"model_type {model.config.model_type!r} has no architecture of llama.cpp's here")
    kind = ARCHITECTURES[model.config.model_type]
    if origin.source.stored:
        say(f"{origin.directory} is quantised by bitsandbytes: its dequantised weights are written; those that it was "
            "made from would lose less")  # fmt: skip
    for text in check_expressible(model):
        say(f"warning: {text}")
    keys, extra, said = config.describe(model)
    for text in said:
        say(f"warning: {text}")
    if vocabulary is None:
        say("warning: the model has no tokenizer: the file will have none, and llama.cpp needs one to read text")
    elif vocabulary.space_prefix and not vocabulary.anywhere:
        say(
            "warning: llama.cpp puts a space before text that follows a special token, this tokenizer only at the start"
        )
    keys |= {} if vocabulary is None else vocabulary.metadata()
    names = stored_names(origin.source)
    if importance is not None:
        _check_importance(importance, names, origin.source.names(), say)
    vectors = {name: _vector(origin, name) for name, shape in origin.source.names().items() if len(shape) == 1}
    keys |= {RESIDUALS + names[name]: residual for name, (_, residual) in vectors.items() if residual is not None}
    writers = {
        quant: _Writer(path, kind.name, quant, origin, keys, importance is not None) for quant, path in files.items()
    }
    try:
        for writer in writers.values():
            writer.begin(names, extra)
        for array in extra.values():
            for writer in writers.values():
                writer.rows(array[None], "f32")
                writer.pad()
        for name in names:
            if name in vectors:
                for writer in writers.values():
                    writer.rows(vectors[name][0][None], "f32")
                    writer.pad()
                continue
            weights = None if importance is None else importance.get(names[name])
            for rows in _matrix(origin, name):
                for writer in writers.values():
                    writer.rows(rows, writer.types[name], weights)
            for writer in writers.values():
                writer.pad()
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.discard()


def _check_importance(
    importance: dict[str, np.ndarray], names: dict[str, str], shapes: dict[str, tuple[int, ...]], say: Say
) -> None:
    """Raises InputError for an importance matrix of another model; says for how many matrices there is none."""
    known = {stored: shapes[name] for name, stored in names.items() if len(shapes[name]) == 2}
    for stored, weights in importance.items():
        if stored in known and len(weights) != known[stored][1]:
            wide = f"{stored} is {len(weights)} columns wide there and {known[stored][1]} here"
            raise InputError(f"the importance matrix is another model's: {wide}")
    if not importance.keys() & known.keys():
        raise InputError(f"the importance matrix is another model's: it has no {next(iter(known))}")
    if extra := sorted(importance.keys() - known.keys()):
        say(f"the importance matrix has {len(extra)} matrices that this model has not, e.g. {extra[0]}")
    left = [stored for stored in known if stored not in importance and stored != "token_embd.weight"]
    if left:
        say(f"the importance matrix says nothing of {len(left)} of {len(known)} matrices, e.g. {left[0]}")


def stored_names(source: Source) -> dict[str, str]:
    """Hugging Face name -> GGUF's, of every tensor of the model."""
    table = {name.hf: name.gguf for name in source.model.family.names}
    found = {}
    for name in source.names():
        parts = name.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        row = name if layer is None else ".".join([*parts[:layer], "{i}", *parts[layer + 1 :]])
        found[name] = table[row].format(i=None if layer is None else parts[layer])
    return found


def _vector(origin: Origin, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A norm or bias as it is stored, in float32, and what `more_norm` says of it."""
    c, kind = origin.model.config, ARCHITECTURES[origin.model.config.model_type]
    values = merged_tensor(origin.source, name, np.dtype(np.float32))
    if kind.norm and "norm" in name:
        return more_norm(values, kind.norm)
    order = row_order(kind.interleaved, name, c.num_heads, c.num_kv_heads, c.head_dim)
    return (values if order is None else as_stored(values, *order)), None


def as_stored(rows: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Rows of whole heads in a file's order."""
    out = np.empty_like(rows)
    out[stored_rows(np.arange(len(rows)), heads, head_dim)] = rows
    return out


def _matrix(origin: Origin, name: str) -> Iterator[np.ndarray]:
    """A matrix a few rows at a time, whole heads where rows change places, as its file has it or summed in float32."""
    source, c = origin.source, origin.model.config
    kind = ARCHITECTURES[c.model_type]
    order = row_order(kind.interleaved, name, c.num_heads, c.num_kv_heads, c.head_dim)
    own = source.base_name(name)
    if own in source.stored or name in source.whole or name.removesuffix(".weight") in source.branches:
        whole = merged_tensor(source, name, np.dtype(np.float32))
        pieces: Iterator[np.ndarray] = (whole[at : at + _step(whole.shape, 1)] for at in _starts(whole.shape, order))
    else:
        view = source.base[own].get_slice(own)
        shape = tuple(view.get_shape())
        step = _step(shape, 1 if order is None else order[1])
        pieces = (view[at : min(at + step, shape[0])] for at in range(0, shape[0], step))
    for rows in pieces:
        yield rows if order is None else as_stored(np.asarray(rows), *order)


def _step(shape: tuple[int, ...], multiple: int) -> int:
    return max(1, hf.CHUNK_BYTES // (4 * shape[1]) // multiple) * multiple


def _starts(shape: tuple[int, ...], order: tuple[int, int] | None) -> range:
    return range(0, shape[0], _step(shape, 1 if order is None else order[1]))


class _Writer:
    """One file being written under a temporary name."""

    def __init__(
        self, path: Path, architecture: str, quant: str, origin: Origin, keys: dict[str, Any], importance: bool
    ):
        self.path, self.quant, self.origin, self.importance = path, quant, origin, importance
        self.temporary = path.with_name(f".{path.name}.partial")
        self.types: dict[str, str] = {}
        self.writer = gguf.GGUFWriter(self.temporary, architecture)
        self.writer.add_type("model")
        self.writer.add_name(origin.directory.resolve().name)
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.writer.add_file_type(file_type(quant))
        add_keys(self.writer, _sampling(origin.directory) | keys)

    def begin(self, names: dict[str, str], extra: dict[str, np.ndarray]) -> None:
        """Writes all that stands before the data."""
        for name, array in extra.items():
            self._add(name, array.shape, "f32")
        c, shapes = self.origin.model.config, self.origin.source.names()
        for name, stored in names.items():
            self.types[name] = tensor_type(
                self.quant, stored, shapes[name], layers=c.num_layers, group=c.num_heads // c.num_kv_heads,
                tied=c.tie_word_embeddings, importance=self.importance, architecture=self.writer.arch,
            )  # fmt: skip
            self._add(stored, shapes[name], self.types[name])
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        assert self.writer.fout is not None
        self.file = self.writer.fout[0]
        self.pad()

    def _add(self, name: str, shape: tuple[int, ...], type: str) -> None:
        kind = TYPES[type]
        if shape[-1] % kind.block:
            raise InputError(
                f"{name} is {shape[-1]} wide, which the {kind.block} values of a block of {type} do not fill"
            )
        size = int(np.prod(shape)) // kind.block * kind.bytes
        self.writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind.gguf)

    def rows(self, rows: np.ndarray, type: str, importance: np.ndarray | None = None) -> None:
        """Rows (R, C) of the tensor that is being written."""
        plain = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}.get(type)
        same = plain is not None and rows.dtype == plain
        data = np.ascontiguousarray(rows) if same else quantize(rows, type, importance)
        data.view(np.uint8).tofile(self.file)

    def pad(self) -> None:
        self.writer.write_padding(self.file, self.file.tell())

    def finish(self) -> None:
        self.writer.close()
        self.temporary.replace(self.path)

    def discard(self) -> None:
        self.writer.close()
        self.temporary.unlink(missing_ok=True)


def add_keys(writer: gguf.GGUFWriter, keys: dict[str, Any]) -> None:
    """Adds values under the types that llama.cpp reads: uint32, float32, bool, text, and lists of them."""
    kinds = gguf.GGUFValueType
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, np.ndarray):
            sub = kinds.UINT8 if value.dtype == np.uint8 else kinds.FLOAT32
            writer.add_key_value(key, value.tolist(), kinds.ARRAY, sub)
        else:
            writer.add_key_value(key, value, kinds.ARRAY, kinds.get_type(value[0]))


def _sampling(directory: Path) -> dict[str, Any]:
    """What generation_config.json recommends, as keys."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    written = json.loads(path.read_text(encoding="utf-8"))
    names = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    return {
        f"general.sampling.{short}": float(written[name]) if name != "top_k" else int(written[name])
        for name, short in names.items()
        if isinstance(written.get(name), int | float)
    }
