"""The time that a dry run foretells: from the plan's own work, at a rate that is measured, or assumed and said."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import estimate as module
from jaxft.config import parse, to_yaml
from jaxft.estimate import ASSUMED, Estimate, Rate, estimate, measured_rate, scaled, spoken, step_work
from jaxft.packing import Batches
from jaxft.samples import weighted
from jaxft.train import main as train
from tests.tiny_models import tiny_model
from tests.tiny_runs import flags, sums, write_base, write_rows


def batches(lengths, max_length=16, batch_size=1):
    samples = [weighted(np.arange(1, n + 1, dtype=np.int32), np.ones(n, bool)) for n in lengths]
    return Batches(samples, [[at] for at in range(len(samples))], max_length=max_length, batch_size=batch_size)


@pytest.mark.parametrize(
    ("policy", "full", "layer_passes", "head_passes", "attention_passes"),
    [
        ("none", False, 2, 2, 3),
        ("products", False, 2, 2, 3),
        ("attention", False, 3, 2, 3),
        ("full", False, 3, 2, 4),
        ("offload", True, 4, 3, 4),
    ],
)
def test_the_work_of_a_step_is_what_the_policy_computes(policy, full, layer_passes, head_passes, attention_passes):
    model, _ = tiny_model("mistral")  # 3 layers of D 32, F 48, 4 heads on 2 of size 12, a window of 5 keys
    batch = batches([7], max_length=16).batch(0)
    layer = 32 * 4 * 12 + 2 * 32 * 2 * 12 + 4 * 12 * 32 + 3 * 32 * 48
    pairs = (1 + 2 + 3 + 4 + 5 + 5 + 5) + 9  # and 9 tokens of padding that see themselves
    expected = 2 * 16 * (layer_passes * 3 * layer + head_passes * 96 * 32) + attention_passes * 4 * 4 * 12 * 3 * pairs
    assert step_work(model, batch, policy, full) == expected
    again = step_work(model, batch, policy, full, kept_layers=2) - step_work(model, batch, "products", full)
    assert again == pytest.approx((expected - step_work(model, batch, "products", full)) / 3)  # one layer of three


def test_the_estimate_is_work_over_rate_for_every_step_and_device(monkeypatch):
    model, _ = tiny_model("qwen3")
    monkeypatch.setattr(module, "measured_rate", lambda *_, **__: Rate(1e6, "measured by a test"))
    made = batches([3, 9, 12, 16, 5])
    found = estimate(
        model, made, steps=40, device=jax.devices()[0], devices=2, gradient_checkpointing="full",
        full_finetuning=False, dtype=jnp.float32, rank=4,
    )  # fmt: skip
    assert isinstance(found, Estimate)
    some = [made.batch(at) for at in (0, 1, 2, 3)]
    assert found.work == pytest.approx(np.mean([step_work(model, batch, "full", False) for batch in some]))
    assert found.seconds == pytest.approx(40 * found.work / 2e6)
    said = " ".join(found.lines())
    assert "an estimate" in said and "measured by a test" in said and "on each of 2 devices" in said
    assert "evaluations and checkpoints are not in it" in said


@pytest.mark.parametrize("full", [False, True])
def test_the_rate_is_the_work_of_a_block_over_the_time_that_it_took(full, monkeypatch):
    model, _ = tiny_model("qwen3")
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 21.0])  # 5, 2 and 1 s: the median is 2
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = measured_rate(
        model, tokens=64, dtype=jnp.float32, device=jax.devices()[0], full_finetuning=full, rank=None if full else 4
    )
    assert found.flops == 2 * 3 * 32 * 48 * 64 * (3 if full else 2) / 2
    assert "64 tokens, 32 to 48, float32" in found.source and "cpu" in found.source


def test_of_a_card_that_is_not_here_a_share_of_its_peak_is_assumed_and_said(monkeypatch):
    model, _ = tiny_model("qwen3")
    card = SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")
    kwargs = dict(steps=1, device=card, devices=1, gradient_checkpointing="full", full_finetuning=False, rank=4)
    found = estimate(model, batches([4]), dtype=jnp.bfloat16, **kwargs)
    assert isinstance(found, Estimate)
    assert found.rate.flops == pytest.approx(ASSUMED * 989e12)
    assert "assumed: 40% of the 989 TFLOP/s in the data sheet of NVIDIA H200" in found.rate.source
    assert estimate(model, batches([4]), dtype=jnp.float32, **kwargs) == (
        "time: not estimated, as no peak of NVIDIA H200 in float32 is known"
    )


def test_times_and_numbers_are_spoken():
    seconds = (0.25, 8.0, 42, 89, 300, 4000, 7200, 36000, 200_000)
    assert [spoken(s) for s in seconds] == [
        "0.25 s", "8 s", "42 s", "89 s", "5 min", "67 min", "2 h", "10 h", "2.3 days",
    ]  # fmt: skip
    assert [scaled(n) for n in (12, 3.25e12, 6.1e9)] == ["12 ", "3.25 T", "6.1 G"]


def test_a_dry_run_says_how_long_the_run_would_take(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", sums(12))
    argv = flags(model_name_or_path=base, dataset=rows, max_length=64, num_train_epochs=2, lora_r=4, eval_split=2,
                 per_device_train_batch_size=2, dataset_cache="none")  # fmt: skip
    assert train(["--dry_run", *argv]) == 0
    captured = capsys.readouterr()
    assert re.search(r"^time: about \S+ \w+ for \d+ steps, \S+ s each, [\d,]+ tokens a second: an estimate$",
                     captured.out, re.MULTILINE), captured.out  # fmt: skip
    assert "measured now on one MLP of the model (128 tokens, 32 to 48, float32" in captured.out
    assert "held out: 2 of 12 rows, drawn by seed 0" in captured.err
    assert "train: format: question/answer (10 rows)" in captured.err
    assert re.search(r"^train: lengths: \d+ to \d+ tokens, half of them up to \d+; \d+\.\d% of the tokens are trained$",
                     captured.err, re.MULTILINE)  # fmt: skip


def test_a_run_records_its_split_and_a_config_repeats_it(tmp_path):
    settings, _ = parse("train", ["--eval_split", "0.05", "--template", "{q}", "--response_template", "{a}"])
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    again, _ = parse("train", ["--config", str(tmp_path / "config.yaml")])
    assert again == settings and again.eval_split == 0.05 and again.columns == settings.columns
