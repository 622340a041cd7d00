"""`python -m jaxft.compare RUN RUN…`: the curves of several runs over each other, and the settings that differ."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NoReturn

import yaml

from jaxft.config import GIVEN_KEY
from jaxft.errors import InputError, RunError, run_command
from jaxft.metrics import Line, MetricsFile
from jaxft.output import CONFIG, METRICS
from jaxft.pages import page, plots, section, table
from jaxft.plots import COLOURS, Curve, chart
from jaxft.report import GIB, points, steps_and_evaluations, task_names, training_seconds, written
from jaxft.view import clock


class Parser(argparse.ArgumentParser):
    """argparse with this package's errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def read_run(directory: Path) -> tuple[list[Line], dict[str, Any]]:
    """The lines and the settings of a run; {} where config.yaml is not written yet.

    Raises InputError where the directory is none of a run, or one of the files cannot be read.
    """
    if not (directory / METRICS).is_file():
        raise InputError(f"{directory} has no {METRICS}; name the output directory of a run")
    lines = MetricsFile(directory / METRICS).lines()
    if not lines:
        raise InputError(f"{directory / METRICS} has no line yet; compare runs that have made a step")
    if not (directory / CONFIG).is_file():
        return lines, {}
    try:
        settings = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as failure:
        text = " ".join(str(failure).split())
        raise InputError(f"{directory / CONFIG} cannot be read: {text}; restore it, or move it away") from failure
    return lines, {name: value for name, value in (settings or {}).items() if name != GIVEN_KEY}


def names_of(directories: Sequence[Path]) -> list[str]:
    """What the runs are called: the directories without what all of them begin with."""
    parts = [directory.expanduser().resolve().parts for directory in directories]
    shared = 0
    while all(len(one) > shared + 1 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    return ["/".join(one[shared:]) for one in parts]


def compared(runs: Mapping[str, tuple[list[Line], dict[str, Any]]]) -> str:
    """The page of several runs by their names."""
    split = {name: steps_and_evaluations(lines) for name, (lines, _) in runs.items()}
    colours = {name: number for number, name in enumerate(runs)}

    def over(title: str, figure: str, scale: float = 1.0, *, held_out: bool = False, **options: Any) -> str:
        curves = [Curve(name, points(split[name][held_out], figure, scale), colours[name], held_out) for name in runs]
        return chart(title, curves, **options)

    tasks = sorted({name for _, evaluations in split.values() for name in task_names(evaluations)})
    figures = [
        over("Held-out loss", "eval_loss", held_out=True),
        over("Training loss", "loss"),
        *(over(name.removeprefix("eval_"), name, held_out=True, from_zero=True) for name in tasks),
        over("Learning rate", "learning_rate", from_zero=True),
        over("Gradient norm, before clipping", "grad_norm", from_zero=True),
        over("Tokens a second", "tokens_per_second", from_zero=True),
        over("Model FLOPs utilisation", "mfu", 100, from_zero=True, shown=lambda value: f"{value:g} %"),
        over("Peak memory", "peak_memory_bytes", 1 / GIB, from_zero=True, shown=lambda value: f"{value:g} GiB"),
    ]
    settings = {name: own for name, (_, own) in runs.items() if own}
    every = dict.fromkeys(key for own in settings.values() for key in own)
    differing = [key for key in every if len({str(own.get(key)) for own in settings.values()}) > 1]
    rows = [(key, *(written(own.get(key)) for own in settings.values())) for key in differing]
    kinds = ("value",) * (1 + len(settings))
    missing = [name for name in runs if name not in settings]
    note = (
        f'<p class="soft">Without {CONFIG}, so not in this table: {escape(", ".join(missing))}</p>' if missing else ""
    )
    alike = f'<p class="soft">{len(every) - len(differing)} other settings are the same.</p>' if settings else ""
    return page(
        f"{len(runs)} runs compared",
        "",
        [
            section("How they ended", _ends(split, tasks)),
            section("Curves", plots(figures)),
            section("Settings that differ", table(("setting", *settings), rows, kinds), alike, note),
        ],
        "Every number on this page is one of metrics.jsonl and config.yaml of these runs.",
    )  # fmt: skip


def _ends(split: Mapping[str, tuple[list[Line], list[Line]]], tasks: Sequence[str]) -> str:
    header = ["run", "steps", "held-out loss", "smallest", *(name.removeprefix("eval_") for name in tasks)]
    rows = []
    for name, (steps, evaluations) in split.items():
        losses = [value for _, value in points(evaluations, "eval_loss")]
        row = [name, f"{steps[-1]['step']:,}" if steps else "0"]
        row += [f"{losses[-1]:.4f}", f"{min(losses):.4f}"] if losses else ["–", "–"]
        for task in tasks:
            scores = points(evaluations, task)
            row.append(f"{scores[-1][1]:.4f}" if scores else "–")
        trained = points(steps, "loss")
        row += [f"{trained[-1][1]:.4f}" if trained else "–", clock(training_seconds(steps))]
        rows.append(row)
    header += ["training loss", "time in steps"]
    return table(header, rows, ("", *("number",) * (len(header) - 1)))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m jaxft.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output directories of jaxft.train")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page; without it compare.html")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    directories = [run.expanduser() for run in options.runs]
    if not 2 <= len(directories) <= COLOURS:
        raise InputError(f"{len(directories)} runs named; 2 to {COLOURS} can be told apart on one page")
    names = names_of(directories)
    if len(set(names)) < len(names):
        raise InputError(f"{', '.join(map(str, directories))}: one run is named twice; name each once")
    text = compared(dict(zip(names, map(read_run, directories), strict=True)))
    output = options.output.expanduser()
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise RunError(f"{output} cannot be written: {failure.strerror}; name another --output") from failure
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
