"""What train, evaluate and generate have in common: from settings to a model, an adapter and a tokenizer on a mesh."""

import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxft.cards import absent_card
from jaxft.convert.peft import read_adapter_config, read_base_model, read_factors
from jaxft.devices import beside, starting_devices, use_compile_cache
from jaxft.errors import InputError
from jaxft.files import is_hub_name
from jaxft.initial import Factors, Parting
from jaxft.load import (
    BASE_CONFIG,
    EMBEDDED,
    QUANTIZED_BASE,
    adapter_shapes,
    adapter_tokenizer,
    base_changes,
    check_base,
    find_directory,
    held_shapes,
    load_adapter,
    load_tokenizer,
    new_adapter,
    on_mesh,
    open_base,
    read_params,
    with_saved_vocabulary,
)
from jaxft.lora import LoraConfig, draw, wanted_branches
from jaxft.lora_config import SAVABLE, AdaLora, saved_modules
from jaxft.models import Model, describe_model, read_hf_config
from jaxft.models.extension import Changes, describe_changes, extend_positions, with_changes
from jaxft.models.layers import OFFLOADED, can_keep_layers
from jaxft.processes import is_first
from jaxft.quant import is_quantized
from jaxft.settings import ADALORA, EvaluateSettings, GenerateSettings, Settings, TrainSettings
from jaxft.sharding import make_mesh, mesh_sizes
from jaxft.templates import set_template
from jaxft.trees import Tree, flatten
from jaxft.vocabulary import add_tokens, read_tokens, resized, resized_params

SUBTRACTED = "subtracted"  # in an output directory: what was taken from the base, which a resumed run takes again


class Unread(NamedTuple):
    """What `read_weights` reads: the weights of `model`, which has no adapter and no new tokens, held as `dtype`."""

    model: Model
    where: dict[str, Any]  # the open files by tensor
    dtype: jnp.dtype


@dataclass(frozen=True)
class Prepared:
    """A model ready to run. trainable is {} where nothing is trained; lora is None without an adapter.

    unread: where the trees hold `jax.ShapeDtypeStruct`s, the weights that take their place, if they are there.
    new_tokens: what the tokenizer has that the model directory's own has not. new_template: whether its chat template
    is another one than that. subtracted: what was taken from the base's modules when they were loaded.
    """

    directory: Path
    model: Model
    trainable: Tree
    frozen: Tree
    lora: LoraConfig | None
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    compute_dtype: jnp.dtype
    changes: Changes  # of the base's configuration, {} where it is as its config.json says
    new_tokens: tuple[str, ...] = ()
    new_template: bool = False
    subtracted: dict[str, Factors] = dataclasses.field(default_factory=dict)
    unread: Unread | None = None

    @property
    def quantized(self) -> bool:
        """Whether any weight is held in fewer than 16 bits."""
        return any(is_quantized(leaf) for leaf in jax.tree.leaves(self.frozen, is_leaf=is_quantized))


def model_of(settings: EvaluateSettings | GenerateSettings) -> str:
    """The model that is named; else the base of the adapter, as its configuration names it; else the embedded one.

    Raises InputError where that base is not here.
    """
    embedded = EMBEDDED / "base"
    if settings.model_name_or_path is not None or settings.adapter is None:
        return settings.model_name_or_path or str(embedded)
    directory = find_directory(settings.adapter)
    own, named = directory / QUANTIZED_BASE, read_base_model(directory)
    if own.is_dir():
        return str(own)
    if not named:
        raise InputError(f"{settings.adapter} names no base; give it as --model_name_or_path")
    if Path(named).parts[-2:] == embedded.parts[-2:]:  # wherever jaxft was installed when the adapter was trained
        return str(embedded)
    if not Path(named).expanduser().exists() and not is_hub_name(named):
        raise InputError(
            f"{settings.adapter} was trained over {named}, which is not here; give its base as --model_name_or_path"
        )
    print(f"base: {named}, as {settings.adapter} says", file=sys.stderr)
    return named


def prepare(settings: Settings, model_name: str) -> Prepared:
    """Loads what the settings name. Raises InputError for anything that is missing, damaged or does not fit."""
    return read_weights(prepare_shapes(settings, model_name), settings)


def prepare_shapes(settings: Settings, model_name: str, *, needed: bool = True) -> Prepared:
    """`prepare` without reading weights, of the model or of an adapter: shapes, placed as the arrays will be.

    Raises InputError as that, for all that headers of files tell; needed: weights must be there, to be read later.
    """
    absent = settings.device if isinstance(settings, TrainSettings) else None
    started = beside(use_compile_cache) if absent else starting_devices()  # the interpreter is free while a GPU starts
    directory = find_directory(model_name)
    changes = config_changes(settings, directory)
    described = describe_model(with_changes(read_hf_config(directory), changes))
    tokenizer = load_tokenizer(directory)
    started.result()
    devices = [absent_card(absent)] if absent else jax.devices()
    platform_dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    param_dtype = jnp.dtype(settings.param_dtype(platform_dtype))
    compute_dtype = jnp.dtype(settings.compute_dtype(platform_dtype))
    mesh = make_mesh(mesh_sizes(settings.mesh_axes, len(devices)), devices)
    if isinstance(settings, TrainSettings):
        check_kept_layers(settings, mesh)
    known_template = tokenizer.chat_template
    new_tokens: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    if settings.adapter is not None:
        if isinstance(settings, TrainSettings) and settings.full_finetuning:
            raise InputError("--adapter and --full_finetuning contradict each other; merge the adapter first")
        lora = read_adapter_config(find_directory(settings.adapter))
        check_base(settings.adapter, directory)
        if isinstance(settings, TrainSettings):
            _check_adapter(settings, lora, described)
        tokenizer, new_tokens = adapter_tokenizer(settings.adapter, described, tokenizer)
        if new_tokens:
            print(f"tokenizer: that of {settings.adapter}, with {len(new_tokens)} more tokens", file=sys.stderr)
    elif isinstance(settings, TrainSettings) and not settings.full_finetuning:
        tied = described.config.tie_word_embeddings
        lora = lora_settings(settings, tied)
        if lora.modules_to_save and tied and not lora.ensure_weight_tying:
            print("head: parts from the embedding, as in PEFT; --ensure_weight_tying keeps them one", file=sys.stderr)
    base, where = open_base(
        directory, dtype=param_dtype, quantization=settings.quantization, changes=changes, lora=lora, needed=needed
    )
    model = base
    if isinstance(settings, TrainSettings) and settings.add_tokens:
        model, new_tokens = with_new_tokens(model, tokenizer, read_tokens(settings.add_tokens))
    choose_template(settings, tokenizer, known_template)
    if settings.adapter is not None:
        assert lora is not None
        model = with_saved_vocabulary(settings.adapter, model, lora)
    params = held_shapes(model, param_dtype, mesh)
    trainable: Tree
    if lora is not None:
        model, trainable, frozen = adapter_shapes(model, params, lora, mesh)
    elif isinstance(settings, TrainSettings):
        if any(is_quantized(leaf) for _, leaf in flatten(params)):
            raise InputError(f"{directory} is quantised: its weights cannot be trained; leave --full_finetuning out")
        trainable, frozen = params, {}
    else:
        trainable, frozen = {}, params
    own_rate = isinstance(settings, TrainSettings) and settings.embedding_learning_rate is not None
    if own_rate and not trainable.keys() & SAVABLE:
        raise InputError(f"--embedding_learning_rate: --adapter {settings.adapter} trains neither embedding nor head")
    return Prepared(
        directory, model, trainable, frozen, lora, tokenizer, mesh, compute_dtype, changes, new_tokens,
        tokenizer.chat_template != known_template, unread=Unread(base, where, param_dtype) if needed else None,
    )  # fmt: skip


def read_weights(described: Prepared, settings: Settings) -> Prepared:
    """What `prepare_shapes` described by these settings, with arrays in the shapes' places.

    Raises InputError for an adapter that does not fit, and where its first values cannot be taken from the weights.
    """
    assert described.unread is not None
    (model, where, dtype), lora, mesh = described.unread, described.lora, described.mesh
    parting: Parting | None = None
    if lora is not None and lora.from_weights:
        assert isinstance(settings, TrainSettings)
        parting = Parting(lora, settings.seed, resumed_factors(settings))
        print(f"adapter: {lora.init_lora_weights} takes its first values from the weights", file=sys.stderr)
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:  # the files, not the interpreter, are what reading waits for
        drawn = None
        if lora is not None and settings.adapter is None:
            assert isinstance(settings, TrainSettings)
            drawn = pool.submit(_first_values, described.model, lora, settings.seed)
        params = read_params(described.directory, model, where, dtype=dtype, mesh=mesh, parting=parting)
        seconds = time.perf_counter() - began
    if isinstance(settings, TrainSettings) and is_first():
        print(f"weights: read in {seconds:.2f} s", file=sys.stderr)
    if isinstance(settings, TrainSettings) and settings.add_tokens and described.new_tokens:
        known = min(len(described.tokenizer) - len(described.new_tokens), model.config.vocab_size)
        model = resized(model, len(described.tokenizer))
        params, _ = on_mesh(model, resized_params(params, model.config.vocab_size, known), {}, mesh)
    trainable: Tree
    if settings.adapter is not None:
        _, trainable, frozen, _ = load_adapter(settings.adapter, model, params, mesh=mesh)
    elif lora is not None:
        assert drawn is not None
        first, (key, values) = None if parting is None else parting.first, drawn.result()
        _, trainable, frozen = new_adapter(model, params, lora, key, mesh=mesh, first=first, drawn=values)
    else:
        trainable, frozen = (params, {}) if described.trainable else ({}, params)
    subtracted = {} if parting is None else parting.subtracted
    return replace(described, trainable=trainable, frozen=frozen, subtracted=subtracted, unread=None)


def _first_values(model: Model, lora: LoraConfig, seed: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The key of a seed and what a new adapter draws by it."""
    key = jax.random.key(seed)
    return key, draw(model, lora, key)


def choose_template(settings: Settings, tokenizer: PreTrainedTokenizerBase, known: Any) -> None:
    """Puts `--chat_template` on the tokenizer; without it says so where an adapter brought another one than `known`."""
    if settings.chat_template is not None:
        end = set_template(tokenizer, settings.chat_template)
        instead = " in place of the tokenizer's own" if known else ""
        print(f"chat template: {settings.chat_template}{instead}, turns end with {end}", file=sys.stderr)
    elif tokenizer.chat_template != known:
        print(f"chat template: that of {settings.adapter}", file=sys.stderr)


def resumed_factors(settings: TrainSettings) -> dict[str, Factors] | None:
    """What the run that is resumed subtracted from its base, None where there is no such run or it did not."""
    resumed = settings.resume_from_checkpoint
    if resumed is None:
        return None
    if resumed == "auto":
        places = [Path(settings.output_dir or ".").expanduser()]
    else:
        path = Path(resumed).expanduser()
        places = [path, *list(path.resolve().parents)[:2]]  # a run, its checkpoints, or one of them
    return next((read_factors(place / SUBTRACTED) for place in places if (place / SUBTRACTED).is_dir()), None)


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


def with_new_tokens(
    model: Model, tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> tuple[Model, tuple[str, ...]]:
    """Adds tokens to the tokenizer, which is changed, and describes the model with a row for each of its tokens.

    Returns (model, what was new).
    """
    known, rows = len(tokenizer), model.config.vocab_size
    new = add_tokens(tokenizer, tokens)
    there = f"; {len(tokens) - len(new)} of {len(tokens)} were there already" if len(new) < len(tokens) else ""
    print(f"tokens: {len(new)} added{there}", file=sys.stderr)
    if not new:
        return model, ()
    print(f"embedding: {len(tokenizer)} rows, {rows} before; the tokenizer had {known} tokens", file=sys.stderr)
    return resized(model, len(tokenizer)), tuple(new)


def lora_settings(settings: TrainSettings, tied: bool) -> LoraConfig:
    """The adapter that the flags ask for; tied: whether the model's head is its embedding.

    New tokens need both trained; a head that is the embedding then stays it, unless a flag says otherwise.
    """
    saved, tying = settings.saved_modules, bool(settings.ensure_weight_tying)
    if settings.add_tokens:
        saved = tuple(dict.fromkeys((*saved, *SAVABLE)))
        tying = tied if settings.ensure_weight_tying is None else tying
    if tying and not tied:
        raise InputError("--ensure_weight_tying: the head of this model is not its embedding; leave it out")
    return LoraConfig(
        r=settings.init_r if settings.peft_type == "adalora" else settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        adalora=AdaLora(**{name: getattr(settings, name) for name in ADALORA})
        if settings.peft_type == "adalora"
        else None,
        init_lora_weights=settings.init_lora_weights,
        loftq_iter=settings.loftq_iter,
        layers_to_transform=settings.lora_layers,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        modules_to_save=("embed_tokens",) if tying and saved else saved,
        ensure_weight_tying=tying,
    )


def check_kept_layers(settings: TrainSettings, mesh: Mesh) -> None:
    """Raises InputError where a mesh's scan over layers keeps none of them (`models.layers.scan_layers`)."""
    policy = settings.gradient_checkpointing
    if settings.kept_layers and not can_keep_layers(policy, mesh.size == 1):
        raise InputError(
            f"--kept_layers with --gradient_checkpointing {policy} is for one device; on {mesh.size} take one of "
            f"{', '.join(OFFLOADED)}"
        )


def _check_adapter(settings: TrainSettings, adapter: LoraConfig, model: Model) -> None:
    """Raises InputError where a given flag says something else than the adapter that training starts from."""
    tied = model.config.tie_word_embeddings
    given, flags = settings.settings_given, lora_settings(settings, tied)

    def contradiction(flag: str, asked: Any, found: Any) -> InputError:
        return InputError(f"--{flag} {asked} contradicts --adapter {settings.adapter}, whose {found}")

    fields = {
        "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
        "use_dora": "use_dora", "peft_type": "peft_type",
        "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "ensure_weight_tying": "ensure_weight_tying",
    }  # fmt: skip
    for flag, field in fields.items():
        asked, found = getattr(flags, field), getattr(adapter, field)
        if flag in given and asked != found:
            raise contradiction(flag, asked, f"{field} is {found}")
    if "modules_to_save" in given and set(saved_modules(flags, tied)) != set(saved_modules(adapter, tied)):
        raise contradiction(
            "modules_to_save", settings.modules_to_save, f"modules_to_save is {adapter.modules_to_save}"
        )
    for flag, field in (("lora_target_modules", "target_modules"), ("layers_to_transform", "layers_to_transform")):
        asked = getattr(flags, field)
        if flag in given and (
            wanted_branches(model, replace(adapter, **{field: asked})).keys() != wanted_branches(model, adapter).keys()
        ):
            raise contradiction(flag, getattr(settings, flag), f"{field} is {getattr(adapter, field)}")
