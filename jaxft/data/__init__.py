"""Turns rows of any known format into samples, and counts whatever does not come through."""

import functools
import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jaxft.cache import fetch, key_of, name_too, rows_digest, store, writes_date
from jaxft.chat import check_train_on
from jaxft.columns import Columns
from jaxft.errors import InputError, RunError
from jaxft.files import find_files, load_rows, open_rows
from jaxft.formats import FORMATS, ROLES, Format, Reader, detect_format, format_of
from jaxft.packing import Batches, make_plan, permutation
from jaxft.rows import Rows
from jaxft.samples import Document, Sample, Samples, from_memory, in_memory, lengths_of, write

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMATS", "Format", "Report", "detect_format", "find_files", "load_rows", "tokenize_dataset"]

_JOIN_STREAM, _SPLIT_STREAM = 5, 6  # of `permutation`
CHUNK = 1000  # rows tokenised in one call: enough to keep the tokenizer's threads busy, few enough to stay small


@dataclass(frozen=True)
class Report:
    """What became of a data set: counts of rows, samples and tokens, and of everything that was left out.

    rows: as they were tokenised, where several of the `rows_read` may have been joined.
    """

    format: str
    rows: int
    layout: str
    rows_read: int = 0
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
    tools_left_out: int = 0
    unknown_roles: int = 0
    duplicates: int = 0
    dated: bool = False
    kept_in: str = ""
    reused: bool = False

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
            (self.unknown_roles, f"messages of a role that is none of {', '.join(ROLES)}: read, but not trained"),
            (self.tools_left_out, "rows with tools that the chat template does not show"),
            (self.duplicates, "samples whose tokens are exactly those of another one: they count twice"),
        )
        notes = []
        if self.dated:
            notes.append("the chat template may write today's date, so tomorrow's tokens may be others")
        if self.kept_in:
            notes.append(
                f"{'taken, tokenised before, from' if self.reused else 'tokenised, and kept in'} {self.kept_in}"
            )
        return [
            f"format: {self.format} ({self.rows} rows), {self.layout}",
            f"samples: {self.samples}, {self.tokens} tokens, {self.target_tokens} of them targets",
            *(f"{count} {what}" for count, what in events if count),
            *notes,
        ]


def tokenize_dataset(
    dataset: "datasets.Dataset | Rows",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    vocab_size: int,
    train_on: str = "responses",
    template_kwargs: Mapping[str, Any] | None = None,
    columns: Columns | None = None,
    cache: Path | None = None,
    anew: Callable[[], object] = lambda: None,
) -> tuple[Samples, Report]:
    """All samples of a data set, in its order, each of 1 to `max_length` tokens, and the report of what happened.

    Conversations, questions, prompts and Alpaca rows are rendered by the tokenizer's chat template. Where it has none
    they are plain text: `question⏎answer`, `prompt` and `completion` joined as they stand, and Alpaca's sections
    under `### Instruction:`, `### Input:` and `### Response:`, with the tokenizer's own special tokens before and EOS,
    which is trained, behind. `text` rows are that too, all trained, and split where they are too long (a last piece
    of one token, which could teach nothing, takes one from the piece before). Every other sample too long is cut at
    its end. Tokenised rows follow transformers: `labels` stand at the positions of `input_ids`, -100 is not trained.

    template_kwargs go to every rendering, as `apply_chat_template` takes them; a row's own `chat_template_kwargs` win.
    columns: templates that make questions and answers of any columns, and how many rows a conversation has.
    With a directory `cache` the samples are written there while they are made, under a key of everything that makes
    them, and read back through a memory map, at once where the same were made before; memory stays small either way.
    Rows that are known by more than their table (`open_rows`) are not even read then. anew is called before rows
    are read that may have to be tokenised, and again when that begins.

    Raises InputError for a row of a wrong form, naming it (rows count from 1), for a token id outside
    [0, `vocab_size`), and where no row at all is left.
    """
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; a sample needs 2 tokens to learn anything")
    check_train_on(train_on)
    settings = {
        "max_length": max_length, "vocab_size": vocab_size, "train_on": train_on,
        "template_kwargs": dict(template_kwargs or {}),
    }  # fmt: skip
    name = None
    if isinstance(dataset, Rows):
        if cache is not None and dataset.known_as is not None:
            as_asked = (columns or Columns()).key()
            name = key_of(dataset.known_as, tokenizer, (Path(__file__),), **settings, columns=as_asked)
            if (found := fetch(cache, name)) is not None:
                kept_in = cache / (cache / name).readlink()
                return found[0], replace(Report(**found[1]), kept_in=str(kept_in), reused=True)
            anew()
        dataset = dataset.table
    form, columns = format_of(dataset.column_names, columns or Columns())
    rows = dataset.select_columns([c for c in (*form.needs, *form.may) if c in dataset.column_names])
    order = None
    if columns.turns > 1:
        order = permutation(len(rows), columns.seed, _JOIN_STREAM)
        rows = rows.select(order)
    reader = Reader(form, tokenizer, train_on, template_kwargs, columns, order)

    def make(streams: Mapping[str, IO[bytes]]) -> dict[str, Any]:
        anew()
        total: Counter[str] = Counter()
        chunks = rows.iter(-(-CHUNK // columns.turns) * columns.turns)  # a conversation lies in one chunk
        seen = array("Q")
        documents = _noted(documents_of(chunks, reader, max_length, vocab_size, total), seen)
        samples, tokens, targets = write(documents, streams)
        duplicates = len(seen) - len(np.unique(np.array(seen, np.uint64)))
        dated = reader.templated and writes_date(tokenizer)
        report = Report(
            form.name, total.pop("rows"), reader.layout, rows_read=len(rows), samples=samples, tokens=tokens,
            target_tokens=targets, duplicates=duplicates, dated=dated, **dict[str, Any](total),
        )  # fmt: skip
        if not samples:
            raise InputError(
                f"none of the {report.rows} rows is left to train on: in {report.refused} all labels are masked (under "
                f"train_on {train_on!r} assistant turns and answers are trained), and in "
                f"{report.refused_after_truncation} samples nothing to be learned lies within max_length {max_length}"
            )
        return asdict(report)

    if cache is None:
        memory = in_memory()
        report = make(memory)
        return from_memory(memory), Report(**report)
    key = key_of(
        rows_digest(rows), None if form.name == "tokenised" else tokenizer, (Path(__file__),), **settings,
        columns=columns.key(),
    )  # fmt: skip
    found = fetch(cache, key)
    reused = found is not None
    if found is None:
        store(cache, key, make)
        found = fetch(cache, key)
    if found is None:
        raise RunError(f"{cache / key} does not hold what was just written to it; is the disk sound?")
    if name is not None:
        name_too(cache, name, key)
    return found[0], replace(Report(**found[1]), kept_in=str(cache / key), reused=reused)


def shape_line(samples: Sequence[Sample], report: Report) -> str:
    """How long the samples are and how much of them is trained; costs nothing where they come from a cache."""
    lengths = lengths_of(samples)
    return (
        f"lengths: {lengths.min()} to {lengths.max()} tokens, half of them up to {int(np.median(lengths))}; "
        f"{report.target_tokens / report.tokens:.1%} of the tokens are trained"
    )


def _noted(documents: Iterable[Document], seen: "array[int]") -> Iterator[Document]:
    """The documents as they are; 8 bytes of a digest of each go to `seen`."""
    for ids, trained in documents:
        seen.append(int.from_bytes(digest_of(ids), "little"))
        yield ids, trained


def digest_of(ids: np.ndarray) -> bytes:
    """8 bytes that stand for the tokens of a sample."""
    return hashlib.blake2b(ids.astype(np.int32).tobytes(), digest_size=8).digest()


def documents_of(
    chunks: Iterable[Mapping[str, list[Any]]], reader: Reader, max_length: int, vocab_size: int, total: Counter[str]
) -> Iterator[Document]:
    """The documents of all rows, which come as tables, cut to `max_length`; counts in `total` what it met."""
    for chunk in chunks:
        names = list(chunk)
        table = [dict(zip(names, values, strict=True)) for values in zip(*chunk.values(), strict=True)]
        for documents, facts in reader.read(table, total["rows"]):
            total.update(facts)
            total["rows"] += 1
            teaching = [(ids, trained) for ids, trained in documents if trained[1:].any()]
            total["refused"] += len(documents) - len(teaching)
            for ids, trained in teaching:
                outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
                if len(outside):
                    raise InputError(
                        f"row {total['rows']}: token id {ids[outside[0]]} is outside the model's vocabulary of "
                        f"{vocab_size} (0 to {vocab_size - 1}); is this the model's own tokenizer?"
                    )
                yield from _cut(reader.form, ids, trained, max_length, total)


def split_rows(
    dataset: "datasets.Dataset", held_out: float, seed: int
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(rows to train on, rows held out), drawn by `seed`, each in the order of the file.

    held_out: a share below 1, of which the nearest whole number of rows is taken and at least one, or that number
    itself. Raises InputError where no row would be left to train on.
    """
    total = len(dataset)
    count = max(1, round(held_out * total)) if held_out < 1 else int(held_out)
    if count >= total:
        raise InputError(f"--eval_split {held_out:g} holds out {count} of {total} rows, and leaves none to train on")
    drawn = np.zeros(total, bool)
    drawn[permutation(total, seed, _SPLIT_STREAM)[:count]] = True
    return dataset.select(np.flatnonzero(~drawn)), dataset.select(np.flatnonzero(drawn))


def split_known(rows: Rows, held_out: float, seed: int) -> tuple[Rows, Rows]:
    """`split_rows` of rows that need not be read for it; what it raises is raised when they are."""

    drawn = functools.cache(lambda: split_rows(rows.table, held_out, seed))  # once for both parts

    def part(at: int) -> Rows:
        return rows.part(f"part {at} with {held_out!r} held out by seed {seed}", lambda _: drawn()[at])

    return part(0), part(1)


def load_batches(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    batch_size: int,
    accumulation: int = 1,
    train_on: str = "responses",
    template_kwargs: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    seed: int = 0,
) -> Batches:
    """A data set as packed batches, in one call: what `jaxft.train` does with its default flags.

    Each batch is a dict of arrays (accumulation, batch_size, max_length); iterating gives one epoch, `.batch(step)` any
    step of any epoch. template_kwargs, cache: see `tokenize_dataset`. Raises InputError for whatever is wrong with the
    data.
    """
    samples, _ = tokenize_dataset(
        open_rows(name), tokenizer, max_length=max_length, vocab_size=len(tokenizer), train_on=train_on,
        template_kwargs=template_kwargs, cache=cache,
    )  # fmt: skip
    plan = make_plan(lengths_of(samples), max_length, packing=True, shuffle=True, seed=seed)
    return Batches(samples, plan, max_length=max_length, batch_size=batch_size, accumulation=accumulation, seed=seed)


def _cut(
    form: Format, ids: np.ndarray, trained: np.ndarray, max_length: int, total: Counter[str]
) -> Iterator[Document]:
    """The samples of one document: itself where it fits, else its pieces or its beginning; counts what it did."""
    if len(ids) > max_length and form.name == "text":
        total["split_documents"] += 1
        bounds = [*range(0, len(ids), max_length), len(ids)]
        if bounds[-1] - bounds[-2] == 1:
            if max_length > 2:
                bounds[-2] -= 1
            else:  # pairs of tokens: the odd one has nothing to stand behind
                bounds.pop()
                total["truncated"] += 1
                total["truncated_tokens"] += 1
        for start, stop in itertools.pairwise(bounds):
            yield ids[start:stop], trained[start:stop]
        return
    if len(ids) > max_length:
        total["truncated"] += 1
        total["truncated_tokens"] += len(ids) - max_length
        ids, trained = ids[:max_length], trained[:max_length]
    if trained[1:].any():
        yield ids, trained
    else:
        total["refused_after_truncation"] += 1
