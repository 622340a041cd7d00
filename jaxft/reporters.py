"""Where the lines of a run go beside metrics.jsonl: TensorBoard and Weights & Biases, by `--report_to`."""

import dataclasses
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jaxft.errors import InputError
from jaxft.metrics import Line
from jaxft.processes import is_first
from jaxft.settings import TrainSettings

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_reporters(settings: TrainSettings) -> None:
    """Raises InputError where a package that `--report_to` needs is not installed; nothing is imported."""
    for name in settings.reporters:
        if find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"--report_to {name} needs the package {PACKAGES[name]}, which is not installed; pip install "
                f"'jaxft[report]', or leave it out"
            )


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line under the names that people know from other trainers: train/loss, eval/loss, …"""
    values = {name: value for name, value in line.items() if name != "step" and value is not None}
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in values.items()
    }


class Reporter(Protocol):
    """Takes the lines of metrics and of samples; `where` says to people where they can be seen."""

    where: str

    def log(self, line: Line) -> None: ...
    def log_samples(self, line: Line) -> None: ...


class Reporters:
    """All of a run's reporters as one."""

    def __init__(self, each: list[Reporter]) -> None:
        self.each = each
        self.where = [reporter.where for reporter in each]

    def log(self, line: Line) -> None:
        for reporter in self.each:
            reporter.log(line)

    def log_samples(self, line: Line) -> None:
        for reporter in self.each:
            reporter.log_samples(line)


class TensorBoard:
    """Event files in OUTPUT_DIR/tensorboard; a resumed run takes back what came after the step it goes on from."""

    def __init__(self, directory: Path, first: int) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1 if first else 0)
        self.where = f"tensorboard --logdir {directory / 'tensorboard'}"

    def log(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def log_samples(self, line: Line) -> None:
        for number, sample in enumerate(line["samples"]):
            text = "\n\n".join(f"**{name}**\n\n{value}" for name, value in sample.items())
            self.writer.add_text(f"samples/{number}", text, line["step"])


class WeightsAndBiases:
    """A run of wandb with its files in OUTPUT_DIR/wandb; a resumed run is the same one there.

    Its own environment variables hold: WANDB_MODE=offline needs no network, WANDB_PROJECT names the project.
    """

    def __init__(self, directory: Path, settings: TrainSettings, stack: ExitStack) -> None:
        import wandb

        identity = directory / "wandb" / "run-id"
        identity.parent.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        values = {name: value for name, value in dataclasses.asdict(settings).items() if "settings_" not in name}
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "jaxft"), name=directory.name, dir=str(directory),
                id=identity.read_text(encoding="utf-8").strip(), resume="allow", config=values,
                settings=wandb.Settings(console="off", silent=True),  # the screen belongs to the view
            )  # fmt: skip
        except (wandb.Error, OSError) as failure:
            raise InputError(
                f"--report_to wandb: {' '.join(str(failure).split())}; log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from failure
        stack.push(lambda kind, *_: self.run.finish(exit_code=0 if kind is None else 1))
        self.table = wandb.Table
        self.where = f"wandb: {self.run.url or self.run.dir}"

    def log(self, line: Line) -> None:
        self.run.log(scalars(line), step=line["step"])

    def log_samples(self, line: Line) -> None:
        rows = [[line["step"], *sample.values()] for sample in line["samples"]]
        table: Any = self.table(columns=["step", *line["samples"][0]], data=rows)
        self.run.log({"samples": table}, step=line["step"])


@contextmanager
def reporting(settings: TrainSettings, directory: Path, first: int) -> Iterator[Reporters]:
    """The reporters that the settings name, for a run that goes on from step `first`; of several processes the first
    has them. Packages are imported only here."""
    with ExitStack() as stack:
        each: list[Reporter] = []
        for name in settings.reporters if is_first() else ():
            if name == "tensorboard":
                each.append(board := TensorBoard(directory, first))
                stack.callback(board.writer.close)
            else:
                each.append(WeightsAndBiases(directory, settings, stack))
        yield Reporters(each)
