"""A run's data: from the data sets that its flags name to the batches of its steps, and what is said of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data import Report, shape_line, split_known, tokenize_dataset
from jaxft.errors import InputError
from jaxft.evaluate import held_out_split, read_from
from jaxft.files import find_files, open_rows, open_stream
from jaxft.mixture import Source, mix
from jaxft.packing import Batches, make_plan
from jaxft.prepare import Prepared
from jaxft.processes import say
from jaxft.rows import Rows
from jaxft.samples import Sample, Samples, Selection
from jaxft.settings import TrainSettings
from jaxft.sharding import data_parallel_size
from jaxft.streaming import StreamBatches


def open_tables(settings: TrainSettings) -> tuple[list[Rows], list[Rows]]:
    """The rows to train on, one table a data set and none where they are streamed, and those that are held out."""
    sources = [] if settings.streaming else settings.sources
    tables, heldout_tables = [read("train", source, _split(source, settings), settings) for source in sources], []
    if settings.eval_split is not None:
        pairs = [split_known(rows, settings.eval_split, settings.seed) for rows in tables]
        tables, heldout_tables = [rows for rows, _ in pairs], [held_out for _, held_out in pairs]
    elif settings.eval_dataset:
        split = held_out_split(settings.eval_dataset, settings)
        heldout_tables = [read("held out", Source(settings.eval_dataset), split, settings)]
    if settings.streaming:
        source = settings.sources[0]
        say(f"train: a stream of {read_from(source.path, _split(source, settings))}, read while training")
    return tables, heldout_tables


def _split(source: Source, settings: TrainSettings) -> str | None:
    """The data set's own split, else that of the flag where it was given."""
    return source.split or (settings.dataset_train_split if "dataset_train_split" in settings.settings_given else None)


def read(what: str, source: Source, split: str | None, settings: TrainSettings) -> Rows:
    rows = open_rows(source.path, split, source.config or settings.dataset_config)
    say(f"{what}: read {read_from(source.path, split)}")
    return rows


@dataclass(frozen=True)
class RunData:
    """What a run trains and evaluates on.

    batches: of its steps. shared: what a resumed run must share to read the same. heldout: the samples to evaluate on.
    lengths: of the samples in tokens, none of a stream. table_rows: how many rows the tables to train on have, 0 of a
    stream. notes: what was said of the data.
    """

    batches: Batches | StreamBatches
    shared: dict[str, Any]
    heldout: Sequence[Sample]
    lengths: np.ndarray
    table_rows: int
    notes: list[str]

    def rows_read(self) -> int:
        """How many rows the run has read to train on so far."""
        return self.batches.report().rows if isinstance(self.batches, StreamBatches) else self.table_rows

    def met(self) -> list[str]:
        """What is to be said of a stream as far as it was read; nothing of tables, of which all was said."""
        if not isinstance(self.batches, StreamBatches):
            return []
        return [f"train: {line}" for line in self.batches.report().lines()]


def read_data(
    tables: list[Rows], heldout_tables: list[Rows], prepared: Prepared, settings: TrainSettings,
    anew: Callable[[], object],
) -> RunData:  # fmt: skip
    """Tokenises the tables and lays them out in rows; anew: called before rows are tokenised that no cache has.

    Raises InputError where something is asked of held-out data and there are none.
    """
    notes: list[str] = []
    batches: Batches | StreamBatches
    found: list[tuple[Samples, Report]] = []
    if settings.streaming:
        batches, shared = stream(prepared, settings)
        lengths = np.zeros(0)
    else:
        found = [tokenize("train", rows, prepared, settings, notes, anew) for rows in tables]
        samples = mixed([part for part, _ in found], settings)
        batches, shared = lay_out(samples, prepared, settings, notes), {"data": samples.checksum()}
        lengths = samples.lengths
    apart = [tokenize("held out", rows, prepared, settings, notes, anew) for rows in heldout_tables]
    if settings.eval_split is not None:
        say_split(found, apart, settings.seed)
    kept = [part for part, _ in apart]
    heldout: Sequence[Sample] = kept[0] if len(kept) == 1 else mix(kept, None, 0)[0] if kept else []
    check_held_out(settings, heldout)
    return RunData(batches, shared, heldout, lengths, sum(report.rows_read for _, report in found), notes)


def note(notes: list[str], text: str) -> None:
    """Says something and keeps it."""
    notes.append(text)
    say(text)


def tokenize(
    what: str, rows: Rows, prepared: Prepared, settings: TrainSettings, notes: list[str], anew: Callable[[], object]
) -> tuple[Samples, Report]:
    samples, found = tokenize_dataset(
        rows, prepared.tokenizer, max_length=settings.max_length, vocab_size=prepared.model.config.vocab_size,
        train_on=settings.train_on, template_kwargs=settings.chat_template_kwargs, cache=settings.cache_directory,
        columns=settings.columns, anew=anew,
    )  # fmt: skip
    for line in (*found.lines(), shape_line(samples, found)):
        note(notes, f"{what}: {line}")
    return samples, found


def mixed(parts: list[Samples], settings: TrainSettings) -> Samples | Selection:
    """The samples of all data sets as one; says how many of each an epoch takes."""
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in settings.sources if source.weight is not None]
    samples, shares = mix(parts, weights or None, settings.seed)
    for source, part, share in zip(settings.sources, parts, shares, strict=True):
        times = f"{share // len(part)} times" + (" and some once more" if share % len(part) else "")
        how = "drawn by seed" if share < len(part) else "each once" if share == len(part) else f"each {times}"
        say(f"train: an epoch takes {share} samples of the {len(part)} of {source.path}, {how}")
    return samples


def lay_out(samples: Samples | Selection, prepared: Prepared, settings: TrainSettings, notes: list[str]) -> Batches:
    """The batches of the run; says how full its rows are."""
    plan = make_plan(
        samples.lengths, settings.max_length, packing=settings.packing,
        shuffle=settings.shuffle_dataset, seed=settings.seed,
    )  # fmt: skip
    batches = Batches(
        samples, plan, max_length=settings.max_length, seed=settings.seed, shuffle=settings.shuffle_dataset,
        batch_size=settings.per_device_train_batch_size * data_parallel_size(prepared.mesh),
        accumulation=settings.gradient_accumulation_steps,
    )  # fmt: skip
    note(
        notes,
        f"{'packed' if settings.packing else 'padded'}: {batches.rows} rows of {settings.max_length} tokens, "
        f"{batches.efficiency:.1%} filled, {batches.steps_per_epoch} steps an epoch",
    )
    return batches


def stream(prepared: Prepared, settings: TrainSettings) -> tuple[StreamBatches, dict[str, Any]]:
    """The batches of a data set that is read while training, and what a resumed run must share to read the same."""
    source = settings.sources[0]
    split = _split(source, settings)
    config = source.config or settings.dataset_config
    batches = StreamBatches(
        lambda: open_stream(source.path, split, config), prepared.tokenizer, max_length=settings.max_length,
        vocab_size=prepared.model.config.vocab_size, seed=settings.seed, total_steps=settings.max_steps,
        batch_size=settings.per_device_train_batch_size * data_parallel_size(prepared.mesh),
        accumulation=settings.gradient_accumulation_steps, buffer_size=settings.buffer_size,
        packing=settings.packing, shuffle=settings.shuffle_dataset, train_on=settings.train_on,
        template_kwargs=settings.chat_template_kwargs, columns=settings.columns,
    )  # fmt: skip
    path = Path(source.path).expanduser()
    files = [file.name for file in find_files(path, split)] if path.exists() else []
    read_alike: dict[str, Any] = {"dataset": files or source.path, "split": split, "config": config}
    read_alike |= {
        name: getattr(settings, name) for name in ("buffer_size", "train_on", "template", "response_template")
    }
    return batches, read_alike | {"chat_template_kwargs": dict(settings.chat_template_kwargs)}


def say_split(found: list[tuple[Samples, Report]], apart: list[tuple[Samples, Report]], seed: int) -> None:
    """How many rows of every data set `--eval_split` holds out."""
    for (_, trained), (_, held_out) in zip(found, apart, strict=True):
        rows = trained.rows_read + held_out.rows_read
        say(f"held out: {held_out.rows_read} of {rows} rows, drawn by seed {seed}")


def check_held_out(settings: TrainSettings, heldout: Sequence[Sample]) -> None:
    """Raises InputError where something is asked of held-out data and there are none."""
    if heldout:
        return
    for name in ("eval_metric", "load_best_model_at_end", "early_stopping_patience"):
        if getattr(settings, name):
            raise InputError(f"--{name} needs held-out data; name them by --eval_dataset or --eval_split")
    idle = [name for name in ("eval_steps", "sample_prompts") if getattr(settings, name)]
    idle += ["eval_strategy"] if settings.eval_strategy == "epoch" else []
    if idle:
        say(f"{', '.join(idle)}: without effect, for there are no held-out data")
