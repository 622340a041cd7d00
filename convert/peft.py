"""PEFT's LoRA adapters: adapter_config.json and adapter_model.safetensors, read and written as PEFT lays them out."""

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.convert.hf import chunks, open_weights, places, write_tensors
from jaxft.convert.table import Name
from jaxft.errors import InputError
from jaxft.lora import LoraConfig
from jaxft.trees import Tree, flatten, unflatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight"}

# fields of PEFT's LoraConfig that change what is computed, and the values under which they change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "layers_to_transform": (None, []),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "exclude_modules": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
}


def adapter_names(names: tuple[Name, ...], trained: Tree) -> dict[str, tuple[str, int | None]]:
    """PEFT tensor name -> (path, row) of every A and B in a tree of LoRA leaves."""
    weights = {path.rsplit("/lora/", 1)[0] + "/weight": leaf for path, leaf in flatten(trained)}
    found = {}
    for hf, place in places(names, unflatten(weights)).items():
        for leaf, suffix in SUFFIXES.items():
            path = place.path.removesuffix("weight") + f"lora/{leaf}"
            found[f"base_model.model.{hf.removesuffix('weight')}{suffix}"] = (path, place.row)
    return found


def excluded_modules(passed_over: tuple[str, ...]) -> str | None:
    """PEFT's pattern for the parts of a model that were not loaded, which have modules of the same names."""
    parts = sorted({prefix.strip(".").split(".")[-1] for prefix in passed_over})
    return f".*({'|'.join(parts)}).*" if parts else None


def save_adapter(
    directory: Path,
    names: tuple[Name, ...],
    trained: Tree,
    config: LoraConfig,
    base_model: str,
    passed_over: tuple[str, ...] = (),
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained(base, directory)` loads, into an existing directory.

    trained: the tree of float32 A and B; base_model: what the adapter's config names as its base. passed_over: prefixes
    of the base's tensors that were not loaded, and so have no branch.
    """
    leaves = dict(flatten(trained))
    tensors = {}
    for name, (path, row) in adapter_names(names, trained).items():
        tensors[name] = np.asarray(leaves[path] if row is None else leaves[path][row])
    write_tensors(directory / WEIGHTS, tensors)
    modules = sorted({path.split("/lora/")[0].rsplit("/", 1)[-1] for path in leaves})
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if passed_over:
        written["exclude_modules"] = excluded_modules(passed_over)
    (directory / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(directory: Path, passed_over: tuple[str, ...] = ()) -> LoraConfig:
    """The LoRA settings of a PEFT adapter; passed_over: as in `save_adapter`.

    Raises InputError where it is missing or of a method not supported.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} has no {CONFIG}; a PEFT adapter directory is needed")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        kind = written.get("peft_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object: {error}") from error
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} is not supported; only LORA adapters are")
    for field, neutral in NEUTRAL.items():
        if field == "exclude_modules" and passed_over and written.get(field) == excluded_modules(passed_over):
            continue
        if field in written and written[field] not in neutral:
            raise InputError(f"{path}: {field} = {written[field]!r} is not supported yet")
    targets = written.get("target_modules")
    if isinstance(targets, list) and targets:
        targets = tuple(sorted(targets))
    elif targets != "all-linear":
        raise InputError(f"{path}: target_modules {targets!r} must be 'all-linear' or a list of module names")
    try:
        return LoraConfig(
            r=int(written["r"]),
            lora_alpha=float(written["lora_alpha"]),
            lora_dropout=float(written.get("lora_dropout") or 0.0),
            target_modules=targets,
            use_rslora=bool(written.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: r and lora_alpha must be numbers: {error!r}") from error


def load_adapter(directory: Path, names: tuple[Name, ...], shapes: Tree, passed_over: tuple[str, ...] = ()) -> Tree:
    """The A and B of a PEFT adapter as a float32 tree like `shapes`; those of `passed_over` parts are counted aloud.

    Raises InputError where the file is missing or damaged, or its tensors are not this model's.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        raise InputError(f"{directory} has no {WEIGHTS}")
    where = open_weights([path])
    skipped = [name for name in where if name.removeprefix("base_model.model.").startswith(passed_over)]
    for name in skipped:
        del where[name]
    if skipped:
        print(f"{path}: passed over {len(skipped)} tensors of parts that are not loaded", file=sys.stderr)
    wanted = adapter_names(names, shapes)
    missing, extra = sorted(set(wanted) - set(where)), sorted(set(where) - set(wanted))
    if missing or extra:
        what = f"{len(missing)} of its tensors are missing, e.g. {missing[0]}" if missing else (
            f"{len(extra)} tensors belong to no part of this model, e.g. {extra[0]}"
        )  # fmt: skip
        raise InputError(f"{path} is not an adapter for this model: {what}")
    leaves = dict(flatten(shapes))
    arrays = {p: np.zeros(leaf.shape, np.float32) for p, leaf in leaves.items()}
    for name, (leaf_path, row) in wanted.items():
        part = arrays[leaf_path] if row is None else arrays[leaf_path][row]
        shape = tuple(where[name].get_slice(name).get_shape())
        if shape != part.shape:
            raise InputError(f"{path} is for another model: {name} has shape {shape}, this model needs {part.shape}")
        for start, chunk in chunks(where[name], name):
            part[start : start + len(chunk)] = chunk.astype(np.float32)
    return unflatten({p: jnp.asarray(arrays[p]) for p in arrays})
