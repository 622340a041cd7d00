"""Settings of the commands: which flags there are, their defaults, and how flags and `--config` become one object."""

import dataclasses
import difflib
import json
import math
import re
import sys
import typing
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import yaml

from jaxft.errors import InputError
from jaxft.sharding import MESH_AXES

SCHEDULES = (
    *("linear", "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "cosine_with_min_lr"),
    *("polynomial", "inverse_sqrt", "warmup_stable_decay"),
)
GIVEN_KEY = "settings_given"  # in a written config.yaml: which of its keys were chosen rather than left at defaults


class JsonObject(dict[str, Any]):
    """A dict that is typed on the command line as a JSON object."""

    def __init__(self, source: Any = ()) -> None:
        value = json.loads(source) if isinstance(source, str) else source
        if isinstance(source, str) and not isinstance(value, dict):
            raise ValueError(f"{source} is not a JSON object")
        super().__init__(value)


def _flag(default: Any, help: str, **options: Any) -> Any:
    """A field that becomes a flag; `options` go to argparse's add_argument."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    _argument_group_name: ClassVar[str] = "model"
    model_name_or_path: str | None = _flag(None, "a local model directory, or a name on the hub")
    adapter: str | None = _flag(None, "start from this PEFT LoRA adapter; r, alpha and targets come from its config")
    dtype: Literal["float32", "bfloat16", "float16"] | None = _flag(None, "float32 on a CPU, else bfloat16")
    bf16: bool | None = _flag(None, "compute in bfloat16; false is float32", nargs="?", const=True)
    fp16: bool | None = _flag(None, "compute in float16", nargs="?", const=True)
    max_length: int = _flag(1024, "longest row in tokens")
    load_in_4bit: bool = _flag(False, "hold the base's linear layers in 4 bits (NF4, double quantisation)")
    load_in_8bit: bool = _flag(False, "hold the base's linear layers in 8 bits")
    mesh: str | None = _flag(None, "devices by axis, such as data=2,fsdp=4; without it all local devices are data")
    debug: bool = _flag(False, "show the traceback of an error")

    def param_dtype(self, platform_dtype: str) -> str:
        """Dtype in which weights are held; `platform_dtype` is the default: float32 on a CPU, else bfloat16."""
        return self.dtype or self.compute_dtype(platform_dtype)

    def compute_dtype(self, platform_dtype: str) -> str:
        """Dtype of the matmuls. `--dtype float32 --bf16` holds float32 and computes in bfloat16."""
        if self.bf16:
            return "bfloat16"
        if self.fp16:
            return "float16"
        return self.dtype or ("float32" if self.bf16 is False else platform_dtype)

    @property
    def quantization(self) -> str | None:
        """How the base's linear layers are held: 'nf4', 'int8', or None for as the files have them."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else None

    @property
    def mesh_axes(self) -> dict[str, int] | None:
        """`--mesh data=2,fsdp=4` as {'data': 2, 'fsdp': 4}; None where it is not given."""
        if self.mesh is None:
            return None
        axes: dict[str, int] = {}
        for part in self.mesh.split(","):
            name, _, size = (word.strip() for word in part.partition("="))
            if name not in MESH_AXES or name in axes or not size.isdecimal() or int(size) < 1:
                raise InputError(f"--mesh {self.mesh!r}: expected {', '.join(MESH_AXES)} such as data=2,fsdp=4")
            axes[name] = int(size)
        return axes


@dataclasses.dataclass(frozen=True)
class LoraArguments:
    _argument_group_name: ClassVar[str] = "LoRA"
    lora_r: int = _flag(16, "rank")
    lora_alpha: int = _flag(16, "the branch is scaled by alpha / r")
    lora_dropout: float = _flag(0.0, "dropout on the input of the branch")
    lora_target_modules: str = _flag("all-linear", "all-linear, or names (q_proj,v_proj)", nargs="+")
    use_rslora: bool = _flag(False, "scale by alpha / sqrt(r)")
    full_finetuning: bool = _flag(False, "train every weight, without LoRA")

    @property
    def lora_targets(self) -> Literal["all-linear"] | tuple[str, ...]:
        """`lora_target_modules` taken apart: 'all-linear' or the module names."""
        return "all-linear" if self.lora_target_modules == "all-linear" else tuple(self.lora_target_modules.split(","))


@dataclasses.dataclass(frozen=True)
class DataArguments:
    _argument_group_name: ClassVar[str] = "data"
    dataset: str | None = _flag(None, "a local file, a directory, or a name on the hub")
    eval_dataset: str | None = _flag(None, "the same, held out for evaluation")
    dataset_config: str | None = _flag(None, "configuration of a hub dataset")
    dataset_train_split: str = _flag("train", "split to train on")
    dataset_test_split: str = _flag("test", "split to evaluate on")
    train_on: Literal["responses", "all"] = _flag("responses", "tokens that count in the loss")
    packing: bool = _flag(True, "put several documents into one row")
    per_device_eval_batch_size: int = _flag(8, "rows a device in evaluation")
    shuffle_dataset: bool = _flag(True, "false keeps the order of the data")


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    _argument_group_name: ClassVar[str] = "training"
    output_dir: str | None = _flag(None, "where everything is written; without it a new runs/MODEL-N")
    learning_rate: float | None = _flag(None, "without it 2e-4, or 2e-5 for --full_finetuning")
    lr_scheduler_type: str = _flag("linear", "schedule of the learning rate", choices=SCHEDULES)
    lr_scheduler_kwargs: JsonObject = dataclasses.field(
        default_factory=JsonObject, metadata={"help": 'its further settings as JSON, such as {"min_lr": 1e-6}'}
    )
    warmup_steps: int = _flag(0, "steps of linear warm-up")
    warmup_ratio: float | None = _flag(None, "warm-up as a share of all steps, instead of --warmup_steps")
    weight_decay: float = _flag(0.0, "decoupled decay; norms and biases never decay")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_epsilon: float = _flag(1e-8, "added to the root of the second moment")
    max_grad_norm: float = _flag(1.0, "clip gradients to this global norm; 0 does not clip")
    num_train_epochs: float = _flag(3.0, "passes over the data")
    max_steps: int = _flag(-1, "optimizer steps instead of epochs; -1 counts epochs")
    per_device_train_batch_size: int = _flag(8, "rows a device and micro-batch")
    gradient_accumulation_steps: int = _flag(1, "micro-batches an optimizer step")
    gradient_checkpointing: Literal["full", "none", "offload", "attention", "products", "true", "false"] = _flag(
        "full",
        "full (or true) recomputes each layer in the backward pass; offload also keeps its input on the host; "
        "attention and products keep more on the device and recompute less; none (or false) keeps all",
        nargs="?",
        const="full",
    )
    optim: Literal["adamw", "adamw_torch", "adamw_8bit"] = _flag("adamw", "adamw_torch is adamw; 8bit: its moments")
    logging_steps: int = _flag(1, "steps a line of metrics")
    save_steps: int = _flag(500, "steps a checkpoint; 0 saves at the end only")
    save_total_limit: int | None = _flag(None, "keep the newest N checkpoints")
    resume_from_checkpoint: str | None = _flag(None, "auto, or the directory of a checkpoint")
    sample_prompts: int = _flag(0, "answer the first N held-out prompts before and after the run")
    eval_steps: int = _flag(0, "steps an evaluation; 0 evaluates at the end only")
    seed: int = _flag(0, "seed of everything random")


@dataclasses.dataclass(frozen=True)
class GenerateArguments:
    _argument_group_name: ClassVar[str] = "generation"
    prompt: str | None = _flag(None, "text to continue")
    messages: str | None = _flag(None, "JSON file of a conversation, rendered with the chat template")
    chat: bool = _flag(False, "the prompt is a user's turn, rendered with the chat template")
    max_new_tokens: int = _flag(128, "most tokens to generate")
    temperature: float = _flag(0.0, "0 is greedy")
    top_p: float = _flag(1.0, "sample from the most probable tokens that make up this much probability")
    seed: int = _flag(0, "seed of sampling")


@dataclasses.dataclass(frozen=True)
class _Origin:
    """`settings_given`: names that were set by a flag or YAML; `settings_ignored`: YAML keys of other commands."""

    settings_given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    settings_ignored: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)


@dataclasses.dataclass(frozen=True)
class TrainSettings(_Origin, TrainArguments, DataArguments, LoraArguments, ModelArguments):
    """Everything `jaxft.train` can be told; what depends on other settings is filled in."""

    learning_rate: float = 2e-4


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(_Origin, DataArguments, ModelArguments):
    """Everything `jaxft.evaluate` can be told."""


@dataclasses.dataclass(frozen=True)
class GenerateSettings(_Origin, GenerateArguments, ModelArguments):
    """Everything `jaxft.generate` can be told."""


Settings = TrainSettings | EvaluateSettings | GenerateSettings

GROUPS: dict[str, tuple[Any, ...]] = {
    "train": (ModelArguments, LoraArguments, DataArguments, TrainArguments),
    "evaluate": (ModelArguments, DataArguments),
    "generate": (ModelArguments, GenerateArguments),
}
SETTINGS: dict[str, type] = {"train": TrainSettings, "evaluate": EvaluateSettings, "generate": GenerateSettings}

RANGES: list[tuple[str, str, Callable[[float], bool]]] = [
    ("learning_rate weight_decay max_grad_norm temperature", "at least 0", lambda x: x >= 0),
    ("warmup_steps save_steps eval_steps sample_prompts", "at least 0", lambda x: x >= 0),
    ("lora_r lora_alpha logging_steps save_total_limit gradient_accumulation_steps", "at least 1", lambda x: x >= 1),
    ("max_new_tokens per_device_train_batch_size per_device_eval_batch_size", "at least 1", lambda x: x >= 1),
    ("lora_dropout adam_beta1 adam_beta2", "at least 0 and below 1", lambda x: 0 <= x < 1),
    ("adam_epsilon num_train_epochs", "above 0", lambda x: x > 0),
    ("warmup_ratio", "from 0 to 1", lambda x: 0 <= x <= 1),
    ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
    ("max_length", "at least 2", lambda x: x >= 2),
    ("max_steps", "at least 1, or -1 to count epochs", lambda x: x == -1 or x >= 1),
    ("seed", "from 0 to 4294967295", lambda x: 0 <= x < 2**32),
]
_UNSET: Any = object()


@typing.overload
def parse(command: Literal["train"], argv: list[str] | None = None) -> tuple[TrainSettings, dict[str, str]]: ...
@typing.overload
def parse(command: Literal["evaluate"], argv: list[str] | None = None) -> tuple[EvaluateSettings, dict[str, str]]: ...
@typing.overload
def parse(command: Literal["generate"], argv: list[str] | None = None) -> tuple[GenerateSettings, dict[str, str]]: ...
def parse(command: str, argv: list[str] | None = None) -> tuple[Any, dict[str, str]]:
    """The settings of `command` from `argv` (None: the process's own): flags win over `--config`, that over defaults.

    Returns the settings and the provenance: for every setting that is not a default, 'flag' or the YAML file's path.
    `--help` prints the flags and exits. Raises InputError for anything that is unknown, of the wrong kind, out of
    range or contradictory.
    """
    flags = _read_tokens(_make_parser(command, "--"), sys.argv[1:] if argv is None else argv, command)
    path = flags.pop("config", None)
    from_yaml, ignored = _read_config(command, path) if path is not None else ({}, set())
    values = from_yaml | flags
    source = dict.fromkeys(from_yaml, str(path)) | dict.fromkeys(flags, "flag")
    settings = _resolve(command, values)
    _check(settings, {name: f"--{name}" if name in flags else f"{path}: {name}" for name in values})
    provenance = {name: source[name] for name in values if _is_choice(command, values, name)}
    settings = dataclasses.replace(settings, settings_given=frozenset(values), settings_ignored=frozenset(ignored))
    return settings, provenance


def describe(settings: Settings, provenance: dict[str, str]) -> list[str]:
    """One line for every setting in `provenance`: its name, its value, where it came from."""
    names = [field.name for field in dataclasses.fields(settings) if field.name in provenance]
    lines = [f"{name} = {getattr(settings, name)} ({provenance[name]})" for name in names]
    if settings.settings_ignored:
        lines.append(f"{len(settings.settings_ignored)} settings of other commands in the config are not used here")
    return lines


def to_yaml(settings: Settings) -> str:
    """All settings as YAML that `--config` reads back to the same settings and the same `settings_given`."""
    values = dataclasses.asdict(settings)
    values.pop("settings_ignored")
    given = sorted(values.pop("settings_given"))
    values = {name: dict(value) if isinstance(value, JsonObject) else value for name, value in values.items()}
    return yaml.safe_dump({**values, GIVEN_KEY: given}, sort_keys=False, allow_unicode=True)


def _fields(command: str) -> dict[str, Any]:
    """Name and type of everything that `command` can be told."""
    hints = [typing.get_type_hints(group) for group in GROUPS[command]]
    return {name: kind for group in hints for name, kind in group.items() if not name.startswith("_")}


def _make_parser(command: str, where: str) -> ArgumentParser:
    """transformers' parser with this package's errors; `where` is what stands before a name in them."""
    from transformers.hf_argparser import HfArgumentParser  # imported here because it takes about a second

    kinds: dict[Any, str] = {int: "a whole number", float: "a number", JsonObject: 'JSON such as {"min_lr": 1e-6}'}

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message} (a value that begins with '-' is written --name=VALUE)")

        def _get_value(self, action: Action, arg_string: str) -> Any:
            try:
                return super()._get_value(action, arg_string)
            except ArgumentError:
                kind = kinds.get(action.type, "true or false")
                raise InputError(f"{where}{action.dest} is {arg_string!r}; expected {kind}") from None

        def _check_value(self, action: Action, value: Any) -> None:
            if action.choices is not None and value not in action.choices:
                raise InputError(f"{where}{action.dest} is {value!r}; expected one of {', '.join(action.choices)}")

    parser = Parser(GROUPS[command], prog=f"python -m jaxft.{command}", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings; flags win over it")
    return parser


def _read_tokens(parser: ArgumentParser, tokens: list[str], command: str) -> dict[str, Any]:
    """Only what `tokens` set: argparse leaves alone what a namespace has already."""
    namespace = Namespace(**dict.fromkeys(_fields(command), _UNSET))
    _, unknown = parser.parse_known_args(tokens, namespace)
    if unknown:
        raise _unknown(command, next((word for word in unknown if word.startswith("-")), unknown[0]), "")
    return {name: value for name, value in vars(namespace).items() if value is not _UNSET and value is not None}


def _unknown(command: str, name: str, where: str) -> InputError:
    dashes = "" if where else "--"
    if dashes and not name.startswith("-"):
        return InputError(f"{name!r} stands alone; settings are written --name VALUE")
    bare = name.lstrip("-").split("=")[0].replace("-", "_")
    advice = f"see python -m jaxft.{command} --help"
    if owners := [other for other in GROUPS if bare in _fields(other)]:
        advice = f"it belongs to jaxft.{owners[0]}"
    elif close := difflib.get_close_matches(bare, [*_fields(command), "config"] if dashes else _fields(command), 1):
        advice = f"did you mean {dashes}{close[0]}?"
    return InputError(f"{where}unknown {'flag' if dashes else 'key'} {name.split('=')[0]}; {advice}")


class _Loader(yaml.SafeLoader):
    """YAML that reads 2e-4 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]} stands twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _read_config(command: str, path: str) -> tuple[dict[str, Any], set[str]]:
    """The settings that a YAML file chooses, and its keys that other commands understand."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError) as failure:
        raise InputError(f"--config {path} cannot be read: {' '.join(str(failure).split())}") from failure
    if not isinstance(content, dict | None):
        raise InputError(f"--config {path} holds a {type(content).__name__}; expected lines of name: value")
    content = content or {}
    listed = content.pop(GIVEN_KEY, None)
    fields = _fields(command)
    elsewhere = {name for other in GROUPS for name in _fields(other)} - fields.keys()
    tokens = []
    for key, value in content.items():
        if key not in fields and key not in elsewhere:
            raise _unknown(command, str(key), f"{path}: ")
        if key in fields and (value is not None or type(None) not in typing.get_args(fields[key])):
            tokens.append(f"--{key}={_token(key, value, fields[key], path)}")
    values = _read_tokens(_make_parser(command, f"{path}: "), tokens, command)
    if listed is not None:  # a config.yaml that jaxft wrote: the other keys count only where they were edited
        if not isinstance(listed, list):
            raise InputError(f"{path}: {GIVEN_KEY} is {listed!r}; expected a list of names")
        chosen = {name: value for name, value in values.items() if name in listed}
        edited = {name: values[name] for name in values if _is_choice(command, chosen | {name: values[name]}, name)}
        values = chosen | edited
    return values, elsewhere & content.keys()


def _token(key: str, value: Any, kind: Any, path: str) -> str:
    """A YAML value as it would be typed after the flag."""
    if isinstance(value, str):
        return value
    if key == "lora_target_modules" and isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    if kind is JsonObject and isinstance(value, dict):
        return json.dumps(value, default=str)
    if value is None or kind is str or kind == str | None:
        raise InputError(f"{path}: {key} is {value!r}; expected {'a value' if value is None else 'text (in quotes?)'}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _resolve(command: str, values: dict[str, Any]) -> Any:
    """The settings object: other spellings made one, defaults that depend on other settings filled in."""
    values = dict(values)
    if command == "train":
        values.setdefault("learning_rate", 2e-5 if values.get("full_finetuning") else 2e-4)
        spellings = {"true": "full", "false": "none", "adamw_torch": "adamw"}
        for name in values.keys() & {"gradient_checkpointing", "optim"}:
            values[name] = spellings.get(values[name], values[name])
        if "lora_target_modules" in values:
            names = " ".join(values["lora_target_modules"]).replace(",", " ").split()
            values["lora_target_modules"] = ",".join(dict.fromkeys(names))
    return SETTINGS[command](**values)


def _is_choice(command: str, values: dict[str, Any], name: str) -> bool:
    """Whether `name` in `values` differs from what it would be if it were left out."""
    without = _resolve(command, {other: value for other, value in values.items() if other != name})
    return getattr(_resolve(command, values), name) != getattr(without, name)


def _check(settings: Any, where: dict[str, str]) -> None:
    """Raises InputError for values out of range and for contradictions; `where` names the place of each."""
    for name, text, fits in ((name, text, fits) for names, text, fits in RANGES for name in names.split()):
        value = getattr(settings, name, None)
        if value is not None and not (abs(value) < math.inf and fits(value)):
            raise InputError(f"{where[name]} is {value}; it must be {text}")
    exclusive = (
        *(("bf16", "fp16"), ("warmup_steps", "warmup_ratio"), ("prompt", "messages"), ("load_in_4bit", "load_in_8bit")),
        *(("load_in_4bit", "full_finetuning"), ("load_in_8bit", "full_finetuning")),
    )
    for one, two in exclusive:
        if getattr(settings, one, None) and getattr(settings, two, None):
            raise InputError(f"{where[one]} and {where[two]} contradict each other; choose one")
    for dtype, own, other in (("bfloat16", "bf16", "fp16"), ("float16", "fp16", "bf16")):
        if settings.dtype == dtype and (getattr(settings, own) is False or getattr(settings, other)):
            name = other if getattr(settings, other) else own
            value = str(getattr(settings, name)).lower()
            raise InputError(f"{where['dtype']} {dtype} and {where[name]} {value} contradict each other; choose one")
    _ = settings.mesh_axes  # raises where it cannot be read
    if isinstance(settings, TrainSettings):
        targets = settings.lora_target_modules.split(",")
        if targets == [""] or ("all-linear" in targets and len(targets) > 1):
            raise InputError(f"--lora_target_modules {settings.lora_target_modules!r}: expected all-linear or names")
        lora = [name for name in where if name.startswith(("lora_", "use_rslora")) and where[name].startswith("--")]
        if settings.full_finetuning and lora:
            raise InputError(f"{where[lora[0]]} has no meaning with --full_finetuning, which trains without LoRA")
