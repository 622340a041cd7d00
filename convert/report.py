"""The report of a dynamic quantisation: a table in Markdown, the same in JSON, and a picture by layer and module."""

import json
import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxft.convert.dynamic import SCORES, Score

HEADS = {"weight": "weight error", "output": "output error", "divergence": "divergence (nats a token)"}


def write_report(out: Path, scores: list[Score], kept: Collection[str], facts: dict[str, Any]) -> list[str]:
    """Writes quantization.md, .json and, where matplotlib is installed, .png; returns the names.

    facts: what was asked for and what came of it, by name; `by` is the score that the choice went by.
    """
    rows = [
        {"module": score.name.removesuffix(".weight"), "kept": score.name in kept}
        | {name: getattr(score, name) for name in SCORES}
        | {"bytes_more_in_16_bits": score.bytes}
        for score in scores
    ]
    record = json.dumps({**facts, "linear_layers": rows}, indent=1) + "\n"
    (out / "quantization.json").write_text(record, encoding="utf-8")
    (out / "quantization.md").write_text(_table(scores, kept, facts), encoding="utf-8")
    if find_spec("matplotlib") is None:
        return ["quantization.md", "quantization.json"]
    _plot(out / "quantization.png", scores, kept, facts["by"])
    return ["quantization.md", "quantization.json", "quantization.png"]


def _table(scores: list[Score], kept: Collection[str], facts: dict[str, Any]) -> str:
    measured = [name for name in SCORES if getattr(scores[0], name) is not None]
    lines = [
        "# What stays in 16 bits",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
        "",
        f"The layers are those whose {HEADS[facts['by']]} sums up to the most within the budget; the worst first.",
        "",
        "| module | kept | " + " | ".join(HEADS[name] for name in measured) + " | bytes more in 16 bits |",
        "|---|---|" + "---|" * (len(measured) + 1),
    ]
    for score in sorted(scores, key=lambda one: -one.by(facts["by"])):
        numbers = " | ".join(f"{score.by(name):.3e}" for name in measured)
        mark = "16 bits" if score.name in kept else ""
        lines.append(f"| {score.name.removesuffix('.weight')} | {mark} | {numbers} | {score.bytes:,} |")
    return "\n".join(lines) + "\n"


def _plot(path: Path, scores: list[Score], kept: Collection[str], by: str) -> None:
    """One field a linear layer, coloured by its score; a cross where it is kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    places = {score.name: _layer_and_module(score.name) for score in scores}
    layers = sorted({layer for layer, _ in places.values()})
    modules = sorted({module for _, module in places.values()})
    grid = [[float("nan")] * len(layers) for _ in modules]
    for score in scores:
        layer, module = places[score.name]
        grid[modules.index(module)][layers.index(layer)] = max(score.by(by), 1e-12)
    figure = Figure(figsize=(2.5 + 0.28 * max(len(layers), 8), 1.2 + 0.35 * len(modules)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [value for row in grid for value in row if value == value]
    norm = LogNorm(min(values), max(max(values), min(values) * 1.001))
    image = axes.imshow(grid, aspect="auto", norm=norm, cmap="viridis")
    for name in kept:
        layer, module = places[name]
        axes.plot(layers.index(layer), modules.index(module), "x", color="red")
    axes.set_yticks(range(len(modules)), modules)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("layer; a cross stays in 16 bits")
    figure.colorbar(image, label=HEADS[by])
    figure.savefig(path, dpi=120)


def _layer_and_module(name: str) -> tuple[int, str]:
    """'model.layers.3.mlp.up_proj.weight' -> (3, 'mlp.up_proj')."""
    found = re.search(r"layers\.(\d+)\.(.+)\.weight$", name)
    assert found is not None  # linears() names nothing else
    return int(found[1]), found[2]
