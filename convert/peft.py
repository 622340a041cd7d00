"""PEFT's LoRA adapters: adapter_config.json and adapter_model.safetensors, read and written as PEFT lays them out."""

import dataclasses
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxft.convert.hf import chunks, open_weights, write_tensors
from jaxft.convert.table import Name
from jaxft.errors import InputError
from jaxft.initial import Factors, doubled
from jaxft.lora import branches, linear_places, lora_shapes
from jaxft.lora_config import SAVABLE, AdaLora, LoraConfig, reaches, saved_modules
from jaxft.models import Model
from jaxft.trees import Tree, flatten, unflatten
from jaxft.vocabulary import resized

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# fields of PEFT's LoraConfig that change what is computed, and the values under which they change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
}


class Part(NamedTuple):
    """Which part of a trained leaf one tensor of a file is: the leaf's path and an index into it."""

    path: str
    slices: tuple[Any, ...]


def adapter_parts(model: Model) -> dict[str, Part]:
    """PEFT tensor name -> part of the trained leaf, for everything that a model with LoRA trains.

    The rows of A and columns of B that only pad a stack of layers are no part of any tensor.
    """
    found = {}
    trained = dict(flatten(lora_shapes(model)[0]))
    for module, (place, rank, _) in branches(model).items():
        row = () if place.row is None else (place.row,)
        end = ".weight"
        if f"{place.path}/lora/e" in trained:
            found[f"{PREFIX}{module}.lora_E"], end = Part(f"{place.path}/lora/e", (*row, slice(rank))), ""
        found[f"{PREFIX}{module}.lora_A{end}"] = Part(f"{place.path}/lora/a", (*row, slice(rank)))
        found[f"{PREFIX}{module}.lora_B{end}"] = Part(f"{place.path}/lora/b", (*row, slice(None), slice(rank)))
        if f"{place.path}/lora/magnitude" in trained:
            found[f"{PREFIX}{module}.lora_magnitude_vector"] = Part(f"{place.path}/lora/magnitude", row)
    for path, name in savable_names(model.family.names).items():
        if path in trained:
            found[PREFIX + name] = Part(path, ())
    return found


def savable_names(names: tuple[Name, ...]) -> dict[str, str]:
    """Tree path -> Hugging Face name of what modules_to_save may name."""
    by_path = {name.path: name.hf for name in names}
    # a family whose head is always the embedding may have no name for it
    return {f"{module}/weight": by_path.get(f"{module}/weight", f"{module}.weight") for module in SAVABLE}


def excluded_modules(passed_over: tuple[str, ...]) -> str | None:
    """PEFT's pattern for the parts of a model that were not loaded, which have modules of the same names."""
    parts = sorted({prefix.strip(".").split(".")[-1] for prefix in passed_over})
    return f".*({'|'.join(parts)}).*" if parts else None


def save_adapter(
    directory: Path,
    model: Model,
    trained: Tree,
    config: LoraConfig,
    base_model: str,
    subtracted: dict[str, Factors] | None = None,
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained(base, directory)` loads, into an existing directory.

    trained: the tree of float32 A and B, and of what is trained whole; base_model: what the adapter's config names as
    its base. Parts of the base that were not loaded have no branch, and are excluded by name. subtracted: what was
    taken from the base's modules; it is written into the adapter, [A; A′] and [B, −B′] of twice the rank, so that the
    adapter is right over the base as it was.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(trained)}
    tensors = {name: np.ascontiguousarray(leaves[path][index]) for name, (path, index) in adapter_parts(model).items()}
    for module, (a, b) in (subtracted or {}).items():
        for name, own, axis in ((f"{PREFIX}{module}.lora_A.weight", a, 0), (f"{PREFIX}{module}.lora_B.weight", -b, 1)):
            tensors[name] = np.concatenate([tensors[name], own], axis=axis)
    kept: dict[str, list[bool]] = {}
    if config.adalora is not None:
        kept = kept_triplets(model, tensors)
        for module, inside in kept.items():
            for name, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
                tensor = f"{PREFIX}{module}.{name}"
                tensors[tensor] = np.ascontiguousarray(np.compress(inside, tensors[tensor], axis=axis))
    head = PREFIX + savable_names(model.family.names)["lm_head/weight"]
    if config.ensure_weight_tying and model.config.tie_word_embeddings and "embed_tokens/weight" in leaves:
        tensors[head] = leaves["embed_tokens/weight"]  # PEFT looks for it under both names
    write_tensors(directory / WEIGHTS, tensors)
    write_config(directory, model, doubled(config) if subtracted else config, base_model, kept)


def kept_triplets(model: Model, tensors: dict[str, np.ndarray]) -> dict[str, list[bool]]:
    """Module -> which of its triplets AdaLoRA has not masked: those whose E is not 0."""
    return {module: (tensors[f"{PREFIX}{module}.lora_E"][:, 0] != 0).tolist() for module in branches(model)}


def write_config(
    directory: Path, model: Model, config: LoraConfig, base_model: str, kept: dict[str, list[bool]] | None = None
) -> None:
    """adapter_config.json; kept: of AdaLoRA, see `kept_triplets`."""
    written: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": target_names(model, config),
        "layers_to_transform": None if config.layers_to_transform is None else list(config.layers_to_transform),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "exclude_modules": config.exclude_modules or excluded_modules(model.family.passed_over),
        "modules_to_save": list(config.modules_to_save) or None,
        "ensure_weight_tying": config.ensure_weight_tying,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if config.adalora is not None:
        own = dataclasses.asdict(config.adalora)
        rows = config.adalora.init_r
        pattern = {f"{module}.lora_E": (one + [False] * rows)[:rows] for module, one in (kept or {}).items()}
        written |= {"peft_type": "ADALORA", **own, "rank_pattern": pattern or None}
    (directory / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_factors(
    directory: Path, model: Model, factors: dict[str, Factors], config: LoraConfig, base_model: str
) -> None:
    """Writes A and B of modules as an adapter of their own, into an existing directory."""
    tensors = {
        f"{PREFIX}{module}.lora_{name}.weight": np.ascontiguousarray(array)
        for module, pair in factors.items()
        for name, array in zip("AB", pair, strict=True)
    }
    write_tensors(directory / WEIGHTS, tensors)
    write_config(directory, model, replace(config, use_dora=False, modules_to_save=()), base_model)


def read_factors(directory: Path) -> dict[str, Factors]:
    """What `save_factors` wrote. Raises InputError where it is missing or damaged."""
    where = open_adapter(directory)
    modules = [name.removesuffix(".lora_A.weight") for name in where if name.endswith(".lora_A.weight")]
    return {
        module.removeprefix(PREFIX): Factors(*(read_tensor(where, f"{module}.lora_{name}.weight") for name in "AB"))
        for module in modules
    }


def read_branch(where: dict[str, Any], module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A, with AdaLoRA's E in it, B, and DoRA's magnitudes of one module."""
    prefix = f"{PREFIX}{module}."
    magnitude, e = f"{prefix}lora_magnitude_vector", f"{prefix}lora_E"
    end = "" if e in where else ".weight"
    a, b = (read_tensor(where, f"{prefix}lora_{part}{end}") for part in "AB")
    return (
        a * read_tensor(where, e) if e in where else a,
        b,
        read_tensor(where, magnitude) if magnitude in where else None,
    )


def target_names(model: Model, config: LoraConfig) -> list[str]:
    """What PEFT's target_modules is to be: the endings of the names that have a branch, or else the names themselves.

    Never a regular expression: PEFT would try it on modules that are not linear layers too, and refuse them.
    """
    reached = branches(model).keys()
    endings = tuple(sorted({module.rsplit(".", 1)[-1] for module in reached}))
    short = replace(config, target_modules=endings)
    return list(endings if {name for name in linear_places(model) if reaches(short, name)} == reached else reached)


def read_base_model(directory: Path) -> str | None:
    """What a PEFT adapter names as its base: a directory or a hub name. Raises InputError as `read_adapter_config`."""
    return _read_config(directory).get("base_model_name_or_path")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} has no {CONFIG}; a PEFT adapter directory is needed")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object: {error}") from error


def read_adapter_config(directory: Path) -> LoraConfig:
    """The LoRA settings of a PEFT adapter. Raises InputError where it is missing or of a method not supported."""
    path, written = directory / CONFIG, _read_config(directory)
    kind = written.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise InputError(f"{path}: peft_type {kind!r} is not supported; only LORA and ADALORA adapters are")
    for field, neutral in NEUTRAL.items():
        if field in written and written[field] not in neutral:
            raise InputError(f"{path}: {field} = {written[field]!r} is not supported yet")
    targets = written.get("target_modules")
    if isinstance(targets, list) and targets:
        targets = tuple(sorted(targets))
    elif not isinstance(targets, str) or not targets:
        raise InputError(f"{path}: target_modules {targets!r} must be a regular expression or a list of module names")
    excluded = written.get("exclude_modules") or ()
    layers = written.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    ranks, adalora = written.get("rank_pattern") or {}, None
    try:
        if kind == "ADALORA":
            adalora = AdaLora(
                **{field.name: written[field.name] for field in dataclasses.fields(AdaLora) if field.name in written}
            )
            if not all(isinstance(rank, int) for rank in (adalora.init_r, adalora.target_r)):
                raise ValueError(f"init_r is {adalora.init_r!r}, target_r {adalora.target_r!r}")
            written = written | {"r": adalora.init_r, "use_rslora": False, "alpha_pattern": None}
            ranks = {re.escape(name.rsplit(".lora_E", 1)[0]): sum(kept) for name, kept in ranks.items()}
        config = LoraConfig(
            r=int(written["r"]),
            adalora=adalora,
            lora_alpha=float(written["lora_alpha"]),
            lora_dropout=float(written.get("lora_dropout") or 0.0),
            target_modules=targets,
            use_rslora=bool(written.get("use_rslora", False)),
            use_dora=bool(written.get("use_dora", False)),
            layers_to_transform=tuple(int(layer) for layer in layers) if layers else None,
            rank_pattern={key: int(rank) for key, rank in ranks.items()},
            alpha_pattern={key: float(alpha) for key, alpha in (written.get("alpha_pattern") or {}).items()},
            modules_to_save=tuple(written.get("modules_to_save") or ()),
            ensure_weight_tying=bool(written.get("ensure_weight_tying", False)),
            exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: r, lora_alpha, their patterns and layers_to_transform must be numbers: {error!r}"
        ) from error
    if min([config.r, *config.rank_pattern.values()]) < (1 if adalora is None else 0):
        raise InputError(f"{path}: a rank below 1 is none")
    return config


def open_adapter(directory: Path, passed_over: tuple[str, ...] = ()) -> dict[str, Any]:
    """Tensor name -> the open file of an adapter, without what belongs to `passed_over` parts, which is counted aloud.

    Raises InputError where it is missing or damaged.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        raise InputError(f"{directory} has no {WEIGHTS}")
    where = open_weights([path])
    skipped = [name for name in where if name.removeprefix(PREFIX).startswith(passed_over)]
    for name in skipped:
        del where[name]
    if skipped:
        print(f"{path}: passed over {len(skipped)} tensors of parts that are not loaded", file=sys.stderr)
    return where


def whole_tensors(where: dict[str, Any], names: tuple[Name, ...]) -> dict[str, str]:
    """Tree path -> tensor name of embedding and head, where an adapter's file holds them."""
    return {path: PREFIX + name for path, name in savable_names(names).items() if PREFIX + name in where}


def shape_of(where: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(where[name].get_slice(name).get_shape())


def read_tensor(where: dict[str, Any], name: str, out: np.ndarray | None = None) -> np.ndarray:
    """A tensor as float32, read a chunk at a time, into `out` where that is given."""
    out = np.empty(shape_of(where, name), np.float32) if out is None else out
    for start, chunk in chunks(where[name], name):
        out[start : start + len(chunk)] = chunk.astype(np.float32)
    return out


def saved_vocabulary(
    directory: Path, where: dict[str, Any], model: Model, config: LoraConfig
) -> tuple[Model, dict[str, str], set[str]]:
    """What an adapter's file says about embedding and head beside what it trains.

    Returns the model with as many rows as they have; tree path -> tensor of what takes the base's place without being
    trained (PEFT writes so what was resized); and all tensors that are not looked for otherwise. Raises InputError
    where the file holds one of the two and the other has another number of rows.
    """
    whole, tied = whole_tensors(where, model.family.names), model.config.tie_word_embeddings
    saved = saved_modules(config, tied)
    one_matrix = tied and (config.ensure_weight_tying or not saved)
    if one_matrix and len(whole) == 2:  # written twice
        embedding, head = whole.values()
        pairs = zip(chunks(where[embedding], embedding), chunks(where[head], head), strict=True)
        if not all(np.array_equal(one, other) for (_, one), (_, other) in pairs):
            raise InputError(f"{directory}: {head} differs from {embedding}; this model has one matrix for both")
        whole.pop("lm_head/weight")
        beside = {head}
    else:
        beside = set()
    rows = {path: shape_of(where, tensor)[0] for path, tensor in whole.items()}
    if rows and set(rows.values()) != {model.config.vocab_size}:
        needed = {"embed_tokens/weight"} | (set() if one_matrix else {"lm_head/weight"})
        if set(rows) != needed or len(set(rows.values())) > 1:
            held = " and ".join(f"{whole[path]} with {count} rows" for path, count in rows.items())
            raise InputError(
                f"{directory} holds {held}, the model has {model.config.vocab_size} tokens; an adapter for another "
                "number of tokens holds both the embedding and the head"
            )
        model = resized(model, next(iter(rows.values())))
    trained = {f"{name}/weight" for name in saved}
    replaced = {path: tensor for path, tensor in whole.items() if path not in trained}
    again = {  # what PEFT writes once more where the vocabulary was resized
        f"{PREFIX}{name.removesuffix('weight')}{part}.weight"
        for name in savable_names(model.family.names).values()
        for part in ("modules_to_save", "original_module")
    }
    return model, replaced, beside | again | set(replaced.values())


def check_tensors(directory: Path, where: dict[str, Any], model: Model, beside: set[str]) -> dict[str, Part]:
    """`adapter_parts`, each of which is in the file in its shape, and nothing else but the tensors `beside`.

    Raises InputError where that is not so.
    """
    path, wanted = directory / WEIGHTS, adapter_parts(model)
    missing, extra = (
        sorted(set(wanted) - set(where)),
        sorted(name for name in set(where) - set(wanted) - beside if 0 not in shape_of(where, name)),
    )  # of a layer that AdaLoRA left without a rank
    if missing or extra:
        what = f"{len(missing)} of its tensors are missing, e.g. {missing[0]}" if missing else (
            f"{len(extra)} tensors belong to no part of this model, e.g. {extra[0]}"
        )  # fmt: skip
        raise InputError(f"{path} is not an adapter for this model: {what}")
    leaves = dict(flatten(lora_shapes(model)[0]))
    for name, (leaf, index) in wanted.items():
        seen, needed = shape_of(where, name), np.broadcast_to(np.False_, leaves[leaf].shape)[index].shape
        if seen != needed:
            raise InputError(f"{path} is for another model: {name} has shape {seen}, this model needs {needed}")
    return wanted


def load_adapter(directory: Path, where: dict[str, Any], model: Model, beside: set[str]) -> Tree:
    """The trained leaves of a PEFT adapter as a float32 tree, zero where a stack is padded.

    beside: tensors of the file that are read elsewhere. Raises InputError where its tensors are not this model's.
    """
    parts = check_tensors(directory, where, model, beside)
    arrays = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(lora_shapes(model)[0])}
    for name, (path, index) in parts.items():
        read_tensor(where, name, arrays[path][index])
    return unflatten({path: jnp.asarray(array) for path, array in arrays.items()})
