"""`jaxft.train` and `jaxft.evaluate` from their flags to the files they leave, on a tiny model, in this process."""

import contextlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft import evaluate, train
from jaxft.data import load_rows, tokenize_dataset
from jaxft.errors import InputError
from jaxft.metrics import MetricsFile
from jaxft.packing import Sample
from tests.tiny_runs import (
    V,
    flags,
    lines_of,
    losses_of,
    make_tokenizer,
    same_tensors,
    sums,
    write_base,
    write_rows,
)

ROOT = Path(__file__).parent.parent
# a constant rate: then neither it nor the number of steps is part of the compiled program, and runs share one
RUN = flags(max_length=64, per_device_train_batch_size=4, learning_rate=0.01, lr_scheduler_type="constant")
RUN += flags(weight_decay=0.1, save_steps=0, gradient_checkpointing="none")
LORA = flags(lora_r=4, lora_alpha=8)
STEP_KEYS = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "target_tokens", "tokens_per_second", "step_seconds",
    "peak_memory_bytes", "mfu",
}  # fmt: skip
EVAL_KEYS = {"step", "epoch", "eval_loss", "eval_perplexity", "eval_target_tokens"}
ALWAYS = {"README.md", "config.yaml", "metrics.jsonl", "checkpoints", "tokenizer.json", "tokenizer_config.json"}
ALWAYS |= {"chat_template.jinja", "report.html"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with base/, train.jsonl (30 rows) and held.jsonl (8 rows)."""
    directory = tmp_path_factory.mktemp("commands")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(30))
    write_rows(directory / "held.jsonl", sums(8, 30))
    return directory


@pytest.fixture(scope="module")
def start(place):
    """Runs jaxft.train on the model and the rows of `place`; returns the output directory."""

    def run(name, *argv, base="base", dataset="train.jsonl", **settings):
        out = place / name
        model = flags(model_name_or_path=place / base, dataset=place / dataset, output_dir=out)
        lora = [] if "--full_finetuning" in argv else LORA
        assert train.main([*model, *RUN, *lora, *argv, *flags(**settings)]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def first(place, start):
    """The usual run: 4 epochs of LoRA with evaluations, a warm-up and a cosine; its stdout must be empty."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        out = start(
            "first", eval_dataset=place / "held.jsonl", num_train_epochs=4, eval_steps=3, lr_scheduler_type="cosine",
            warmup_steps=2,
        )  # fmt: skip
    assert stdout.getvalue() == ""
    return out


def held_out_samples(place) -> list[Sample]:
    rows = load_rows(str(place / "held.jsonl"))
    return tokenize_dataset(rows, make_tokenizer(), max_length=64, vocab_size=V)[0]


def torch_loss(model, samples: list[Sample]) -> float:
    """The token-weighted loss of a transformers or PEFT model, one document at a time."""
    import torch

    total, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor(sample.input_ids.astype(np.int64))[None]
        labels = torch.where(torch.tensor(sample.loss_weights)[None] != 0, ids, -100)
        targets = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * targets
        count += targets
    return total / count


# What a run leaves


def test_output_directory_holds_exactly_what_the_design_names(first):
    assert {entry.name for entry in first.iterdir()} == ALWAYS | {"adapter_model.safetensors", "adapter_config.json"}
    steps = lines_of(first)[-1]["step"]
    assert [entry.name for entry in (first / "checkpoints").iterdir()] == [str(steps)]
    card = (first / "README.md").read_text(encoding="utf-8")
    assert f"| steps | {steps} |" in card and f"| eval_loss | {lines_of(first)[-1]['eval_loss']} |" in card


def test_peft_loads_the_adapter_and_finds_the_loss_that_the_run_reported(first, place):
    pytest.importorskip("peft", reason="the reference needs torch and peft")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    evaluations = [line["eval_loss"] for line in lines_of(first) if "eval_loss" in line]
    assert torch_loss(base, held_out_samples(place)) == pytest.approx(evaluations[0], rel=1e-5)
    tuned = PeftModel.from_pretrained(base, first).eval()
    assert torch_loss(tuned, held_out_samples(place)) == pytest.approx(evaluations[-1], rel=1e-5)
    assert tuned.peft_config["default"].r == 4 and tuned.peft_config["default"].base_model_name_or_path == str(
        place / "base"
    )
    assert evaluations[-1] < evaluations[0] - 0.5


def test_full_finetuning_leaves_a_model_directory_that_transformers_loads(place, start):
    out = start("full", "--full_finetuning", eval_dataset=place / "held.jsonl", max_steps=4)
    assert {entry.name for entry in out.iterdir()} == ALWAYS | {"config.json", "model.safetensors"}
    evaluations = [line["eval_loss"] for line in lines_of(out) if "eval_loss" in line]
    assert evaluations[1] < evaluations[0] - 0.5
    pytest.importorskip("torch", reason="the reference needs torch")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch_loss(tuned, held_out_samples(place)) == pytest.approx(evaluations[1], rel=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer().chat_template


def test_metrics_have_their_keys_and_count_steps_from_one(first):
    lines = lines_of(first)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert all(line.keys() == STEP_KEYS for line in steps) and all(line.keys() == EVAL_KEYS for line in evaluations)
    assert len(steps) + len(evaluations) == len(lines)
    total = len(steps)
    assert [line["step"] for line in steps] == list(range(1, total + 1))
    assert [line["step"] for line in evaluations] == sorted({*range(0, total, 3), total})
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert [line["epoch"] for line in steps] == [step / (total / 4) for step in range(1, total + 1)]
    assert all(line["peak_memory_bytes"] is None for line in steps)  # a CPU does not tell
    assert sum(line["target_tokens"] for line in steps) == 4 * sum(len(row["answer"]) + 1 for row in sums(30))


def test_learning_rate_is_the_one_that_transformers_uses_in_that_step(first):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import get_scheduler

    rates = [line["learning_rate"] for line in lines_of(first) if "loss" in line]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=len(rates))
    expected = []
    for _ in rates:
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert rates[0] == 0 and rates[2] == pytest.approx(0.01)


def test_metrics_read_back_exactly_and_what_is_not_finite_is_null(tmp_path):
    odd = {"step": 1, "a": 0.1 + 0.2, "b": float(np.float32(1 / 3)), "c": 5e-324, "d": -0.0, "e": 1e308, "f": None}
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(odd | {"nan": math.nan, "inf": -math.inf})
    (read,) = file.lines()
    assert read == odd | {"nan": None, "inf": None} and math.copysign(1, read["d"]) == -1


def test_logged_loss_is_the_token_weighted_mean_since_the_last_line(start):
    every = [line for line in lines_of(start("every", max_steps=5)) if "loss" in line]
    pairs = [line for line in lines_of(start("pairs", max_steps=5, logging_steps=2)) if "loss" in line]
    assert [line["step"] for line in pairs] == [2, 4, 5]
    for line, window in zip(pairs, (every[0:2], every[2:4], every[4:5]), strict=True):
        tokens = [one["target_tokens"] for one in window]
        assert line["target_tokens"] == sum(tokens) and len(set(tokens)) == len(tokens)
        mean = sum(one["loss"] * n for one, n in zip(window, tokens, strict=True)) / sum(tokens)
        assert line["loss"] == pytest.approx(mean, rel=1e-12)
        assert line["grad_norm"] == window[-1]["grad_norm"]


# Settings


def test_the_written_config_repeats_the_run_bit_for_bit(first, place):
    again = place / "again"
    assert train.main(["--config", str(first / "config.yaml"), "--output_dir", str(again)]) == 0
    assert losses_of(again) == losses_of(first)
    assert same_tensors(again / "adapter_model.safetensors", first / "adapter_model.safetensors")
    assert {entry.name for entry in again.iterdir()} == {entry.name for entry in first.iterdir()}


def test_flags_win_over_the_config_and_both_are_named_at_the_start(first, place, capsys):
    out = place / "flags"
    given = flags(output_dir=out, max_steps=1, lora_alpha=2, lr_scheduler_type="constant", eval_steps=0)
    assert train.main(["--config", str(first / "config.yaml"), *given]) == 0
    printed, said = capsys.readouterr()
    assert printed == ""
    assert "lora_alpha = 2 (flag)" in said and f"lora_r = 4 ({first / 'config.yaml'})" in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 2)


def test_one_batch_of_the_whole_epoch_has_the_same_loss_packed_and_padded(start):
    (packed,) = (line for line in lines_of(start("packed", per_device_train_batch_size=32, max_steps=1)))
    (padded,) = (
        line for line in lines_of(start("padded", "--packing=false", per_device_train_batch_size=32, max_steps=1))
    )
    assert packed["target_tokens"] == padded["target_tokens"]
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


def test_every_factorisation_of_batch_and_accumulation_has_the_same_losses(start):
    whole = losses_of(start("b4a1", max_steps=5))
    for rows, accumulation in ((2, 2), (1, 4)):
        out = start(
            f"b{rows}a{accumulation}", max_steps=5, per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        assert losses_of(out) == pytest.approx(whole, rel=1e-5)


def test_steps_beyond_an_epoch_take_the_data_again(start):
    lines = lines_of(start("wrap", max_steps=11))
    per_epoch = round(lines[0]["step"] / lines[0]["epoch"])
    assert per_epoch == 5 and [line["epoch"] for line in lines] == [step / 5 for step in range(1, 12)]
    tokens = sum(len(row["answer"]) + 1 for row in sums(30))
    assert [sum(line["target_tokens"] for line in lines[at : at + 5]) for at in (0, 5)] == [tokens, tokens]


def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_steps_as_transformers_does(start):
    per_epoch = lines_of(start("whole", num_train_epochs=1))[-1]["step"]
    out = start("fraction", num_train_epochs=1.1)
    assert lines_of(out)[-1]["step"] == math.ceil(1.1 * per_epoch) == per_epoch + 1


DTYPES = ("--dtype=bfloat16", "--fp16", "--dtype=bfloat16 --full_finetuning")
MORE_DTYPES = ("--dtype=float16", "--bf16", "--bf16=false", "--dtype=float32 --bf16")
MORE_DTYPES += ("--dtype=float32 --fp16 --full_finetuning",)


@pytest.mark.parametrize("words", [*DTYPES, *(pytest.param(words, marks=pytest.mark.long) for words in MORE_DTYPES)])
def test_every_dtype_trains_on_a_cpu(words, start):
    out = start(f"dtype {words}", *words.split(), max_steps=10, per_device_train_batch_size=32)
    losses = losses_of(out)
    # float16 leaves the first steps out until its loss scale fits: the loss then stays what it was
    assert all(later < earlier or "16" in words for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 0.2


def test_without_output_dir_each_run_gets_a_new_directory_named_after_the_model(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", max_steps=1)
    assert train.main([*RUN, *model]) == 0 and train.main([*RUN, *model]) == 0
    assert sorted(str(path) for path in Path("runs").iterdir()) == ["runs/base-1", "runs/base-2"]
    assert losses_of(Path("runs/base-1")) == losses_of(Path("runs/base-2"))


HELP = """
import sys
from jax._src import xla_bridge
from jaxft.train import main
try:
    main(["--help"])
finally:
    print("devices", xla_bridge.backends_are_initialized(), file=sys.stderr)
"""


def test_help_names_every_group_and_touches_no_device():
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "devices False"
    assert all(
        f"--{name}" in done.stdout for name in ("model_name_or_path", "lora_r", "dataset", "max_steps", "config")
    )


# Adapters


def test_an_adapter_is_continued_from_where_it_was_left(first, place, start):
    out = start("continued", adapter=first, dataset="held.jsonl", per_device_train_batch_size=8, max_steps=2)
    last = [line["eval_loss"] for line in lines_of(first) if "eval_loss" in line][-1]
    assert losses_of(out)[0] == pytest.approx(last, rel=1e-6)
    assert losses_of(out)[1] < last
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_a_flag_that_contradicts_the_adapter_is_refused(first, place, start):
    with pytest.raises(InputError, match=r"--lora_r 16 contradicts --adapter .*first, whose r is 4"):
        start("contradiction", adapter=first, lora_r=16)
    with pytest.raises(InputError, match="--adapter and --full_finetuning contradict each other"):
        start("contradiction", "--full_finetuning", adapter=first)
    assert not (place / "contradiction").exists()


# Evaluation


def evaluated(capsys, *argv) -> dict:
    """What jaxft.evaluate printed: one line of JSON, alone on stdout."""
    assert evaluate.main([*flags(max_length=64), *argv]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_evaluate_prints_the_loss_that_transformers_computes(place, capsys):
    found = evaluated(capsys, *flags(model_name_or_path=place / "base", dataset=place / "held.jsonl"))
    assert found.keys() == {"loss", "perplexity", "target_tokens"}
    assert found["perplexity"] == math.exp(found["loss"])
    assert found["target_tokens"] == sum(len(row["answer"]) + 1 for row in sums(8, 30))
    pytest.importorskip("torch", reason="the reference needs torch")
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    assert found["loss"] == pytest.approx(torch_loss(reference, held_out_samples(place)), rel=1e-5)


def test_evaluate_with_the_adapter_finds_the_loss_of_the_runs_last_evaluation(first, place, capsys):
    named = flags(model_name_or_path=place / "base", dataset=place / "held.jsonl", adapter=first)
    assert evaluated(capsys, *named)["loss"] == lines_of(first)[-1]["eval_loss"]


def test_evaluation_on_a_directory_reads_its_test_files_and_says_so(place, start, tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", sums(30))
    write_rows(tmp_path / "test.jsonl", sums(8, 30))
    model = flags(model_name_or_path=place / "base")
    whole = evaluated(capsys, *model, *flags(dataset=place / "held.jsonl"))
    assert evaluate.main([*flags(max_length=64, dataset=tmp_path), *model]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == whole and f"read {tmp_path / 'test.jsonl'}" in captured.err
    train_loss = evaluated(capsys, *model, *flags(dataset=tmp_path, dataset_test_split="train"))
    assert train_loss["target_tokens"] == sum(len(row["answer"]) + 1 for row in sums(30))
    out = start("split", eval_dataset=tmp_path, max_steps=1)
    assert lines_of(out)[0]["eval_loss"] == whole["loss"]
    assert f"held out: read {tmp_path / 'test.jsonl'}" in capsys.readouterr().err


def test_evaluation_on_a_directory_without_test_files_never_takes_the_training_files(place, tmp_path, capsys):
    model = flags(model_name_or_path=place / "base")
    write_rows(tmp_path / "a.jsonl", sums(4, 30))
    write_rows(tmp_path / "b.jsonl", sums(4, 34))
    both = evaluated(capsys, *model, *flags(dataset=tmp_path))
    assert both["target_tokens"] == sum(len(row["answer"]) + 1 for row in sums(8, 30))
    write_rows(tmp_path / "train.jsonl", sums(4))
    with pytest.raises(InputError, match=r"no file of split 'test' among a\.jsonl, b\.jsonl, train\.jsonl"):
        evaluate.main([*flags(max_length=64, dataset=tmp_path), *model])
