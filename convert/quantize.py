"""A model directory written again in 4 or 8 bits, one tensor at a time, as bitsandbytes and transformers load it."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.convert import bnb, hf
from jaxft.errors import InputError
from jaxft.load import as_written, copy_tokenizer, find_directory, write_config
from jaxft.models import Model, describe_model, read_hf_config
from jaxft.models.quantized import all_linears
from jaxft.quant import NF4, Quantized, is_quantized

KINDS = {4: "nf4", 8: "int8"}
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Source:
    """The open files of a model that is not quantised, and how it will be written.

    model: as it is written. where: name -> open file. names: the name of each written tensor in the source. linears:
    what may be quantised, as the leaf that it becomes. shapes: of every written tensor. dtype: of the rest.
    """

    directory: Path
    model: Model
    where: dict[str, Any]
    names: dict[str, str]
    linears: dict[str, Quantized]
    shapes: dict[str, tuple[int, ...]]
    dtype: jnp.dtype

    def matrix(self, name: str) -> jax.Array:
        """A matrix on the device, in the dtype of its file."""
        return hf.read_matrix(self.where, self.names[name])

    def size(self, name: str, quantized: bool) -> int:
        """Bytes of one tensor in a file; of a quantised one with everything that stands beside it."""
        if not quantized:
            return int(np.prod(self.shapes[name])) * self.dtype.itemsize
        leaf = self.linears[name]
        # NF4's offset, a scalar, stands in the text of its state
        arrays = sum(array.size * np.dtype(array.dtype).itemsize for array in jax.tree.leaves(leaf) if array.ndim)
        return arrays + (bnb.BOOKS if isinstance(leaf, NF4) else 1)

    def total(self, kept: Collection[str]) -> int:
        """Bytes of all tensors where the linear layers `kept` are in `dtype` and the others quantised."""
        return sum(self.size(name, name in self.linears and name not in kept) for name in self.shapes)


def open_source(name: str, bits: int, dtype: str | None) -> Source:
    """Raises InputError where the model is missing, damaged or quantised already; no weight is read."""
    directory = find_directory(name)
    model = describe_model(read_hf_config(directory))
    where = hf.open_model(directory, model.family.older, model.family.passed_over)
    stored, _ = hf.check_model(directory, where, model.family.names, model.shapes)
    if stored:
        raise InputError(f"{directory} is quantised already; name the model in 16 or 32 bits that it was made from")
    there = {place: hf_name for hf_name, place in hf.places(model.family.names, model.shapes).items()}
    written = as_written(model)
    names = {new: there[place] for new, place in hf.places(written.family.names, model.shapes).items()}
    if dtype is None:
        held = {where[hf_name].get_slice(hf_name).get_dtype() for hf_name in names.values()}
        dtype = "float16" if held == {"F16"} else "bfloat16"
    linears = all_linears(written, KINDS[bits], dtype)
    shapes = hf.expected_tensors(written.family.names, model.shapes)
    return Source(directory, written, where, names, linears, shapes, jnp.dtype(dtype))


def quantize(source: Source, out: Path, kept: Collection[str], say: Callable[[str], None]) -> None:
    """Writes the model into `out`, a directory that exists, with all linear layers but `kept` quantised.

    On the device are one tensor and what it becomes; on the host one shard (`hf.SHARD_BYTES`, or one tensor if that is
    larger) and one chunk (`hf.CHUNK_BYTES`).
    """
    leaves: dict[str, Any] = {
        name: source.linears[name] if name in source.linears and name not in kept else shape
        for name, shape in source.shapes.items()
    }
    if not any(map(is_quantized, leaves.values())):
        raise InputError(
            f"{source.directory}: all linear layers fit the budget in 16 bits; nothing is left to quantise"
        )
    done = 0

    def read(name: str) -> dict[str, np.ndarray]:
        nonlocal done
        done += 1
        if done % 100 == 0:
            say(f"{done} of {len(leaves)} tensors")
        leaf = leaves[name]
        if is_quantized(leaf):
            return bnb.leaf_tensors(name, hf.load_leaf(source.where, source.names[name], leaf, None))
        return {name: _cast(source, name)}

    hf.save_shards(out, {name: source.size(name, is_quantized(leaf)) for name, leaf in leaves.items()}, read)
    write_config(out, source.model, source.dtype, leaves)
    copy_tokenizer(source.directory, out)


def _cast(source: Source, name: str) -> np.ndarray:
    """A tensor in the dtype that is written. Raises InputError where that cannot hold a value."""
    whole = np.empty(source.shapes[name], source.dtype)
    for start, rows in hf.chunks(source.where[source.names[name]], source.names[name]):
        with np.errstate(over="ignore"):
            whole[start : start + len(rows)] = rows.astype(source.dtype)
    if source.dtype == np.float16 and not np.isfinite(whole).all():
        raise InputError(f"{name}: float16 cannot hold its values; choose --dtype bfloat16")
    return whole


def write_card(out: Path, name: str, source: Source, kept: Collection[str]) -> None:
    """README.md: what was made of what, and how it is loaded."""
    first = next(iter(source.linears.values()))
    how = "4 bits (NF4 with double quantisation)" if isinstance(first, NF4) else "8 bits (LLM.int8())"
    some = f", {len(kept)} of {len(source.linears)} linear layers in {source.dtype.name} (`quantization.md`)"
    front = f'---\nbase_model: {json.dumps(name)}\nlibrary_name: transformers\ntags: ["jaxft", "bitsandbytes"]\n---\n'
    text = (
        f"{front}\n# {Path(name).name} in {how}\n\nWritten by `python -m jaxft.convert quantize`"
        f"{some if kept else ''}. It loads where bitsandbytes is installed:\n\n```python\nfrom transformers import "
        'AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")\n```\n'
    )
    (out / "README.md").write_text(text, encoding="utf-8")
