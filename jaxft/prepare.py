"""What train, evaluate and generate have in common: from settings to a model, an adapter and a tokenizer on a mesh."""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxft.cards import absent_card
from jaxft.convert.peft import read_adapter_config
from jaxft.errors import InputError
from jaxft.load import (
    BASE_CONFIG,
    adapter_shapes,
    base_changes,
    find_directory,
    load_adapter,
    load_model,
    load_tokenizer,
    model_shapes,
    new_adapter,
)
from jaxft.lora import LoraConfig
from jaxft.models import Model, read_hf_config
from jaxft.models.extension import Changes, describe_changes, extend_positions, with_changes
from jaxft.quant import is_quantized
from jaxft.settings import GenerateSettings, Settings, TrainSettings
from jaxft.sharding import make_mesh, mesh_sizes
from jaxft.trees import Tree, flatten


@dataclass(frozen=True)
class Prepared:
    """A model ready to run. trainable is {} where nothing is trained; lora is None without an adapter."""

    directory: Path
    model: Model
    trainable: Tree
    frozen: Tree
    lora: LoraConfig | None
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    compute_dtype: jnp.dtype
    changes: Changes  # of the base's configuration, {} where it is as its config.json says


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, on accelerators; JAX_COMPILATION_CACHE_DIR says where else."""
    # a CPU program may not run on another CPU of the same name, and compiles in seconds anyway
    if jax.default_backend() != "cpu" and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxft" / "xla"))


def prepare(settings: Settings, model_name: str, *, weights: bool = True) -> Prepared:
    """Loads what the settings name. Raises InputError for anything that is missing, damaged or does not fit.

    weights: False reads no weights, of the model or of an adapter: both trees then hold `jax.ShapeDtypeStruct`s.
    """
    use_compile_cache()
    absent = settings.device if isinstance(settings, TrainSettings) else None
    devices = [absent_card(absent)] if absent else jax.devices()
    platform_dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    param_dtype = jnp.dtype(settings.param_dtype(platform_dtype))
    compute_dtype = jnp.dtype(settings.compute_dtype(platform_dtype))
    mesh = make_mesh(mesh_sizes(settings.mesh_axes, len(devices)), devices)
    directory = find_directory(model_name)
    changes = config_changes(settings, directory)
    tokenizer = load_tokenizer(directory)
    load = load_model if weights else model_shapes
    model, params = load(directory, dtype=param_dtype, mesh=mesh, quantization=settings.quantization, changes=changes)
    lora: LoraConfig | None = None
    trainable: Tree
    if settings.adapter is not None:
        if isinstance(settings, TrainSettings) and settings.full_finetuning:
            raise InputError("--adapter and --full_finetuning contradict each other; merge the adapter first")
        if weights:
            model, trainable, frozen, lora = load_adapter(settings.adapter, model, params, mesh=mesh)
        else:
            lora = read_adapter_config(find_directory(settings.adapter), model.family.passed_over)
            model, trainable, frozen = adapter_shapes(model, params, lora, mesh)
        if isinstance(settings, TrainSettings):
            _check_adapter(settings, lora)
    elif isinstance(settings, TrainSettings) and settings.full_finetuning:
        if any(is_quantized(leaf) for _, leaf in flatten(params)):
            raise InputError(f"{directory} is quantised: its weights cannot be trained; leave --full_finetuning out")
        trainable, frozen = params, {}
    elif isinstance(settings, TrainSettings):
        lora = lora_settings(settings)
        if weights:
            model, trainable, frozen = new_adapter(model, params, lora, jax.random.key(settings.seed), mesh=mesh)
        else:
            model, trainable, frozen = adapter_shapes(model, params, lora, mesh)
    else:
        trainable, frozen = {}, params
    return Prepared(directory, model, trainable, frozen, lora, tokenizer, mesh, compute_dtype, changes)


def config_changes(settings: Settings, directory: Path) -> Changes:
    """What has to differ from the model's own config.json: as the adapter was trained, or for a longer `--max_length`.

    Said on stderr. Raises InputError for a length that was not asked for, or that the adapter was not trained for.
    """
    hf = read_hf_config(directory)
    changes = base_changes(settings.adapter) if settings.adapter else {}
    positions = with_changes(hf, changes).get_text_config().max_position_embeddings
    if changes:
        rope = describe_changes(changes)
        print(f"{settings.adapter} was trained for {positions} positions: the base's rope is {rope}", file=sys.stderr)
    if isinstance(settings, GenerateSettings) or settings.max_length <= positions:
        return changes
    longer = f"max_length {settings.max_length} is longer than the model's {positions} positions"
    if changes:
        raise InputError(f"{longer}, for which {settings.adapter} was trained; set --max_length {positions} or less")
    changes = extend_positions(hf, settings.max_length)
    if changes and "max_length" not in settings.settings_given:
        raise InputError(
            f"{longer}; set --max_length {positions} or less, or ask for more than {positions} to have its rope scaled"
        )
    what = f"its rope becomes {describe_changes(changes)}" if changes else "its rope scales by each document's length"
    print(f"warning: {longer}; {what}", file=sys.stderr)
    if changes and isinstance(settings, TrainSettings) and not settings.full_finetuning:
        print(
            f"the adapter is right only on a base whose configuration has {json.dumps(changes)}; its {BASE_CONFIG} "
            "and its card say so, and evaluate and generate read it",
            file=sys.stderr,
        )
    return changes


def lora_settings(settings: TrainSettings) -> LoraConfig:
    """The adapter that the flags ask for."""
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets,
        use_rslora=settings.use_rslora,
    )


def _check_adapter(settings: TrainSettings, adapter: LoraConfig) -> None:
    """Raises InputError where a given flag says something else than the adapter that training starts from."""
    flags = lora_settings(settings)
    targets = "all-linear" if flags.target_modules == "all-linear" else tuple(sorted(flags.target_modules))
    flags = replace(flags, target_modules=targets)
    names = {
        "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "lora_target_modules": "target_modules", "use_rslora": "use_rslora",
    }  # fmt: skip
    for flag, field in names.items():
        asked, found = getattr(flags, field), getattr(adapter, field)
        if flag in settings.settings_given and asked != found:
            raise InputError(f"--{flag} {asked} contradicts --adapter {settings.adapter}, whose {field} is {found}")
