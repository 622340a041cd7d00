"""What report and compare are written on: one file without a request, light or dark as the reader's system."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css")


def page(title: str, under: str, sections: Iterable[str], foot: str) -> str:
    """A whole HTML file. under: HTML below the title; sections: HTML, '' for none; foot: text."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>' + escape(title) + "</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n{under}\n{body}\n"
        f"<footer>{escape(foot)}</footer>\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A headed part of a page; '' where nothing is in it."""
    inside = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inside}</section>" if inside else ""


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Figures that are seen first: (name, value, what stands below it)."""
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        + (f"<small>{escape(below)}</small>" if below else "") + "</div>"
        for name, value, below in facts
    ) + "</div>"  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], kinds: Sequence[str] = ()) -> str:
    """A table of texts; kinds: a class for each column, '' for none. '' without rows; a header of '' is not shown."""
    kinds = kinds or [""] * len(header)
    cells = [
        "".join(f'<td class="{kind}">{escape(str(cell))}</td>' for cell, kind in zip(row, kinds, strict=True))
        for row in rows
    ]
    if not cells:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in header if any(header))
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>"
        + "".join(f"<tr>{row}</tr>" for row in cells)
        + "</tbody></table>"
    )


def plots(figures: Iterable[str]) -> str:
    """Figures side by side, as many as there is room for; '' without any."""
    drawn = "\n".join(figure for figure in figures if figure)
    return f'<div class="plots">{drawn}</div>' if drawn else ""
