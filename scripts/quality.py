"""The same fine-tune of the embedded base in 16 bits, NF4, dynamic NF4 and 8 bits, and their held-out losses.

    python scripts/quality.py                   # writes docs/quality.md
    python scripts/quality.py --seeds 0 1 2     # the mean of three runs each

Every base is a directory that `jaxft.convert quantize` wrote from the same files, and every run is `jaxft.train` with
the embedded run's own settings: LoRA on all linear layers, computed in float32 on a CPU.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

import jax

from jaxft import train
from jaxft.convert.__main__ import main as convert
from jaxft.errors import run_command
from jaxft.load import EMBEDDED

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "quality.md"
CALIBRATION = str(EMBEDDED / "problems_train.jsonl")
# name -> what `quantize` is told, None for the base as it is
BASES: dict[str, list[str] | None] = {
    "16 bits": None,
    "NF4": [],
    "NF4, dynamic +10%": ["--dynamic", "--calibration", CALIBRATION, "--budget", "+10%"],
    "NF4, dynamic +20%": ["--dynamic", "--calibration", CALIBRATION, "--budget", "+20%"],
    "8 bits": ["--bits", "8"],
}


def run(base: Path, out: Path, seed: int, argv: list[str]) -> tuple[float, float]:
    """The held-out loss before and after one fine-tune."""
    settings = {
        "config": EMBEDDED / "config.yaml", "model_name_or_path": base, "dataset": CALIBRATION,
        "eval_dataset": EMBEDDED / "problems_heldout.jsonl", "output_dir": out, "seed": seed, "sample_prompts": 0,
        "save_steps": 0,
    }  # fmt: skip
    train.main([*(f"--{name}={value}" for name, value in settings.items()), *argv])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return losses[0], losses[-1]


def measure(place: Path, seeds: list[int], argv: list[str]) -> list[dict]:
    """One record a base."""
    found = []
    for number, (name, how) in enumerate(BASES.items()):
        base = EMBEDDED / "base"
        if how is not None:
            base = place / f"base-{number}"
            with contextlib.redirect_stdout(io.StringIO()):
                convert(["quantize", str(EMBEDDED / "base"), str(base), *how])
        losses = [run(base, place / f"run-{number}-{seed}", seed, argv) for seed in seeds]
        size = (base / "model.safetensors").stat().st_size
        found.append({"base": name, "bytes": size, "before": losses[0][0], "after": [after for _, after in losses]})
        print(json.dumps(found[-1]), flush=True)
    return found


def document(found: list[dict], seeds: list[int], argv: list[str]) -> str:
    """docs/quality.md."""
    exact = found[0]
    several = len(seeds) > 1
    lines = [
        "# What four and eight bits cost",
        "",
        "The same fine-tune of the embedded base (`python -m jaxft.train` as it is: LoRA on all linear layers, 2,000",
        "arithmetic problems) over a base in 16 bits, in NF4 with double quantisation, in NF4 with the layers that",
        "lose the most in 16 bits (`jaxft.convert quantize --dynamic`), and in 8 bits. Losses are of the 200 held-out",
        "problems, in nats a target token. Written by `python scripts/quality.py"
        + (f" --seeds {' '.join(map(str, seeds))}" if seeds != [0] else "")
        + (f" {' '.join(argv)}" if argv else "")
        + f"` (jax {jax.__version__}, {jax.devices()[0].platform}).",
        "",
        f"| base | bytes of its file | held-out loss before | after{', mean (lowest to highest)' if several else ''} | "
        "after, beside 16 bits |",
        "|---|---|---|---|---|",
    ]
    for record in found:
        mean = statistics.fmean(record["after"])
        spread = f" ({min(record['after']):.4f} to {max(record['after']):.4f})" if several else ""
        apart = "" if record is exact else f"{mean - statistics.fmean(exact['after']):+.4f}"
        lines.append(
            f"| {record['base']} | {record['bytes']:,} | {record['before']:.4f} | {mean:.4f}{spread} | {apart} |"
        )
    lines += [
        "",
        "Differences of a few thousandths are chance: a small change of the weights may lower the loss as well as",
        "raise it, and another seed ends elsewhere (`--seeds 0 1 2` gives the mean of three). What has no such",
        "noise is how far the predictions move from those in 16 bits: [Four bits](four-bits.md) has it.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run each")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    options, others = parser.parse_known_args(argv)  # what is not known here is a flag of jaxft.train
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place), options.seeds, others)
    options.output.write_text(document(found, options.seeds, others), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
