"""Turns rows of any known format into samples, and counts whatever does not come through."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.chat import Rendered, check_train_on, left_out, render_conversation, shown, trained_tokens, weighted
from jaxft.errors import InputError
from jaxft.files import find_files, load_rows
from jaxft.packing import Batches, Sample, make_plan

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMATS", "Format", "Report", "detect_format", "find_files", "load_rows", "tokenize_dataset"]

Row = Mapping[str, Any]
Document = tuple[np.ndarray, np.ndarray]  # ids int32 (n,), trained bool (n,)

IGNORED = -100
_CHUNK = 1000  # rows tokenised in one call: enough to keep the tokenizer's threads busy, few enough to stay small


@dataclass(frozen=True)
class Format:
    """One kind of row: its name, the columns it must have, and those it may have."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


# In order: a set with several kinds of columns at once (Alpaca's own has `text` too) is read as the first that fits.
FORMATS = (
    Format("tokenised", ("input_ids",), ("labels", "attention_mask")),
    Format("messages", ("messages",), ("tools",)),
    Format("prompt/completion", ("prompt", "completion"), ("tools",)),
    Format("question/answer", ("question", "answer")),
    Format("Alpaca", ("instruction", "output"), ("input",)),
    Format("text", ("text",)),
)


@dataclass(frozen=True)
class Report:
    """What became of a data set: counts of rows, samples and tokens, and of everything that was left out."""

    format: str
    rows: int
    layout: str
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    split_conversations: int = 0
    split_documents: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    refused: int = 0
    refused_after_truncation: int = 0
    padding_removed: int = 0
    left_out: int = 0

    def lines(self) -> list[str]:
        """The report for the terminal: always two lines, and one for each thing that happened to the rows."""
        events = (
            (self.split_conversations, "conversations split into several samples: the template changes earlier turns"),
            (self.split_documents, "documents longer than max_length, split into pieces"),
            (self.truncated, f"samples longer than max_length, cut at their end ({self.truncated_tokens} tokens lost)"),
            (self.refused, "rows refused: nothing in them is to be learned (all labels masked)"),
            (self.refused_after_truncation, "samples refused: nothing to be learned was left after the cut"),
            (self.padding_removed, "tokens of padding (attention_mask 0) removed"),
            (self.left_out, "messages that the chat template does not show in full (thinking, for example)"),
        )
        return [
            f"format: {self.format} ({self.rows} rows), {self.layout}",
            f"samples: {self.samples}, {self.tokens} tokens, {self.target_tokens} of them targets",
            *(f"{count} {what}" for count, what in events if count),
        ]


def detect_format(columns: Sequence[str]) -> Format:
    """The first of FORMATS whose columns are all there; InputError lists what was seen and what is understood."""
    for form in FORMATS:
        if set(form.needs) <= set(columns):
            return form
    understood = "; ".join(", ".join([*form.needs, *(f"[{column}]" for column in form.may)]) for form in FORMATS)
    raise InputError(f"no format has the columns seen ({', '.join(columns)}); understood: {understood}")


def tokenize_dataset(
    dataset: "datasets.Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    vocab_size: int,
    train_on: str = "responses",
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Sample], Report]:
    """All samples of a data set, in its order, each of 1 to `max_length` tokens, and the report of what happened.

    Conversations, questions, prompts and Alpaca rows are rendered by the tokenizer's chat template. Where it has none
    they are plain text: `question⏎answer`, `prompt` and `completion` joined as they stand, and Alpaca's sections
    under `### Instruction:`, `### Input:` and `### Response:`, with the tokenizer's own special tokens before and EOS,
    which is trained, behind. `text` rows are that too, all trained, and split where they are too long (a last piece
    of one token, which could teach nothing, takes one from the piece before). Every other sample too long is cut at
    its end. Tokenised rows follow transformers: `labels` stand at the positions of `input_ids`, -100 is not trained.

    Raises InputError for a row of a wrong form, naming it (rows count from 1), for a token id outside
    [0, `vocab_size`), and where no row at all is left.
    """
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; a sample needs 2 tokens to learn anything")
    check_train_on(train_on)
    form = detect_format(dataset.column_names)
    reader = _Reader(form, tokenizer, train_on, template_kwargs)
    total: Counter[str] = Counter()
    samples: list[Sample] = []
    used = [column for column in (*form.needs, *form.may) if column in dataset.column_names]
    table = dataset.select_columns(used)
    for first in range(0, len(dataset), _CHUNK):
        chunk = table[first : first + _CHUNK]
        rows = [dict(zip(used, values, strict=True)) for values in zip(*(chunk[c] for c in used), strict=True)]
        for number, (documents, facts) in enumerate(reader.read(rows, first), first + 1):
            total.update(facts)
            teaching = [(ids, trained) for ids, trained in documents if trained[1:].any()]
            total["refused"] += not teaching
            for ids, trained in teaching:
                outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
                if len(outside):
                    raise InputError(
                        f"row {number}: token id {ids[outside[0]]} is outside the model's vocabulary of {vocab_size} "
                        f"(0 to {vocab_size - 1}); is this the model's own tokenizer?"
                    )
                samples += _cut(form, ids, trained, max_length, total)
    total["samples"] = len(samples)
    total["tokens"] = sum(len(sample) for sample in samples)
    total["target_tokens"] = sum(int(np.count_nonzero(sample.loss_weights)) for sample in samples)
    report = Report(form.name, len(dataset), reader.layout, **total)
    if not samples:
        raise InputError(
            f"none of the {report.rows} rows is left to train on: in {report.refused} all labels are masked (under "
            f"train_on {train_on!r} assistant turns and answers are trained), and in {report.refused_after_truncation} "
            f"samples nothing to be learned lies within max_length {max_length}"
        )
    return samples, report


def load_batches(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    batch_size: int,
    accumulation: int = 1,
    train_on: str = "responses",
    seed: int = 0,
) -> Batches:
    """A data set as packed batches, in one call: what `jaxft.train` does with its default flags.

    Each batch is a dict of arrays (accumulation, batch_size, max_length); iterating gives one epoch, `.batch(step)` any
    step of any epoch. Raises InputError for anything wrong with the data.
    """
    samples, _ = tokenize_dataset(
        load_rows(name), tokenizer, max_length=max_length, vocab_size=len(tokenizer), train_on=train_on
    )
    plan = make_plan([len(sample) for sample in samples], max_length, packing=True, shuffle=True, seed=seed)
    return Batches(samples, plan, max_length=max_length, batch_size=batch_size, accumulation=accumulation, seed=seed)


def _cut(form: Format, ids: np.ndarray, trained: np.ndarray, max_length: int, total: Counter[str]) -> Iterator[Sample]:
    """The samples of one document: itself where it fits, else its pieces or its beginning; counts what it did."""
    if len(ids) > max_length and form.name == "text":
        total["split_documents"] += 1
        bounds = [*range(0, len(ids), max_length), len(ids)]
        if bounds[-1] - bounds[-2] == 1 and max_length > 2:
            bounds[-2] -= 1
        for start, stop in itertools.pairwise(bounds):
            yield weighted(ids[start:stop], trained[start:stop])
        return
    if len(ids) > max_length:
        total["truncated"] += 1
        total["truncated_tokens"] += len(ids) - max_length
        ids, trained = ids[:max_length], trained[:max_length]
    if trained[1:].any():
        yield weighted(ids, trained)
    else:
        total["refused_after_truncation"] += 1


class _Reader:
    """Rows of one format as tokenised documents, each row with the facts that the report counts."""

    def __init__(
        self,
        form: Format,
        tokenizer: "PreTrainedTokenizerBase",
        train_on: str,
        template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self._form, self._tokenizer, self._train_on = form, tokenizer, train_on
        self._template_kwargs = template_kwargs
        self._plain = form.name == "text" or (form.name != "messages" and not tokenizer.chat_template)
        eos = "the tokenizer has no EOS to end them" if tokenizer.eos_token_id is None else "ended by EOS"
        plain = f"as plain text, {eos}" + (", all tokens trained" if form.name == "text" else "")
        self.layout = plain if self._plain else "rendered with the chat template"
        if form.name == "tokenised":
            self.layout = "taken as they are"

    def read(self, rows: Sequence[Row], first: int) -> list[tuple[list[Document], dict[str, int]]]:
        """Each row's documents; `first` is the 0-based number of the first row, for messages."""
        if self._form.name == "tokenised":
            return [self._named(first + at, _tokenised, row) for at, row in enumerate(rows)]
        rendered = [self._named(first + at, self._render, row) for at, row in enumerate(rows)]
        flat = [text for texts, _ in rendered for text in texts]
        documents = iter(trained_tokens(self._tokenizer, flat, special_tokens=self._plain))
        if self._plain:
            documents = map(self._ended, documents)
        return [([next(documents) for _ in texts], facts) for texts, facts in rendered]

    @staticmethod
    def _named(number: int, function: Callable[[Row], Any], row: Row) -> Any:
        try:
            return function(row)
        except InputError as failure:
            raise InputError(f"row {number + 1}: {failure}") from failure

    def _render(self, row: Row) -> tuple[list[Rendered], dict[str, int]]:
        name = self._form.name
        if name == "text":
            return [Rendered(text := _text(row, "text"), [(0, len(text))])], {}
        if name == "messages":
            return self._conversation(row, row["messages"], 0)
        if name == "prompt/completion" and not isinstance(row["prompt"], str):
            prompt, completion = row["prompt"], row["completion"]
            if not isinstance(prompt, list) or not isinstance(completion, list):
                raise InputError(f"prompt is {shown(prompt)}; prompt and completion must both be strings or messages")
            return self._conversation(row, prompt + completion, len(prompt))
        if name == "Alpaca":
            asked, given = _text(row, "instruction"), row.get("input") or ""
            if not isinstance(given, str):
                raise InputError(f"input is {shown(given)}; must be a string")
            answer, joint = _text(row, "output"), ""
            if self._plain:
                sections = [("Instruction", asked), *([("Input", given)] if given else []), ("Response", "")]
                asked = "\n\n".join(f"### {title}:\n{body}" for title, body in sections)
            elif given:
                asked = f"{asked}\n\n{given}"
        else:
            asked, answer = (_text(row, column) for column in self._form.needs)
            joint = "\n" if name == "question/answer" else ""
        if not self._plain:
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            return self._conversation(row, turns, 0)
        start = 0 if self._train_on == "all" else len(asked + joint)
        text = asked + joint + answer
        return [Rendered(text, [(start, len(text))])], {}

    def _conversation(self, row: Row, messages: Any, trained: int) -> tuple[list[Rendered], dict[str, int]]:
        tools = row.get("tools") or None
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as failure:
                raise InputError(f"tools is no JSON: {failure.msg}: {shown(tools)}") from failure
        texts = render_conversation(
            self._tokenizer, messages, self._train_on, tools, self._template_kwargs, first_trained=trained
        )
        return texts, {"split_conversations": int(len(texts) > 1), "left_out": left_out(messages, texts)}

    def _ended(self, document: Document) -> Document:
        """A plain text with EOS behind it, trained."""
        ids, trained = document
        eos = self._tokenizer.eos_token_id
        if eos is None:
            return document
        if len(ids) and ids[-1] == eos:
            return ids, np.append(trained[:-1], True)
        return np.append(ids, np.int32(eos)), np.append(trained, True)


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
