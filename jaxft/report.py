"""report.html: a run on one page, from its settings and the lines it wrote. No number in it is of anything else."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import numpy as np

from jaxft.metrics import Line
from jaxft.pages import page, plots, section, table, tiles
from jaxft.plots import Curve, chart, histogram
from jaxft.settings import TrainSettings
from jaxft.view import clock

GIB = 1 << 30


@dataclass(frozen=True)
class Told:
    """What a report tells beside the lines of a run.

    environment: versions and devices; data: lines about the data sets; lengths: tokens of every training sample;
    use: lines to copy by the tool's name; provenance: where each setting that is no default came from.
    """

    title: str
    settings: TrainSettings
    provenance: Mapping[str, str]
    environment: Sequence[tuple[str, str]]
    data: Sequence[str]
    lengths: np.ndarray
    use: Mapping[str, str]
    result_step: int
    ended: str | None = None
    lora: bool = True


def points(lines: Sequence[Line], name: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """(step, value) of every line that has the figure."""
    return [(line["step"], line[name] * scale) for line in lines if line.get(name) is not None]


def steps_and_evaluations(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """The lines of logged steps, and those of evaluations."""
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def task_names(evaluations: Sequence[Line]) -> list[str]:
    """The figures of evaluations that are counted on answers, such as eval_gsm8k."""
    known = ("eval_loss", "eval_perplexity", "eval_target_tokens")
    return sorted({name for line in evaluations for name in line if name.startswith("eval_") and name not in known})


def training_seconds(steps: Sequence[Line]) -> float:
    """Seconds that the logged steps took together, without evaluations and checkpoints."""
    before = [0, *(line["step"] for line in steps)]
    return sum(line["step_seconds"] * (line["step"] - last) for line, last in zip(steps, before, strict=False))


def report(told: Told, lines: Sequence[Line], samples: Sequence[Line]) -> str:
    """The page. lines: of metrics.jsonl; samples: of samples.jsonl."""
    steps, evaluations = steps_and_evaluations(lines)
    kind = "LoRA adapter" if told.lora else "full fine-tuning"
    base, data = escape(str(told.settings.model_name_or_path)), escape(str(told.settings.dataset))
    under = f'<p class="soft">{kind} of {base}, trained on {data}</p>'
    if told.ended:
        under += f'<p class="soft">Ended before its last planned step: {escape(told.ended)}.</p>'
    return page(
        told.title,
        under + tiles(first_figures(steps, evaluations, told.result_step)),
        [
            section("Before and after", *_samples(samples, told.result_step)),
            section("Curves", plots(_curves(steps, evaluations, told.result_step))),
            section("Data", _list(told.data), plots([histogram(
                "Length of the training samples", told.lengths, x_name="tokens", limit=told.settings.max_length
            )])),
            section("Load it", *(f"<h3>{escape(name)}</h3><pre data-tool=\"{escape(name)}\">{escape(text)}</pre>"
                                 for name, text in told.use.items())),
            section("Settings", *_settings(told)),
            section("Made with", table(("", ""), told.environment, ("", "value"))),
        ],
        "Written by jaxft at the end of the run; every number on this page was computed in it. metrics.jsonl has them.",
    )  # fmt: skip


def first_figures(steps: Sequence[Line], evaluations: Sequence[Line], result: int) -> list[tuple[str, str, str]]:
    """The figures that are seen first; what the run did not measure is not among them."""
    found = []
    made = [line for line in evaluations if line["step"] <= result and line["eval_loss"] is not None]
    for name in ("eval_loss", *task_names(evaluations)):
        having = [line for line in made if line.get(name) is not None]
        if having:
            known = f"{having[0][name]:.4f} before" if len(having) > 1 and having[0]["step"] == 0 else ""
            label = "held-out loss" if name == "eval_loss" else name.removeprefix("eval_")
            found.append((label, f"{having[-1][name]:.4f}", known))
    losses = points(steps, "loss")
    if losses:
        below = f"{losses[0][1]:.4f} at step {losses[0][0]:,}" if len(losses) > 1 else ""
        found.append(("training loss", f"{losses[-1][1]:.4f}", below))
    if steps:
        best = f"result of step {result:,}" if result != steps[-1]["step"] else f"epoch {steps[-1]['epoch']:.2f}"
        found.append(("steps", f"{steps[-1]['step']:,}", best))
        seen = sum(line["target_tokens"] for line in steps)
        found.append(("time in steps", clock(training_seconds(steps)), f"{seen:,} targets"))
        speed = statistics.median(line["tokens_per_second"] for line in steps)
        mfu = [line["mfu"] for line in steps if line.get("mfu") is not None]
        found.append(("tokens a second", f"{speed:,.0f}", f"MFU {statistics.median(mfu):.1%}" if mfu else "median"))
        if peaks := [value for _, value in points(steps, "peak_memory_bytes", 1 / GIB)]:
            found.append(("peak memory", f"{max(peaks):.2f} GiB", "of one device"))
    return found


def _curves(steps: Sequence[Line], evaluations: Sequence[Line], result: int) -> list[str]:
    last = steps[-1]["step"] if steps else result
    mark = (float(result), "result") if result != last else None
    losses = [Curve("training", points(steps, "loss"), 0), Curve("held out", points(evaluations, "eval_loss"), 1, True)]
    tasks = [Curve(name.removeprefix("eval_"), points(evaluations, name), number, True)
             for number, name in enumerate(task_names(evaluations), 1)]  # fmt: skip
    return [
        chart("Loss", losses, mark=mark),
        chart(f"Answers: {tasks[0].name}" if len(tasks) == 1 else "Answers", tasks, from_zero=True, mark=mark),
        chart("Held-out perplexity", [Curve("held out", points(evaluations, "eval_perplexity"), 1, True)], mark=mark)
        if len(evaluations) > 2 else "",
        chart("Learning rate", [Curve("learning rate", points(steps, "learning_rate"))], from_zero=True),
        chart("Gradient norm, before clipping", [Curve("grad norm", points(steps, "grad_norm"), 3)], from_zero=True),
        chart("Tokens a second", [Curve("tokens a second", points(steps, "tokens_per_second"), 2)], from_zero=True),
        chart("Model FLOPs utilisation", [Curve("MFU", points(steps, "mfu", 100), 5)], from_zero=True,
              shown=lambda value: f"{value:g} %"),
        chart("Peak memory", [Curve("peak memory", points(steps, "peak_memory_bytes", 1 / GIB), 6)], from_zero=True,
              shown=lambda value: f"{value:g} GiB"),
    ]  # fmt: skip


def _samples(samples: Sequence[Line], result: int) -> list[str]:
    by_step = {line["step"]: line["samples"] for line in samples}
    after = by_step.get(result, [])
    before = by_step.get(0) if result != 0 else None
    found = []
    for number, sample in enumerate(after):
        answers = [("before", before[number]["answer"])] if before else []
        answers += [("after", sample["answer"]), ("reference", sample["reference"])]
        pair = "".join(f"<div><span>{name}</span>{escape(text.strip())}</div>" for name, text in answers)
        prompt = f'<div class="prompt"><span>prompt</span>{escape(sample["prompt"].strip())}</div>'
        found.append(f'<div class="sample">{prompt}<div class="pair">{pair}</div></div>')
    return found


def _settings(told: Told) -> list[str]:
    values = {
        f.name: getattr(told.settings, f.name) for f in fields(told.settings) if not f.name.startswith("settings_")
    }
    chosen = [(name, written(values[name]), told.provenance[name]) for name in values if name in told.provenance]
    rest = [(name, written(value)) for name, value in values.items() if name not in told.provenance]
    return [
        table(("setting", "value", "from"), chosen, ("value", "value", "")),
        f"<details><summary>{len(rest)} settings at their defaults</summary>"
        + table(("setting", "value"), rest, ("value", "value")) + "</details>",
    ]  # fmt: skip


def written(value: Any) -> str:
    """A setting as it is typed."""
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul><br>" if items else ""
