"""Curves and histograms as inline SVG: no script, no request, colours by the classes that page.css describes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 236
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 34
MOST = 400  # points drawn of a curve; more are taken together, with the band between their extremes
COLOURS = 8  # that page.css has

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: (x, y) points by x. dotted: few points, each is marked. colour: its number, from 0."""

    name: str
    points: Points
    colour: int = 0
    dotted: bool = False


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(
        factor for factor, until in ((1, 1.4), (2, 3.2), (5, 7.1), (10, math.inf)) if raw / power <= until
    )
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 0.25, 1,200, 81k, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.6g}" if abs(value) >= 1e-4 else f"{value:.3g}"


def thinned(points: Points) -> tuple[np.ndarray, bool]:
    """Rows (x, lowest, mean, highest), at most MOST of them, and whether several points became one row."""
    array = np.asarray([(x, y) for x, y in points if math.isfinite(y)], np.float64).reshape(-1, 2)
    if len(array) <= MOST:
        return np.stack([array[:, 0], *[array[:, 1]] * 3], axis=1), False
    parts = np.array_split(array, MOST)
    return np.asarray([(p[:, 0].mean(), p[:, 1].min(), p[:, 1].mean(), p[:, 1].max()) for p in parts]), True


def chart(
    title: str, curves: Sequence[Curve], *, shown: Callable[[float], str] = short, from_zero: bool = False,
    x_name: str = "step", mark: tuple[float, str] | None = None,
) -> str:  # fmt: skip
    """A figure with curves on one pair of axes; '' where no curve has a point.

    shown: how a value is written. from_zero: the y axis begins at 0. mark: an x that is marked, and its name.
    """
    drawn = [(curve, *thinned(curve.points)) for curve in curves]
    drawn = [(curve, rows, banded) for curve, rows, banded in drawn if len(rows)]
    if not drawn:
        return ""
    every = np.concatenate([rows for _, rows, _ in drawn])
    x_low, x_high = float(every[:, 0].min()), float(every[:, 0].max())
    y_low, y_high = float(every[:, 1].min()), float(every[:, 3].max())
    if from_zero:
        y_low, y_high = min(0.0, y_low), y_high or 1.0
    if y_high == y_low:  # a flat line lies in the middle
        y_low, y_high = y_low - (abs(y_low) or 1) * 0.1, y_high + (abs(y_high) or 1) * 0.1
    pad = (y_high - y_low) * 0.06
    y_low, y_high = (y_low if from_zero and y_low == 0 else y_low - pad), y_high + pad
    x_high = x_high if x_high > x_low else x_low + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_grid(ticks(x_low, x_high, 6), ticks(y_low, y_high), at, (x_low, y_low), shown)]
    if mark is not None and x_low <= mark[0] <= x_high:
        x, _ = at(mark[0], y_low)
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        nudge = -5 if anchor == "end" else 5
        parts.append(
            f'<text class="note" x="{x + nudge}" y="{TOP + 11}" text-anchor="{anchor}">{escape(mark[1])}</text>'
        )
    for curve, rows, banded in drawn:
        colour = f"c{curve.colour % COLOURS}"
        if banded:
            edge = [at(x, high) for x, _, _, high in rows] + [at(x, low) for x, low, _, _ in rows[::-1]]
            parts.append(f'<polygon class="band {colour}" points="{_joined(edge)}"/>')
        places = [at(x, mean) for x, _, mean, _ in rows]
        if len(places) > 1:
            parts.append(f'<polyline class="curve {colour}" points="{_joined(places)}"/>')
        if curve.dotted or len(places) == 1:
            dots = zip(places, rows, strict=True)
            parts += [
                f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3"><title>{escape(curve.name)} '
                f"{escape(shown(row[2]))} at {x_name} {row[0]:g}</title></circle>"
                for (x, y), row in dots
            ]
    name = f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>'
    legend = "".join(
        f'<span class="key"><i class="c{curve.colour % COLOURS}"></i>{escape(curve.name)}</span>'
        for curve, _, _ in drawn
    )
    return _figure(title, legend if len(drawn) > 1 else "", "".join(parts) + name)


def histogram(title: str, values: np.ndarray, *, x_name: str, limit: float | None = None) -> str:
    """A figure of how many values lie where, in 30 bins at most; limit: an x that is marked. '' without values."""
    if not len(values):
        return ""
    high = max(float(values.max()), limit or 0)
    counts, edges = np.histogram(values, bins=min(30, max(1, int(high))), range=(0, high))
    y_high = counts.max() * 1.08

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / high * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (y_high - y) / y_high * (HEIGHT - TOP - BOTTOM), 1)

    whole = [tick for tick in ticks(0, float(y_high)) if tick == int(tick)]
    parts = [_grid(ticks(0, high, 6), whole, at, (0, 0), short)]
    for count, start, stop in zip(counts, edges, edges[1:], strict=False):
        (left, y), (right, bottom) = at(start, count), at(stop, 0)
        if count:
            parts.append(
                f'<rect class="bar" x="{left + 0.5:.1f}" y="{y}" width="{max(right - left - 1, 0.5):.1f}" '
                f'height="{bottom - y:.1f}"><title>{count} of {start:.0f} to {stop:.0f} {escape(x_name)}</title></rect>'
            )
    if limit is not None:
        x, _ = at(limit, 0)
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="note" x="{x - 5}" y="{TOP + 11}" text-anchor="end">max_length</text>')
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    return _figure(title, "", "".join(parts))


def _grid(
    x_ticks: Sequence[float], y_ticks: Sequence[float], at: Callable[[float, float], tuple[float, float]],
    origin: tuple[float, float], shown: Callable[[float], str],
) -> str:  # fmt: skip
    parts = []
    for tick in y_ticks:
        _, y = at(origin[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(shown(tick))}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in x_ticks:
        x, _ = at(tick, origin[1])
        parts.append(f'<text class="axis" x="{x}" y="{HEIGHT - 18}" text-anchor="middle">{escape(short(tick))}</text>')
    return "".join(parts)


def _joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)


def _figure(title: str, legend: str, drawing: str) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawing}</svg></figure>'
    )
