"""The training loop: steps, metrics, evaluations, checkpoints, and an orderly end when a signal or the time comes."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxft.cards import peak_flops
from jaxft.checkpoint import Checkpoints
from jaxft.errors import InputError, RunError
from jaxft.evaluate import evaluate
from jaxft.flops import model_flops
from jaxft.metrics import Line, MetricsFile
from jaxft.optim import LossScale, state_shapes
from jaxft.output import CHECKPOINTS, METRICS, SAMPLES
from jaxft.packing import Batches
from jaxft.prepare import Prepared
from jaxft.processes import is_first, largest, on_first
from jaxft.reporters import reporting
from jaxft.schedules import Numbers, Schedule, scheduled, with_numbers
from jaxft.settings import TrainSettings
from jaxft.sharding import put_batch
from jaxft.step import TrainStep, make_eval_step
from jaxft.stopping import Course, Rules
from jaxft.streaming import StreamBatches
from jaxft.tasks import Task
from jaxft.trees import Tree
from jaxft.view import Display, live_display


@dataclass(frozen=True)
class Run:
    """What one training run is: where, on what, for how long, with which optimizer."""

    directory: Path
    settings: TrainSettings
    total_steps: int
    batches: Batches | StreamBatches
    heldout: Batches | None
    optimizer: optax.GradientTransformation
    schedule: Schedule
    fingerprint: dict[str, Any]
    step: TrainStep | None = None  # compiled, by `budget.plan_run`
    task: Task | None = None  # what is answered at each evaluation

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out data are due: before the first step, after the last, and in between as was asked."""
        if step == 0 or step >= self.total_steps:
            return True
        every = {"no": 0, "steps": self.settings.eval_steps, "epoch": self.batches.steps_per_epoch}
        period = every[self.settings.eval_strategy]
        return period > 0 and step % period == 0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, by which signal if any, or why before its last step, with which figures.

    result_step: of the parameters in `trainable`; samples: the answers at each evaluation, as samples.jsonl has them.
    """

    trainable: Tree
    step: int
    result_step: int
    stopped_by: signal.Signals | None
    ended: str | None
    figures: dict[str, Any]
    samples: list[Line]


class Sent(NamedTuple):
    """A step that was given to the device and whose results have not been read."""

    step: int
    batch: dict[str, np.ndarray]
    found: dict[str, jax.Array]


@dataclass
class Window:
    """Sums since the last line of metrics."""

    loss: float = 0.0
    weight: float = 0.0
    targets: int = 0
    tokens: int = 0
    steps: int = 0
    flops: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def line(self, step: int, epoch: float, grad_norm: float, learning_rate: float, peak: float | None) -> Line:
        seconds = time.perf_counter() - self.began
        memory = jax.local_devices()[0].memory_stats()
        return {
            "step": step,
            "epoch": epoch,
            "loss": self.loss / self.weight if self.weight else math.nan,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "target_tokens": self.targets,
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds / self.steps,
            "peak_memory_bytes": memory["peak_bytes_in_use"] if memory else None,
            "mfu": self.flops / seconds / peak if peak else None,
        }


def initial_optimizer_state(run: Run, prepared: Prepared) -> optax.OptState:
    """The optimizer's first state, each moment where its parameter lies."""

    def init(trainable: Tree, numbers: Numbers) -> optax.OptState:
        return with_numbers(run.optimizer.init(trainable), numbers)

    places = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(run.optimizer, prepared.trainable))
    return jax.jit(init, out_shardings=places)(prepared.trainable, run.schedule.numbers)


def run_training(run: Run, prepared: Prepared) -> Outcome:
    """Runs from the first step, or from a checkpoint, to the last. Must be called under `jax.set_mesh`.

    Raises RunError where a loss or gradient is not finite: the last checkpoint stays, and the batch is written out.
    """
    assert run.step is not None
    settings = run.settings
    checkpoints = Checkpoints(run.directory / CHECKPOINTS, settings.save_total_limit)
    metrics, samples = MetricsFile(run.directory / METRICS), MetricsFile(run.directory / SAMPLES)
    rules, began = Rules.of(settings), time.perf_counter()
    trainable, opt_state = prepared.trainable, initial_optimizer_state(run, prepared)
    key = jax.device_put(jax.random.key(settings.seed), jax.tree.leaves(opt_state)[0].sharding)
    first, step, window = 0, 0, Window()
    sent: Sent | None = None
    source = resumed_from(run, checkpoints)
    if source is not None:
        saved, first = source
        like = {"trainable": trainable, "opt_state": with_numbers(opt_state, None), "key": key}
        state, meta = saved.restore(first, like)
        trainable, key = state["trainable"], state["key"]
        opt_state = with_numbers(state["opt_state"], scheduled(opt_state).numbers)  # of the run as it is planned now
        window = Window(**meta["window"])
        run.batches.go_on(first, meta["epoch"], meta["row"])

    def begin() -> None:
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise InputError(f"--output_dir {run.directory} cannot be made: {failure}; name another") from failure
        metrics.cut(first if source else -1)
        evaluated = {line["step"] for line in metrics.lines() if "eval_loss" in line}
        samples.keep(lambda line: line["step"] in evaluated)  # one that was killed between the two is made anew

    on_first(begin)
    evaluations = [line for line in metrics.lines() if "eval_loss" in line]
    evaluated = {line["step"] for line in evaluations}
    course = Course.restored(rules, meta.get("course") if source else None, evaluations)
    checkpoints.delete_after(first)  # the run goes on from an earlier one, which was named; it has one course only
    if source and rules.keep_best and course.best_step is not None:
        _keep_best(checkpoints, saved, course.best_step)

    peak = peak_flops(prepared.mesh.devices.flat[0], prepared.compute_dtype)
    peak = None if peak is None else peak * prepared.mesh.devices.size
    # one program each, where each of their operations would be one
    rate, step_key = jax.jit(run.schedule.rate), jax.jit(jax.random.fold_in)
    eval_function = jax.jit(make_eval_step(prepared.model, dtype=prepared.compute_dtype))

    def settle() -> None:
        """Waits for the step that was sent last, and adds up what it found."""
        nonlocal sent
        if sent is None:
            return
        (number, batch, found), sent = sent, None
        loss, weight = float(found["loss"]), float(found["weight"])
        if not found["finite"] and not (isinstance(opt_state, LossScale) and found["loss_scale"] > 1):
            raise RunError(_non_finite(run.directory, number, batch, found, checkpoints))
        if math.isfinite(loss):  # float16 leaves out a step whose gradients overflow; its loss is one all the same
            window.loss += loss * weight
            window.weight += weight
        window.targets += int(found["target_tokens"])
        window.tokens += int(np.count_nonzero(batch["segment_ids"]))
        window.flops += model_flops(prepared.model, batch, prepared.lora is None) if peak else 0.0
        window.steps += 1
        display.advance(number)

    def save(step: int) -> None:
        settle()
        epoch, row = run.batches.position(step)
        state = {"trainable": trainable, "opt_state": with_numbers(opt_state, None), "key": key}
        sums = {"loss": window.loss, "weight": window.weight, "targets": window.targets}
        meta = {"fingerprint": run.fingerprint, "total_steps": run.total_steps, "epoch": epoch, "row": row}
        meta["window"] = sums  # so that a line after a resume covers the same steps as without
        meta["course"] = course.state(time.perf_counter() - began)
        checkpoints.save(step, state, meta, course.best_step if rules.keep_best else None)

    def tell(line: Line, display: Display) -> None:
        metrics.write(line)
        display.show(line)
        reporters.log(line)

    def evaluate_now(step: int, display: Display) -> None:
        if run.heldout is None or step in evaluated:
            return
        rows = f"{run.heldout.rows} rows in {len(run.heldout)} batches"
        display.busy(f"evaluating {rows}" if step == first else "evaluating", told=step == first)
        found = evaluate(eval_function, trainable, prepared.frozen, run.heldout, prepared.mesh, stop.asked)
        if stop.agreed is not None:
            return  # half an evaluation is none: the resumed run makes it
        line = {"step": step, "epoch": step / run.batches.steps_per_epoch}
        line |= {f"eval_{name}": value for name, value in found.items()}
        if run.task is not None:
            answers = run.task.answers(prepared, trainable, stop.asked)
            if stop.agreed is not None:
                return
            try:
                line |= run.task.score(answers)
            except RunError:  # what somebody's function does to an answer must not cost the steps before it
                if step > first and checkpoints.latest() != step:
                    save(step)
                raise
            if run.task.shown:
                shown = {"step": step, "samples": run.task.samples(prepared.tokenizer, answers)}
                samples.write(shown)
                reporters.log_samples(shown)
        tell(line, display)
        evaluated.add(step)
        if course.note(line) and rules.keep_best and step < run.total_steps:
            save(step)

    with (
        live_display(first, run.total_steps, metrics.lines(), is_first()) as display,
        reporting(settings, run.directory, first) as reporters,
        _signals() as stop,
    ):
        for line in reporters.where:
            display.say(line)
        if source is not None:
            display.say(f"resumed from {saved.directory / str(first)}: {first} of {run.total_steps} steps done")
            if meta["total_steps"] != run.total_steps:
                display.say(f"{meta['total_steps']} steps were planned: the learning rate follows the new plan")
        if run.evaluates_after(first):
            evaluate_now(first, display)
        step, window.began, ended = first, time.perf_counter(), None
        for step in range(first + 1, run.total_steps + 1):
            ended = course.over() or (
                _time_is_up(course, began, step - 1) and f"--max_time {settings.max_time} is over"
            )
            if stop.asked() or ended:
                step -= 1
                break
            try:
                batch = run.batches.batch(step - 1)
            except InputError:  # a row of a stream that cannot be read must not cost the steps before it
                if step - 1 > first and checkpoints.latest() != step - 1:
                    save(step - 1)
                raise
            told = step % settings.logging_steps == 0 or step == run.total_steps
            if told:  # asks the device, which is busy with the step before
                learning_rate = float(rate(_updates_done(opt_state, step - 1), run.schedule.numbers))
            trainable, opt_state, found = run.step(
                trainable, opt_state, prepared.frozen, put_batch(batch, prepared.mesh),
                step_key(key, step),
            )  # fmt: skip
            settle()  # of the step before: the device has work while the host reads and prepares
            sent = Sent(step, batch, found)
            evaluating = step != run.total_steps and run.evaluates_after(step)
            saving = settings.save_steps and step % settings.save_steps == 0 and step != run.total_steps
            if told or evaluating or saving:
                settle()
            if told:
                epoch, norm = step / run.batches.steps_per_epoch, float(found["grad_norm"])
                tell(window.line(step, epoch, norm, learning_rate, peak), display)
                window = Window()
            pause = time.perf_counter()
            if evaluating:
                evaluate_now(step, display)
            if saving and checkpoints.latest() != step:  # the best one so far is saved already
                save(step)
            window.began += time.perf_counter() - pause  # evaluations and checkpoints are not the step's time
        if checkpoints.latest() != step:
            save(step)
        if stop.agreed is None:
            evaluate_now(step, display)
    result_step = step
    if stop.agreed is None and rules.keep_best and course.best_step is not None:
        result_step = course.best_step
    if result_step != step:
        described = jax.tree.map(_described, {"trainable": trainable, "opt_state": with_numbers(opt_state, None)})
        like = described | {"key": key}
        del trainable, opt_state
        trainable = checkpoints.restore(result_step, like)[0]["trainable"]
    return Outcome(
        trainable, step, result_step, stop.agreed, None if stop.agreed else ended or None, metrics.figures(result_step),
        samples.lines(),
    )  # fmt: skip


def _updates_done(opt_state: optax.OptState, steps_done: int) -> Any:
    """How many updates the schedule has counted: all steps, less those that float16 left out."""
    if not isinstance(opt_state, LossScale):
        return steps_done
    return int(scheduled(opt_state).count)


def _time_is_up(course: Course, began: float, steps_done: int) -> bool:
    """Whether `--max_time` is over in any process, each of which must ask; one step is made in any case."""
    if course.rules.seconds is None or steps_done == 0:
        return False
    return largest(course.too_long(time.perf_counter() - began)) != 0


def _described(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _keep_best(own: Checkpoints, source: Checkpoints, step: int) -> None:
    """Has the best checkpoint of a resumed run in its own directory. Raises InputError where there is none any more."""
    if step not in own.steps() and step not in source.steps():
        raise InputError(
            f"--load_best_model_at_end: {source.directory} has no checkpoint of step {step}, the best one before; "
            "resume without --load_best_model_at_end, or start a new run"
        )
    own.adopt(source, step)


def resumed_from(run: Run, own: Checkpoints | None = None) -> tuple[Checkpoints, int] | None:
    """The checkpoint to go on with, in `own` ("auto": those of the run's directory) or the directory that was named.

    Raises InputError where there is none, and where it is of a run with other settings or data.
    """
    own = Checkpoints(run.directory / CHECKPOINTS, repair=False) if own is None else own
    source = _resume_source(run.settings.resume_from_checkpoint, own)
    if source is not None:
        saved, step = source
        _check_fingerprint(saved.directory / str(step), saved.meta(step)["fingerprint"], run.fingerprint)
    return source


def _resume_source(wanted: str | None, own: Checkpoints) -> tuple[Checkpoints, int] | None:
    if wanted is None:
        return None
    if wanted == "auto":
        latest = own.latest()
        return None if latest is None else (own, latest)
    path = Path(wanted).expanduser()
    if path.name.isdecimal() and path.is_dir():
        return Checkpoints(path.parent, repair=False), int(path.name)
    for directory in (path / CHECKPOINTS, path):
        if directory.is_dir() and (latest := Checkpoints(directory, repair=False).latest()) is not None:
            return Checkpoints(directory, repair=False), latest
    raise InputError(
        f"--resume_from_checkpoint {wanted}: there is no checkpoint; name the directory of a run or one checkpoint"
    )


def _check_fingerprint(folder: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    differing = [name for name in own if saved.get(name) != own[name]]
    if differing:
        said = [f"{name} was {saved.get(name)} and is {own[name]}" for name in differing if name != "data"]
        said += ["the tokenised data are others"] if "data" in differing else []
        raise InputError(
            f"checkpoint {folder} is of a run with other settings: {', '.join(said)}. Resume with the settings of that "
            "run, or start a new one in another --output_dir"
        )


def _non_finite(directory: Path, step: int, batch: dict[str, np.ndarray], found: Any, checkpoints: Checkpoints) -> str:
    """Writes the batch that gave a loss or gradient that is not finite, and says so."""
    path = directory / f"non_finite_step_{step}.npz"
    written = f"its batch is in {path}"
    try:
        if is_first():
            np.savez(path, allow_pickle=False, **batch)
    except OSError as failure:
        written = f"its batch could not be written to {path} ({failure})"
    latest = checkpoints.latest()
    kept = "there is no checkpoint yet" if latest is None else f"the checkpoint of step {latest} is whole"
    return (
        f"step {step}: loss {float(found['loss'])}, grad_norm {float(found['grad_norm'])}, one of them not finite. The "
        f"parameters were not changed by it; {written}; {kept}. A lower --learning_rate, or --dtype "
        "float32, is what helps most often"
    )


class _Stop:
    """received: by this process. agreed: what all processes know of, and act on together."""

    received: signal.Signals | None = None
    agreed: signal.Signals | None = None

    def asked(self) -> bool:
        """Whether any process was asked to stop; all of them must call it equally often."""
        number = largest(self.received or 0)
        self.agreed = signal.Signals(number) if number else None
        return number != 0


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Notes SIGTERM and Ctrl-C: steps that were sent end and a checkpoint is saved. A second one acts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def note(number: int, frame: Any) -> None:
        if stop.received is not None:
            raise KeyboardInterrupt
        stop.received = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
