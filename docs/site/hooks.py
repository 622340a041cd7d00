"""Hooks of mkdocs: settings.md gets the tables of all settings; a page that the navigation lacks is added to it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft.settings import GROUPS


def on_config(config: Any) -> Any:
    """Adds to the navigation's first section the pages that it does not name."""
    named = set(paths(config["nav"]))
    section = next(part for entry in config["nav"] for part in entry.values() if isinstance(part, list))
    section += sorted(page.name for page in Path(config["docs_dir"]).glob("*.md") if page.name not in named)
    return config


def paths(nav: Any) -> Iterator[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from paths(entry)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    if page.file.src_uri != "settings.md":
        return markdown
    groups = dict.fromkeys(group for groups in GROUPS.values() for group in groups)
    return "\n".join([markdown, *(line for group in groups for line in table(group))])


def table(group: Any) -> list[str]:
    """One group of settings: name, default, meaning."""
    lines = ["", f"## {group._argument_group_name[:1].upper()}{group._argument_group_name[1:]}", ""]
    lines += ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(group):
        made = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
        choices = field.metadata.get("choices")
        meaning = field.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        lines.append(f"| `{field.name}` | {shown(made)} | {cell(meaning)} |")
    return lines


def shown(default: Any) -> str:
    """A default as it would be typed; nothing where there is none."""
    if default is None or default in ({}, []):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def cell(text: str) -> str:
    for character in "\\`*|<":
        text = text.replace(character, "\\" + character)
    return text
