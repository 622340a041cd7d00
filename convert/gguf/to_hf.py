"""A GGUF file as a Hugging Face model directory: its weights dequantised, one shard at a time."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.convert import hf
from jaxft.convert.gguf.write import Origin, Say, open_origin
from jaxft.convert.merge import merged_tensor, write_config
from jaxft.errors import InputError
from jaxft.load import copy_tokenizer


def write_directory(file: str, out: Path, dtype: str | None, say: Say) -> Origin:
    """Writes config.json, weights and tokenizer, whole or not at all.

    dtype: of every tensor; None keeps each tensor's own, which is float32 for a quantised one. Host memory stays below
    one shard and two chunks. Raises InputError for a file that is damaged or not read, and an `out` that holds
    something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; name a new directory")
    if not Path(file).expanduser().is_file():
        raise InputError(f"{file} is no file; name a GGUF file")
    origin = open_origin(file, None)
    source = origin.source
    names = source.names()
    dtypes = {name: np.dtype(jnp.dtype(dtype)) if dtype else source.dtype(name) for name in names}
    sizes = {name: int(np.prod(shape)) * dtypes[name].itemsize for name, shape in names.items()}
    largest = max(set(dtypes.values()), key=lambda one: sum(sizes[name] for name in names if dtypes[name] == one))
    quantised = [name for name in names if source.base[source.base_name(name)].info.type not in ("f32", "f16", "bf16")]
    if quantised:
        say(f"{len(quantised)} of {len(names)} tensors are quantised; they are written as {largest.name}")
    with hf.whole_directory(out) as temporary:
        hf.save_shards(temporary, sizes, lambda name: {name: merged_tensor(source, name, dtypes[name])})
        write_config(origin.directory, temporary, origin.model, largest.name, {})
        copy_tokenizer(origin.directory, temporary)
    return origin


def facts(out: Path) -> dict[str, Any]:
    """What was written, of its configuration."""
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return {"out": str(out), "model_type": written["model_type"], "dtype": written["dtype"]}
