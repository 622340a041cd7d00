"""Does literally what pages say: every command of their console blocks, in an empty directory for each, in order.

    python scripts/follow_docs.py README.md docs/quick-start.md

A page finds what it names as its reader would have it: a model directory Qwen3-0.6B (in fact the embedded base, as is
embedded), train.jsonl, test.jsonl and ask.jsonl, recipes/, and each Python block as the file that the text before it
names. A command that
fails ends the script with 1. So does a line that is shown and does not come: numbers aside, in the order shown, with
`[…]` for what is left out. Commands that are not jaxft's or a shell's own are listed as not run.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "jaxft" / "embedded"
RUN = ("python -m jaxft", "cat ", "head ", "ls")
ROWS = {"train.jsonl": ("problems_train.jsonl", 96), "test.jsonl": ("problems_heldout.jsonl", 16)}


class Step(NamedTuple):
    """One command of a page, and the lines that the page shows of what it prints."""

    command: str
    shown: list[str]


def steps(text: str) -> Iterator[Step]:
    """The commands of the console blocks of a page."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        at = 0
        while at < len(lines):
            command = lines[at].removeprefix("$ ")
            while command.endswith("\\"):
                at += 1
                command = f"{command[:-1].rstrip()} {lines[at].strip()}"
            at += 1
            shown = []
            while at < len(lines) and not lines[at].startswith("$ "):
                shown.append(lines[at])
                at += 1
            yield Step(command, [line for line in shown if line.strip() and line != "[…]"])


def prepare(directory: Path, text: str) -> None:
    """What a reader of the page has before its first command."""
    shutil.copytree(EMBEDDED / "base", directory / "Qwen3-0.6B")
    (directory / "embedded").symlink_to(EMBEDDED / "base")
    for name, (source, count) in ROWS.items():
        rows = (EMBEDDED / source).read_text(encoding="utf-8").splitlines()[:count]
        (directory / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    prompts = [{"prompt": "What is 3 + 4?"}, {"messages": [{"role": "user", "content": "What is 5 + 6?"}]}]
    (directory / "ask.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts), encoding="utf-8")
    (directory / "recipes").symlink_to(ROOT / "recipes")
    for name, script in re.findall(r"`([\w-]+\.py)` is\n\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (directory / name).write_text(script, encoding="utf-8")


def without_numbers(line: str) -> str:
    return re.sub(r"-?\d[\d.,]*(?:e[-+]?\d+)?", "#", " ".join(line.split()))


def missing(shown: list[str], printed: str) -> str | None:
    """The first line that is shown and was not printed after those before it."""
    lines = iter(map(without_numbers, printed.splitlines()))
    return next((line for line in shown if without_numbers(line) not in lines), None)


def follow(page: Path) -> bool:
    """Whether every command of the page ran and printed what is shown."""
    text = page.read_text(encoding="utf-8")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="jaxft-docs-") as folder:
        prepare(Path(folder), text)
        for command, shown in steps(text):
            if not command.startswith(RUN):
                print(f"{page.name}: not run: {command}", flush=True)
                continue
            began = time.monotonic()
            done = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            print(f"{page.name}: {time.monotonic() - began:.0f} s: {command}", flush=True)
            absent = missing(shown, done.stdout)
            if done.returncode or absent is not None:
                why = f"exit code {done.returncode}" if done.returncode else f"not printed: {absent}"
                print(f"{done.stdout}\n{page.name}: {command}\n{why}", file=sys.stderr)
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    pages = parser.parse_args().pages
    with ThreadPoolExecutor(os.cpu_count()) as readers:  # most of a command is importing, which takes one core
        return 0 if all(list(readers.map(follow, pages))) else 1


if __name__ == "__main__":
    sys.exit(main())
