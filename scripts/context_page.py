"""The page that `context.py table` writes, docs/context.md, from what was planned and measured."""

import textwrap
from typing import Any

from jaxft.memory import GIB, gib

STOPPED = (
    " XLA allocates all that a step needs before its first kernel, so a step that ran and was stopped (`--stop_after`) "
    "has the peak of a whole one. It proves that the row fits: nobody saw its loss, and its seconds are an estimate, "
    "marked by ~."
)
UNMEASURED = " Rows without a peak are planned by the compiler alone, and their seconds are an estimate, marked by ~."
UNSLOTH_FIXED, UNSLOTH_TOKEN = 7.37e9, 222 * 1024  # bytes; its published lengths lie on this line or a little below

Record = dict[str, Any]


def unsloth_length(budget: float) -> int:
    """The length at which Unsloth's line reaches a budget of GiB."""
    return int((budget * GIB - UNSLOTH_FIXED) / UNSLOTH_TOKEN)


def shorter(data: Record) -> str:
    """By how much the rows that were run are shorter than planned without a card: for the card's own plan, and where a
    length was named."""
    runs = [(budget, run, data["budgets"][budget]) for budget, run in data["measured"].items()]
    cut = [1 - run["length"] / found["length"] for _, run, found in runs if not run.get("named")]
    words = f" The rows run are {min(cut):.0%} to {max(cut):.0%} shorter for it." if any(cut) else ""
    for budget, run, found in runs:
        if run.get("named") and run["length"] < found["length"]:
            less, longest_row = 1 - run["length"] / found["length"], f"the {found['length']:,} tokens planned"
            words += f" The row of {budget} GiB is not the longest: `--length` made it {less:.0%} shorter than "
            words += f"{longest_row}, which would need {gib(found['host'])} of the host."
    return words


def estimates(data: Record) -> str:
    """How far the seconds that are estimated are from those that were measured, "" where none were."""
    pairs = [(run, data["budgets"][budget]) for budget, run in data["measured"].items() if "step_seconds" in run]
    if not pairs:
        return ""
    times = [run["step_seconds"] / found["estimated_seconds"] for run, found in pairs]
    first = "; long ones are first steps, which pin the host's memory too"
    first *= any(not run["warmup"] for run, _ in pairs)
    return f" A step that was timed took {min(times):.1f} to {max(times):.1f} times its estimate{first}."


def document(data: Record, unsloth: bool, step: int) -> str:
    """docs/context.md; unsloth: with its line, which is of one model; step: of which lengths are multiples."""
    measured = [(budget, data["measured"][budget]) for budget in data["budgets"] if budget in data["measured"]]
    cards = ", ".join(sorted({run["device"] for _, run in measured}))
    ran = []
    for how, ended in (("Run on a card", True), ("Begun on a card and stopped", False)):
        budgets = ", ".join(budget for budget, run in measured if ("step_seconds" in run) == ended)
        ran += [f"{how}: {budgets} GiB ({cards})."] * bool(budgets)
    stopped = STOPPED * any("stopped_after" in run for _, run in measured)
    unmeasured = UNMEASURED * any(found and budget not in data["measured"] for budget, found in data["budgets"].items())
    lines = [
        "# How long a row fits",
        "",
        *textwrap.wrap(
            f"{data['model']}, QLoRA in NF4, one row a step, r = 16 on all linear layers, 8-bit AdamW. The longest "
            f"row, a multiple of {step}, whose step takes at most {data['margin']:.0%} of the budget by XLA's own plan "
            f"for {data['device']}, made without one (jax {data['jax']}; the next longer row was compiled too and "
            "takes more). Rows that were run have the card's own plan, which may need less, so that some tokens more "
            f"might fit.{shorter(data)}{estimates(data)}",
            120,
        ),
        "",
        f"**{' '.join(ran) or 'No row was run on a card yet.'}**",
        *textwrap.wrap(
            "In a run XLA has no more of the card than the budget, weights and tokens are random, the loss is finite, "
            f"and the peak is the allocator's.{stopped}{unmeasured} What waits on the host is beside the budget. "
            "Positions are not scaled: beyond the model's own a real run scales its rope, at the same cost.",
            120,
        ),
        "",
    ]
    if unsloth:
        words = (
            "Unsloth's column is an upper bound of its published table for Llama 3.1 8B, r = 32, at the same budget: "
            "the line 7.37 GB and 222 KiB a token, with the units read in its favour, up to 2,750 tokens above it."
        )
        lines += [*textwrap.wrap(words, 120), ""]
    lines += [
        "`python scripts/context.py plan --device h200`, `measure --budget N [--stop_after 5]` and `table` repeat it.",
        "",
        "| budget, GiB | policy, MLP tiles | longest row | planned, GiB | measured peak, GiB | on the host, GiB "
        "| seconds a step |" + (" Unsloth's line |" if unsloth else ""),
        "|---|---|---|---|---|---|---|" + ("---|" if unsloth else ""),
    ]
    for budget, found in data["budgets"].items():
        cells = [budget, "nothing fits", *[""] * 5]
        if found:
            cells = [budget, *_cells(found, data["measured"].get(budget))]
        lines.append(f"| {' | '.join(cells + [f'{unsloth_length(float(budget)):,}'] * unsloth)} |")
    return "\n".join(lines) + "\n"


def _cells(found: Record, run: Record | None) -> list[str]:
    """From the policy to the seconds; of the run where there is one, else of the plan without a card."""
    row = run or found
    peak = ""
    if run is not None:
        peak = "not known" if run["peak_bytes"] is None else f"{run['peak_bytes'] / GIB:.2f}"
    seconds = f"{row['step_seconds']:.1f}" if "step_seconds" in row else f"~{row['estimated_seconds']:.0f}"
    if "stopped_after" in row:
        seconds += f", stopped after {row['stopped_after']:.0f}"
    sizes = f"{row['total'] / GIB:.2f}", peak, f"{row['host'] / GIB:.1f}"
    return [f"`{row['policy']}`, {row['tiles']}", f"{row['length']:,}", *sizes, seconds]
