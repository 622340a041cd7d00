"""The scripts that measure on a card, at tiny sizes on a CPU: what they search, run, count and write is right."""

import json
import math
from pathlib import Path

import pytest

from jaxft import bench
from jaxft.errors import run_command
from jaxft.memory import GIB
from tests.tiny_models import CONFIGS

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def tiny_workload(monkeypatch):
    monkeypatch.setitem(bench.CONFIGS, "tiny", CONFIGS["qwen3"] | {"num_hidden_layers": 1})
    monkeypatch.setitem(bench.WORKLOADS, "A7", bench.Workload("tiny", 1, 64, load_in_4bit=True))


def test_length_and_batch_take_the_place_of_the_workloads_own(tiny_workload, capsys):
    options = bench.read_options(["A7", "--batch", "2", "--length", "32"])
    assert bench.workload_of("A7", options) == bench.Workload("tiny", 2, 32, load_in_4bit=True)
    assert bench.workload_of("A7", bench.read_options(["A7"])) == bench.WORKLOADS["A7"]
    assert run_command(bench.main, ["A7", "--dry_run", "--batch", "2", "--length", "512"]) == 0
    line = json.loads(capsys.readouterr().out)
    batch = line["arguments"] - line["weights"] - line["trained"] - line["optimizer"]
    assert 4 * 4 * 2 * 512 <= batch <= 4 * 4 * 2 * 512 + 4096  # four arrays of 4 bytes a token
    with pytest.raises(SystemExit):
        bench.main(["A7", "--length", "0"])
    assert "expected a whole number above 0" in capsys.readouterr().err


# scripts/context.py


def test_the_longest_row_is_found_in_few_compiles_even_where_memory_is_no_straight_line(scripts):
    import context

    def bent(count: int) -> int:
        return 1000 + 10 * count + (count * count) // 200 + (37 if count % 3 else 0)

    for limit in (1000, 1050, 1100, 1500, 4000, 20000):
        tried: list[int] = []

        def total(count: int, tried=tried) -> int:
            tried.append(count)
            return bent(count)

        found = context.longest(limit, total, {16: bent(16), 128: bent(128)})
        assert bent(found + 1) > limit and (found == 0 or bent(found) <= limit)
        assert len(tried) <= 8 and len(tried) == len(set(tried))


@pytest.fixture
def foretold(scripts, monkeypatch):
    """context.py over a compiler whose plans are known: 5 GiB, and 64 KiB a token more with small tiles."""
    import context

    compiled: list[list[str]] = []

    def dry_run(name, options):
        compiled.append([options.gradient_checkpointing, options.mlp_tiles, options.length])
        tile = -(-options.length // options.mlp_tiles)
        token = 64 * 1024 + (4096 if options.gradient_checkpointing == "offload_attention" else 0)
        total = 5 * GIB + token * options.length + tile * (1 << 18)
        return {"total": total, "temporary": total - GIB, "arguments": GIB, "host": options.length * 1000}

    monkeypatch.setattr(context.bench, "dry_run", dry_run)
    return context, compiled


def test_every_length_that_is_named_was_compiled_and_so_was_the_next(foretold, tmp_path, capsys):
    context, compiled = foretold
    argv = ["plan", "--model", "llama-3-8b", "--margin", "1", "--results", str(tmp_path / "c.json")]
    assert context.main([*argv, "--budget", "8", "24"]) == 0
    data = json.loads((tmp_path / "c.json").read_text())
    for budget in (8, 24):
        found = data["budgets"][str(budget)]
        # the candidate with the smallest tiles, 512 tokens, reaches farthest
        length = int(((budget - 5) * GIB - 512 * (1 << 18)) / (64 * 1024)) // 1024 * 1024
        assert (found["length"], found["policy"], found["tiles"]) == (length, "offload", length // 512)
        assert found["total"] <= budget * GIB < found["next_total"]
        tiles = length // 512
        assert ["offload", tiles, length] in compiled and ["offload", tiles + 2, length + 1024] in compiled
    assert len(compiled) <= 8 + 2 * 4
    count = len(compiled)
    assert context.main([*argv, "--budget", "8", "24"]) == 0 and len(compiled) == count  # nothing is compiled again
    assert run_command(context.main, ["plan", "--model", "qwen3-4b", "--results", str(tmp_path / "c.json")]) == 2
    assert "was made with model llama-3-8b" in capsys.readouterr().err


def test_a_measured_row_is_run_and_the_page_says_which_was(tiny_workload, foretold, tmp_path, capsys):
    context, _ = foretold
    found = {"policy": "offload", "tiles": 2, "length": 64, "total": 7 * GIB, "temporary": 1, "arguments": 1}
    found |= {"host": 6 * GIB, "next_total": 9 * GIB, "estimated_seconds": 0.1}
    about = {"model": "tiny", "device": "h200", "jax": "0", "margin": 0.95, "compiled": {}, "measured": {}}
    results = tmp_path / "c.json"
    results.write_text(json.dumps(about | {"budgets": {"8": found, "12": found | {"length": 128}, "1": None}}))
    page = tmp_path / "context.md"
    assert context.main(["table", "--results", str(results), "--output", str(page)]) == 0
    assert "No row was run on a card yet" in page.read_text()
    assert context.main(["measure", "--budget", "8", "--results", str(results)]) == 0
    record = json.loads(results.read_text())["measured"]["8"]
    assert record["length"] == 64 and len(record["loss"]) == 2  # one before the timed one
    assert all(loss == pytest.approx(math.log(CONFIGS["qwen3"]["vocab_size"]), rel=0.2) for loss in record["loss"])
    assert context.main(["table", "--results", str(results), "--output", str(page)]) == 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| 8 | `offload`, 2 | 64 | 7.00 | not known | 6.0 | ") and "~" not in rows[1]
    assert rows[2].startswith("| 12 | `offload`, 2 | 128 | 7.00 |  | 6.0 | ~") and "nothing fits" in rows[3]
    assert "Run on a card: 8 GiB (cpu)" in page.read_text()
    assert run_command(context.main, ["measure", "--budget", "40", "--results", str(results)]) == 2
    assert "no length for 40 GiB" in capsys.readouterr().err


def test_unsloths_line_gives_it_no_less_than_its_published_table(scripts):
    import context

    for budget, published in {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733}.items():
        assert 0 < context.unsloth_length(budget) - published < 2750
