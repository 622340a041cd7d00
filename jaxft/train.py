"""`python -m jaxft.train`: fine-tunes a model on a data set; without arguments the embedded ones."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxft.budget import plan_run, with_plan
from jaxft.config import describe, parse
from jaxft.convert.hf import files_of
from jaxft.errors import InputError, run_command
from jaxft.hub import open_repository, push
from jaxft.load import EMBEDDED, parameter_count
from jaxft.loop import resumed_from, run_training
from jaxft.lora import padding
from jaxft.make_run import guessed, make_run, some_optimizer, steps_of, with_schedule
from jaxft.metrics import MetricsFile
from jaxft.output import (
    CHECKPOINTS,
    METRICS,
    choose_directory,
    is_finished,
    model_card,
    write_result,
    write_subtracted,
)  # fmt: skip
from jaxft.prepare import Prepared, prepare_shapes, read_weights
from jaxft.processes import gathered, joined, leave, meet, on_first, say
from jaxft.read_ahead import reading_ahead
from jaxft.report import Told, report
from jaxft.reporters import check_reporters
from jaxft.run_data import open_tables, read_data
from jaxft.settings import TrainSettings
from jaxft.step_ahead import step_ahead
from jaxft.tasks import find_metric
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
    tables, heldout_tables = open_tables(settings)
    prepared = prepare_shapes(settings, settings.model_name_or_path, needed=not settings.dry_run)
    # the step is compiled before any weight is on a device: XLA tries its ways there, with arrays of its own
    with (
        reading_ahead([] if settings.dry_run else files_of(prepared.directory)),
        step_ahead(settings, guessed(settings, prepared), lambda some: some_optimizer(settings, some)) as ahead,
    ):
        data = read_data(tables, heldout_tables, prepared, settings, ahead.begin)
        say_model(prepared)
        prepared = with_schedule(prepared, settings, steps_of(settings, data.batches))
        run = make_run(settings, prepared, directory, data)
        resumed_from(run)  # raises now what it would raise after compiling and reading the weights
        planned = plan_run(run, prepared, say, ahead.take)
    if settings.dry_run:
        return 0
    run, prepared = with_plan(run, planned), read_weights(prepared, settings)
    on_first(lambda: write_subtracted(directory, prepared, settings))
    with jax.set_mesh(prepared.mesh):
        outcome = run_training(run, prepared)
        for line in (met := data.met()):
            say(line)
        if outcome.stopped_by is not None:
            say(f"stopped by {outcome.stopped_by.name} after step {outcome.step} of {run.total_steps}; go on with "
                f"--output_dir {directory} --resume_from_checkpoint auto")  # fmt: skip
            return 128 + outcome.stopped_by
        if outcome.ended is not None:
            say(f"ended after step {outcome.step} of {run.total_steps}: {outcome.ended}")
        if outcome.result_step != outcome.step:
            say(f"the best evaluation was after step {outcome.result_step}: its checkpoint is the result")
        facts = {
            "data": ", ".join(source.path for source in settings.sources),
            "rows": data.rows_read(),
            "steps": outcome.step,
            **({"result of step": outcome.result_step} if outcome.result_step != outcome.step else {}),
            **outcome.figures,
        }
        whole, card = gathered(outcome.trainable), model_card(prepared, settings, facts)
        told = Told(
            title=directory.name, settings=settings, provenance=provenance, environment=environment(prepared),
            data=[*data.notes, *met], lengths=data.lengths, use=usage(prepared, settings, directory),
            result_step=outcome.result_step, ended=outcome.ended, lora=prepared.lora is not None,
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


def say_model(prepared: Prepared) -> None:
    model, devices = prepared.model, prepared.mesh.devices
    trained, frozen = parameter_count(prepared.trainable) - padding(model), parameter_count(prepared.frozen)
    say(
        f"model: {model.config.model_type}, {(trained + frozen) / 1e6:,.2f} M parameters, "
        f"{trained / 1e6:,.2f} M trained; computed in {prepared.compute_dtype.name} "
        f"on {devices.size} × {devices.flat[0].device_kind}"
    )


def environment(prepared: Prepared) -> list[tuple[str, str]]:
    """With what and on what the run was made, for the report."""
    devices = prepared.mesh.devices
    versions = [(name, version(name)) for name in ("jax", "flax", "optax", "transformers")]
    return [
        ("computed in", f"{prepared.compute_dtype.name} on {devices.size} × {devices.flat[0].device_kind}"),
        ("Python", platform.python_version()),
        *versions,
    ]


def before_and_after(lines: Sequence[dict[str, Any]], step: int) -> list[tuple[dict[str, str] | None, dict[str, str]]]:
    """Samples of the untrained model beside those of `step`; None where the run began elsewhere."""
    by_step = {line["step"]: line["samples"] for line in lines}
    after = by_step.get(step, [])
    return list(zip(by_step.get(0, [None] * len(after)), after, strict=True))


if __name__ == "__main__":
    sys.exit(leave(run_command(main)))
