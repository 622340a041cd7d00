"""Batches of a data set that is read while training, window by window, because it is too large or has no end."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxft.cache import writes_date
from jaxft.chat import check_train_on
from jaxft.columns import Columns
from jaxft.data import CHUNK, Report, documents_of
from jaxft.errors import InputError
from jaxft.formats import Reader, format_of
from jaxft.packing import Batch, lay_rows, make_plan, permutation
from jaxft.samples import Sample, lengths_of, weighted

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_WINDOW_STREAM = 4


@dataclass(frozen=True)
class _Window:
    """The packed rows of a window that begins with row `first` (from 0) of pass `epoch`, and what its report counts."""

    epoch: int
    first: int
    rows: list[list[Sample]]
    facts: Counter[str]


class StreamBatches:
    """The batches of a stream, in order: what `Batches` is for a set that is read whole.

    The stream is read in windows of `buffer_size` rows. A window's samples are packed together, and its rows taken in
    an order drawn from (`seed`, pass, window), or in their own where `shuffle` is false; a step may take rows of two
    windows. The next window is read and tokenised while the one before it is trained on, and no other is held. Where
    the stream ends it is read again. The position is (pass, [first row of the window, packed rows taken of it]): to go
    on from there skips the rows before, tokenises one window, and gives the same batches.

    `open_rows()` opens the stream. `total_steps` stands for an epoch, whose length nobody knows.
    """

    def __init__(
        self,
        open_rows: Callable[[], "datasets.IterableDataset"],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int,
        vocab_size: int,
        batch_size: int,
        accumulation: int,
        total_steps: int,
        buffer_size: int,
        seed: int,
        packing: bool = True,
        shuffle: bool = True,
        train_on: str = "responses",
        template_kwargs: Mapping[str, Any] | None = None,
        columns: Columns | None = None,
    ) -> None:
        check_train_on(train_on)
        with _named_failures("at its beginning"):
            stream = open_rows()
            names = stream.column_names or list(next(iter(stream), {}))
        form, columns = format_of(names, columns or Columns())
        self._columns = [name for name in (*form.needs, *form.may) if name in names]
        self._open, self._reader = open_rows, Reader(form, tokenizer, train_on, template_kwargs, columns)
        self.max_length, self._vocab_size, self._buffer = max_length, vocab_size, buffer_size
        self._seed, self._packing, self._shuffle = seed, packing, shuffle
        self._shape = (accumulation, batch_size, max_length)
        self.rows_per_step = accumulation * batch_size
        self.steps_per_epoch = total_steps
        self.max_documents: int | None = None  # not known before the last row is read
        self._dated = self._reader.templated and writes_date(tokenizer)
        self.go_on(0, 0, [0, 0])

    def go_on(self, step: int, epoch: int, row: list[int]) -> None:
        """Continues with the 0-based `step`, of which `position` said (`epoch`, `row`)."""
        first, taken = row
        self._step, self._taken = step, taken
        self._ahead = _one_ahead(self._windows(epoch, first))
        self._window = _Window(epoch, first, [], Counter())
        self._total: Counter[str] = Counter()
        if taken:
            self._next_window()
            self._taken = taken

    def position(self, step: int) -> tuple[int, list[int]]:
        """(pass, [first row of the window, packed rows taken of it]) where the 0-based `step` begins: the next one."""
        if step != self._step:
            raise ValueError(f"a stream stands before step {self._step}; it does not know where step {step} begins")
        return self._window.epoch, [self._window.first, self._taken]

    def batch(self, step: int) -> Batch:
        """The batch of the 0-based `step`, which must be the next one; four arrays (A, B, T) as `Batches.batch` has."""
        if step != self._step:
            raise ValueError(f"a stream stands before step {self._step}; step {step} was asked for")
        rows: list[list[Sample]] = []
        before = self._window, self._taken
        try:
            while len(rows) < self.rows_per_step:
                if self._taken >= len(self._window.rows):
                    self._next_window()
                more = self._window.rows[self._taken : self._taken + self.rows_per_step - len(rows)]
                self._taken += len(more)
                rows += more
        except InputError:
            self._window, self._taken = before  # where to go on from, once the row is mended
            raise
        self._step += 1
        return lay_rows(rows, self._shape)

    def report(self) -> Report:
        """What became of the rows read since the beginning or the last `go_on`, up to the window in use."""
        facts: dict[str, Any] = {"rows": 0, **self._total}
        return Report(self._reader.form.name, layout=self._reader.layout, dated=self._dated, **facts)

    def _next_window(self) -> None:
        self._window, self._taken = next(self._ahead), 0
        self._total.update(self._window.facts)

    def _windows(self, epoch: int, first: int) -> Iterator[_Window]:
        """The windows from row `first` of pass `epoch` on, without end."""
        while True:
            found = first > 0
            with _named_failures(f"after row {first}"):
                rows = self._open().select_columns(self._columns)
                tables = (rows.skip(first) if first else rows).iter(self._buffer)
            while True:
                with _named_failures(f"after row {first}"):
                    table = next(tables, None)
                if table is None:
                    break
                window = self._read(epoch, first, table)
                first += len(table[self._columns[0]])
                found = found or bool(window.rows)
                yield window
            if not found:
                raise InputError("the stream has no row to train on: it is empty, or every row was refused")
            epoch, first = epoch + 1, 0

    def _read(self, epoch: int, first: int, table: Mapping[str, list[Any]]) -> _Window:
        total: Counter[str] = Counter({"rows": first})  # so that messages name a row by its place in the stream
        count = len(table[self._columns[0]])
        chunks = ({name: values[at : at + CHUNK] for name, values in table.items()} for at in range(0, count, CHUNK))
        documents = documents_of(chunks, self._reader, self.max_length, self._vocab_size, total)
        samples = [weighted(ids, trained) for ids, trained in documents]
        lengths = lengths_of(samples)
        total["rows"], total["samples"], total["tokens"] = count, len(samples), int(lengths.sum())
        total["target_tokens"] = sum(int((sample.loss_weights > 0).sum()) for sample in samples)
        if not samples:
            return _Window(epoch, first, [], total)
        plan = make_plan(lengths, self.max_length, packing=self._packing, shuffle=self._shuffle, seed=self._seed)
        order: Iterable[int] = range(len(plan))
        if self._shuffle:
            order = permutation(len(plan), self._seed, _WINDOW_STREAM, epoch, first)
        return _Window(epoch, first, [[samples[number] for number in plan[row]] for row in order], total)


def _one_ahead(windows: Iterator[_Window]) -> Iterator[_Window]:
    """The same windows, each made in another thread while the one before it is in use."""
    pool = ThreadPoolExecutor(1, "stream")
    try:
        coming = pool.submit(next, windows)
        while True:
            window = coming.result()
            coming = pool.submit(next, windows)
            yield window
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _named_failures(where: str) -> Iterator[None]:
    """Turns what a stream raises while it is read into an InputError that says where."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, DatasetsError) as failure:
        text = " ".join(str(failure).split())
        raise InputError(f"the stream cannot be read {where}: {type(failure).__name__}: {text}") from failure
