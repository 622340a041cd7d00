"""Commands in processes of their own, forked from one that has imported everything: importing takes longer than a run.

A child can be killed at a named moment: `act` names a function, the count of its calls at which the child sends a
signal to itself, and whether before or after that call.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

FORKER = """
import importlib, json, os, signal, sys
from jaxft import checkpoint, evaluate, generate, loop, metrics, output, train
from jaxft.errors import run_command

def arm(name, count, number, after):
    module, *path = name.split(".")
    owner = globals()[module]
    for part in path[:-1]:
        owner = getattr(owner, part)
    whole = getattr(owner, path[-1])
    calls = [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and not after:
            os.kill(os.getpid(), number)
        result = whole(*args, **kwargs)
        if calls[0] == count and after:
            os.kill(os.getpid(), number)
        return result
    setattr(owner, path[-1], wrapped)

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(asked[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.environ.update(asked["environment"])
        for act in asked["act"]:
            arm(*act)
        code = run_command(globals()[asked["command"]].main, asked["argv"])
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
"""


@dataclass(frozen=True)
class Child:
    """A command that runs: its process, where it writes, and how to wait for it."""

    pid: int
    out: Path
    err: Path
    wait: Callable[[], int]

    @property
    def said(self) -> str:
        return self.err.read_text(encoding="utf-8")

    @property
    def printed(self) -> str:
        return self.out.read_text(encoding="utf-8")


Start = Callable[..., Child]


@contextlib.contextmanager
def forked_runs(place: Path) -> Iterator[Start]:
    """Yields start(argv, command="train", act=(), environment={}); what children write lies in `place`."""
    command = [sys.executable, "-W", "ignore", "-c", FORKER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forker:
        assert forker.stdin is not None and forker.stdout is not None

        def ask(**asked: Any) -> int:
            forker.stdin.write(json.dumps(asked) + "\n")
            forker.stdin.flush()
            return int(forker.stdout.readline())

        started = 0

        def start(
            argv: Sequence[str], command: str = "train", act: Sequence[Any] = (), environment: dict | None = None
        ) -> Child:
            nonlocal started
            started += 1
            out, err = place / f"stdout-{started}", place / f"stderr-{started}"
            pid = ask(
                argv=list(argv), command=command, act=list(act), environment=environment or {}, stdout=str(out),
                stderr=str(err),
            )  # fmt: skip
            return Child(pid, out, err, lambda: ask(wait=pid))

        yield start
        forker.stdin.close()


def devices(count: int) -> dict[str, str]:
    """The environment of a process with `count` virtual devices; it keeps the flags of this one."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".lstrip()}
