"""What the commands of `python -m jaxft.convert` say while they work: on stderr, as the last line of stdout is JSON."""

import sys


def say(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)
