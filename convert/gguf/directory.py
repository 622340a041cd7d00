"""A GGUF file as a model directory: config.json, tokenizer and a pointer to the file; so every command reads it."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from jaxft.convert.gguf import config, ropes
from jaxft.convert.gguf.pretokenizers import NFC
from jaxft.convert.gguf.read import Header, read_header
from jaxft.convert.gguf.tensors import open_tensors, read_plain
from jaxft.convert.gguf.tokenizer_in import write_tokenizer
from jaxft.convert.gguf.vocabulary import PREFIX, Vocabulary, from_metadata
from jaxft.errors import InputError

POINTER = "gguf.json"


def directory_of(file: Path) -> Path:
    """A directory, made once in a process and removed at its end, that stands for a GGUF file.

    Raises InputError where the file is damaged, or holds what is not read.
    """
    file = file.resolve()
    stat = file.stat()
    return _made(file, stat.st_size, stat.st_mtime_ns)


@cache
def _made(file: Path, size: int, changed: int) -> Path:
    header = read_header(file)
    place = Path(tempfile.mkdtemp(prefix="jaxft-gguf-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    directory = place / file.stem
    directory.mkdir()
    write_directory(header, directory)
    (directory / POINTER).write_text(json.dumps({"file": str(file)}), encoding="utf-8")
    return directory


def write_directory(header: Header, directory: Path) -> None:
    """config.json and the tokenizer's files."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{header.path} holds {kind!r}, not a model; name the model's file")
    parts = header.metadata.get("split.count", 0)
    if parts and int(parts) > 1:
        raise InputError(
            f"{header.path} is one of {parts} parts of a model; join them by llama.cpp's llama-gguf-split --merge"
        )
    extra = {name: read_plain(header.path, header.tensors[name]) for name in ropes.TENSORS if name in header.tensors}
    written = config.config_of(header, extra)
    written["dtype"] = _dtype(header)
    if f"{PREFIX}model" in header.metadata:
        vocabulary = read_vocabulary(header)
        write_tokenizer(vocabulary, directory, written["max_position_embeddings"])
        written |= {f"{name}_token_id": vocabulary.ids.get(name) for name in ("bos", "eos", "pad")}
    (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def read_vocabulary(header: Header) -> Vocabulary:
    try:
        return from_metadata(header.metadata, NFC)
    except InputError as error:
        raise InputError(f"{header.path}: {error}") from error


def _dtype(header: Header) -> str:
    """What most of the weights are: float16 or bfloat16 where they are so, else float32."""
    sizes: dict[str, int] = {}
    for info in header.tensors.values():
        sizes[info.type] = sizes.get(info.type, 0) + info.size
    most = max(sizes, key=lambda kind: sizes[kind]) if sizes else "f32"
    return {"f16": "float16", "bf16": "bfloat16"}.get(most, "float32")


def open_model(directory: Path, pointer: Path) -> dict[str, Any]:
    """Hugging Face name -> tensor of the file that a directory of `directory_of` stands for."""
    from jaxft.models import describe_model, read_hf_config

    header = read_header(Path(json.loads(pointer.read_text(encoding="utf-8"))["file"]))
    model = describe_model(read_hf_config(directory))
    c = model.config
    return open_tensors(header, model.family.names, c.num_heads, c.num_kv_heads, c.head_dim)
