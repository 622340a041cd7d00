"""A run that was stopped, or killed at any moment, and resumed is the run that was not: bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from jaxft import train
from jaxft.checkpoint import Checkpoints
from jaxft.errors import InputError
from jaxft.evaluate import evaluate
from jaxft.loop import _signals
from tests.forked_runs import devices, forked_runs
from tests.tiny_runs import flags, lines_of, losses_of, same_tensors, sums, write_base, write_rows

STEPS = 12
RUN = flags(
    max_length=64, per_device_train_batch_size=8, learning_rate=0.01, max_steps=STEPS, save_steps=4,
    eval_steps=6, lora_r=4, lora_dropout=0.2, weight_decay=0.1, gradient_checkpointing="none",
    lr_scheduler_type="constant_with_warmup", warmup_steps=9,
)  # fmt: skip
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(40))
    write_rows(directory / "held.jsonl", sums(8, 40))
    return directory


def arguments(place, out, *argv, **settings) -> list[str]:
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", eval_dataset=place / "held.jsonl")
    return [*RUN, *named, f"--output_dir={out}", *argv, *flags(**settings)]


@pytest.fixture(scope="module")
def processes(place):
    """run(out, *argv, act=[…], kill_after=…) in a process of its own: its exit code and what it said."""
    with forked_runs(place) as start:

        def run(out, *argv, act=(), watch=None, environment=None, **settings):
            child = start(arguments(place, out, *argv, **settings), act=act, environment=environment)
            if watch is not None:
                watch(child.pid)
            return child.wait(), child.said

        yield run


@pytest.fixture(scope="module")
def whole(place):
    """The run that nothing stopped."""
    assert train.main(arguments(place, place / "whole")) == 0
    return place / "whole"


def timeless(directory: Path) -> list[dict]:
    """The lines of metrics without what a clock says."""
    clocks = ("tokens_per_second", "step_seconds")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines_of(directory)]


def assert_same_run(out: Path, whole: Path) -> None:
    assert timeless(out) == timeless(whole)
    assert same_tensors(out / ADAPTER, whole / ADAPTER)
    assert {entry.name for entry in out.iterdir()} == {entry.name for entry in whole.iterdir()}
    assert Checkpoints(out / "checkpoints").steps() == [4, 8, 12]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_was_not_stopped(number, code, processes, place, whole):
    out = place / f"stopped-{number.name}"
    line_of_step_5 = 1 + 5  # behind the first evaluation
    found, said = processes(out, act=[("metrics.MetricsFile.write", line_of_step_5, number, True)])
    assert found == code and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last == (
        f"stopped by {number.name} after step 5 of 12; go on with --output_dir {out} --resume_from_checkpoint auto"
    )
    assert {entry.name for entry in out.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert Checkpoints(out / "checkpoints").steps() == [4, 5]
    found, said = processes(out, "--resume_from_checkpoint=auto")
    assert found == 0 and "5 of 12 steps done" in said
    Checkpoints(out / "checkpoints").delete(5)
    assert_same_run(out, whole)


# (function, call, before or after it): where a run is killed, with no chance to do anything about it
MOMENTS = {
    "before the first step": ("metrics.MetricsFile.write", 1, False),
    "half way through the first save": ("checkpoint.Checkpoints._commit", 1, False),
    "before the rename of the second save": ("checkpoint.os.fsync", 3, True),
    "after the last step, before its save": ("checkpoint.Checkpoints.save", 3, False),
    "after the last save, before the evaluation": ("checkpoint.Checkpoints.save", 3, True),
    "while the result is written": ("output.copy_tokenizer", 1, True),
    "before the last file of the result": ("output.config_text", 1, False),
}


USUAL = ("half way through the first save", "after the last save, before the evaluation", "while the result is written")


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[] if m in USUAL else pytest.mark.long) for m in MOMENTS])
def test_a_run_killed_at_a_bad_moment_goes_on_as_if_it_had_not_been(moment, processes, place, whole):
    out = place / f"killed {moment}"
    function, call, after = MOMENTS[moment]
    found, _ = processes(out, act=[(function, call, signal.SIGKILL, after)])
    assert found == -signal.SIGKILL
    found, said = processes(out, "--resume_from_checkpoint=auto")
    assert found == 0 and "Traceback" not in said
    assert_same_run(out, whole)


# evaluations after 2, 4, 6, 8; the first is the best where more loss is better, and three others end the run after 8
WATCHED = flags(
    eval_steps=2, save_steps=3, save_total_limit=1, load_best_model_at_end=True, greater_is_better=True,
    early_stopping_patience=3, sample_prompts=2, eval_metric="gsm8k", eval_max_new_tokens=3,
)  # fmt: skip
WATCHED_MOMENTS = {
    "between the samples and the line of an evaluation": ("metrics.MetricsFile.write", 10, False),
    "after the last save": ("checkpoint.Checkpoints.save", 4, True),
}


@pytest.fixture(scope="module")
def watched(place):
    assert train.main(arguments(place, place / "watched", *WATCHED)) == 0
    lines = lines_of(place / "watched")
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 8] and lines[-1]["step"] == 8
    assert Checkpoints(place / "watched" / "checkpoints").steps() == [2, 8]
    return place / "watched"


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=[] if "last" in m else pytest.mark.long) for m in WATCHED_MOMENTS]
)
def test_best_checkpoint_early_stop_and_samples_are_those_of_the_run_that_was_not_killed(
    moment, processes, place, watched
):
    out = place / f"watched {moment}"
    function, call, after = WATCHED_MOMENTS[moment]
    found, _ = processes(out, *WATCHED, act=[(function, call, signal.SIGKILL, after)])
    assert found == -signal.SIGKILL
    found, said = processes(out, *WATCHED, "--resume_from_checkpoint=auto")
    assert found == 0 and "ended after step 8 of 12: 3 evaluations in a row without a better eval_loss" in said
    assert "the best evaluation was after step 2: its checkpoint is the result" in said
    assert timeless(out) == timeless(watched) and same_tensors(out / ADAPTER, watched / ADAPTER)
    assert (out / "samples.jsonl").read_text() == (watched / "samples.jsonl").read_text()
    checkpoints = Checkpoints(out / "checkpoints")
    assert checkpoints.steps() == [2, 8]


@pytest.mark.long
def test_a_run_resumed_elsewhere_takes_the_best_checkpoint_with_it(place, watched):
    out = place / "watched elsewhere"
    argv = arguments(place, out, *WATCHED, early_stopping_patience=4, resume_from_checkpoint=watched)
    assert train.main(argv) == 0
    assert Checkpoints(out / "checkpoints").steps() == [2, 10]
    assert same_tensors(out / ADAPTER, watched / ADAPTER)


@pytest.mark.long
def test_a_run_killed_again_and_again_at_random_moments_ends_as_if_it_had_not_been(processes, place, whole):
    out, chance = place / "again", random.Random(0)
    kills = 0

    def kill(child):
        nonlocal kills
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.02 + chance.random() * 0.3)
        os.kill(child, signal.SIGKILL)
        kills += 1

    while True:
        found, said = processes(out, "--resume_from_checkpoint=auto", watch=kill if kills < 6 else None)
        assert found in (0, -signal.SIGKILL), said
        if found == 0:
            break
    assert_same_run(out, whole)


def test_a_line_of_metrics_that_a_stop_fell_into_covers_the_same_steps(place):
    out, resumed = place / "lines", place / "lines resumed"
    assert train.main(arguments(place, out, logging_steps=3)) == 0
    assert train.main(arguments(place, resumed, logging_steps=3, resume_from_checkpoint=out / "checkpoints" / "4")) == 0
    whole = [line for line in timeless(out) if "loss" in line]
    assert [line["step"] for line in whole] == [3, 6, 9, 12]
    assert [line for line in timeless(resumed) if "loss" in line] == whole[1:]


def test_a_signal_during_an_evaluation_ends_it_and_the_resumed_run_makes_it(place, whole, monkeypatch):
    out = place / "evaluating"

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("jaxft.loop.evaluate", interrupted)
        assert train.main(arguments(place, out)) == 143
    assert [entry.name for entry in out.iterdir()] == ["checkpoints"]
    assert train.main(arguments(place, out, resume_from_checkpoint="auto")) == 0
    assert timeless(out) == timeless(whole) and same_tensors(out / ADAPTER, whole / ADAPTER)


def test_a_second_signal_acts_at_once():
    with pytest.raises(KeyboardInterrupt), _signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal did nothing")


@pytest.mark.parametrize("source", ["", "checkpoints", "checkpoints/12", "checkpoints/4"])
def test_a_run_a_checkpoints_directory_or_one_checkpoint_can_be_named(source, place, whole, capsys):
    out = place / f"from {source}".replace("/", " ")
    assert train.main(arguments(place, out, resume_from_checkpoint=whole / source)) == 0
    step = 4 if source.endswith("4") else 12
    assert f"resumed from {whole / 'checkpoints' / str(step)}: {step} of 12 steps done" in capsys.readouterr().err
    assert same_tensors(out / ADAPTER, whole / ADAPTER)
    assert timeless(out)[-1] == timeless(whole)[-1]
    assert losses_of(out) == losses_of(whole)[step:]


def test_going_back_to_an_earlier_checkpoint_drops_what_came_after_it(place, whole):
    out = place / "back"
    assert train.main(arguments(place, out)) == 0
    other = arguments(place, out, resume_from_checkpoint=out / "checkpoints" / "4", max_steps=6)
    assert train.main(other) == 0
    assert Checkpoints(out / "checkpoints").steps() == [4, 6]
    assert losses_of(out)[:4] == losses_of(whole)[:4] and len(losses_of(out)) == 6


def test_auto_without_a_checkpoint_starts_fresh_and_save_total_limit_keeps_the_newest(place, whole):
    out = place / "fresh"
    assert train.main(arguments(place, out, resume_from_checkpoint="auto", save_total_limit=2)) == 0
    assert timeless(out) == timeless(whole) and same_tensors(out / ADAPTER, whole / ADAPTER)
    assert Checkpoints(out / "checkpoints").steps() == [8, 12]
    assert (out / "config.yaml").read_text().count("resume_from_checkpoint: null") == 1


def test_a_finished_run_ends_at_once_and_nothing_of_it_changes(place, whole, capsys):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole.rglob("*")}
    began = time.monotonic()
    assert train.main(arguments(place, whole, resume_from_checkpoint="auto")) == 0
    assert time.monotonic() - began < 2
    assert "holds the finished run of these settings" in capsys.readouterr().err
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole.rglob("*")} == before


def test_a_finished_run_can_be_made_longer_and_says_that_the_schedule_changes(place, whole, capsys):
    out = place / "longer"
    assert train.main(arguments(place, out, resume_from_checkpoint=whole, max_steps=14)) == 0
    assert "12 steps were planned" in capsys.readouterr().err
    assert [line["step"] for line in lines_of(out) if "loss" in line] == [13, 14]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "paged_adamw"])
def test_a_longer_run_takes_the_rates_of_its_own_plan_and_no_checkpoint_holds_those_of_another(optim, place):
    out, longer = place / f"planned {optim}", place / f"planned longer {optim}"
    linear = {"lr_scheduler_type": "linear", "warmup_steps": 2, "lora_dropout": 0, "save_steps": 0, "optim": optim}
    assert train.main(arguments(place, out, max_steps=4, **linear)) == 0
    record = json.loads((out / "checkpoints" / "4" / "checkpoint.json").read_text())
    assert [name for name in record["leaves"] if name.endswith("/count")]
    assert not [name for name in record["leaves"] if "numbers" in name]
    assert train.main(arguments(place, longer, max_steps=6, resume_from_checkpoint=out, **linear)) == 0
    lines = [line for line in lines_of(longer) if "loss" in line]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01 * 2 / 4, 0.01 * 1 / 4])
    assert not same_tensors(longer / ADAPTER, out / ADAPTER)  # by the old plan the rate would be 0 after step 4


def test_settings_that_contradict_the_checkpoint_are_listed_and_nothing_is_touched(place, whole):
    out = place / "contradicting"
    for settings, said in (
        ({"learning_rate": 0.1, "seed": 3}, r"learning_rate was 0\.01 and is 0\.1, seed was 0 and is 3\. Resume with"),
        ({"lora_r": 8}, "lora_r was 4 and is 8"),
        ({"per_device_train_batch_size": 4}, "rows_per_step was 8 and is 4"),
        ({"train_on": "all"}, "the tokenised data are others"),
        ({"dtype": "bfloat16"}, r"dtype was float32 weights, computed in float32 and is bfloat16"),
    ):
        with pytest.raises(InputError, match=said):
            train.main(arguments(place, out, resume_from_checkpoint=whole, **settings))
    assert not out.exists()


def test_no_checkpoint_and_the_checkpoint_of_another_run_are_refused(place, whole):
    out = place / "nothing"
    with pytest.raises(InputError, match=r"--resume_from_checkpoint .*base: there is no checkpoint"):
        train.main(arguments(place, out, resume_from_checkpoint=place / "base"))
    with pytest.raises(InputError, match="auto needs --output_dir"):
        train.main([*RUN, "--resume_from_checkpoint=auto"])
    assert not out.exists()
    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"nothing is not empty and .*whole is the checkpoint of another run"):
        train.main(arguments(place, out, resume_from_checkpoint=whole))
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds adapter_config\.json and no checkpoint to go on from"):
        train.main(arguments(place, out, resume_from_checkpoint="auto"))


@pytest.mark.long  # test_meshes has the usual case: from mesh to mesh to mesh
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_a_run_resumed_on_another_mesh_has_the_same_losses(mesh, processes, place, whole):
    out = place / f"mesh {mesh}"
    (out / "checkpoints").mkdir(parents=True)
    os.symlink(whole / "checkpoints" / "4", out / "checkpoints" / "4")
    found, said = processes(
        out, mesh=mesh, per_device_train_batch_size=1, resume_from_checkpoint="auto", per_device_eval_batch_size=1,
        environment=devices(8),
    )  # fmt: skip
    assert found == 0, said
    assert "on 8 × cpu" in said and "4 of 12 steps done" in said
    assert losses_of(out) == pytest.approx(losses_of(whole)[4:], abs=1e-5)
    assert lines_of(out)[-1]["eval_loss"] == pytest.approx(lines_of(whole)[-1]["eval_loss"], abs=1e-5)
