"""The formats of rows: by which columns each is known, and how its rows become texts or tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.chat import Rendered, left_out, render_conversation, trained_tokens
from jaxft.columns import Columns
from jaxft.errors import InputError
from jaxft.messages import as_object, function_of, parse_json, shown, without_none
from jaxft.samples import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

IGNORED = -100
CHAT_EXTRAS = ("tools", "chat_template_kwargs")
ROLES = ("system", "developer", "user", "assistant", "tool")  # others may be a template's own, or a slip
# ShareGPT's names of speakers, and the roles that templates know
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
SPEAKERS |= {"model": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
SPEAKERS |= {"function_response": "tool", "function_call": "assistant"}


@dataclass(frozen=True)
class Format:
    """One kind of row: its name, the columns it must have, and those it may have."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


# In order: a set with several kinds of columns at once (Alpaca's own has `text` too) is read as the first that fits.
SINGLE = ("template", "question/answer", "prompt/completion", "Alpaca")  # formats of one question and one answer
FORMATS = (
    Format("tokenised", ("input_ids",), ("labels", "attention_mask")),
    Format("messages", ("messages",), CHAT_EXTRAS),
    Format("ShareGPT", ("conversations",), ("system", *CHAT_EXTRAS)),
    Format("prompt/completion", ("prompt", "completion"), CHAT_EXTRAS),
    Format("question/answer", ("question", "answer")),
    Format("Alpaca", ("instruction", "output"), ("input",)),
    Format("text", ("text",)),
)


def detect_format(columns: Sequence[str]) -> Format:
    """The first of FORMATS whose columns are all there; InputError lists what was seen and what is understood."""
    for form in FORMATS:
        if set(form.needs) <= set(columns):
            return form
    understood = "; ".join(", ".join([*form.needs, *(f"[{column}]" for column in form.may)]) for form in FORMATS)
    raise InputError(
        f"no format has the columns seen ({', '.join(columns)}); understood: {understood}; "
        "other columns are named by --template and --response_template"
    )


def format_of(columns: Sequence[str], templates: Columns) -> tuple[Format, Columns]:
    """The format of a table with these columns, and the templates with what they left to it filled in.

    Raises InputError where a template names a column that is not there, and where rows cannot be joined.
    """
    templates = templates.fitted(columns)
    if templates.question is None or templates.answer is None:
        form = detect_format(columns)
    else:
        form = Format("template", tuple(dict.fromkeys((*templates.question.columns, *templates.answer.columns))))
    if templates.turns > 1 and form.name not in SINGLE:
        raise InputError(
            f"--conversation_extension joins rows of a question and an answer ({', '.join(SINGLE)}); these are "
            f"{form.name}; leave it out"
        )
    return form, templates


class Reader:
    """Rows of one format as tokenised documents, each row with the facts that the report counts.

    templates: of `format_of`. order: the place in the file of each row, where they are read in another order.
    """

    def __init__(
        self,
        form: Format,
        tokenizer: "PreTrainedTokenizerBase",
        train_on: str,
        template_kwargs: Mapping[str, Any] | None,
        templates: Columns | None = None,
        order: np.ndarray | None = None,
    ) -> None:
        self.form, self._tokenizer, self._train_on = form, tokenizer, train_on
        self._templates, self._order = templates or Columns(), order
        self._template_kwargs = dict(template_kwargs or {})
        conversations = form.name in ("messages", "ShareGPT")
        self._plain = form.name == "text" or not (conversations or tokenizer.chat_template)
        self.templated = not self._plain and form.name != "tokenised"
        eos = "the tokenizer has no EOS to end them" if tokenizer.eos_token_id is None else "ended by EOS"
        plain = f"as plain text, {eos}" + (", all tokens trained" if form.name == "text" else "")
        self.layout = plain if self._plain else "rendered with the chat template"
        if form.name == "tokenised":
            self.layout = "taken as they are"
        if self._templates.turns > 1:
            if self._plain:
                raise InputError("--conversation_extension needs a chat template; choose one with --chat_template")
            self.layout += f", {self._templates.turns} rows a conversation"

    def read(self, rows: Sequence[Row], first: int) -> list[tuple[list[Document], dict[str, int]]]:
        """Each row's documents; `first` is the 0-based number of the first row, for messages.

        Of rows that make one conversation the first has its documents, and the others have none.
        """
        if self.form.name == "tokenised":
            return [self._named(first + at, _tokenised, row) for at, row in enumerate(rows)]
        if self._templates.turns > 1:
            rendered = self._joined(rows, first)
        else:
            rendered = [self._named(first + at, self._render, row) for at, row in enumerate(rows)]
        flat = [text for texts, _ in rendered for text in texts]
        documents = iter(trained_tokens(self._tokenizer, flat, special_tokens=self._plain))
        if self._plain:
            documents = map(self._ended, documents)
        return [([next(documents) for _ in texts], facts) for texts, facts in rendered]

    def _named(self, number: int, function: Callable[[Row], Any], row: Row) -> Any:
        try:
            return function(row)
        except InputError as failure:
            place = number if self._order is None else self._order[number]
            raise InputError(f"row {place + 1}: {failure}") from failure

    def _joined(self, rows: Sequence[Row], first: int) -> list[tuple[list[Rendered], dict[str, int]]]:
        """Conversations of several rows each; what is wrong with one is said of its first row."""
        turns, found = self._templates.turns, []
        for start in range(0, len(rows), turns):
            group = rows[start : start + turns]
            pairs = [self._named(first + start + at, self._pair, row) for at, row in enumerate(group)]
            joined = {"messages": [message for pair in pairs for message in pair]}
            found.append(self._named(first + start, lambda row: self._conversation({}, row["messages"], 0), joined))
            found += [([], {})] * (len(group) - 1)
        return found

    def _pair(self, row: Row) -> list[dict[str, str]]:
        """A row's question and answer as messages."""
        asked, answer, _ = self._question(row)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    def _question(self, row: Row) -> tuple[str, str, str]:
        """(what is asked, what is answered, what joins them in plain text) of a row that has one of each."""
        if self._templates.question is not None and self._templates.answer is not None:
            return self._templates.question.fill(row), self._templates.answer.fill(row), ""
        if self.form.name == "Alpaca":
            asked, given = _text(row, "instruction"), row.get("input") or ""
            if not isinstance(given, str):
                raise InputError(f"input is {shown(given)}; must be a string")
            answer = _text(row, "output")
            if self._plain:
                sections = [("Instruction", asked), *([("Input", given)] if given else []), ("Response", "")]
                asked = "\n\n".join(f"### {title}:\n{body}" for title, body in sections)
            elif given:
                asked = f"{asked}\n\n{given}"
            return asked, answer, ""
        asked, answer = (_text(row, column) for column in self.form.needs)
        return asked, answer, "\n" if self.form.name == "question/answer" else ""

    def _render(self, row: Row) -> tuple[list[Rendered], dict[str, int]]:
        name = self.form.name
        if name == "text":
            return [Rendered(text := _text(row, "text"), [(0, len(text))])], {}
        if name == "messages":
            return self._conversation(row, _messages(row["messages"], "messages"), 0)
        if name == "ShareGPT":
            messages = _messages(row["conversations"], "conversations")
            if (system := row.get("system")) and not any(SPEAKERS.get(_role(m)) == "system" for m in messages[:1]):
                messages = [{"role": "system", "content": system}, *messages]
            return self._conversation(row, messages, 0)
        if name == "prompt/completion" and not isinstance(row["prompt"], str):
            prompt, completion = (_messages(row[column], column) for column in self.form.needs)
            if not isinstance(prompt, list) or not isinstance(completion, list):
                raise InputError(f"prompt is {shown(prompt)}; prompt and completion must both be strings or messages")
            return self._conversation(row, prompt + completion, len(prompt))
        asked, answer, joint = self._question(row)
        if not self._plain:
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            return self._conversation(row, turns, 0)
        start = 0 if self._train_on == "all" else len(asked + joint)
        text = asked + joint + answer
        return [Rendered(text, [(start, len(text))])], {}

    def _conversation(self, row: Row, messages: Any, trained: int) -> tuple[list[Rendered], dict[str, int]]:
        tools = parse_json(row.get("tools") or None, "tools")
        if tools is not row.get("tools"):
            given = tools
        else:  # a table has the same keys in every tool, and None where a tool lacks one
            given = without_none(tools)
        if given is not None and (not isinstance(given, list) or not all(isinstance(t, Mapping) for t in given)):
            raise InputError(f"tools is {shown(tools)}; must be a list of objects")
        name = "chat_template_kwargs"
        own = as_object(parse_json(row.get(name) or {}, name), name)
        texts = render_conversation(
            self._tokenizer, messages, self._train_on, given or None, self._template_kwargs | without_none(own),
            first_trained=trained,
        )  # fmt: skip
        names = [function_of(tool).get("name") for tool in given or []]
        hidden = any(isinstance(name, str) and not any(name in text.text for text in texts) for name in names)
        facts = {"split_conversations": int(len(texts) > 1), "left_out": left_out(messages, texts)}
        unknown = sum(message["role"] not in ROLES for message in messages)
        return texts, facts | {"tools_left_out": int(hidden), "unknown_roles": unknown}

    def _ended(self, document: Document) -> Document:
        """A plain text with EOS behind it, trained."""
        ids, trained = document
        eos = self._tokenizer.eos_token_id
        if eos is None:
            return document
        if len(ids) and ids[-1] == eos:
            return ids, np.append(trained[:-1], True)
        return np.append(ids, np.int32(eos)), np.append(trained, True)


def _messages(value: Any, column: str) -> Any:
    """Messages with role and content, from such or from ShareGPT's `from` and `value`; JSON text is read."""
    turns = parse_json(value, column)
    if not isinstance(turns, list):
        if column == "conversations":
            raise InputError(f"conversations is {shown(turns)}; must be a list of objects with from and value")
        return turns
    return [_from_sharegpt(number, turn) for number, turn in enumerate(turns, 1)]


def _from_sharegpt(number: int, turn: Any) -> Any:
    """A turn of ShareGPT as a message; whatever has a role, or is no turn at all, stays as it is."""
    if not isinstance(turn, Mapping) or turn.get("from") is None:
        return turn
    speaker, said = turn["from"], turn.get("value")
    if speaker not in SPEAKERS:
        raise InputError(f"message {number} is from {shown(speaker)}; understood: {', '.join(SPEAKERS)}")
    if not isinstance(said, str):
        raise InputError(f"message {number} (from {speaker}) has value {shown(said)}; must be a string")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker != "function_call":
        return {**others, "role": SPEAKERS[speaker], "content": said}
    calls = parse_json(said, f"message {number} (from function_call)")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(function_of(call).get("name"), str) for call in calls):
        raise InputError(f"message {number} (from function_call) has value {shown(said)}; must be JSON with a name")
    functions = [
        {"type": "function", "function": {key: _as_text(part) for key, part in function_of(call).items()}}
        for call in calls
    ]
    return {**others, "role": "assistant", "content": None, "tool_calls": functions}


def _role(message: Any) -> str:
    return str(message.get("role")) if isinstance(message, Mapping) else ""


def _as_text(arguments: Any) -> Any:
    """Arguments as JSON text, in which a null is told from a key that a table filled up with None."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise InputError(f"{column} is {shown(row[column])}; must be a string")
    return str(row[column])


def _tokenised(row: Row) -> tuple[list[Document], dict[str, int]]:
    """A row of input_ids with its labels; padding that attention_mask shows is removed, nothing is added."""
    ids = _integers(row, "input_ids")
    labels = _integers(row, "labels") if row.get("labels") is not None else ids
    mask = _integers(row, "attention_mask") if row.get("attention_mask") is not None else np.ones_like(ids)
    if not len(ids) == len(labels) == len(mask):
        raise InputError(f"input_ids, labels, attention_mask have {len(ids)}, {len(labels)}, {len(mask)} entries")
    if not np.isin(mask, (0, 1)).all():
        raise InputError(f"attention_mask holds {mask[(mask != 0) & (mask != 1)][0]}; must be 0 or 1")
    trained = labels != IGNORED
    if row.get("labels") is not None:
        wrong = np.flatnonzero(trained & ((labels != ids) | (mask == 0)))
        if len(wrong):
            at = wrong[0]
            raise InputError(
                f"labels[{at}] is {labels[at]}, input_ids[{at}] {ids[at]}, attention_mask {mask[at]}; a label must "
                f"be {IGNORED} or the id at its own position (the shift happens here), and {IGNORED} in padding"
            )
    return [(ids[mask == 1], trained[mask == 1])], {"padding_removed": int((mask == 0).sum())}


def _integers(row: Row, column: str) -> np.ndarray:
    values = row[column]
    if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**62 for value in values):
        raise InputError(f"{column} is {shown(values)}; must be a list of integers")
    return np.asarray(values, np.int64)
