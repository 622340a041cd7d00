"""What a run says while it goes: metrics.jsonl for machines, a live bar or plain lines for people."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxft.errors import RunError
from jaxft.processes import is_first

Line = dict[str, Any]


class MetricsFile:
    """metrics.jsonl: one JSON object a logged step. Floats are written so that they read back exactly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """Every line that was written whole, in order."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a run killed while it wrote leaves half a line, and nothing after it
        return found

    def cut(self, step: int) -> None:
        """Drops every line after `step`, and a last line that was not written whole."""
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
            temporary = self.path.with_suffix(".partial")
            with _written(self.path):
                try:
                    temporary.write_text("".join(kept), encoding="utf-8")
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)

    def figures(self) -> Line:
        """What a model card tells of a run: its last loss, and the held-out loss at its first and last evaluation."""
        lines = self.lines()
        losses = [line["loss"] for line in lines if "loss" in line]
        held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
        found = {"loss": losses[-1]} if losses else {}
        return found | ({"eval_loss before": held_out[0], "eval_loss": held_out[-1]} if held_out else {})

    def write(self, line: Line) -> None:
        """Appends a line; of several processes the first writes it."""
        if not is_first():
            return
        # JSON has no NaN: what is not finite is written as null
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with _written(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raises RunError where the disk does not take what is written inside."""
    try:
        yield
    except OSError as failure:
        raise RunError(
            f"{path} could not be written: {failure}. Make room, then go on from the last checkpoint by "
            "--resume_from_checkpoint auto"
        ) from failure


def plain(line: Line) -> str:
    """A line of metrics for people."""
    if "eval_loss" in line:
        return f"step {line['step']}  eval_loss {line['eval_loss']:.4f}  perplexity {line['eval_perplexity']:.3f}"
    parts = [
        f"step {line['step']}",
        f"loss {line['loss']:.4f}",
        f"grad_norm {line['grad_norm']:.3f}",
        f"lr {line['learning_rate']:.2e}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]
    if line["peak_memory_bytes"] is not None:
        parts.append(f"peak {line['peak_memory_bytes'] / 2**30:.2f} GiB")
    return "  ".join(parts)


class Display(Protocol):
    """Where the lines of a run are shown."""

    def advance(self, step: int) -> None: ...
    def show(self, line: Line) -> None: ...
    def say(self, text: str) -> None: ...


class _Bar:
    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def show(self, line: Line) -> None:
        if "eval_loss" in line:
            self.progress.console.print(plain(line), highlight=False, markup=False)
        else:
            self.progress.update(self.task, text=plain(line).split("  ", 1)[1])

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Lines:
    def advance(self, step: int) -> None:
        pass

    def show(self, line: Line) -> None:
        print(plain(line), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Nothing:
    def advance(self, step: int) -> None:
        pass

    def show(self, line: Line) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@contextmanager
def live_display(first: int, total: int, shown: bool = True) -> Iterator[Display]:
    """A live bar on a terminal, plain lines where stderr is none, nothing where it is not `shown`."""
    if not shown:
        yield _Nothing()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("<"),
        TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, progress.add_task("train", total=total, completed=first, text="compiling"))
