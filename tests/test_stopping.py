"""Best evaluation, early stopping, time, metrics on answers: the rules, what is refused, what is scored."""

import json
import math
import sys

import numpy as np
import pytest

from jaxft import evaluate, loop, train, view
from jaxft.config import parse
from jaxft.errors import InputError, RunError
from jaxft.samples import Sample
from jaxft.stopping import Course, Rules
from jaxft.tasks import METRICS, Task, asked, final_number, find_metric, gsm8k
from jaxft.typed import parse_seconds
from tests.tiny_runs import flags, lines_of, losses_of, same_tensors, sums, write_base, write_rows

RUN = flags(max_length=64, per_device_train_batch_size=8, learning_rate=0.01, gradient_checkpointing="none", lora_r=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stopping")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(40))
    write_rows(directory / "held.jsonl", sums(8, 40))
    return directory


def run(place, name, *argv, **settings):
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=place / name)
    assert train.main([*RUN, *named, *argv, *flags(**settings)]) == 0
    return place / name


def course(values, *, greater=False, patience=2, threshold=0.0, seconds=None) -> tuple[Course, list[bool]]:
    found = Course(Rules("eval_loss", greater, True, patience, threshold, seconds))
    return found, [found.note({"step": step, "eval_loss": value}) for step, value in enumerate(values)]


# The rules


def test_the_best_is_the_smallest_loss_and_the_untrained_model_is_none_of_them():
    found, best = course([0.1, 3.0, 2.0, 2.0, 2.5])
    assert best == [False, True, True, False, False]
    assert (found.best_step, found.best_value, found.waited) == (2, 2.0, 2)
    assert found.over() == "2 evaluations in a row without a better eval_loss, 2 at step 2"
    assert course([0.0, 1.0, 3.0], greater=True)[1] == [False, True, True]


def test_patience_counts_what_is_not_better_by_the_threshold_as_transformers_does():
    transformers = pytest.importorskip("transformers.trainer_callback", reason="the reference is transformers' own")
    values = np.random.default_rng(0).normal(size=60).cumsum().tolist()
    for patience, threshold, greater in ((2, 0.0, False), (3, 0.5, False), (2, 0.2, True)):
        callback = transformers.EarlyStoppingCallback(patience, threshold)
        state = transformers.TrainerState(best_metric=None)
        arguments = type("Arguments", (), {"greater_is_better": greater})()
        found, _ = course([0.0], greater=greater, patience=patience, threshold=threshold)
        for step, value in enumerate(values, 1):
            callback.check_metric_value(arguments, state, None, value)
            if state.best_metric is None or (value > state.best_metric) == greater:
                state.best_metric = value
            found.note({"step": step, "eval_loss": value})
            assert (found.waited, found.best_value) == (callback.early_stopping_patience_counter, state.best_metric)
            assert (found.over() is not None) == (found.waited >= patience)


@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
def test_a_value_that_is_not_finite_is_never_better(bad):
    found, best = course([0.0, 2.0, bad])
    assert best == [False, True, False] and found.best_step == 1 and found.waited == 1


@pytest.mark.parametrize("saved_after", range(6))
def test_a_course_is_the_same_from_a_checkpoint_at_any_step_and_the_lines_after_it(saved_after):
    values = [9.0, 3.0, 2.0, 2.5, 1.9, 2.0]
    lines = [{"step": step, "eval_loss": value} for step, value in enumerate(values)]
    whole, _ = course(values, threshold=0.2)
    part, _ = course(values[: saved_after + 1], threshold=0.2)
    state = json.loads(json.dumps(part.state(7.0)))
    restored = Course.restored(whole.rules, state, lines)
    assert restored == whole and restored.spent == 7.0
    assert Course.restored(whole.rules, None, lines) == whole  # a checkpoint of before there were any


def test_another_metric_begins_anew_and_only_the_time_goes_on():
    found, _ = course([9.0, 3.0])
    other = Rules("eval_gsm8k", True, True, 1, 0.0, 10.0)
    restored = Course.restored(other, found.state(4.0), [])
    assert (restored.best_step, restored.counted) == (None, 1)
    assert not restored.too_long(5.9) and restored.too_long(6.0)
    with pytest.raises(InputError, match="--metric_for_best_model eval_gsm8k: an evaluation here has eval_loss"):
        restored.note({"step": 2, "eval_loss": 1.0})


def test_times_are_seconds_or_are_written_with_their_units():
    expected = {"90": 90, "1.5": 1.5, "45s": 45, "90m": 5400, "1h30m": 5400, "2h": 7200, "1d1h1m1s": 90061}
    assert {text: parse_seconds(text) for text in expected} == expected
    for text in ("", "0", "h", "1h30", "1 h", "30m1h", "-5", "soon"):
        with pytest.raises(InputError, match=r"--max_time .*: expected seconds, or a time such as 90m or 1h30m"):
            parse_seconds(text)


REFUSED = {
    "--eval_strategy=steps": "--eval_strategy steps needs --eval_steps N",
    "--eval_strategy=epoch --eval_steps=3": "--eval_steps and --eval_strategy epoch contradict each other",
    "--eval_strategy=epoch --streaming --max_steps=3": "--streaming does not know how long an epoch is",
    "--load_best_model_at_end": "--load_best_model_at_end needs evaluations during the run",
    "--early_stopping_patience=2": "--early_stopping_patience needs evaluations during the run",
    "--early_stopping_patience=0": "must be at least 1",
    "--metric_for_best_model=loss": "has no meaning without --load_best_model_at_end or --early_stopping_patience",
    "--early_stopping_threshold=0.1": "has no meaning without --early_stopping_patience",
    "--eval_metric_samples=3": "has no meaning without --eval_metric",
    "--eval_metric=gsm8k --train_on=all": "--train_on all does not tell apart",
    "--report_to=mlflow": "--report_to is 'mlflow'; expected tensorboard, wandb, both, or none alone",
    "--report_to tensorboard none": "--report_to is 'none'",
    "--max_time=soon": "--max_time 'soon': expected seconds",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_make_no_sense_together_are_refused(words):
    with pytest.raises(InputError, match=REFUSED[words]):
        parse("train", words.split())


def test_eval_steps_alone_evaluates_every_so_many_steps(tmp_path):
    assert parse("train", ["--eval_steps=3"])[0].eval_strategy == "steps"
    assert train.read_settings(["--eval_steps=3"])[0].eval_strategy == "steps"  # with the embedded settings too
    assert parse("train", [])[0].eval_strategy == "no"
    (tmp_path / "no.yaml").write_text("eval_strategy: no\nreport_to: [tensorboard, wandb]\n")
    settings, _ = parse("train", ["--config", str(tmp_path / "no.yaml")])
    assert settings.eval_strategy == "no" and settings.reporters == ("tensorboard", "wandb")
    assert parse("train", ["--report_to", "tensorboard", "wandb"])[0].reporters == ("tensorboard", "wandb")


# Answers


def test_the_final_number_is_the_one_behind_the_mark_or_the_last():
    expected = {
        "so 3 + 4 = 7\n#### 1,200.50": "1200.5", "#### -7 apples, of 9": "-7", "It is 3, then 12.": "12", "none": None,
        "#### none": None, "7.00": "7", "a 5 #### 1 #### 2": "2", "$1,000": "1000",
    }  # fmt: skip
    assert {text: final_number(text) for text in expected} == expected


def test_gsm8k_is_the_share_of_right_final_numbers():
    references = ["2 + 2 = 4\n#### 4", "#### 10", "#### 3", "no number"]
    assert gsm8k(["4", "it is 10.0", "#### 4", "no number"], references) == 0.5


def test_own_metrics_are_imported_and_what_is_none_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def length(answers, references):\n    return {'long': len(answers[0])}\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_metric("mine:length")(["abc"], ["d"]) == {"long": 3}
    for name, words in (
        ("rouge", "expected gsm8k or MODULE:FUNCTION"),
        ("absent:f", "No module named 'absent'; is the module in the working directory or installed"),
        ("mine:absent", "has no attribute 'absent'"),
        ("mine:x", "is a int; a function"),
    ):
        with pytest.raises(InputError, match=words):
            find_metric(name)
    sys.modules.pop("mine")


def test_a_metric_that_fails_or_says_no_number_is_a_run_error():
    for metric, words in ((lambda a, r: a[5], "IndexError"), (lambda a, r: "good", "could not convert string")):
        task = Task([[1]], ["x"], 0, 1, "mine", metric, 8, 8)
        with pytest.raises(RunError, match=rf"--eval_metric mine failed on 1 answers: .*{words}"):
            task.score(["y"])


def test_a_sample_is_asked_up_to_its_last_trained_span():
    ids, weights = np.arange(8, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1, 1, 0], np.float32)
    assert asked(Sample(ids, weights)) == ([0, 1, 2, 3, 4], [5, 6])
    assert asked(Sample(ids, np.zeros(8, np.float32))) is None
    assert asked(Sample(ids, np.minimum(ids, 1).astype(np.float32))) == ([0], [1, 2, 3, 4, 5, 6, 7])


# In a run


@pytest.mark.long
def test_epochs_are_evaluated_and_the_best_evaluation_is_the_result(place, capsys):
    names = {"eval_dataset": place / "held.jsonl", "eval_strategy": "epoch", "num_train_epochs": 3, "lora_dropout": 0}
    whole = run(place, "whole", **names, save_steps=1)
    per_epoch = lines_of(whole)[-1]["step"] // 3
    evaluations = {line["step"]: line for line in lines_of(whole) if "eval_loss" in line}
    assert sorted(evaluations) == [0, per_epoch, 2 * per_epoch, 3 * per_epoch]
    worst = max(step for step in evaluations if step and all(
        evaluations[step]["eval_loss"] >= line["eval_loss"] for number, line in evaluations.items() if number
    ))  # fmt: skip
    best = run(place, "best", "--load_best_model_at_end", "--greater_is_better", **names, save_total_limit=1)
    kept = {int(entry.name) for entry in (best / "checkpoints").iterdir()}
    assert worst < 3 * per_epoch and kept == {worst, 3 * per_epoch}
    card = (best / "README.md").read_text(encoding="utf-8")
    assert f"| result of step | {worst} |" in card and f"| eval_loss | {evaluations[worst]['eval_loss']} |" in card
    capsys.readouterr()
    named = flags(max_length=64, model_name_or_path=place / "base", dataset=place / "held.jsonl", adapter=best)
    assert evaluate.main(named) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == evaluations[worst]["eval_loss"]


def test_max_time_ends_with_a_whole_result_and_a_longer_one_goes_on_bit_for_bit(place, capsys):
    names = {"eval_dataset": place / "held.jsonl", "max_steps": 4, "eval_metric": "gsm8k", "sample_prompts": 1}
    names |= {"eval_max_new_tokens": 4, "lr_scheduler_type": "constant"}
    whole = run(place, "timeless", **names)
    out = run(place, "timed", **names, max_time="0.001")
    said = capsys.readouterr().err
    assert "ended after step 1 of 4: --max_time 0.001 is over" in said
    assert [line["step"] for line in lines_of(out) if "eval_gsm8k" in line] == [0, 1]
    assert (out / "adapter_model.safetensors").exists() and (out / "config.yaml").exists()
    run(place, "timed", **names, max_time="1h", resume_from_checkpoint="auto")
    assert losses_of(out) == losses_of(whole)
    assert same_tensors(out / "adapter_model.safetensors", whole / "adapter_model.safetensors")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [0, 1, 4]
    assert samples[-1] == json.loads((whole / "samples.jsonl").read_text().splitlines()[-1])
    assert samples[0]["samples"][0].keys() == {"prompt", "reference", "answer"}


@pytest.mark.parametrize("policy", ["full", "offload_middle"])
def test_an_adapter_over_bfloat16_is_trained_evaluated_and_asked(place, policy):
    names = {"eval_dataset": place / "held.jsonl", "eval_metric": "gsm8k", "eval_max_new_tokens": 2, "max_steps": 2}
    names |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dtype": "bfloat16"}
    out = run(place, f"bfloat16-{policy}", **names, gradient_checkpointing=policy)
    losses = {line["step"]: line["eval_loss"] for line in lines_of(out) if "eval_gsm8k" in line}
    assert losses.keys() == {0, 2} and losses[2] < losses[0]


def test_a_step_is_sent_before_the_last_ones_loss_is_read_but_where_a_line_or_checkpoint_is_due(place, monkeypatch):
    order: list[str] = []
    put, advance = loop.put_batch, view._Lines.advance
    monkeypatch.setattr(loop, "put_batch", lambda *given: order.append("send") or put(*given))
    monkeypatch.setattr(view._Lines, "advance", lambda self, step: order.append(f"read {step}") or advance(self, step))
    named = {"max_steps": 7, "logging_steps": 3, "save_steps": 5}
    lines = lines_of(run(place, "ahead", **named))
    assert " ".join(order) == (
        "send send read 1 send read 2 read 3 send send read 4 read 5 send read 6 send read 7"  # lines at 3, 6 and 7
    )
    assert [line["step"] for line in lines] == [3, 6, 7]
    each = {line["step"]: line["loss"] for line in lines_of(run(place, "each", max_steps=7, logging_steps=1))}
    assert lines[0]["loss"] == pytest.approx(sum(each[step] for step in (1, 2, 3)) / 3, rel=0.05)


@pytest.mark.long
def test_a_metric_that_fails_in_the_middle_costs_no_step(place, tmp_path, monkeypatch):
    (tmp_path / "fragile.py").write_text(
        "calls = []\ndef f(a, r):\n    calls.append(1)\n    return 1 / (3 - len(calls))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = {"eval_dataset": place / "held.jsonl", "max_steps": 6, "eval_steps": 2, "eval_max_new_tokens": 2}
    with pytest.raises(RunError, match="--eval_metric f failed on 8 answers: ZeroDivisionError"):
        run(place, "fragile", **names, eval_metric="fragile:f", save_steps=0)
    assert [entry.name for entry in (place / "fragile" / "checkpoints").iterdir()] == ["4"]


def test_evaluate_counts_on_answers_too(place, capsys, monkeypatch):
    asked = []

    def right(answers, references):
        asked.append((answers, references))
        return {"right": 0.25}

    monkeypatch.setitem(METRICS, "right", right)
    named = {"eval_metric": "right", "eval_metric_samples": 3, "eval_max_new_tokens": 4}
    said = flags(max_length=64, model_name_or_path=place / "base", dataset=place / "held.jsonl", **named)
    assert evaluate.main(said) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"loss", "perplexity", "target_tokens", "right"} and found["right"] == 0.25
    ((answers, references),) = asked
    assert references == [row["answer"] for row in sums(3, 40)] and len(answers) == 3
    with pytest.raises(InputError, match="--eval_metric_samples has no meaning without --eval_metric"):
        parse("evaluate", ["--eval_metric_samples=3"])


def test_what_needs_held_out_data_says_so(place):
    with pytest.raises(InputError, match="--early_stopping_patience needs held-out data; name them by --eval_dataset"):
        run(place, "nothing", early_stopping_patience=1, eval_steps=1)
    assert not (place / "nothing").exists()
