"""`python -m jaxft.convert args SOURCE`: settings for `jaxft.train` out of a script, YAML or command line of others.

    python -m jaxft.convert args train_unsloth.py > run.yaml
    python -m jaxft.convert args "trl sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name some/set --use_peft"

What is given there and means the same here becomes a line of YAML; so does a default of theirs that differs from
jaxft's. What has no counterpart is listed, in the YAML and on stderr. A script is read as text and never run.
"""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxft.config import parse
from jaxft.convert.arguments_table import DEFAULTS, rule_for, taken_by_name
from jaxft.convert.arguments_values import ALL_TURNS
from jaxft.convert.script import Given, Source, read_script
from jaxft.errors import InputError
from jaxft.settings import GROUPS, LoraArguments, TrainSettings

LORA_ORIGINS = {"LoraConfig", "FastLanguageModel.get_peft_model", "trl with --use_peft"}
# a setting that is given twice: the trainer's own counts
ORDER = ("SFTConfig", "UnslothTrainingArguments", "TrainingArguments", "SFTTrainer", "UnslothTrainer", "Trainer",
         "command", "LoraConfig", "FastLanguageModel.get_peft_model")  # fmt: skip
SECRET = ("token", "hub_token", "api_key")


class Taken(NamedTuple):
    """A setting of ours, and what to say about where it comes from."""

    value: Any
    remark: str


@dataclasses.dataclass(frozen=True)
class Converted:
    """What became of a source: our settings, what needs no setting here, and what is lost, each with a reason."""

    settings: dict[str, Taken]
    needless: list[str]
    lost: list[str]

    def to_yaml(self, source: str) -> str:
        """YAML for `--config`, with the lost settings as comments at its end."""
        lines = [f"# made from {source} by python -m jaxft.convert args"]
        for name, (value, remark) in self.settings.items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else _scalar(value)
            lines.append(f"{name}: {text}" + (f"  # {remark}" if remark else ""))
        for title, listed in (("no counterpart", self.lost), ("nothing to set", self.needless)):
            lines += [f"# {title}:"] * bool(listed) + [f"#   {line}" for line in listed]
        return "\n".join(lines) + "\n"


def convert(source: str) -> Converted:
    """The settings of a script or notebook (.py, .ipynb), a YAML file or a command line.

    Raises InputError where there are none, or the source cannot be read.
    """
    suffix = Path(source).suffix.lower() if "\n" not in source and len(source) < 4096 else ""
    if suffix in (".py", ".ipynb") and " " not in source.strip():
        return _settled(read_script(Path(source).expanduser()))
    if suffix in (".yaml", ".yml") and " " not in source.strip():
        return _settled(_as_trl([Given("command", *pair) for pair in read_yaml(Path(source).expanduser()).items()]))
    return _settled(read_command(source))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as failure:
        raise InputError(f"{path} cannot be read: {' '.join(str(failure).split())}; name a YAML file") from failure
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} holds a {type(content).__name__}; expected lines of name: value")
    return {name: _number(value) for name, value in content.items()}


def read_command(line: str) -> Source:
    """`trl sft --name value …`, or any program with such flags; those of a launcher stand before its script."""
    try:
        words = shlex.split(line.replace("\\\n", " "))
    except ValueError as failure:
        raise InputError(
            f"the command line cannot be taken apart: {failure}; put it into one pair of quotes"
        ) from failure
    starts = [i for i, word in enumerate(words) if word.endswith(".py") or word in ("sft", "SFT")]
    first = starts[0] + 1 if starts else next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    given: dict[str, Any] = {}
    name = None
    for word in words[first:]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = _number(value) if equals else True
        elif name is not None:
            before = given[name]
            given[name] = (
                _number(word) if before is True else [*(before if isinstance(before, list) else [before]), word]
            )
    if not given:
        raise InputError(f"{line!r} has no flags; give a .py, .ipynb or .yaml file, or a whole command line in quotes")
    config = given.pop("config", None)
    if config is not None:
        given = read_yaml(Path(str(config)).expanduser()) | given
    found = [Given("command", *pair) for pair in given.items()]
    launcher = [word for word in words[:first] if word.startswith("--")]
    found += [
        Given("command", word[2:], None, f"{word}: of the launcher; devices are a mesh here") for word in launcher
    ]
    if "trl" in words[:first]:
        return _as_trl(found)
    lora = any(one.name.startswith("lora_") or (one.name == "use_peft" and one.value) for one in found)
    return Source(found, {"LoraConfig"} if lora else {"command"})


def _as_trl(given: list[Given]) -> Source:
    """Settings by TRL's own names: there an adapter is trained only with use_peft."""
    adapter = any(one.name == "use_peft" and str(one.value).lower() == "true" for one in given)
    idle = [one for one in given if not adapter and (one.name.startswith("lora_") or one.name == "use_rslora")]
    rest = [one for one in given if one not in idle]
    rest += [one._replace(unread=f"{one.value}: without use_peft it had no effect") for one in idle]
    return Source(rest, {"trl", "trl with --use_peft"} if adapter else {"trl"})


def _settled(source: Source) -> Converted:
    """Rules, defaults and contradictions applied; what is left is accepted by `jaxft.train`."""
    settings: dict[str, Taken] = {}
    needless: list[str] = []
    lost: list[str] = []
    for one in sorted(source.given, key=lambda given: ORDER.index(given.origin) if given.origin in ORDER else 99):
        shown = "(not shown)" if one.name in SECRET else one.value
        if one.unread:
            lost.append(f"{one.name} = {one.unread}")
            continue
        rule = rule_for(one.origin, one.name)
        own = taken_by_name(rule, one.name)
        if rule is None and not own:
            lost.append(f"{one.name} = {shown}: unknown")
            continue
        made, remark, is_lost = ({one.name: one.value}, "", False) if rule is None else rule.act(one.name, one.value)
        if own and is_lost:
            made, remark, is_lost = {one.name: one.value}, "", False
        for name, value in made.items():
            if name in settings and settings[name].value != value:
                lost.append(f"{one.name} = {shown}: {name} is {settings[name].value} elsewhere")
                continue
            settings.setdefault(name, Taken(value, remark or ("" if name == one.name else f"{one.name} there")))
        if not made and remark:
            (lost if is_lost else needless).append(f"{one.name} = {shown}: {remark}")
    silent = not any(one.name == "assistant_only_loss" for one in source.given)
    if silent and "train_on" not in settings and source.origins & {"SFTConfig", "SFTTrainer", "trl"}:
        lost.append(f"assistant_only_loss is not given: {ALL_TURNS}")
    return _accepted(_with_defaults(settings, source.origins, lost), needless, lost)


def _with_defaults(settings: dict[str, Taken], origins: set[str], lost: list[str]) -> dict[str, Taken]:
    """What their calls mean where they are silent, and whether it is LoRA at all."""
    adapter = bool(origins & LORA_ORIGINS)
    if not adapter and origins - {"from_pretrained", "BitsAndBytesConfig"}:
        settings.setdefault("full_finetuning", Taken(True, "no LoRA was asked for"))
    full = "full_finetuning" in settings and settings["full_finetuning"].value is True
    for origin in (origin for origin in DEFAULTS if origin in origins):
        for name, value in DEFAULTS[origin].items():
            if not (full and name in ("load_in_4bit", *LoraArguments.__annotations__)):
                settings.setdefault(name, Taken(value, f"the default of {origin}"))
    if "max_steps" in settings and float(settings["max_steps"].value) < 0:
        settings.pop("max_steps")
    if full:
        for name in [name for name in settings if name in LoraArguments.__annotations__ and name != "full_finetuning"]:
            lost.append(f"{name} = {settings.pop(name).value}: all weights are trained")
    return settings


def _accepted(settings: dict[str, Taken], needless: list[str], lost: list[str]) -> Converted:
    """Without those that `jaxft.train` refuses, each listed with its words; typed and in the settings' own order."""
    while True:
        try:
            checked, _ = parse("train", _flags(settings))
            break
        except InputError as failure:
            culprit = next((name for name in _by_suspicion(settings) if _passes(settings, name, str(failure))), None)
            if culprit is None:
                raise
            lost.append(f"{culprit} = {settings.pop(culprit).value}: {failure}")
    names = [field.name for field in dataclasses.fields(TrainSettings) if field.name in settings]
    order = [name for group in GROUPS["train"] for name in group.__annotations__]
    names.sort(key=order.index)
    typed = {}
    for name in names:
        value = getattr(checked, name)
        typed[name] = Taken(dict(value) if isinstance(value, dict) else value, settings[name].remark)
    return Converted(typed, needless, lost)


def _by_suspicion(settings: dict[str, Taken]) -> list[str]:
    """Names in the order in which they are given up: what says what is trained comes last."""
    return sorted(settings, key=lambda name: name in ("full_finetuning", "model_name_or_path", "dataset"))


def _passes(settings: dict[str, Taken], without: str, failure: str) -> bool:
    """Whether leaving one setting out makes this failure go away; another may show then."""
    try:
        parse("train", _flags({name: taken for name, taken in settings.items() if name != without}))
    except InputError as other:
        return str(other) != failure
    return True


def _flags(settings: dict[str, Taken]) -> list[str]:
    words = []
    for name, (value, _) in settings.items():
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, dict) or (name == "dataset" and isinstance(value, list)):
            text = json.dumps(value, ensure_ascii=False)
        else:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words.append(f"--{name}={text}")
    return words


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, width=10_000, allow_unicode=True).removesuffix("...\n").strip()


def _number(value: Any) -> Any:
    """Text that is a number as that number: YAML reads 2e-4 as text, and a command line has text only."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
