"""`python -m jaxft.train`: fine-tunes a model on a data set; without arguments the embedded ones."""

import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxft.adalora import with_adalora
from jaxft.config import describe, parse
from jaxft.convert.hf import files_of
from jaxft.data import Report, shape_line, split_known, tokenize_dataset
from jaxft.errors import InputError, run_command
from jaxft.evaluate import held_out_split, read_from
from jaxft.files import find_files, open_rows, open_stream
from jaxft.hub import open_repository, push
from jaxft.in_place import InPlace
from jaxft.load import EMBEDDED, parameter_count
from jaxft.loop import Run, resumed_from, run_training
from jaxft.lora import padding
from jaxft.memory import plan_run, with_plan
from jaxft.metrics import MetricsFile
from jaxft.mixture import Source, mix
from jaxft.optim import make_optimizer, with_loss_scale
from jaxft.optim_paged import check_device
from jaxft.output import (
    CHECKPOINTS,
    METRICS,
    choose_directory,
    is_finished,
    model_card,
    write_result,
    write_subtracted,
)  # fmt: skip
from jaxft.packing import Batches, eval_batches, make_plan
from jaxft.prepare import Prepared, prepare_shapes, read_weights
from jaxft.processes import gathered, is_first, joined, leave, meet, on_first
from jaxft.read_ahead import reading_ahead
from jaxft.report import Told, report
from jaxft.reporters import check_reporters
from jaxft.rows import Rows
from jaxft.samples import Sample, Samples, Selection
from jaxft.schedules import Schedule, make_schedule
from jaxft.settings import TrainSettings
from jaxft.sharding import data_parallel_size
from jaxft.step_ahead import step_ahead
from jaxft.streaming import StreamBatches
from jaxft.tasks import find_metric, make_task
from jaxft.usage import usage


def main(argv: list[str] | None = None) -> int:
    settings, provenance = read_settings(sys.argv[1:] if argv is None else argv)
    with joined(settings):
        for line in describe(settings, provenance):
            say(line)
        return train(settings, provenance)


def train(settings: TrainSettings, provenance: dict[str, str]) -> int:
    """The run from its settings to its files; in several processes each of them calls it.

    provenance: where each setting that is no default came from.
    """
    assert settings.model_name_or_path is not None and settings.dataset is not None
    check_reporters(settings)
    if settings.eval_metric is not None:
        find_metric(settings.eval_metric)  # raises now what it would raise after the model is loaded
    directory = choose_directory(settings, settings.model_name_or_path)
    finished = settings.resume_from_checkpoint == "auto" and is_finished(directory, settings)
    meet("directory")  # all have seen it before the first process writes
    repository = hub_repository(settings, directory)
    if finished:
        push_result(repository, directory)
        rest = "" if repository else "; there is nothing left to do"
        say(f"{directory} holds the finished run of these settings{rest}")
        return 0
    named = settings.dataset_train_split if "dataset_train_split" in settings.settings_given else None
    sources = settings.sources
    tables = [read("train", source, source.split or named, settings) for source in sources if not settings.streaming]
    heldout_rows = settings.eval_dataset and read(
        "held out", Source(settings.eval_dataset), held_out_split(settings.eval_dataset, settings), settings
    )
    heldout_tables = [heldout_rows] if heldout_rows else []
    if settings.eval_split is not None:
        pairs = [split_known(rows, settings.eval_split, settings.seed) for rows in tables]
        tables, heldout_tables = [rows for rows, _ in pairs], [held_out for _, held_out in pairs]
    if settings.streaming:
        say(f"train: a stream of {read_from(sources[0].path, sources[0].split or named)}, read while training")
    prepared = prepare_shapes(settings, settings.model_name_or_path, needed=not settings.dry_run)
    notes: list[str] = []  # what is said of the data, for the report
    batches: Batches | StreamBatches
    # the step is compiled before any weight is on a device: XLA tries its ways there, with arrays of its own
    with (
        reading_ahead([] if settings.dry_run else files_of(prepared.directory)),
        step_ahead(settings, guessed(settings, prepared), lambda some: some_optimizer(settings, some)) as ahead,
    ):
        if settings.streaming:
            batches, data = stream(sources[0], sources[0].split or named, prepared, settings)
        else:
            found = [tokenize("train", rows, prepared, settings, notes, ahead.begin) for rows in tables]
            samples = mixed([part for part, _ in found], sources, settings.seed)
            batches, data = lay_out(samples, prepared, settings, notes), {"data": samples.checksum()}
        apart = [tokenize("held out", rows, prepared, settings, notes, ahead.begin) for rows in heldout_tables]
        if settings.eval_split is not None:
            say_split(found, apart, settings.seed)
        kept = [part for part, _ in apart]
        heldout: Sequence[Sample] = kept[0] if len(kept) == 1 else mix(kept, None, 0)[0] if kept else []
        check_held_out(settings, heldout)
        say_model(prepared)
        prepared = with_schedule(prepared, settings, steps_of(settings, batches))
        run = make_run(settings, prepared, directory, batches, data, heldout)
        resumed_from(run)  # raises now what it would raise after compiling and reading the weights
        planned = plan_run(run, prepared, say, ahead.take)
    if settings.dry_run:
        return 0
    run, prepared = with_plan(run, planned), read_weights(prepared, settings)
    on_first(lambda: write_subtracted(directory, prepared, settings))
    with jax.set_mesh(prepared.mesh):
        outcome = run_training(run, prepared)
        if isinstance(batches, StreamBatches):
            seen = batches.report().rows
            for line in batches.report().lines():
                note(notes, f"train: {line}")
        else:
            seen = sum(report.rows_read for _, report in found)
        if outcome.stopped_by is not None:
            say(f"stopped by {outcome.stopped_by.name} after step {outcome.step} of {run.total_steps}; go on with "
                f"--output_dir {directory} --resume_from_checkpoint auto")  # fmt: skip
            return 128 + outcome.stopped_by
        if outcome.ended is not None:
            say(f"ended after step {outcome.step} of {run.total_steps}: {outcome.ended}")
        if outcome.result_step != outcome.step:
            say(f"the best evaluation was after step {outcome.result_step}: its checkpoint is the result")
        facts = {
            "data": ", ".join(source.path for source in sources),
            "rows": seen,
            "steps": outcome.step,
            **({"result of step": outcome.result_step} if outcome.result_step != outcome.step else {}),
            **outcome.figures,
        }
        whole, card = gathered(outcome.trainable), model_card(prepared, settings, facts)
        lengths = np.zeros(0) if settings.streaming else samples.lengths
        told = Told(
            title=directory.name, settings=settings, provenance=provenance, environment=environment(prepared),
            data=notes, lengths=lengths, use=usage(prepared, settings, directory), result_step=outcome.result_step,
            ended=outcome.ended, lora=prepared.lora is not None,
        )  # fmt: skip
        page = report(told, MetricsFile(directory / METRICS).lines(), outcome.samples)
        on_first(lambda: write_result(directory, prepared, whole, settings, card, page))
    for before, after in before_and_after(outcome.samples, outcome.result_step):
        text = f"before: {before['answer'].strip()}\n" if before else ""
        say(f"\nprompt: {after['prompt'].strip()}\n{text}after:  {after['answer'].strip()}")
    say(f"{'adapter' if prepared.lora else 'model'} written to {directory}")
    push_result(repository, directory)
    return 0


def hub_repository(settings: TrainSettings, directory: Path) -> list[str]:
    """The repository that `--push_to_hub` fills at the end, opened now; [] where nothing is pushed."""
    opened: list[str] = []

    def open_one() -> None:
        name = settings.hub_model_id or directory.resolve().name
        exist_ok = settings.hub_exist_ok
        opened.append(open_repository(name, private=settings.hub_private_repo, exist_ok=exist_ok))

    if settings.push_to_hub and not settings.dry_run:
        on_first(open_one)
    return opened


def push_result(repository: list[str], directory: Path) -> None:
    """Uploads what a run left to what `hub_repository` opened, all but its checkpoints."""
    for name in repository:  # in the first process only
        url = push(name, directory, "python -m jaxft.train", leave=(f"{CHECKPOINTS}/*",))
        say(f"pushed to {url}")


def say(text: str) -> None:
    """Everything but results goes to stderr; of several processes the first says it."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def read_settings(argv: list[str]) -> tuple[TrainSettings, dict[str, str]]:
    """The settings, with the embedded model and data where neither a model nor data is named.

    Raises InputError where only one of the two is named.
    """
    settings, provenance = parse("train", argv)
    if settings.model_name_or_path is None and settings.dataset is None:
        flags, given = settings, settings.settings_given
        settings, _ = parse("train", ["--config", str(EMBEDDED / "config.yaml")])
        chosen = {name: getattr(flags, name) for name in {*given, "eval_strategy"}}  # which follows from --eval_steps
        embedded = settings.settings_given - given
        if flags.warmup_ratio is not None and "warmup_steps" in embedded:  # it takes the place of the embedded steps
            chosen["warmup_steps"], embedded = 0, embedded - {"warmup_steps"}
        if flags.memory_budget is not None and "gradient_checkpointing" in embedded:  # the budget chooses in its place
            chosen["gradient_checkpointing"] = flags.gradient_checkpointing
            embedded = embedded - {"gradient_checkpointing"}
        settings = replace(settings, **chosen, settings_given=given | embedded)
        heldout = None if settings.eval_split else str(EMBEDDED / "problems_heldout.jsonl")
        settings = replace(
            settings,
            model_name_or_path=str(EMBEDDED / "base"),
            dataset=str(EMBEDDED / "problems_train.jsonl"),
            eval_dataset=settings.eval_dataset or heldout,
        )
        names = sorted(embedded | {"model_name_or_path", "dataset"} | ({"eval_dataset"} - given if heldout else set()))
        provenance = provenance | dict.fromkeys(names, "embedded default")
    if settings.model_name_or_path is None or settings.dataset is None:
        missing = "--model_name_or_path" if settings.model_name_or_path is None else "--dataset"
        raise InputError(f"{missing} is missing; name both a model and a data set, or neither for the embedded ones")
    return settings, provenance


def read(what: str, source: Source, split: str | None, settings: TrainSettings) -> Rows:
    rows = open_rows(source.path, split, source.config or settings.dataset_config)
    say(f"{what}: read {read_from(source.path, split)}")
    return rows


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


def mixed(parts: list[Samples], sources: Sequence[Source], seed: int) -> Samples | Selection:
    """The samples of all data sets as one; says how many of each an epoch takes."""
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in sources if source.weight is not None]
    samples, shares = mix(parts, weights or None, seed)
    for source, part, share in zip(sources, parts, shares, strict=True):
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


def stream(
    source: Source, split: str | None, prepared: Prepared, settings: TrainSettings
) -> tuple[StreamBatches, dict[str, Any]]:
    """The batches of a data set that is read while training, and what a resumed run must share to read the same."""
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


def say_model(prepared: Prepared) -> None:
    model, devices = prepared.model, prepared.mesh.devices
    trained, frozen = parameter_count(prepared.trainable) - padding(model), parameter_count(prepared.frozen)
    say(
        f"model: {model.config.model_type}, {(trained + frozen) / 1e6:,.2f} M parameters, "
        f"{trained / 1e6:,.2f} M trained; computed in {prepared.compute_dtype.name} "
        f"on {devices.size} × {devices.flat[0].device_kind}"
    )


def steps_of(settings: TrainSettings, batches: Batches | StreamBatches) -> int:
    """How many optimizer steps the run has."""
    if settings.max_steps >= 0:
        return settings.max_steps
    return math.ceil(settings.num_train_epochs * batches.steps_per_epoch)  # as transformers rounds it


def guessed(settings: TrainSettings, prepared: Prepared) -> Prepared:
    """`with_schedule` for the steps that the flags name, or else the fewest that AdaLoRA takes."""
    fewest = settings.tinit + settings.tfinal + 1
    return with_schedule(prepared, settings, settings.max_steps if settings.max_steps >= 0 else fewest)


def some_optimizer(settings: TrainSettings, prepared: Prepared) -> optax.GradientTransformation:
    """The run's optimizer for some number of steps, where theirs is not known yet: its program is that of any."""
    return optimizer_of(settings, prepared, schedule_of(settings, 1))


def with_schedule(prepared: Prepared, settings: TrainSettings, total: int) -> Prepared:
    """AdaLoRA's settings with the number of steps that its schedule needs; those of an adapter stay as they were."""
    if prepared.lora is None or prepared.lora.adalora is None or settings.adapter is not None:
        return prepared
    adalora = replace(prepared.lora.adalora, total_step=total)
    return replace(prepared, lora=replace(prepared.lora, adalora=adalora))


def make_run(
    settings: TrainSettings, prepared: Prepared, directory: Path, batches: Batches | StreamBatches,
    data: dict[str, Any], heldout: Sequence[Sample],
) -> Run:  # fmt: skip
    """Everything the loop needs, computed from the settings once."""
    total = steps_of(settings, batches)
    schedule = schedule_of(settings, total)
    if settings.optim.startswith("paged") and not settings.device:
        check_device(prepared.mesh.devices.flat[0])
    optimizer = optimizer_of(settings, prepared, schedule)
    eval_rows = settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh)
    return Run(
        directory=directory,
        settings=settings,
        total_steps=total,
        batches=batches,
        heldout=eval_batches(heldout, max_length=settings.max_length, batch_size=eval_rows, packing=settings.packing)
        if heldout
        else None,
        optimizer=optimizer,
        schedule=schedule,
        fingerprint=fingerprint(settings, prepared, batches, data),
        task=make_task(settings, prepared, heldout),
    )


def schedule_of(settings: TrainSettings, total: int) -> Schedule:
    """The learning rate of a run of `total` steps, by the number of the step."""
    warmup = settings.warmup_steps if settings.warmup_ratio is None else math.ceil(settings.warmup_ratio * total)
    return make_schedule(
        settings.lr_scheduler_type, settings.learning_rate, warmup, total, settings.lr_scheduler_kwargs
    )


def optimizer_of(
    settings: TrainSettings, prepared: Prepared, schedule: optax.Schedule
) -> optax.GradientTransformation | InPlace:
    """The optimizer that the flags ask for."""
    own_rate = settings.embedding_learning_rate
    adalora = None if prepared.lora is None else prepared.lora.adalora
    optimizer = make_optimizer(
        schedule, adam_beta1=settings.adam_beta1, adam_beta2=settings.adam_beta2, adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0 if adalora else settings.max_grad_norm,
        optim=settings.optim, embedding_factor=1.0 if own_rate is None else own_rate / settings.learning_rate,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
    )  # fmt: skip
    if adalora is not None:
        optimizer = with_adalora(
            optimizer, prepared.model, adalora, max_grad_norm=settings.max_grad_norm, allocate=settings.adapter is None
        )
    if prepared.compute_dtype == np.dtype("float16"):
        optimizer = with_loss_scale(optimizer)
    return optimizer


def fingerprint(
    settings: TrainSettings, prepared: Prepared, batches: Batches | StreamBatches, data: dict[str, Any]
) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on with, for its losses to be the same."""
    names = (
        "full_finetuning", "max_length", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
        "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
        "shuffle_dataset", "packing", "optim", "load_in_4bit", "load_in_8bit", "embedding_learning_rate", "add_tokens",
        "chat_template", "eval_split", "loraplus_lr_ratio",
    )  # fmt: skip
    found: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if prepared.lora is not None:
        own = {"r": "lora_r", "target_modules": "lora_target_modules"}
        found |= {own.get(name, name): value for name, value in asdict(prepared.lora).items()}
    held = {leaf.dtype.name for leaf in jax.tree.leaves((prepared.trainable, prepared.frozen))}
    found["dtype"] = f"{' and '.join(sorted(held))} weights, computed in {prepared.compute_dtype.name}"
    found |= {"rows_per_step": batches.rows_per_step, **data}
    return json.loads(json.dumps(found))  # as it comes back from a checkpoint: lists, and no tuples


def environment(prepared: Prepared) -> list[tuple[str, str]]:
    """With what and on what the run was made, for the report."""
    devices = prepared.mesh.devices
    versions = [(name, version(name)) for name in ("jax", "flax", "optax", "transformers")]
    return [
        ("computed in", f"{prepared.compute_dtype.name} on {devices.size} × {devices.flat[0].device_kind}"),
        ("Python", platform.python_version()),
        *versions,
    ]


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


def before_and_after(lines: Sequence[dict[str, Any]], step: int) -> list[tuple[dict[str, str] | None, dict[str, str]]]:
    """Samples of the untrained model beside those of `step`; None where the run began elsewhere."""
    by_step = {line["step"]: line["samples"] for line in lines}
    after = by_step.get(step, [])
    return list(zip(by_step.get(0, [None] * len(after)), after, strict=True))


if __name__ == "__main__":
    sys.exit(leave(run_command(main)))
