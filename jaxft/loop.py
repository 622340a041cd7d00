"""The training loop: steps, metrics, evaluations and checkpoints, and an orderly end when a signal comes."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxft.cards import step_options
from jaxft.checkpoint import Checkpoints
from jaxft.errors import InputError, RunError
from jaxft.evaluate import evaluate
from jaxft.metrics import Display, Line, MetricsFile, live_display
from jaxft.optim import LossScale, state_shapes
from jaxft.output import CHECKPOINTS, METRICS
from jaxft.packing import Batches
from jaxft.prepare import Prepared
from jaxft.processes import is_first, largest, on_first
from jaxft.settings import TrainSettings
from jaxft.sharding import put_batch
from jaxft.step import TrainStep, make_eval_step, make_train_step
from jaxft.streaming import StreamBatches
from jaxft.trees import Tree


@dataclass(frozen=True)
class Run:
    """What one training run is: where, on what, for how long, with which optimizer."""

    directory: Path
    settings: TrainSettings
    total_steps: int
    batches: Batches | StreamBatches
    heldout: Batches | None
    optimizer: optax.GradientTransformation
    schedule: Callable[[int], Any]
    fingerprint: dict[str, Any]
    step: TrainStep | None = None  # compiled already, as `--memory_budget` chose it


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, by which signal if any, with which last figures."""

    trainable: Tree
    step: int
    stopped_by: signal.Signals | None
    figures: dict[str, Any]


@dataclass
class Window:
    """Sums since the last line of metrics."""

    loss: float = 0.0
    weight: float = 0.0
    targets: int = 0
    tokens: int = 0
    steps: int = 0
    began: float = field(default_factory=time.perf_counter)

    def line(self, step: int, epoch: float, grad_norm: float, learning_rate: float) -> Line:
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
        }


def initial_optimizer_state(run: Run, prepared: Prepared) -> optax.OptState:
    """The optimizer's first state, each moment where its parameter lies."""
    places = _shardings(state_shapes(run.optimizer, prepared.trainable))
    return jax.jit(run.optimizer.init, out_shardings=places)(prepared.trainable)


def run_training(run: Run, prepared: Prepared) -> Outcome:
    """Runs from the first step, or from a checkpoint, to the last. Must be called under `jax.set_mesh`.

    Raises RunError where a loss or gradient is not finite: the last checkpoint stays, and the batch is written out.
    """
    settings = run.settings
    checkpoints = Checkpoints(run.directory / CHECKPOINTS, settings.save_total_limit)
    metrics = MetricsFile(run.directory / METRICS)
    trainable, opt_state = prepared.trainable, initial_optimizer_state(run, prepared)
    key = jax.device_put(jax.random.key(settings.seed), jax.tree.leaves(opt_state)[0].sharding)
    first, step, window = 0, 0, Window()
    source = _resume_source(settings, checkpoints)
    if source is not None:
        saved, first = source
        _check_fingerprint(saved.directory / str(first), saved.meta(first)["fingerprint"], run.fingerprint)
        state, meta = saved.restore(first, {"trainable": trainable, "opt_state": opt_state, "key": key})
        trainable, opt_state, key = state["trainable"], state["opt_state"], state["key"]
        window = Window(**meta["window"])
        run.batches.go_on(first, meta["epoch"], meta["row"])

    def begin() -> None:
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise InputError(f"--output_dir {run.directory} cannot be made: {failure}; name another") from failure
        metrics.cut(first if source else -1)

    on_first(begin)
    evaluated = {line["step"] for line in metrics.lines() if "eval_loss" in line}
    checkpoints.delete_after(first)  # the run goes on from an earlier one, which was named; it has one course only

    step_function = run.step or jax.jit(
        make_train_step(
            prepared.model, optimizer=run.optimizer, gradient_checkpointing=settings.gradient_checkpointing,
            dtype=prepared.compute_dtype, mlp_tiles=settings.mlp_tiles, max_documents=run.batches.max_documents,
        ),
        donate_argnums=(0, 1),
        out_shardings=(_shardings(trainable), _shardings(opt_state), None),
        compiler_options=step_options(jax.default_backend(), settings.gradient_checkpointing),
    )  # fmt: skip
    eval_function = jax.jit(make_eval_step(prepared.model, dtype=prepared.compute_dtype))

    def save(step: int) -> None:
        epoch, row = run.batches.position(step)
        state = {"trainable": trainable, "opt_state": opt_state, "key": key}
        sums = {"loss": window.loss, "weight": window.weight, "targets": window.targets}
        meta = {"fingerprint": run.fingerprint, "total_steps": run.total_steps, "epoch": epoch, "row": row}
        meta["window"] = sums  # so that a line after a resume covers the same steps as without
        checkpoints.save(step, state, meta)

    def evaluate_now(step: int, display: Display) -> None:
        if run.heldout is None:
            return
        if step == first:
            display.say(f"evaluating {run.heldout.rows} rows in {len(run.heldout)} batches")
        found = evaluate(eval_function, trainable, prepared.frozen, run.heldout, prepared.mesh, stop.asked)
        if stop.agreed is not None:
            return  # half an evaluation is none: the resumed run makes it
        line = {"step": step, "epoch": step / run.batches.steps_per_epoch}
        line |= {f"eval_{name}": value for name, value in found.items()}
        metrics.write(line)
        display.show(line)

    with live_display(first, run.total_steps, is_first()) as display, _signals() as stop:
        if source is not None:
            display.say(f"resumed from {saved.directory / str(first)}: {first} of {run.total_steps} steps done")
            if meta["total_steps"] != run.total_steps:
                display.say(f"{meta['total_steps']} steps were planned: the learning rate follows the new plan")
        due = first == 0 or first >= run.total_steps or (settings.eval_steps and first % settings.eval_steps == 0)
        if due and first not in evaluated:
            evaluate_now(first, display)
        step, window.began = first, time.perf_counter()
        for step in range(first + 1, run.total_steps + 1):
            if stop.asked():
                step -= 1
                break
            try:
                batch = run.batches.batch(step - 1)
            except InputError:  # a row of a stream that cannot be read must not cost the steps before it
                if step - 1 > first and checkpoints.latest() != step - 1:
                    save(step - 1)
                raise
            learning_rate = float(run.schedule(_updates_done(opt_state, step - 1)))
            trainable, opt_state, found = step_function(
                trainable, opt_state, prepared.frozen, put_batch(batch, prepared.mesh),
                jax.random.fold_in(key, step),
            )  # fmt: skip
            loss, weight = float(found["loss"]), float(found["weight"])
            if not found["finite"] and not (isinstance(opt_state, LossScale) and found["loss_scale"] > 1):
                raise RunError(_non_finite(run.directory, step, batch, found, checkpoints))
            if math.isfinite(loss):  # float16 leaves out a step whose gradients overflow; its loss is one all the same
                window.loss += loss * weight
                window.weight += weight
            window.targets += int(found["target_tokens"])
            window.tokens += int(np.count_nonzero(batch["segment_ids"]))
            window.steps += 1
            display.advance(step)
            if step % settings.logging_steps == 0 or step == run.total_steps:
                line = window.line(step, step / run.batches.steps_per_epoch, float(found["grad_norm"]), learning_rate)
                metrics.write(line)
                display.show(line)
                window = Window()
            pause = time.perf_counter()
            if settings.eval_steps and step % settings.eval_steps == 0 and step != run.total_steps:
                evaluate_now(step, display)
            if settings.save_steps and step % settings.save_steps == 0 and step != run.total_steps:
                save(step)
            window.began += time.perf_counter() - pause  # evaluations and checkpoints are not the step's time
        if checkpoints.latest() != step:
            save(step)
        if stop.agreed is None and step > first:
            evaluate_now(step, display)
    return Outcome(trainable, step, stop.agreed, metrics.figures())


def _updates_done(opt_state: optax.OptState, steps_done: int) -> Any:
    """How many updates the schedule has counted: all steps, less those that float16 left out."""
    if not isinstance(opt_state, LossScale):
        return steps_done
    return int(optax.tree.get(opt_state.inner, "count", filtering=lambda path, _: "ScaleBySchedule" in str(path)))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _resume_source(settings: TrainSettings, own: Checkpoints) -> tuple[Checkpoints, int] | None:
    """The checkpoint to go on with: of this run ("auto"), or the directory that was named."""
    wanted = settings.resume_from_checkpoint
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
    """Notes SIGTERM and Ctrl-C: the step in flight ends and a checkpoint is saved. A second one acts at once."""
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
