"""What the trainer will see of a data set: counts, lengths, the packing plan, samples with what is trained in them."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jaxft.data import Report, digest_of
from jaxft.packing import Plan, make_plan
from jaxft.samples import Sample, lengths_of

BINS = 12  # of the histogram, at most
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there are no colours
STYLE = "bold green"


def length_facts(samples: Sequence[Sample]) -> dict[str, Any]:
    """Smallest, mean, median, 95th percentile and largest length, and a histogram of bins [from, to] with counts."""
    lengths = lengths_of(samples)
    least, most = int(lengths.min()), int(lengths.max())
    width = _round_up((most - least + 1) / BINS)
    start = least // width * width
    counts = np.bincount((lengths - start) // width)
    bins = [
        {"from": start + at * width, "to": start + (at + 1) * width - 1, "count": int(n)} for at, n in enumerate(counts)
    ]
    middle, high = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.95))
    mean = float(lengths.mean())
    return {"min": least, "mean": mean, "median": middle, "p95": high, "max": most, "histogram": bins}


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= width:
                return factor * unit
        unit *= 10


def packing_facts(
    samples: Sequence[Sample], *, max_length: int, packing: bool, shuffle: bool, seed: int, rows_per_step: int
) -> dict[str, Any]:
    """The plan of rows that the run will take, how full it is, and beside it one sample a row.

    rows_per_step: rows of an optimizer step on one device.
    """
    lengths = lengths_of(samples)

    def facts(plan: Plan) -> dict[str, Any]:
        documents = [len(row) for row in plan]
        tokens = int(sum(lengths[row].sum() for row in plan))
        return {
            "rows": len(plan), "efficiency": tokens / (len(plan) * max_length),
            "documents_per_row": sum(documents) / len(plan), "most_documents": max(documents),
            "steps_per_epoch": -(-len(plan) // rows_per_step),
        }  # fmt: skip

    chosen = facts(make_plan(lengths, max_length, packing=packing, shuffle=shuffle, seed=seed))
    alone = facts(make_plan(lengths, max_length, packing=False, shuffle=shuffle, seed=seed))
    return {"packing": packing, "max_length": max_length, "rows_per_step": rows_per_step, **chosen, "unpacked": alone}


def shared_samples(one: Sequence[Sample], other: Sequence[Sample]) -> int:
    """How many samples of the first set have exactly the tokens of a sample of the second."""
    known = {digest_of(sample.input_ids) for sample in other}
    return sum(digest_of(sample.input_ids) in known for sample in one)


def pieces(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[tuple[str, bool]]:
    """A sample's text in pieces, each trained or not, with every special token as it is written."""
    trained = sample.loss_weights > 0
    bounds = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(sample)]
    found, before = [], ""
    for start, stop in itertools.pairwise(bounds):
        # from the beginning each time: what a token is written as may depend on those before it
        text = str(tokenizer.decode(sample.input_ids[:stop], skip_special_tokens=False))
        if not text.startswith(before):  # a character lies across the bound
            text = before + str(tokenizer.decode(sample.input_ids[start:stop], skip_special_tokens=False))
        found.append((text[len(before) :], bool(trained[start])))
        before = text
    return found


def rendered(parts: list[tuple[str, bool]], colours: bool) -> Text:
    """The pieces as text for a terminal: trained ones in colour, or in ⟦ ⟧."""
    text = Text()
    for part, trained in parts:
        if trained and not colours:
            part = f"{OPEN}{part}{CLOSE}"
        text.append(part, style=STYLE if trained and colours else None)
    return text


def histogram_lines(facts: dict[str, Any], width: int) -> list[str]:
    """The histogram as bars of at most `width` characters."""
    bins = facts["histogram"]
    most, digits = max(bin["count"] for bin in bins), len(str(bins[-1]["to"]))
    lines = []
    for bin in bins:
        bar = "█" * round(width * bin["count"] / most) or ("▏" if bin["count"] else "")
        lines.append(f"{bin['from']:>{digits}} to {bin['to']:>{digits}}  {bar} {bin['count']}".rstrip())
    return lines


def report_facts(report: Report) -> dict[str, Any]:
    """The report's counts under their names, those of things that did not happen too."""
    named = (
        *("format", "rows", "layout", "samples", "tokens", "target_tokens", "duplicates", "truncated"),
        *("truncated_tokens", "split_documents", "split_conversations", "refused", "refused_after_truncation"),
        *("padding_removed", "left_out", "tools_left_out", "unknown_roles"),
    )
    return {name: getattr(report, name) for name in named} | {"trained_share": report.target_tokens / report.tokens}
