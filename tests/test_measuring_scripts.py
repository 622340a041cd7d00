"""The scripts that measure on a card, at tiny sizes on a CPU: what they search, run, count and write is right."""

import argparse
import json
import math
import os
import re
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxft import bench, load_model, train
from jaxft.errors import InputError, RunError, run_command
from jaxft.memory import GIB
from tests.tiny_models import CONFIGS
from tests.tiny_runs import flags, make_tokenizer, sums, write_base, write_rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def tiny_workload(monkeypatch):
    monkeypatch.setitem(bench.CONFIGS, "tiny", CONFIGS["qwen3"] | {"num_hidden_layers": 1})
    monkeypatch.setitem(bench.WORKLOADS, "A7", bench.Workload("tiny", 1, 64, load_in_4bit=True))


def test_length_and_batch_take_the_place_of_the_workloads_own(tiny_workload, monkeypatch, capsys):
    options = bench.read_options(["A7", "--batch", "2", "--length", "32"])
    assert bench.workload_of("A7", options) == bench.Workload("tiny", 2, 32, load_in_4bit=True)
    assert bench.workload_of("A7", bench.read_options(["A7"])) == bench.WORKLOADS["A7"]
    made = []
    monkeypatch.setattr(bench, "plan", lambda *_, batch, **__: made.append(batch))
    bench.planned("A7", options)
    assert made[0]["tokens"].shape == (1, 2, 32)
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
        token = 64 * 1024 + (4096 if options.gradient_checkpointing == "offload_middle" else 0)
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


def test_a_row_is_shortened_to_what_fits_on_the_card_itself(scripts):
    import context

    class Compiled:
        data = {"model": "tiny"}  # noqa: RUF012
        asked: list[int] = []  # noqa: RUF012

        def compiled(self, model, device, candidate, length):
            assert (model, device, candidate) == ("tiny", None, ("offload", 512))
            self.asked.append(length // context.STEP)
            return {"length": length, "total": 5000 + 700 * (length // context.STEP)}

    found = {"policy": "offload", "tiles": 20, "length": 10 * context.STEP, "arguments": 4000}
    card = Compiled()
    assert context.step_on_card(card, found, None, 9000)["length"] == 5 * context.STEP
    assert {5, 6} <= set(card.asked)  # the one that fits and the next one, which does not
    assert context.step_on_card(card, found, None, 99000)["length"] == 10 * context.STEP  # the plan is not passed
    assert context.step_on_card(card, found, 3 * context.STEP, 1)["length"] == 3 * context.STEP
    with pytest.raises(RunError, match=r"no row of 1,024 tokens"):
        context.step_on_card(card, found, None, 5600)


def test_a_measured_row_is_run_and_the_page_says_which_was(tiny_workload, foretold, monkeypatch, tmp_path, capsys):
    context, _ = foretold
    monkeypatch.setattr(context, "STEP", 32)
    planned = bench.planned

    def slow(*args):
        found = planned(*args)

        def step(*arguments):
            time.sleep(0.3)  # sending a step of more kernels than a queue holds takes as long as the step
            return found.compiled(*arguments)

        return replace(found, compiled=step)

    monkeypatch.setattr(bench, "planned", slow)
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
    assert record["step_seconds"] >= 0.3  # the whole of it, and nothing of it beside the one before
    assert all(loss == pytest.approx(math.log(CONFIGS["qwen3"]["vocab_size"]), rel=0.2) for loss in record["loss"])
    assert context.main(["table", "--results", str(results), "--output", str(page)]) == 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| 8 | `offload`, 2 | 64 | 5.01 | not known | 0.0 | ") and "~" not in rows[1]
    assert rows[2].startswith("| 12 | `offload`, 2 | 128 | 7.00 |  | 6.0 | ~") and "nothing fits" in rows[3]
    assert "Run on a card: 8 GiB (cpu)" in page.read_text()
    times = f"{record['step_seconds'] / 0.1:.1f}"
    assert f"A step that was timed took {times} to {times} times its estimate." in " ".join(page.read_text().split())
    assert "Rows without a peak are planned" in page.read_text() and "shorter" not in page.read_text()
    assert context.main(["measure", "--budget", "12", "--length", "96", "--results", str(results)]) == 0
    assert context.main(["table", "--results", str(results), "--output", str(page)]) == 0
    said = " ".join(page.read_text().split())
    assert "`--length` made it 25% shorter than the 128 tokens planned, which would need 6.00 GiB of the host." in said
    assert "Rows without a peak" not in said and "shorter for it" not in said
    assert run_command(context.main, ["measure", "--budget", "40", "--results", str(results)]) == 2
    assert "no length for 40 GiB" in capsys.readouterr().err


def test_a_measured_step_has_no_more_of_the_card_than_the_budget(scripts, monkeypatch):
    import context

    monkeypatch.setattr(context.shutil, "which", lambda name: name)
    monkeypatch.setattr(context.subprocess, "check_output", lambda *_, **__: "143771\n143771\n")  # MiB of each card
    monkeypatch.setattr(context, "available_memory", lambda: 64 * GIB)
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"):
        monkeypatch.setenv(name, "")  # what the script sets is taken back after the test
    assert context.limit_memory(24, GIB + 1) == 9 * GIB
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) * 143771 == pytest.approx(24 * 1024)
    assert os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "9"
    with pytest.raises(InputError, match=r"--budget 160: the card has 140\.40 GiB"):
        context.limit_memory(160, 0)
    # XLA pins more than it is asked for: never all that the host has
    assert context.limit_memory(24, GIB << 20) == 58 * GIB


def test_the_card_is_asked_that_the_process_sees(scripts, monkeypatch):
    import context

    asked = []
    monkeypatch.setattr(context.subprocess, "check_output", lambda call, **_: asked.append(call[1]) or "1\n")
    for seen in (None, "", "3,1"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if seen is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        context.ask_card("memory.total")
    assert asked == ["--id=0", "--id=0", "--id=3"]


def test_a_row_for_which_the_host_is_too_small_is_not_run(scripts, monkeypatch, tmp_path, capsys):
    import context

    found = {"policy": "offload", "tiles": 2, "length": 1024, "total": 7 * GIB, "host": 6 * GIB}
    results = tmp_path / "c.json"
    data = {"model": "tiny", "margin": 1, "compiled": {}, "measured": {}}
    results.write_text(json.dumps(data | {"budgets": {"8": found | {"estimated_seconds": 1}}}))
    monkeypatch.setattr(context, "limit_memory", lambda *_: 5 * GIB)
    monkeypatch.setattr(context, "step_on_card", lambda *_: found)
    monkeypatch.setattr(context.bench, "measure", lambda *_: pytest.fail("run"))
    assert run_command(context.main, ["measure", "--budget", "8", "--results", str(results)]) == 2
    said = capsys.readouterr().err
    assert "--budget 8: 6.00 GiB of 1,024 tokens wait on the host, which has 5.00 GiB to pin" in said


def test_a_step_is_stopped_only_after_it_ran_so_long_without_a_break(scripts, monkeypatch):
    import context

    looks, left, kept = [False, True, False] + [True] * 20, [], []
    monkeypatch.setattr(context, "POLL", 0.05)
    monkeypatch.setattr(context, "runs", lambda total: total == 7 and bool(looks) and looks.pop(0))

    def leave(code):
        left.append(code)
        looks.clear()

    monkeypatch.setattr(context.os, "_exit", leave)
    with context.stopping(0.1, 7, kept.append):
        deadline = time.monotonic() + 30
        while not left and time.monotonic() < deadline:
            time.sleep(0.01)
    assert left == [0] and len(kept) == 1 and kept[0] >= 0.1
    with context.stopping(0.0, 8, kept.append):  # it never runs
        time.sleep(0.2)
    with context.stopping(None, 7, kept.append):
        pass
    assert len(left) == len(kept) == 1


def test_a_step_runs_where_its_memory_is_held_and_the_card_computes(scripts, monkeypatch):
    import context

    held, busy = {"bytes_in_use": 990}, ["100\n"]
    monkeypatch.setattr(context.jax, "devices", lambda: [SimpleNamespace(memory_stats=lambda: held)])
    monkeypatch.setattr(context.subprocess, "check_output", lambda *_, **__: busy[0])
    assert context.runs(1000)
    assert not context.runs(1001)  # its arguments alone
    for busy[0] in ("0\n", "[N/A]\n"):  # memory on the host is still being pinned; or nobody knows
        assert not context.runs(1000)


def test_the_page_says_which_rows_were_stopped_and_what_that_proves(tiny_workload, scripts, monkeypatch, tmp_path):
    import context

    monkeypatch.setattr(context, "STEP", 32)
    found = {"policy": "offload", "tiles": 2, "length": 64, "total": 7 * GIB, "host": 6 * GIB, "arguments": 1}
    data = {"model": "tiny", "device": "h200", "jax": "0", "margin": 0.95, "compiled": {}, "measured": {}}
    results, page = tmp_path / "c.json", tmp_path / "context.md"
    budgets = {str(budget): found | {"estimated_seconds": 1e3} for budget in (8, 12, 16)}
    results.write_text(json.dumps(data | {"budgets": budgets}))

    @contextmanager
    def stopping(after, total, keep):  # as if the end came first
        if after is not None:
            keep(after + 0.4)
            raise RunError("the process ended")
        yield

    monkeypatch.setattr(context, "stopping", stopping)
    measure = ["measure", "--results", str(results), "--budget"]
    assert context.main([*measure, "8"]) == 0
    with pytest.raises(RunError, match="the process ended"):
        context.main([*measure, "12", "--stop_after", "60"])
    record = json.loads(results.read_text())["measured"]["12"]
    assert record["length"] == 64 and record["stopped_after"] == 60.4 and not {"loss", "step_seconds"} & set(record)
    assert context.main(["table", "--results", str(results), "--output", str(page)]) == 0
    text = page.read_text()
    assert "**Run on a card: 8 GiB (cpu). Begun on a card and stopped: 12 GiB (cpu).**" in text
    assert "nobody saw its loss" in " ".join(text.split())
    eight, twelve, sixteen = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert "~" not in eight and "stopped" not in eight
    assert twelve.endswith("| ~0, stopped after 60 |") and "| not known |" in twelve  # a CPU says no peak
    assert sixteen.endswith("| 7.00 |  | 6.0 | ~1000 |")


def test_unsloths_line_gives_it_no_less_than_its_published_table(scripts):
    import context

    for budget, published in {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733}.items():
        assert 0 < context.unsloth_length(budget) - published < 2750


# scripts/random_model.py


def test_a_random_model_is_written_once_and_is_never_another_one(tiny_workload, scripts, tmp_path, capsys):
    from random_model import write_random_model

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "model"
    bench.CONFIGS["tiny"]["vocab_size"] = 320  # a dict of this test's own
    write_random_model("tiny", tmp_path / "tokenizer", out)
    model, params = load_model(out)
    assert model.config.vocab_size == 320 and params["embed_tokens"]["weight"].shape[0] == 320
    assert float(np.std(np.asarray(params["embed_tokens"]["weight"]))) == pytest.approx(0.02, rel=0.05)
    written = (out / "model.safetensors").stat().st_mtime_ns
    write_random_model("tiny", tmp_path / "tokenizer", out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written and "there already" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds another model than qwen3-4b"):
        write_random_model("qwen3-4b", tmp_path / "tokenizer", out)
    bench.CONFIGS["tiny"]["vocab_size"] = 128
    with pytest.raises(InputError, match="has 260 tokens, tiny 128"):
        write_random_model("tiny", tmp_path / "tokenizer", tmp_path / "other")


# scripts/first_step.py


def test_a_run_says_the_lines_by_which_the_way_to_its_first_step_is_timed(scripts, tmp_path, capsys):
    import first_step

    base, data = write_base(tmp_path / "base", num_hidden_layers=1), write_rows(tmp_path / "rows.jsonl", sums(8))
    argv = flags(model_name_or_path=base, dataset=data, output_dir=tmp_path / "out", max_steps=2, max_length=64)
    assert train.main([*argv, *flags(save_steps=0, gradient_checkpointing="none")]) == 0
    said = capsys.readouterr().err.splitlines(keepends=True)
    # as one_run has them: each line with the time when it came; here the n-th comes after n seconds
    program = ["Finished tracing + transforming train_step for pjit in 0.5 sec\n"]
    program += ["Finished jaxpr to MLIR module conversion jit(train_step) in 0.25 sec\n"]
    program += [
        f"Finished XLA compilation of jit({name}) in {size} sec\n" for name, size in (("zeros", 1), ("train_step", 2))
    ]
    first = next(number for number, line in enumerate(said) if line.startswith("step 1"))
    weights = next(number for number, line in enumerate(said) if line.startswith("weights: read in"))
    said[weights : weights + 1] = [*program, re.sub(r"[\d.]+ s", "0.25 s", said[weights])]  # too few to take any time
    found = first_step.parts_of("cold", [(float(number), line) for number, line in enumerate(said)])
    assert found["total"] == first + len(program) == sum(found[part] for part in first_step.ENDS)
    assert found["step compiled, weights"] >= len(program) + 1
    assert found["total"] - found["without reading"] == found["reading weights"] == 0.25
    assert [found[part] for part in first_step.PROGRAM] == [0.5, 0.25, 2.0]
    assert (found["programs compiled"], found["all of them"]) == (2, 3.0)
    assert found[first_step.BESIDE] == 0
    early = first_step.parts_of("cold", [(float(number), line) for number, line in enumerate([*program, *said])])
    assert early[first_step.BESIDE] == 0.5 + 0.25 + 2.0
    assert 0 < first_step.step_seconds(tmp_path / "out") < 60
    with pytest.raises(RunError, match="did not say 'weights: read in"):
        first_step.parts_of("cold", [(0.0, line) for line in said if not line.startswith("weights")])


@pytest.mark.long
def test_the_second_run_takes_its_programs_from_the_first_ones_cache(scripts, tmp_path, capsys):
    import first_step

    base, data = write_base(tmp_path / "base", num_hidden_layers=1), write_rows(tmp_path / "rows.jsonl", sums(8))
    argv = [str(base), str(data), "--json", str(tmp_path / "found.json"), "--place", str(tmp_path / "place")]
    assert first_step.main([*argv, "--max_length=64"]) == 0
    cold, warm = json.loads((tmp_path / "found.json").read_text())
    assert warm["step compiled, weights"] < cold["step compiled, weights"]
    cached = "compiling, or taking from the cache"
    assert 0 < warm[cached] < cold[cached] / 2 and cold["tracing"] > 0 and cold["lowering"] > 0
    assert "| without reading |" in capsys.readouterr().out
    assert run_command(first_step.main, [str(base), str(tmp_path / "none.jsonl")]) == 1
    assert "the cold run ended with 2: error:" in capsys.readouterr().err


# scripts/padded_vs_packed.py


@pytest.fixture
def padded(scripts, tmp_path):
    import padded_vs_packed

    base, data = write_base(tmp_path / "base", num_hidden_layers=1), write_rows(tmp_path / "rows.jsonl", sums(12))
    options = argparse.Namespace(
        model_dir=base, dataset=str(data), batch_size=2, max_length=256, steps=2, way=["packed"], json=None
    )
    return padded_vs_packed, options


def test_packed_and_padded_rows_hold_the_same_text_and_only_it_is_counted(padded):
    module, options = padded
    samples = module.samples_of(options)
    for packing in (True, False):
        batches = module.batches_of(options, samples, packing)
        real = [batch["tokens"][batch["segment_ids"] > 0] for batch in batches]
        assert sum(map(len, real)) == samples.lengths.sum()
        assert batches.max_length == (256 if packing else 64) and samples.lengths.max() <= 64
        found = module.timed(options, batches, lambda batch: 0.0)
        timed = [batches.batch(number)["segment_ids"] for number in (0, 1)]
        assert found["filled"] == np.mean([np.mean(one > 0) for one in timed]) and len(found["loss"]) == 4
    ids, mask, labels = module.unpadded(batches.batch(0))
    assert ids.shape == mask.shape == labels.shape and mask.sum(axis=1).max() == ids.shape[1]
    assert ((labels == ids) | (labels == -100)).all() and (labels[mask == 0] == -100).all() and (labels != -100).any()


@pytest.mark.parametrize(
    "ways, rows",
    [
        (("padded", "hf"), ("| padded | 2 × 64 | ", "| hf | 2 × ≤ 64 |  | ")),
        (("packed", "hf_packed"), ("| packed | 2 × 256 | ", "| hf_packed | 2 × 256 | ")),
    ],
)
def test_rows_have_the_loss_of_transformers_and_peft(padded, ways, rows):
    pytest.importorskip("peft", reason="transformers' way needs torch and PEFT")
    module, options = padded
    one, two = (module.measure(way, options) for way in ways)
    # the same documents, and an adapter that is zero at first
    assert one["loss"][0] == pytest.approx(two["loss"][0], rel=1e-4)
    for line, start in zip(module.table([one, two]).splitlines()[2:], rows, strict=True):
        assert line.startswith(start)
