"""What a run shows while it goes: one live view on a terminal, plain lines where there is none."""

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxft.metrics import Line

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 50  # steps whose median says how long the others will take


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a line of `width` block characters at most, from the smallest to the largest; a block for several
    values stands for their mean."""
    width = min(width, len(values))
    if width < 1:
        return ""
    ends = [len(values) * number // width for number in range(width + 1)]
    means = [statistics.fmean(values[start:stop]) for start, stop in pairwise(ends)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


def clock(seconds: float) -> str:
    """3:07, or 1:02:45."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def evaluated(line: Line) -> list[tuple[str, str]]:
    """The figures of an evaluation for people, the loss first."""
    found = []
    for name, value in line.items():
        if name == "eval_perplexity" and value is not None:
            found.append(("perplexity", f"{value:.3f}"))
        elif name.startswith("eval_") and name not in ("eval_perplexity", "eval_target_tokens") and value is not None:
            found.append((name, f"{value:.4f}"))
    return found


def plain(line: Line) -> str:
    """A line of metrics for people."""
    if "eval_loss" in line:
        return "  ".join([f"step {line['step']}", *(f"{name} {value}" for name, value in evaluated(line))])
    parts = [
        f"step {line['step']}",
        f"loss {line['loss']:.4f}",
        f"grad_norm {line['grad_norm']:.3f}",
        f"lr {line['learning_rate']:.2e}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]
    if line["peak_memory_bytes"] is not None:
        parts.append(f"peak {line['peak_memory_bytes'] / 2**30:.2f} GiB")
    if line["mfu"] is not None:
        parts.append(f"mfu {line['mfu']:.1%}")
    return "  ".join(parts)


class Display(Protocol):
    """Where the lines of a run are shown. busy: what it is at beside steps; told: worth a plain line."""

    def advance(self, step: int) -> None: ...
    def show(self, line: Line) -> None: ...
    def busy(self, text: str, told: bool) -> None: ...
    def say(self, text: str) -> None: ...


class View:
    """The live view, drawn anew whenever something is known: every number in it is of a line or of a clock."""

    def __init__(self, console: Console, first: int, total: int, history: Sequence[Line]) -> None:
        self.console, self.total, self.first, self.step = console, total, first, first
        self.doing = "compiling"
        self.began = self.last = time.monotonic()
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.lines = [line for line in history if line.get("loss") is not None]
        self.evaluations = [line for line in history if line.get("eval_loss") is not None]

    def advance(self, step: int) -> None:
        now = time.monotonic()
        if self.step > self.first:  # the first step of a process compiles
            self.seconds.append(now - self.last)
        self.step, self.last, self.doing = step, now, ""

    def show(self, line: Line) -> None:
        if "eval_loss" in line:
            self.evaluations.append(line)
            self.last, self.doing = time.monotonic(), "compiling" if self.step == self.first else ""
        else:
            self.lines.append(line)

    def busy(self, text: str) -> None:
        self.doing = text
        self.last = time.monotonic()

    def remaining(self) -> str:
        """How long the steps that are left take at the median of those before."""
        if self.step >= self.total or not self.seconds:
            return "" if self.step < self.total else "done"
        return f"{clock(statistics.median(self.seconds) * (self.total - self.step))} left"

    def __rich__(self) -> Panel:
        wide = min(48, self.console.width - 72)  # what the names and figures beside it leave
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        epoch = f"  epoch {self.lines[-1]['epoch']:.2f}" if self.lines else ""
        passed = clock(time.monotonic() - self.began)
        times = " · ".join(part for part in (self.doing, passed, self.remaining()) if part)
        head.add_row(
            Text.assemble(("step ", "dim"), (f"{self.step:,}", "bold"), (f" of {self.total:,}{epoch}", "dim")),
            ProgressBar(total=self.total, completed=self.step, style="grey37", complete_style="cyan"),
            Text(times, style="dim"),
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True, min_width=9)
        body.add_column(no_wrap=True, justify="right", min_width=10)
        body.add_column(no_wrap=True, style="cyan")
        body.add_column(no_wrap=True)
        if self.lines:
            line = self.lines[-1]
            facts = [("lr", f"{line['learning_rate']:.2e}"), ("grad norm", f"{line['grad_norm']:.3f}")]
            body.add_row(
                "loss", Text(f"{line['loss']:.4f}", "bold"), self.drawn(self.lines, "loss", wide), _facts(facts)
            )
            facts = []
            if line["peak_memory_bytes"] is not None:
                facts.append(("memory", f"{line['peak_memory_bytes'] / 2**30:.2f} GiB"))
            if line["mfu"] is not None:
                facts.append(("mfu", f"{line['mfu']:.1%}"))
            speeds = self.drawn(self.lines, "tokens_per_second", wide)
            body.add_row("tokens/s", f"{line['tokens_per_second']:,.0f}", speeds, _facts(facts))
        if self.evaluations:
            line = self.evaluations[-1]
            facts = [
                ("at step", f"{line['step']:,}"),
                *((name.removeprefix("eval_"), value) for name, value in evaluated(line)[1:]),
            ]
            curve = self.drawn(self.evaluations, "eval_loss", wide)
            body.add_row("eval loss", Text(f"{line['eval_loss']:.4f}", "bold"), curve, _facts(facts))
        return Panel(Group(head, body), border_style="grey37", padding=(0, 1))

    def drawn(self, lines: Sequence[Line], name: str, width: int) -> str:
        """The sparkline of a figure; none where the terminal has no such characters."""
        if not (self.console.encoding or "").lower().startswith("utf"):
            return ""
        values = [line[name] for line in lines if math.isfinite(line[name])]
        return sparkline(values, width) if len(values) > 1 and width > 3 else ""


def _facts(pairs: Sequence[tuple[str, str]]) -> Text:
    parts: list[Any] = []
    for name, value in pairs:
        parts += [(f"{name} ", "dim"), f"{value}  "]
    return Text.assemble(*parts)


class _OnTerminal:
    def __init__(self, view: View, live: Live) -> None:
        self.view, self.live = view, live

    def advance(self, step: int) -> None:
        self.view.advance(step)

    def show(self, line: Line) -> None:
        self.view.show(line)
        self.live.refresh()

    def busy(self, text: str, told: bool) -> None:
        self.view.busy(text)
        self.live.refresh()

    def say(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Lines:
    def advance(self, step: int) -> None:
        pass

    def show(self, line: Line) -> None:
        print(plain(line), file=sys.stderr, flush=True)

    def busy(self, text: str, told: bool) -> None:
        if told:
            self.say(text)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Nothing:
    def advance(self, step: int) -> None:
        pass

    def show(self, line: Line) -> None:
        pass

    def busy(self, text: str, told: bool) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@contextmanager
def live_display(first: int, total: int, history: Sequence[Line] = (), shown: bool = True) -> Iterator[Display]:
    """The live view on a terminal, plain lines where stderr is none, nothing where it is not `shown`.

    history: the lines of the steps before `first`.
    """
    if not shown:
        yield _Nothing()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    view = View(console, first, total, history)
    with Live(view, console=console, refresh_per_second=4) as live:
        yield _OnTerminal(view, live)
