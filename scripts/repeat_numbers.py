"""The rows of docs/performance.md again, on this card: what the page says beside what is measured now.

    python scripts/repeat_numbers.py                  # the nine workloads, the first of each one's lines of jaxft
    python scripts/repeat_numbers.py A1 A3 --all      # every line of these two
    python scripts/repeat_numbers.py --json FILE      # bench's own lines, too

Each line is a `python -m jaxft.bench` in a process of its own, with the policy that the page names; some 25 seconds on
an H200. Exit 1 where one is slower than the page's by more than 5 %, needs more memory by more than 2 %, or begins with
a loss that is 0.02 off: on another card the first two are no fault.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import InputError, RunError, run_command
from jaxft.memory import GIB

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
LINE = re.compile(r"\|[^|]*\|[^|]*\| jaxft, `(?P<policy>[^`]+)`[^|]*\|(?P<figures>.*)\|")
FIRST = re.compile(r"\| (A\d) \|")
SLOWER, LARGER, APART = 0.95, 1.02, 0.02


@dataclass(frozen=True)
class Claim:
    """A line of the page: tokens a second, the allocator's peak in GiB, and the first step's loss."""

    id: str
    policy: str
    tokens_per_second: float
    gib: float
    loss: float

    @property
    def command(self) -> list[str]:
        """What measures it."""
        flags = shlex.split(f"--gradient_checkpointing {self.policy}")
        return [sys.executable, "-m", "jaxft.bench", self.id, *flags]


def claims(page: str) -> list[Claim]:
    """jaxft's lines of the page's table, in order."""
    found, current = [], ""
    for line in page.splitlines():
        if begins := FIRST.match(line):
            current = begins[1]
        if current and (match := LINE.match(line)):
            speed, gib, loss = (float(cell.replace(",", "")) for cell in match["figures"].split("|"))
            found.append(Claim(current, match["policy"], speed, gib, loss))
    return found


def chosen(found: Sequence[Claim], ids: Sequence[str], every: bool) -> list[Claim]:
    """The lines of these workloads, of all where none is named; the first of each one's alone, or every one."""
    known = list(dict.fromkeys(claim.id for claim in found))
    if unknown := [name for name in ids if name not in known]:
        raise InputError(f"{', '.join(unknown)}: not on the page, which has {', '.join(known)}")
    wanted = [claim for claim in found if claim.id in (ids or known)]
    return wanted if every else list({claim.id: claim for claim in reversed(wanted)}.values())[::-1]


def measured(claim: Claim) -> dict[str, Any]:
    """bench's line. Raises RunError where it fails."""
    done = subprocess.run(claim.command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise RunError(f"{shlex.join(claim.command[1:])} ended with {done.returncode}: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def verdict(claim: Claim, line: dict[str, Any]) -> str:
    """What is not as the page says; '' where all is."""
    peak, loss = line["peak_bytes"], line["loss"][0]
    wrong = ["slower"] * (line["tokens_per_second"] < SLOWER * claim.tokens_per_second)
    wrong += ["more memory"] * (peak is not None and peak / GIB > LARGER * claim.gib)
    return ", ".join(wrong + ["another loss"] * (not abs(loss - claim.loss) <= APART))


def row(claim: Claim, line: dict[str, Any]) -> str:
    """A line of the table: the page's figures, this card's, their ratio, and what is wrong."""
    peak = "" if line["peak_bytes"] is None else f"{line['peak_bytes'] / GIB:.2f}"
    cells = (
        claim.id, claim.policy, f"{claim.tokens_per_second:,.0f}", f"{line['tokens_per_second']:,.0f}",
        f"{line['tokens_per_second'] / claim.tokens_per_second:.3f}", f"{claim.gib:.2f}", peak, f"{claim.loss:.2f}",
        f"{line['loss'][0]:.2f}", verdict(claim, line),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help="workloads of the page; all where none is named")
    parser.add_argument("--all", action="store_true", help="every line of a workload, not its first alone")
    parser.add_argument("--json", type=Path, help="write bench's lines here, one a row")
    options = parser.parse_args(argv)
    wanted = chosen(claims(PAGE.read_text(encoding="utf-8")), options.ids, options.all)
    lines, well = [], True
    heads = ("id", "policy", "page tokens/s", "here", "ratio", "page GiB", "here", "page loss", "here", "otherwise")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for claim in wanted:
        lines.append(measured(claim))
        print(row(claim, lines[-1]), flush=True)
        well &= not verdict(claim, lines[-1])
        if options.json:
            options.json.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"measured on {', '.join(sorted({line['device'] for line in lines}))}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
