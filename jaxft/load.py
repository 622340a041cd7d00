"""From a name to a model on its devices, and back to a directory: the start and end of every run."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxft.convert import bnb, hf, peft
from jaxft.errors import InputError
from jaxft.initial import Factors, Parting
from jaxft.lora import (
    LoraConfig,
    add_lora,
    first_layer,
    frozen_params,
    kept_params,
    lora_shapes,
    wanted_branches,
    with_lora,
)
from jaxft.models import FAMILIES, Model, describe_model, read_hf_config
from jaxft.models.extension import Changes, with_changes
from jaxft.models.quantized import all_linears, linear_weights, with_quantized
from jaxft.quant import is_quantized, kind_of
from jaxft.sharding import shardings
from jaxft.templates import saved_template
from jaxft.trees import Tree, flatten, join, like

BASE_CONFIG = "base_config.json"  # beside an adapter: fields that its base's config.json must have otherwise
QUANTIZED_BASE = "quantized_base"  # beside an adapter: the base that it needs, where that is not the quantised original
EMBEDDED = Path(__file__).parent / "embedded"
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def find_directory(name: str) -> Path:
    """The local directory of a model or adapter: itself where it exists or looks like a path, else the hub's copy.

    Of a GGUF file: one made for this process, with the configuration and the tokenizer that the file describes.

    Raises InputError where a local name does not exist, or the hub does not have it or cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        from jaxft.convert.gguf.directory import directory_of

        return directory_of(path)
    if path.exists():
        raise InputError(f"{name} is a file; a model directory or a .gguf file is needed")
    if name.startswith(("/", ".", "~")):
        raise InputError(f"{name} does not exist; check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES))
    except HFValidationError as error:
        said = f"{name!r} is neither a directory here nor a name the hub could have: {error}"
        raise InputError(f"{said}; check the path, or name OWNER/NAME") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"{name!r} is no directory here, and the hub did not give it: {str(error).splitlines()[0]}; check the name "
            "and the network, or download it and name its directory"
        ) from error


def load_model(
    name: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    quantization: str | None = None,
    changes: Changes | None = None,
    lora: LoraConfig | None = None,
    parting: Parting | None = None,
) -> tuple[Model, Tree]:
    """A Hugging Face model by directory or hub name: its description and its parameters, of `dtype`, on `mesh`.

    quantization: "nf4" (4 bits with double quantisation) or "int8" for all linear layers but the head; None: as the
    files have them, which may be quantised by bitsandbytes. changes: fields that config.json should have had otherwise,
    such as `base_changes(adapter)`. lora: the adapter that will be put on; the layers below its first one then form
    runs of their own, so that no backward pass enters them. parting: takes its weights apart while they
    load. Raises InputError for a model that is missing, damaged, of
    an unknown type, or already quantised in another way, and where lora names what it has not.
    """
    directory = find_directory(str(name))
    model, where = open_base(directory, dtype=dtype, quantization=quantization, changes=changes, lora=lora)
    return model, read_params(directory, model, where, dtype=dtype, mesh=mesh, parting=parting)


def open_base(
    directory: Path, *, dtype: Any, quantization: str | None = None, changes: Changes | None = None,
    lora: LoraConfig | None = None, needed: bool = True,
) -> tuple[Model, dict[str, Any]]:  # fmt: skip
    """What `load_model` says of a directory before it reads a weight: the description, and the open files by tensor.

    needed: without it the weights may be absent, and {} is returned. Raises InputError as `load_model` for all that
    the files' headers tell, and where config.json says that absent weights are quantised.
    """
    model = describe_model(with_changes(read_hf_config(directory), changes or {}))
    where: dict[str, Any] = {}
    if needed or any(directory.glob("*.safetensors")):
        where = hf.open_model(directory, model.family.older, model.family.passed_over)
    elif getattr(model.hf_config, "quantization_config", None):
        raise InputError(f"{directory} is quantised, and its weights are not here: what they hold is not known")
    model = _as_held(model, where, directory, dtype, quantization, lora)
    if needed:
        hf.check_model(directory, where, model.family.names, model.shapes)
    return model, where


def read_params(
    directory: Path, model: Model, where: dict[str, Any], *, dtype: Any, mesh: Mesh | None = None,
    parting: Parting | None = None,
) -> Tree:  # fmt: skip
    """The parameters of a model that `open_base` described, from the files that it opened; the rest as `load_model`."""
    places = None if mesh is None else shardings(model.axes, model.shapes, mesh)
    changed: dict[str, hf.Change] = {}
    if parting is not None:
        if bnb.stored_leaves(where, directory):
            raise InputError(
                f"init_lora_weights {parting.config.init_lora_weights} needs the 16-bit weights that {directory} was "
                "quantised from; name their directory, with --load_in_4bit"
            )
        for module in wanted_branches(model, parting.config):
            changed[f"{module}.weight"] = lambda name, weight, kind: parting.part(
                name.removesuffix(".weight"), weight, kind
            )
    return hf.load_params(directory, model.family.names, model.shapes, dtype, places, where, changed)


def model_shapes(
    name: str | Path, *, mesh: Mesh, dtype: Any = jnp.float32, quantization: str | None = None,
    changes: Changes | None = None, lora: LoraConfig | None = None,
) -> tuple[Model, Tree]:  # fmt: skip
    """`load_model` with a `jax.ShapeDtypeStruct` for each array, placed as that would be; config.json is enough.

    Where weights are there, their headers are read, to see what is quantised. Raises InputError where config.json says
    that they are quantised and they are not there, and as `load_model`.
    """
    directory, held = find_directory(str(name)), dict(dtype=dtype, quantization=quantization, changes=changes)
    model, _ = open_base(directory, lora=lora, needed=False, **held)
    return model, held_shapes(model, dtype, mesh)


def held_shapes(model: Model, dtype: Any, mesh: Mesh) -> Tree:
    """A model's parameters as shapes on a mesh, all but the quantised of `dtype`."""
    held = jax.tree.map(
        lambda leaf: leaf if is_quantized(leaf) else jax.ShapeDtypeStruct(leaf.shape, dtype), model.shapes,
        is_leaf=is_quantized,
    )  # fmt: skip
    return shapes_on_mesh(model, held, mesh)


def adapter_shapes(model: Model, params: Tree, config: LoraConfig, mesh: Mesh) -> tuple[Model, Tree, Tree]:
    """`new_adapter` of the shapes that `model_shapes` gives: (model, trainable, frozen)."""
    model = with_lora(model, config)
    trained, scales = lora_shapes(model)
    frozen = join(kept_params(model, params), scales)
    return model, shapes_on_mesh(model, trained, mesh), shapes_on_mesh(model, frozen, mesh)


def shapes_on_mesh(model: Model, tree: Tree, mesh: Mesh) -> Tree:
    """Part of a model's tree of shapes with the shardings that the table of axes gives it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree, like(shardings(model.axes, model.shapes, mesh), tree),
    )  # fmt: skip


def _as_held(
    model: Model, where: dict[str, Any], directory: Path, dtype: Any, quantization: str | None,
    lora: LoraConfig | None,
) -> Model:  # fmt: skip
    """The model with the weights quantised that the files (`open_model`'s) or `quantization` have so, in its runs."""
    stored = bnb.stored_leaves(where, directory)
    kinds = {kind_of(leaf) for leaf in stored.values()}
    if quantization and kinds - {quantization}:
        held = ", ".join(sorted(kinds))
        raise InputError(
            f"{directory} is already quantised as {held}, {quantization} was asked for; leave the flag out"
        )
    leaves = stored or (all_linears(model, quantization, dtype) if quantization else {})
    start = 0 if lora is None else first_layer(model, lora)
    return with_quantized(model, leaves, (start,)) if leaves or start else model


def load_adapter(
    name: str | Path, model: Model, params: Tree, *, mesh: Mesh | None = None
) -> tuple[Model, Tree, Tree, LoraConfig]:
    """A PEFT LoRA adapter on a loaded model: (model, trainable, frozen, its settings).

    Raises InputError for an adapter that is missing, damaged, of an unsupported method or for another model.
    """
    directory = find_directory(str(name))
    config = peft.read_adapter_config(directory)
    where = peft.open_adapter(directory, model.family.passed_over)
    changes, text = base_changes(directory), model.hf_config.get_text_config()
    if any(getattr(text, field, None) != value for field, value in changes.items()):
        raise InputError(
            f"{directory} was trained on a base whose configuration has {json.dumps(changes)}, as its {BASE_CONFIG} "
            "says; load the base with changes=base_changes(adapter)"
        )
    model, replaced, beside = peft.saved_vocabulary(directory, where, model, config)
    for path, tensor in replaced.items():
        array = peft.read_tensor(where, tensor).astype(params["embed_tokens"]["weight"].dtype)
        params = params | {path.split("/")[0]: {"weight": jnp.asarray(array)}}
    model = with_lora(model, config)
    trainable = peft.load_adapter(directory, where, model, beside)
    return model, *on_mesh(model, trainable, frozen_params(model, params), mesh), config


def with_saved_vocabulary(adapter: str | Path, model: Model, config: LoraConfig) -> Model:
    """The model described with as many rows of the embedding as an adapter's file holds, where it holds any."""
    directory = find_directory(str(adapter))
    return peft.saved_vocabulary(directory, peft.open_adapter(directory, model.family.passed_over), model, config)[0]


def check_base(adapter: str | Path, directory: Path) -> None:
    """Raises InputError where an adapter needs the quantised base that stands beside it, and `directory` is another."""
    own = find_directory(str(adapter)) / QUANTIZED_BASE
    if own.is_dir() and own.resolve() != directory.resolve():
        raise InputError(
            f"{adapter} was trained over {own}, which is not {directory} in 4 bits (parts of its weights were "
            f"taken out); name {own} as the model, without --load_in_4bit"
        )


def base_changes(adapter: str | Path) -> Changes:
    """What an adapter needs its base's configuration to have otherwise; {} for most. Raises InputError if damaged."""
    path = find_directory(str(adapter)) / BASE_CONFIG
    if not path.is_file():
        return {}
    try:
        changes = json.loads(path.read_text(encoding="utf-8"))
        return {name: changes[name] for name in ("max_position_embeddings", "rope_parameters")}
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no JSON object with what the base needs: {error!r}") from error


def write_changes(directory: Path, changes: Changes) -> None:
    """Writes what `base_changes` reads, where there is something to write."""
    if changes:
        (directory / BASE_CONFIG).write_text(json.dumps(changes, indent=2) + "\n", encoding="utf-8")


def new_adapter(
    model: Model,
    params: Tree,
    config: LoraConfig,
    key: jax.Array,
    *,
    mesh: Mesh | None = None,
    first: dict[str, Factors] | None = None,
    drawn: dict[str, jax.Array] | None = None,
) -> tuple[Model, Tree, Tree]:
    """`add_lora` with the new leaves put on `mesh`."""
    model, trainable, frozen = add_lora(model, params, config, key, first=first, drawn=drawn)
    return model, *on_mesh(model, trainable, frozen, mesh)


def on_mesh(model: Model, trainable: Tree, frozen: Tree, mesh: Mesh | None) -> tuple[Tree, Tree]:
    """Both trees on the mesh, each leaf where the table of axes puts it; as they are without a mesh."""
    if mesh is None:
        return trainable, frozen
    places = shardings(model.axes, model.shapes, mesh)
    return (
        jax.device_put(trainable, like(places, trainable)),
        jax.device_put(frozen, like(places, frozen)) if frozen else frozen,
    )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name. Raises InputError where there is none that can be read."""
    directory = find_directory(str(name))
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = f"{directory} has no tokenizer that transformers can read: {error}"
        raise InputError(f"{said}; copy the model's tokenizer files there again") from error


def adapter_tokenizer(
    name: str | Path, model: Model, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """The tokenizer to use with an adapter, and the tokens that it has beside those of the model's own `tokenizer`.

    It is the adapter's own where the adapter holds an embedding and its tokenizer more tokens than the model's; else
    `tokenizer`, which gets the chat template that was saved with the adapter, where one was. Raises InputError where
    the adapter has an embedding for other tokens and no tokenizer.
    """
    directory = find_directory(str(name))
    tokenizer.chat_template = saved_template(directory) or tokenizer.chat_template
    where = peft.open_adapter(directory, model.family.passed_over)
    whole = peft.whole_tensors(where, model.family.names)
    rows = {peft.shape_of(where, tensor)[0] for tensor in whole.values()}
    if not whole:
        return tokenizer, ()
    if (directory / "tokenizer_config.json").is_file() or (directory / "tokenizer.json").is_file():
        own = load_tokenizer(directory)
        if new := sorted(own.get_vocab().keys() - tokenizer.get_vocab().keys()):
            return own, tuple(new)
    elif rows != {model.config.vocab_size}:
        raise InputError(
            f"{directory} holds {max(rows)} tokens, the model {model.config.vocab_size}, and the tokenizer that knows "
            "them is not there; copy the one that it was trained with"
        )
    return tokenizer, ()


def save_adapter(
    directory: str | Path, model: Model, trainable: Tree, config: LoraConfig, base_model: str,
    subtracted: dict[str, Factors] | None = None,
) -> None:  # fmt: skip
    """Writes a PEFT adapter: `PeftModel.from_pretrained(base, directory)` loads it. Nothing half made is left.

    subtracted: what `jaxft.initial.Parting` took from the base, so that the adapter is right over the base as it was.
    """
    with hf.whole_directory(Path(directory)) as temporary:
        peft.save_adapter(temporary, model, trainable, config, base_model, subtracted)


def save_model(directory: str | Path, model: Model, params: Tree, *, dtype: Any = None) -> None:
    """Writes a Hugging Face model directory (config.json and safetensors). dtype: the parameters' own where None."""
    with hf.whole_directory(Path(directory)) as temporary:
        write_model(temporary, model, params, jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype))


def write_model(directory: Path, model: Model, params: Tree, dtype: jnp.dtype) -> None:
    """config.json and the weights, into a directory that exists.

    A model of which parts were not loaded is written as what was, Gemma 3's text model; that is said on stderr.
    """
    model = as_written(model)
    hf.save_params(directory, model.family.names, params, dtype)
    leaves = dict(flatten(params))
    by_name = {name: leaves[place.path] for name, place in hf.places(model.family.names, params).items()}
    write_config(directory, model, dtype, by_name)


def write_config(directory: Path, model: Model, dtype: jnp.dtype, leaves: dict[str, Any]) -> None:
    """config.json of a model whose weights are `leaves` by Hugging Face name, in `dtype` where not quantised."""
    written = model.hf_config.to_diff_dict() | {"dtype": dtype.name, "architectures": _architectures(model)}
    written.pop("_name_or_path", None)  # a path of this machine
    written.pop("quantization_config", None)  # of what was loaded, not of what is written
    if any(is_quantized(leaf) for leaf in leaves.values()):
        written["quantization_config"] = bnb.quantization_config(leaves, list(linear_weights(model)))
    (directory / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def as_written(model: Model) -> Model:
    """The model under the family that it is saved as, where that is another one."""
    kind = model.family.written_as
    if kind is None:
        return model
    text = copy.deepcopy(model.hf_config.get_text_config())
    text.tie_word_embeddings = model.config.tie_word_embeddings
    print(
        f"saved as {kind}, the text model alone: the other parts of {model.config.model_type} were not loaded",
        file=sys.stderr,
    )
    return replace(model, family=FAMILIES[kind], hf_config=text)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the tokenizer's and generation's files as they are: what was loaded is what is shipped."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, directory / name)
    if (source / "chat_templates").is_dir():
        shutil.copytree(source / "chat_templates", directory / "chat_templates", dirs_exist_ok=True)


def _architectures(model: Model) -> list[str]:
    name = type(model.hf_config).__name__.removesuffix("Config").removesuffix("Text")
    return model.hf_config.architectures or [f"{name}ForCausalLM"]


def parameter_count(tree: Tree) -> int:
    """How many numbers a tree of arrays or shapes holds; a quantised weight counts as what it stands for."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree, is_leaf=is_quantized))
