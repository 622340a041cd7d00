"""An adapter merged into its model: W + s · B · A, written as a Hugging Face model directory, one shard at a time.

With DoRA every row of that sum is brought to its magnitude.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.convert import bnb, hf, peft
from jaxft.errors import InputError, RunError
from jaxft.files import is_hub_name
from jaxft.load import (
    adapter_tokenizer,
    base_changes,
    check_base,
    copy_tokenizer,
    find_directory,
    load_adapter,
    load_model,
    load_tokenizer,
)
from jaxft.lora import Branch, branches, with_lora
from jaxft.models import Model, describe_model, read_hf_config
from jaxft.models.extension import Changes, with_changes
from jaxft.quant import Quantized, dense, kind_of
from jaxft.stops import stop_token_ids
from jaxft.templates import write_template
from jaxft.trees import Tree, flatten, unflatten

DTYPES = ("float32", "bfloat16", "float16")
FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TEXT = "A train leaves at 9:40 and arrives at 12:15. 火车走了多久? Two hours and thirty-five minutes."  # of the check


@dataclass(frozen=True)
class Source:
    """The open files of a model and of an adapter for it.

    model: with the adapter's branches, vocabulary and head. whole: Hugging Face name -> tensor of the adapter that
    takes its place. stored: what the base holds quantised. base, adapter: name -> open file. branches: by module name.
    """

    model: Model
    base: dict[str, Any]
    stored: dict[str, Quantized]
    adapter: dict[str, Any]
    whole: dict[str, str]
    branches: dict[str, Branch]

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the merged model."""
        plain = {path: leaf for path, leaf in flatten(self.model.shapes) if "/lora/" not in path}
        return hf.expected_tensors(self.model.family.names, unflatten(plain))

    def base_name(self, name: str) -> str:
        """The base's tensor of that name; a head that was parted from the embedding is the embedding there."""
        return name if name in self.base else peft.savable_names(self.model.family.names)["embed_tokens/weight"]

    def dtype(self, name: str) -> np.dtype:
        """What the base holds a tensor in; a quantised one: what was quantised."""
        own = self.base_name(name)
        if own in self.stored:
            return np.dtype(self.stored[own].dtype)
        return np.dtype(jnp.dtype(FILE_DTYPES[self.base[own].get_slice(own).get_dtype()]))


def open_source(model_directory: Path, adapter_directory: Path) -> Source:
    """Raises InputError where model or adapter is missing, damaged or not for the other; no weight is read."""
    check_base(adapter_directory, model_directory)
    config, adapter = peft.read_adapter_config(adapter_directory), peft.open_adapter(adapter_directory)
    model = describe_model(with_changes(read_hf_config(model_directory), base_changes(adapter_directory)))
    if model.family.passed_over:
        parts = ", ".join(model.family.passed_over)
        raise InputError(
            f"{model_directory} has parts that are not loaded here ({parts}), and without them a merged model would be "
            "another one; merge with PEFT's merge_and_unload"
        )
    base = hf.open_model(model_directory, model.family.older)
    stored, _ = hf.check_model(model_directory, base, model.family.names, model.shapes)
    model, _, beside = peft.saved_vocabulary(adapter_directory, adapter, model, config)
    model = with_lora(model, config)
    peft.check_tensors(adapter_directory, adapter, model, beside)
    names = peft.savable_names(model.family.names)
    whole = {names[path]: tensor for path, tensor in peft.whole_tensors(adapter, model.family.names).items()}
    return Source(model, base, stored, adapter, whole, branches(model))


def merged_tensor(source: Source, name: str, dtype: np.dtype) -> np.ndarray:
    """One tensor of the merged model in `dtype`, summed in float32 and rounded once.

    Raises InputError where dtype cannot hold a value.
    """
    if name in source.whole:
        return _cast(peft.read_tensor(source.adapter, source.whole[name]), dtype, name)
    own, module = source.base_name(name), name.removesuffix(".weight")
    branch = source.branches.get(module)
    magnitude = None
    if branch is not None:
        a, b, magnitude = peft.read_branch(source.adapter, module)

    def add(rows: np.ndarray, start: int) -> np.ndarray:
        if branch is None:
            return rows if rows.dtype == dtype else _cast(rows, dtype, name)
        total = b[start : start + len(rows)] @ a
        total *= np.float32(branch.scale)  # in place: a chunk is large
        total += rows.astype(np.float32)
        if magnitude is not None:
            norms, wanted = np.linalg.norm(total, axis=1), magnitude[start : start + len(rows)]
            factors = np.divide(wanted, norms, out=np.ones_like(norms), where=(wanted != 0) & (norms > 0))
            total *= factors[:, None]
        return _cast(total, dtype, name)

    if own in source.stored:
        leaf = jax.tree.map(jnp.asarray, bnb.read_leaf(source.base, own, source.stored[own]))
        return add(np.asarray(dense(leaf, jnp.float32)), 0)
    out = np.empty(peft.shape_of(source.base, own), dtype)
    for start, rows in hf.chunks(source.base[own], own):
        out[start : start + len(rows)] = add(rows, start)
    return out


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise InputError(f"{name}: float16 cannot hold its values; choose --dtype bfloat16 or float32")
    return cast


def merge(model: str, adapter: str, out: Path, dtype: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the merged model to `out`, whole or not at all; returns what was merged.

    dtype: of every tensor; None keeps each tensor's own. Host memory stays below one shard and four chunks (of
    `hf.SHARD_BYTES`, or one tensor if that is larger, and `hf.CHUNK_BYTES`); a quantised weight is one chunk. Raises
    InputError for input that does not fit and for an `out` that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; name a new directory")
    directory, adapter_directory = find_directory(model), find_directory(adapter)
    source = open_source(directory, adapter_directory)
    if source.stored:
        kinds = " and ".join(sorted({kind_of(leaf) for leaf in source.stored.values()}))
        say(f"{directory} is quantised ({kinds}): merging onto its dequantised weights; the weights that it was made "
            "from would lose less")  # fmt: skip
    new_tokens: tuple[str, ...] = ()
    tokenizer, own_template = None, None
    if has_tokenizer(directory):
        base, tokenizer = describe_model(read_hf_config(directory)), load_tokenizer(directory)
        own_template = tokenizer.chat_template
        tokenizer, new_tokens = adapter_tokenizer(adapter_directory, base, tokenizer)
    names = source.names()
    dtypes = {name: np.dtype(jnp.dtype(dtype)) if dtype else source.dtype(name) for name in names}
    sizes = {name: int(np.prod(shape)) * dtypes[name].itemsize for name, shape in names.items()}
    largest = max(set(dtypes.values()), key=lambda one: sum(sizes[name] for name in names if dtypes[name] == one))
    with hf.whole_directory(out) as temporary:
        hf.save_shards(temporary, sizes, lambda name: {name: merged_tensor(source, name, dtypes[name])})
        write_config(directory, temporary, source.model, largest.name, base_changes(adapter_directory))
        copy_tokenizer(directory, temporary)
        if tokenizer is not None and new_tokens:
            tokenizer.save_pretrained(temporary)
        if tokenizer is not None and tokenizer.chat_template != own_template:
            write_template(temporary, tokenizer, stop_token_ids(tokenizer, temporary))
        (temporary / "README.md").write_text(_card(model, adapter), encoding="utf-8")
    return {
        "out": str(out),
        "dtype": largest.name,
        "merged": len(source.branches),
        "replaced": len(source.whole),
    }


def write_config(source: Path, target: Path, model: Model, dtype: str, changes: Changes) -> None:
    """config.json of the base with what merging changes: dtype, tokens, head, a longer rope, no quantisation."""
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    written.pop("quantization_config", None)
    written.pop("torch_dtype", None)  # the older name
    changed = {"vocab_size": model.config.vocab_size, "tie_word_embeddings": model.config.tie_word_embeddings}
    written |= {"dtype": dtype} | {name: value for name, value in changed.items() if name in written}
    if changes:
        written.pop("rope_scaling", None)  # the older names
        written.pop("rope_theta", None)
    written |= changed | changes
    (target / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _card(model: str, adapter: str) -> str:
    base = f"base_model: {json.dumps(model)}\n" if is_hub_name(model) else ""  # else the hub would refuse the card
    front = f'---\n{base}library_name: transformers\ntags: ["jaxft"]\n---\n'
    return (
        f"{front}\n# {Path(model).name}, merged with {Path(adapter).name}\n\nThe LoRA adapter `{adapter}` added into "
        f"`{model}` by `python -m jaxft.convert merge`.\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")\n```\n'
    )


def compare(model: str, adapter: str, out: Path) -> dict[str, float]:
    """The largest difference between the logits of adapter on model and of `out`, read back, on a fixed text.

    Weights are held as the files hold them and computed with in float32.
    """
    vocabulary = describe_model(read_hf_config(out)).config.vocab_size
    if has_tokenizer(out):
        tokens = load_tokenizer(out).encode(TEXT)
    else:
        tokens = [token * 7919 % vocabulary for token in range(32)]
    expected = _logits(find_directory(model), adapter, tokens)
    found = _logits(out, None, tokens)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise RunError(f"{out} is written, but its logits or those of the adapter on the model are not finite")
    return {
        "largest_logit_difference": float(np.abs(found - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
    }


def _logits(directory: Path, adapter: str | None, tokens: list[int]) -> np.ndarray:
    described = describe_model(read_hf_config(directory))
    where = hf.open_model(directory, described.family.older)
    stored, names = hf.check_model(directory, where, described.family.names, described.shapes)
    held = {where[name].get_slice(name).get_dtype() for name in names if name not in stored}
    model, params = load_model(
        directory, dtype=jnp.dtype(FILE_DTYPES[held.pop()] if len(held) == 1 else "float32"),
        changes=None if adapter is None else base_changes(adapter),
    )  # fmt: skip
    trees: tuple[Tree, ...] = (params,)
    if adapter is not None:
        model, *found, _ = load_adapter(adapter, model, params)
        trees = tuple(found)

    @jax.jit
    def run(trees: tuple[Tree, ...], tokens: jax.Array) -> jax.Array:
        decoder = model.bind(*trees)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return decoder.logits(decoder(tokens, jnp.ones_like(tokens), positions, dtype=jnp.dtype("float32")))

    return np.asarray(run(trees, jnp.asarray([tokens], jnp.int32)))
