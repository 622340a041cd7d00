"""What runs of `parity.py` left, held against each other: verdicts, a page and its picture."""

import itertools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"hf": "transformers + PEFT", "jaxft": "jaxft", "unsloth": "Unsloth"}
RANK = ALPHA = 16
SIZES = {"rows": 2, "length": 1024, "steps": 200, "seed": 0}
FIRST = 1e-2  # how far the losses of the first step may lie apart
SHARE = 0.1  # of what rounding moves the reference by: how far programs in float32 may lie apart in the mean
TIMES = 2.0  # how many times the run-to-run noise the curves of two programs may lie apart in the mean
YOUNG = 10  # steps in which the adapter is small beside the weights' rounding
GIB = 1 << 30


@dataclass(frozen=True)
class Result:
    """What one run left, as its file has it."""

    program: str
    seed: int
    dtype: str
    prepared: dict[str, Any]
    training: dict[str, float]
    losses: list[float]
    tokens_per_second: float
    peak_bytes: int | None
    device: str
    versions: dict[str, str]

    @property
    def name(self) -> str:
        return f"{NAMES[self.program]}{f', seed {self.seed}' if self.seed else ''}"


def read(paths: Sequence[Path]) -> list[Result]:
    return [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def read_exact(paths: Sequence[Path], reference: Result) -> list[Result]:
    """Runs in float32, which the others are rounded runs of: one a program, the reference's first where it is there.
    Raises InputError where one is another run."""
    from jaxft.errors import InputError

    found = read(paths)
    for path, one in zip(paths, found, strict=True):
        if one.dtype != "float32":
            raise InputError(f"--exact {path} is a run in {one.dtype}; add --dtype float32 to `run`")
        check_same(path, one, "the others", reference, ("prepared", "training", "seed"))
    return in_order(found)


def in_order(results: list[Result]) -> list[Result]:
    """By seed, and transformers + PEFT first. Raises InputError where two are of one program and seed."""
    from jaxft.errors import InputError

    found = sorted(results, key=lambda one: (one.seed, list(NAMES).index(one.program)))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise InputError(f"two results of one program and seed among {', '.join(names)}")
    return found


def check_same(path: Path, one: Result, name: Path | str, reference: Result, fields: Sequence[str]) -> None:
    """Raises InputError where a field of the result in `path` is not the one of the reference, which is named."""
    from jaxft.errors import InputError

    for field in fields:
        if getattr(one, field) != getattr(reference, field):
            raise InputError(
                f"{path} has {field} {getattr(one, field)}, {name} {getattr(reference, field)}; compare runs of one "
                "prepared directory"
            )


def read_results(paths: Sequence[Path]) -> list[Result]:
    """The results, the reference first. Raises InputError where they cannot be compared."""
    from jaxft.errors import InputError

    found = read(paths)
    for path, one in zip(paths, found, strict=True):
        check_same(path, one, paths[0], found[0], ("prepared", "training", "dtype"))
    found = in_order(found)
    if found[0].program != "hf" or found[0].seed != 0:
        names = [one.name for one in found]
        raise InputError(f"no result of `run hf` with seed 0 among {', '.join(names)}; the others are held against it")
    return found


@dataclass(frozen=True)
class Apart:
    """Two results, and |a's loss − b's| of each step."""

    a: Result
    b: Result

    @property
    def distances(self) -> np.ndarray:
        return np.abs(np.subtract(self.a.losses, self.b.losses))

    @property
    def mean(self) -> float:
        return float(self.distances.mean())


def verdicts(results: list[Result], exact: list[Result]) -> list[tuple[bool, str]]:
    """(whether it holds, the sentence) of each promise. The noise is the reference's own."""
    found = [against_exact(results, exact[0])] if exact else []
    return [*among_exact(results[0], exact), *found, *against_noise(results)]


def among_exact(reference: Result, exact: list[Result]) -> list[tuple[bool, str]]:
    """Where next to nothing is rounded, programs compute the same."""
    rounding = Apart(reference, exact[0]).mean if exact else 0.0
    found = []
    for pair in programs(exact):
        text = f"in float32 {pair.a.name} and {pair.b.name} differ by {pair.mean:.1e} in the mean"
        text = f"{text}, at most {pair.distances.max():.1e} (mean at most {SHARE:g} of {rounding:.1e}, which "
        found.append((pair.mean <= SHARE * rounding, f"{text}{reference.dtype} moves {reference.name} by)"))
    return found


def against_exact(results: list[Result], exact: Result) -> tuple[bool, str]:
    """Rounding moves jaxft no farther from float32 than it moves the farthest of the others."""
    far = {one.program: Apart(one, exact).mean for one in results if one.seed == 0}
    text = ", ".join(f"{one.name} {far[one.program]:.1e}" for one in results if one.seed == 0)
    others = max(mean for program, mean in far.items() if program != "jaxft")
    return far.get("jaxft", 0.0) <= others, f"from a run in float32 ({exact.name}) differ in the mean: {text}"


def against_noise(results: list[Result]) -> list[tuple[bool, str]]:
    """The first losses are near each other, and no two programs farther apart than runs of the reference, twice."""
    first = float(np.ptp([one.losses[0] for one in results]))
    found = [(first <= FIRST, f"the first step's losses lie within {first:.1e} of each other (at most {FIRST:.0e})")]
    own = [pair for pair in seeds(results) if pair.a.program == results[0].program]
    if not own:
        text = f"the run-to-run noise was not measured: run {results[0].program} with another --seed"
        return [*found, (False, text)]
    noise = max(pair.mean for pair in own)
    for pair in (*programs(results), *(pair for pair in seeds(results) if pair not in own)):
        times = f"{pair.mean / noise:.2f} times" if noise else "where there is no noise, not within"
        text = f"{pair.a.name} and {pair.b.name} differ by {pair.mean:.1e} in the mean"
        text = f"{text}, {times} the noise of {noise:.1e} (at most {TIMES:g} times)"
        found.append((pair.mean <= TIMES * noise, text))
    return found


def page(results: list[Result], exact: list[Result], verdict: list[tuple[bool, str]], picture: str) -> str:
    """docs/parity.md."""
    reference, prepared, training = results[0], results[0].prepared, results[0].training
    steps = len(reference.losses)
    shown = sorted({1, *(steps * part // 4 for part in range(1, 5))} - {0})
    cards = sorted({one.device for one in results})
    versions = {package: number for one in results for package, number in one.versions.items()}
    words = (
        f"{steps} steps of LoRA on the same random weights of {prepared['config']}'s configuration, from the same "
        f"adapter (r {RANK}, alpha {ALPHA}, all seven linear layers, B zero), on the same text: "
        f"`{prepared['dataset']}`, rendered as for training and joined, {prepared['rows']} full rows of "
        f"{prepared['length']} tokens a step, no padding, every token but a row's first a target. Weights and products "
        f"are {reference.dtype}, the adapter and AdamW's states float32: learning rate {training['learning_rate']:g} "
        f"after {training['warmup_steps']} steps that rise from 0, betas {training['beta1']:g} and "
        f"{training['beta2']:g}, epsilon {training['epsilon']:g}, no decay, gradients clipped to norm "
        f"{training['max_grad_norm']:g}. transformers + PEFT runs as TRL runs it, under autocast; each program "
        f"recomputes layers for the backward pass. Measured on {', '.join(cards)} with "
        + ", ".join(f"{package} {number}" for package, number in sorted(versions.items()))
        + "."
    )
    seeded = (
        f"Differences are those to {reference.name} with seed 0. Another seed takes the rows of each batch in another "
        "order and lets every row begin at another position, of which RoPE knows differences alone: exact arithmetic "
        f"would not notice, rounding does. How far such runs of {reference.name} lie apart is the noise that the "
        f"others are held against. What lies apart in {reference.dtype} and not in float32 is rounded in other places: "
        "the distance to float32 says who loses less by it."
    )
    measured = "The peak is the allocator's in the whole process, loading included. Written by"
    lines = [
        "# The same losses as transformers + PEFT and Unsloth",
        "",
        *textwrap.wrap(words, 120, break_long_words=False, break_on_hyphens=False),
        "",
        *(f"- {'**holds**' if holds else '**FAILS**'}: {text}" for holds, text in verdict),
        "",
        f"![Losses, and differences to transformers + PEFT]({picture})",
        "",
        f"| who | {' | '.join(f'loss at {step}' for step in shown)} | mean \\|difference\\| | largest | "
        + f"to float32, mean | to float32, first {YOUNG} steps | " * bool(exact)
        + "peak GiB |",
        "|---" * (len(shown) + 4 + 2 * bool(exact)) + "|",
    ]
    for one in results:
        apart = Apart(one, reference)
        losses = " | ".join(f"{one.losses[step - 1]:.4f}" for step in shown)
        far = " | " if one is reference else f"{apart.mean:.1e} | {apart.distances.max():.1e}"
        peak = "" if one.peak_bytes is None else f"{one.peak_bytes / GIB:.2f}"
        moved = Apart(one, exact[0]).distances if exact else None
        rounded = "" if moved is None else f"{moved.mean():.1e} | {moved[:YOUNG].mean():.1e} | "
        lines.append(f"| {one.name} | {losses} | {far} | {rounded}{peak} |")
    lines += [
        "",
        *textwrap.wrap(seeded, 120),
        "",
        *textwrap.wrap(measured, 120),
        "",
        "```console",
        *commands(results, exact),
        "```",
    ]
    return "\n".join(lines) + "\n"


def commands(results: list[Result], exact: list[Result]) -> list[str]:
    """What was typed, with short paths."""
    prepared, files = results[0].prepared, [f"{one.program}-{one.seed}.json" for one in results]
    shape = " ".join(f"--{name} {prepared[name]}" for name in SIZES)
    dtype = "" if results[0].dtype == "bfloat16" else f" --dtype {results[0].dtype}"
    report = f"$ python scripts/parity.py report {' '.join(files)}"
    wide = {one.program: f"{one.program}-float32.json" for one in exact}
    return [
        f"$ python scripts/parity.py prepare parity --config {prepared['config']} \\",
        f"      --dataset {prepared['dataset']} --tokenizer {prepared['tokenizer']} \\",
        f"      {shape}",
        *(
            f"$ python scripts/parity.py run {one.program} parity {file}{f' --seed {one.seed}' * bool(one.seed)}{dtype}"
            for one, file in zip(results, files, strict=True)
        ),
        *(f"$ python scripts/parity.py run {name} parity {file} --dtype float32" for name, file in wide.items()),
        f"{report} --exact {' '.join(wide.values())}" if wide else report,
    ]


def programs(results: list[Result]) -> list[Apart]:
    """The pairs of two programs, each with seed 0."""
    return [Apart(b, a) for a, b in itertools.combinations([one for one in results if one.seed == 0], 2)]


def seeds(results: list[Result]) -> list[Apart]:
    """The pairs of two seeds of one program."""
    return [Apart(b, a) for a, b in itertools.combinations(results, 2) if a.program == b.program]


def draw(path: Path, results: list[Result], exact: list[Result]) -> None:
    """The curves, and below them what they differ from the reference by; runs of another seed are thin, those in
    float32 dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"hf": "#444444", "jaxft": "#2563eb", "unsloth": "#d97706"}
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = np.arange(1, len(results[0].losses) + 1)
    for one in results:
        look = dict(color=colours[one.program], linewidth=0.6 if one.seed else 1.4, alpha=0.7 if one.seed else 1.0)
        above.plot(steps, one.losses, label=one.name, **look)
        below.plot(steps, np.subtract(one.losses, results[0].losses), **look)
    for one in exact:
        apart = np.subtract(one.losses, results[0].losses)
        below.plot(steps, apart, color=colours[one.program], linestyle="--", label=f"{one.name}, float32")
    if exact:
        below.legend(frameon=False)
    every = np.concatenate([Apart(one, results[0]).distances for one in [*results, *exact]])
    limit = 1.1 * every[np.isfinite(every)].max() or 1e-6
    below.set_ylim(-limit, limit)
    above.set_ylabel("loss")
    below.set_ylabel(f"loss − {results[0].name}'s")
    below.set_xlabel("step")
    above.legend(frameon=False)
    for axes in (above, below):
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
