"""A hook of mkdocs: appends to settings.md the tables of all settings, made of the dataclasses behind the flags."""

import dataclasses
from typing import Any

from jaxft.settings import GROUPS


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
