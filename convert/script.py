"""The settings that a Python script gives to transformers, TRL, PEFT or Unsloth: read from its text, never run."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.convert.arguments_table import ORIGINS
from jaxft.errors import InputError

OTHER_TRAINING = ("DPOConfig", "GRPOConfig", "ORPOConfig", "KTOConfig", "PPOConfig", "RLOOConfig", "CPOConfig",
                  "RewardConfig", "GKDConfig")  # fmt: skip
EARLY_STOPPING = ("early_stopping_patience", "early_stopping_threshold")  # in the order in which it takes them
BFLOAT16_ASKED = ("is_bfloat16_supported", "is_bf16_supported", "is_torch_bf16_gpu_available")


class Given(NamedTuple):
    """One setting as a source gives it: where (a key of ORIGINS), its name and value, or why the value is unknown."""

    origin: str
    name: str
    value: Any
    unread: str = ""


class Source(NamedTuple):
    """All that a script, a YAML file or a command line gives, and which calls or commands it has (DEFAULTS)."""

    given: list[Given]
    origins: set[str]


class Unread(Exception):
    """A value that only running the script would tell."""


class Script:
    """The text of a script, and what its plain assignments say."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            self.tree = ast.parse(_cells(text) if path.suffix == ".ipynb" else text)
        except (OSError, ValueError, KeyError, TypeError, SyntaxError) as failure:
            raise InputError(
                f"{path} cannot be read as Python: {' '.join(str(failure).split())}; name a script that runs"
            ) from failure
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                targets: list[ast.expr] = node.targets
            else:
                targets = [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in targets:
                if isinstance(target, ast.Name) and node.value is not None:  # type: ignore[attr-defined]
                    self.assigned.setdefault(target.id, []).append(node.value)  # type: ignore[attr-defined]

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Every call in the order of the text, with the last word of what is called."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        for node in sorted(found, key=lambda call: (call.lineno, call.col_offset)):
            yield _last_word(node.func), node

    def value(self, node: ast.expr) -> Any:
        """What an expression of literals and of names set once is. Raises Unread for any other."""
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple() | ast.Set():
                return [self.value(item) for item in node.elts]
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                return {self.value(key): self.value(item) for key, item in pairs if key is not None}
            case ast.Name(id=name):
                values = {ast.dump(one): one for one in self.assigned.get(name, [])}
                if len(values) != 1:
                    raise Unread("it is set nowhere" if not values else "it is set more than once")
                return self.value(next(iter(values.values())))
            case ast.Attribute(attr=attr) if _root(node) in ("torch", "SchedulerType", "OptimizerNames"):
                return attr.lower()
            case ast.Subscript():
                held, key = self.value(node.value), self.value(node.slice)
                try:
                    return held[key]
                except (KeyError, IndexError, TypeError) as failure:
                    raise Unread(f"it has no {key!r}") from failure
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(op=ast.Mult() | ast.Add() | ast.Sub() | ast.FloorDiv() | ast.Pow()):
                return self._computed(node)
            case ast.JoinedStr(values=parts):
                return "".join(str(self.value(part)) for part in parts)
            case ast.FormattedValue(value=inner, format_spec=None):
                return self.value(inner)
            case ast.Call(func=ast.Name(id="dict" | "LoftQConfig"), args=[], keywords=words):
                return {word.arg: self.value(word.value) for word in words if word.arg}
        raise Unread("only running it would tell")

    def _computed(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        texts = isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add)
        small = all(isinstance(one, int | float) and abs(one) < 2**40 for one in (left, right))
        if not texts and (not small or (isinstance(node.op, ast.Pow) and abs(right) > 40)):
            raise Unread("only running it would tell")
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Pow():
                return left**right
        if right == 0:
            raise Unread("it divides by 0")
        return left // right

    def keywords(self, origin: str, call: ast.Call) -> Iterator[Given]:
        """The keyword arguments of a call; **settings of a dict that is written out count."""
        for word in call.keywords:
            if word.arg is not None:
                yield self.given(origin, word.arg, word.value)
                continue
            try:
                for name, value in dict(self.value(word.value)).items():
                    yield Given(origin, str(name), value)
            except (Unread, TypeError, ValueError) as failure:
                yield Given(origin, f"**{ast.unparse(word.value)}", None, str(failure))

    def given(self, origin: str, name: str, node: ast.expr) -> Given:
        try:
            return Given(origin, name, self.value(node))
        except Unread as failure:
            return Given(origin, name, None, f"{ast.unparse(node)}: {failure}")


def read_script(path: Path) -> Source:
    """Every setting that a script or notebook gives. Raises InputError where it gives none, or trains otherwise."""
    script = Script(path)
    found: list[Given] = []
    origins: set[str] = set()
    others = []
    for word, call in script.calls():
        owner = _last_word(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        origin = f"FastLanguageModel.{word}" if owner.startswith("Fast") else word
        if word == "train_on_responses_only":
            found.append(Given("SFTConfig", "assistant_only_loss", True))
        elif word == "EarlyStoppingCallback":
            found += _early_stopping(script, call)
        elif word == "get_chat_template":
            found += [one for one in script.keywords("SFTConfig", call) if one.name == "chat_template"]
        elif word in OTHER_TRAINING:
            others.append(word)
        elif word == "from_pretrained" and owner.startswith("Fast") + ("ForCausalLM" in owner) == 0:
            continue  # of a tokenizer, say
        elif origin in ORIGINS and origin not in ("command", "load_dataset"):
            origins.add(origin)
            if word == "from_pretrained" and call.args:
                found.append(script.given(origin, "pretrained_model_name_or_path", call.args[0]))
            found += [given for given in script.keywords(origin, call) if not _is_object(given, script, call)]
            if word.endswith("Trainer"):
                found += _named_model(call)
    if others and not origins & {"SFTConfig", "TrainingArguments", "UnslothTrainingArguments"}:
        raise InputError(f"{path} trains by {others[0]}; jaxft trains on given answers only (SFTConfig)")
    if not origins:
        raise InputError(f"{path} calls none of {', '.join(ORIGINS)}; name the script that trains")
    return Source([*found, *_data_sets(script)], origins)


def _early_stopping(script: Script, call: ast.Call) -> list[Given]:
    """What `EarlyStoppingCallback(…)` says; silent about its patience, it waits for one evaluation."""
    found = [script.given("SFTConfig", *pair) for pair in zip(EARLY_STOPPING, call.args, strict=False)]
    found += [one for one in script.keywords("SFTConfig", call) if one.name in EARLY_STOPPING]
    silent = all(one.name != "early_stopping_patience" for one in found)
    return found + [Given("SFTConfig", "early_stopping_patience", 1)] * silent


def _named_model(call: ast.Call) -> list[Given]:
    """The model that a trainer is given by its name."""
    node = next((word.value for word in call.keywords if word.arg == "model"), call.args[0] if call.args else None)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [Given("from_pretrained", "pretrained_model_name_or_path", node.value)]
    return []


def _data_sets(script: Script) -> list[Given]:
    """The data set that is trained on, the one that is held out, and what is done to their rows."""
    every = [call for word, call in script.calls() if word == "load_dataset"]
    loads: dict[str, ast.Call] = {}
    for name, values in script.assigned.items():
        for call in (node for value in values for node in ast.walk(value) if node in every):
            assert isinstance(call, ast.Call)
            loads.setdefault(name, call)
    words = {
        keyword.arg: keyword.value
        for word, call in script.calls() if word.endswith("Trainer") and word in ORIGINS for keyword in call.keywords
    }  # fmt: skip
    found: list[Given] = []
    parted = any(word == "train_test_split" for word, _ in script.calls())
    trained: str | None = None
    for role, default in (("train_dataset", every[:1]), ("eval_dataset", [])):
        given = words.get(role)
        inside = [] if given is None else list(ast.walk(given))
        named = next((node.id for node in inside if isinstance(node, ast.Name)), None)
        behind = loads.get(_behind(script, named, loads))
        calls = [call for call in every if call in inside] or ([behind] if behind else default)
        part = given.slice if isinstance(given, ast.Subscript) and not parted else None
        if parted and role == "eval_dataset" and calls and calls[0] is loads.get(_behind(script, trained, loads)):
            continue  # the rows that are held out of those that are trained on
        trained = named
        found += _of_load(script, calls[0], role == "eval_dataset", part) if calls else []
    for word, call in script.calls():
        if word == "train_test_split":
            found += [script.given("load_dataset", "eval_split", one.value) for one in call.keywords
                      if one.arg == "test_size"]  # fmt: skip
        elif word == "map" and isinstance(call.func, ast.Attribute):
            found.append(Given("load_dataset", "map", ast.unparse(call.args[0]) if call.args else "rows"))
    return found


def _behind(script: Script, name: str | None, loads: dict[str, ast.Call]) -> str:
    """The name that a load_dataset was assigned to, through `split = dataset.map(…)` and the like."""
    seen: set[str] = set()
    while name is not None and name not in loads and name not in seen:
        seen.add(name)
        used = [n.id for value in script.assigned.get(name, []) for n in ast.walk(value) if isinstance(n, ast.Name)]
        name = next((one for one in used if one not in seen), None)
    return name or ""


def _of_load(script: Script, call: ast.Call, held_out: bool, part: ast.expr | None) -> list[Given]:
    """`load_dataset(…)` as our settings; `part` is the "test" of the dataset["test"] that a trainer was given."""
    words = {word.arg: word.value for word in call.keywords if word.arg}
    role, setting, usual = (
        ("eval_dataset", "dataset_test_split", "test") if held_out else ("dataset", "dataset_train_split", "train")
    )
    files, path = words.get("data_files"), call.args[0] if call.args else words.get("path")
    source, chosen = files if files is not None else path, part if part is not None else words.get("split")
    try:
        split = None if chosen is None else script.value(chosen)
        name = None if source is None else script.value(source)
    except Unread as failure:
        return [Given("load_dataset", role, None, f"{ast.unparse(call)}: {failure}")]
    if isinstance(name, dict) and name:
        name = name.get(str(split), next(iter(name.values())))
    found = [Given("load_dataset", role, name[0] if isinstance(name, list) and len(name) == 1 else name)]
    config = call.args[1] if len(call.args) > 1 else words.get("name")
    if config is not None and files is None:
        found.append(script.given("load_dataset", "dataset_config", config))
    if isinstance(split, str) and "[" in split:
        rows = f"{split}: rows are not cut out here; write them to a file"
        found.append(Given("load_dataset", f"split of {role}", None, rows))
        split = split.split("[")[0]
    if isinstance(split, str) and split not in ("", usual) and files is None:
        found.append(Given("load_dataset", setting, split))
    if "streaming" in words and not held_out:
        found.append(script.given("load_dataset", "dataset_streaming", words["streaming"]))
    return found


def _is_object(given: Given, script: Script, call: ast.Call) -> bool:
    """Whether a value is an object made by a call that is read itself, or whether it asks what the card can do."""
    node = next((word.value for word in call.keywords if word.arg == given.name), None)
    if not given.unread or node is None:
        return False
    nodes = [node, *script.assigned.get(node.id, [])] if isinstance(node, ast.Name) else [node]
    called = {_last_word(one.func) for top in nodes for one in ast.walk(top) if isinstance(one, ast.Call)}
    if given.name == "callbacks" and called == {"EarlyStoppingCallback"}:
        return True
    if given.name in ("bf16", "fp16") and called & set(BFLOAT16_ASKED):
        return True  # bfloat16 where the card has it: what jaxft does by itself
    objects = ("model", "tokenizer", "processing_class", "train_dataset", "eval_dataset", "args", "peft_config")
    return bool(called & ORIGINS.keys()) or given.name in objects


def _cells(text: str) -> str:
    """The Python of a notebook, without its shell and magic lines."""
    sources = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [line for source in sources for line in ("".join(source)).splitlines()]
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def _last_word(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
