"""Seconds from the command to the end of the first step: `python -m jaxft.train`, cold and warm.

    python scripts/first_step.py MODEL_DIR DATASET [--json FILE] [flags of jaxft.train]

Two runs of two steps each, as processes of their own: the first with empty caches (XLA's compiled programs, tokenised
data, the driver's), the second with what the first left there. Time stamps are those of the run's own lines as they
arrive; how long the weights took to read is told apart, for it is the disk's. MODEL_DIR may have random weights
(scripts/random_model.py).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxft.errors import RunError, run_command

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"cold": 20.0, "warm": 8.0}  # seconds, without reading the weights, of Qwen3-4B on an H200
TOKENS = "device, tokenizer, tokens"
# the line that ends each part of the way to the first step, in order
ENDS = {
    "imports": re.compile(r"model_name_or_path = "),
    "data set": re.compile(r"train: read "),
    TOKENS: re.compile(r"model: "),
    "step compiled, weights": re.compile(r"weights: read in ([\d.]+) s"),
    "adapter, first step": re.compile(r"step 1\b"),
}
# jax's own lines about the step's program, which is made beside `TOKENS` where what they tell was guessed right
# (jaxft/step_ahead.py), else in "step compiled, weights"; where it was guessed wrong, in both
PROGRAM = {
    "tracing": re.compile(r"Finished tracing.* train_step for \w+ in ([\d.]+) sec"),
    "lowering": re.compile(r"Finished jaxpr to MLIR module conversion jit\(train_step\) in ([\d.]+) sec"),
    "compiling, or taking from the cache": re.compile(r"Finished XLA compilation of jit\(train_step\) in ([\d.]+) sec"),
}
BESIDE = "of the step's, beside the tokens"
PROGRAMS = re.compile(r"Finished XLA compilation of .* in ([\d.]+) sec")


def one_run(place: Path, name: str, command: list[str]) -> dict[str, Any]:
    """The parts of a run's way to its first step, in seconds. Its lines are left in `place`/name.log.

    Raises RunError where the run fails, or does not say what is waited for.
    """
    caches = {
        "JAX_COMPILATION_CACHE_DIR": place / "xla", "XDG_CACHE_HOME": place / "cache",
        "CUDA_CACHE_PATH": place / "cuda",
    }  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    told = {"JAX_LOG_COMPILES": "1", "PYTHONPATH": paths}
    environment = os.environ | {key: str(value) for key, value in (caches | told).items()}
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--output_dir", str(place / name)], env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    lines = [(time.perf_counter() - began, line) for line in process.stderr]
    code = process.wait()
    log = place / f"{name}.log"
    log.write_text("".join(f"{at:8.2f} {line}" for at, line in lines), encoding="utf-8")
    if code:
        raise RunError(f"the {name} run ended with {code}: {lines[-1][1].strip() if lines else 'nothing was said'}")
    return parts_of(name, lines) | {"second step": step_seconds(place / name)}


def parts_of(name: str, lines: list[tuple[float, str]]) -> dict[str, Any]:
    """What the lines of a run and their times say. Raises RunError where a line that ends a part is missing."""
    found: dict[str, Any] = {"run": name}
    last = reading = tokens = 0.0
    for part, end in ENDS.items():
        hits = [(at, match) for at, line in lines if (match := end.match(line))]
        if not hits:
            raise RunError(f"the {name} run did not say {end.pattern!r}, by which the end of {part!r} is known")
        at, match = hits[0]
        if match.groups():
            reading = float(match.group(1))
        found[part], last = at - last, at
        tokens = at if part == TOKENS else tokens

    def spent(until: float) -> dict[str, float]:
        """Seconds of each part of the step's program that was there by then."""
        so_far = [line for at, line in lines if at <= until]
        return {
            part: sum(float(match.group(1)) for line in so_far if (match := said.search(line)))
            for part, said in PROGRAM.items()
        }

    found |= spent(last)
    found[BESIDE] = sum(spent(tokens).values())
    others = [float(match.group(1)) for at, line in lines if at <= last and (match := PROGRAMS.search(line))]
    found["programs compiled"], found["all of them"] = len(others), sum(others)
    return found | {"reading weights": reading, "total": last, "without reading": last - reading}


def step_seconds(directory: Path) -> float:
    """Of the second step, which compiles nothing."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return next(line["step_seconds"] for line in lines if line["step"] == 2 and "loss" in line)


def table(found: list[dict[str, Any]]) -> str:
    """The runs side by side, in seconds."""
    rows = [f"| part | {' | '.join(run['run'] for run in found)} |", f"|---{'|---' * len(found)}|"]
    parts = ("total", "without reading", "reading weights", *ENDS, *PROGRAM, BESIDE, "programs compiled", "all of them")
    for part in (*parts, "second step"):
        cells = [f"{run[part]}" if isinstance(run[part], int) else f"{run[part]:.2f}" for run in found]
        rows.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--place", type=Path, help="a folder for caches and logs, which must be new; else a temporary")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options, others = parser.parse_known_args(argv)  # what is not known here is a flag of jaxft.train
    command = [sys.executable, "-m", "jaxft.train", "--model_name_or_path", str(options.model_dir.resolve())]
    command += ["--dataset", options.dataset, "--max_steps", "2", "--save_steps", "0", "--logging_steps", "1", *others]
    with tempfile.TemporaryDirectory() as temporary:
        place = options.place or Path(temporary)
        place.mkdir(parents=True, exist_ok=options.place is None)
        found = [one_run(place, name, command) for name in GOALS]
    print(table(found))
    for run in found:
        goal = GOALS[run["run"]]
        verdict = "reached" if run["without reading"] <= goal else "not reached"
        print(f"{run['run']}: {run['without reading']:.1f} s without reading the weights; goal {goal:g} s {verdict}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
