"""How flags and `--config` become one settings object, and how that object is written down again."""

import dataclasses
import difflib
import json
import re
import sys
import typing
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from jaxft.contradictions import check
from jaxft.errors import InputError
from jaxft.settings import (
    GROUPS,
    SETTINGS,
    DataSettings,
    EvaluateSettings,
    GenerateSettings,
    Settings,
    TrainSettings,
)
from jaxft.typed import JsonObject, is_expression

GIVEN_KEY = "settings_given"  # in a written config.yaml: which of its keys were chosen rather than left at defaults
_UNSET: Any = object()
# settings that are lists, and what separates their words: a token may hold a space
LISTS = {
    "lora_target_modules": ", ",
    "layers_to_transform": ", ",
    "modules_to_save": ", ",
    "add_tokens": ",",
    "report_to": ", ",
}


@typing.overload
def parse(command: Literal["train"], argv: list[str] | None = None) -> tuple[TrainSettings, dict[str, str]]: ...
@typing.overload
def parse(command: Literal["evaluate"], argv: list[str] | None = None) -> tuple[EvaluateSettings, dict[str, str]]: ...
@typing.overload
def parse(command: Literal["generate"], argv: list[str] | None = None) -> tuple[GenerateSettings, dict[str, str]]: ...
@typing.overload
def parse(command: Literal["data"], argv: list[str] | None = None) -> tuple[DataSettings, dict[str, str]]: ...
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
    check(settings, {name: f"--{name}" if name in flags else f"{path}: {name}" for name in values})
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

    kinds: dict[Any, str] = {int: "a whole number", float: "a number", JsonObject: 'JSON such as {"name": 1}'}

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
    lists = [name for name, kind in _fields(command).items() if typing.get_origin(kind) is list]
    # a list begins as None: argparse extends what it finds
    namespace = Namespace(**(dict.fromkeys(_fields(command), _UNSET) | dict.fromkeys(lists)))
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
        raise InputError(
            f"--config {path} cannot be read: {' '.join(str(failure).split())}; name a YAML file"
        ) from failure
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
            several = typing.get_origin(fields[key]) is list and isinstance(value, list)
            for one in value if several else [value]:
                tokens.append(f"--{key}={_token(key, one, str if several else fields[key], path)}")
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
    if value is False and "no" in typing.get_args(kind):
        return "no"  # as YAML reads a bare one
    if key in LISTS and isinstance(value, list) and all(type(name) in (str, int) for name in value):
        return ",".join(map(str, value))
    if key == "layers_to_transform" and type(value) is int:
        return str(value)
    if (kind is JsonObject and isinstance(value, dict)) or (key == "dataset" and isinstance(value, list)):
        return json.dumps(value, default=str, ensure_ascii=False)
    if key == "dataset_weights" and isinstance(value, list):
        return ",".join(map(str, value))
    if value is None or kind is str or kind == str | None or typing.get_origin(kind) is list:
        raise InputError(f"{path}: {key} is {value!r}; expected {'a value' if value is None else 'text (in quotes?)'}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _resolve(command: str, values: dict[str, Any]) -> Any:
    """The settings object: other spellings made one, defaults that depend on other settings filled in."""
    values = dict(values)
    for name in values.keys() & {"dataset", "dataset_weights"}:
        words = values[name]
        if name == "dataset" and not isinstance(words, str):
            values[name] = words[0] if len(words) == 1 else json.dumps(words, ensure_ascii=False)
        elif not isinstance(words, str):
            values[name] = ",".join(" ".join(words).replace(",", " ").split())
    if command in ("train", "data"):
        values.setdefault("learning_rate", 2e-5 if values.get("full_finetuning") else 2e-4)
        values.setdefault("eval_strategy", "steps" if values.get("eval_steps") else "no")
        spellings = {"true": "full", "false": "none", "adamw_torch": "adamw", "paged_adamw_32bit": "paged_adamw"}
        for name in values.keys() & {"gradient_checkpointing", "optim"}:
            values[name] = spellings.get(values[name], values[name])
        for name in values.keys() & LISTS.keys():
            values[name] = _join_words(name, values[name])
    return SETTINGS[command](**values)


def _join_words(name: str, words: list[str]) -> str:
    """A list of words as one text, separated by commas; a regular expression stays as it is typed."""
    if name == "lora_target_modules" and any(map(is_expression, words)):
        if len(words) > 1:
            raise InputError(f"--{name} {' '.join(words)!r}: a regular expression stands alone")
        return words[0]
    if LISTS[name] != ",":
        words = [part for word in words for part in word.split()]
    return ",".join(dict.fromkeys(part for word in words for part in word.split(",") if part))


def _is_choice(command: str, values: dict[str, Any], name: str) -> bool:
    """Whether `name` in `values` differs from what it would be if it were left out."""
    without = _resolve(command, {other: value for other, value in values.items() if other != name})
    return getattr(_resolve(command, values), name) != getattr(without, name)
