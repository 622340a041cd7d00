"""Values as they are typed: JSON objects, sizes, times, and names that may be a regular expression."""

import json
import re
from typing import Any

from jaxft.errors import InputError


class JsonObject(dict[str, Any]):
    """A dict that is typed on the command line as a JSON object."""

    def __init__(self, source: Any = ()) -> None:
        value = json.loads(source) if isinstance(source, str) else source
        if isinstance(source, str) and not isinstance(value, dict):
            raise ValueError(f"{source} is not a JSON object")
        super().__init__(value)


def is_expression(text: str) -> bool:
    """Whether a target is a regular expression, and no name such as q_proj or mlp.up_proj."""
    return re.search(r"[][\\^$*+?{}()|]", text) is not None


def parse_bytes(text: str, expected: str = "--memory_budget {}: expected auto, or") -> int:
    """'11GiB', '11.5 GB', '800MiB' as bytes: GiB is 2^30, GB 10^9. Raises InputError for anything else, or no bytes.

    expected: how the error begins, {} being the text.
    """
    units = {f"{letter}{mark}B": base**power for power, letter in ((1, "K"), (2, "M"), (3, "G"), (4, "T"))
             for mark, base in (("i", 1024), ("", 1000))}  # fmt: skip
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip())
    if not found or not (size := int(float(found[1]) * units[found[2]])):
        raise InputError(f"{expected.format(repr(text))} a number with its unit, such as 11GiB or 800MiB")
    return size


def parse_seconds(text: str) -> float:
    """'5400', '90m', '1h30m', '45s' in seconds. Raises InputError for anything else, or no time at all."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)s?|(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?)", text.strip())
    seconds = 0.0
    if found:
        parts = zip(found.groups(), (1, 86400, 3600, 60, 1), strict=True)
        seconds = sum(float(part) * unit for part, unit in parts if part)
    if not seconds:
        raise InputError(f"--max_time {text!r}: expected seconds, or a time such as 90m or 1h30m")
    return seconds
