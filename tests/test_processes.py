"""Two processes of one run on one machine: the losses of one process, one writer, an end for both where one dies."""

import re
import signal
import socket
import time

import pytest

from jaxft import train
from jaxft.checkpoint import Checkpoints
from jaxft.config import parse
from jaxft.errors import InputError
from jaxft.processes import asked_for, gathered, largest, meet, on_first
from tests.forked_runs import forked_runs
from tests.tiny_runs import flags, lines_of, losses_of, sums, write_base, write_rows

RUN = flags(
    max_length=64, learning_rate=0.01, max_steps=5, save_steps=2, eval_steps=3, lora_r=4, lora_dropout=0.2,
    weight_decay=0.1, gradient_checkpointing="none", lr_scheduler_type="constant", heartbeat_timeout_seconds=4,
)  # fmt: skip


def test_a_process_without_others_is_not_asked_for_its_devices(monkeypatch):
    def asked(*_):
        raise AssertionError("asked for devices")

    monkeypatch.setattr("jax.process_count", asked)
    monkeypatch.setattr("jax.process_index", asked)
    done = []
    on_first(lambda: done.append(largest(3)))
    meet("nowhere")
    assert done == [3] and gathered({"a": 1}) == {"a": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(24))
    write_rows(directory / "held.jsonl", sums(6, 24))
    return directory


def arguments(place, **settings) -> list[str]:
    named = {"model_name_or_path": place / "base", "dataset": place / "train.jsonl"}
    return [*RUN, *flags(**(named | settings))]


@pytest.fixture(scope="module")
def two(place):
    """Runs the command in two processes of one device each: [(exit code, stderr, stdout), …], process 0 first.

    `act` is for process 1 alone, and so are the settings in `second`.
    """
    with forked_runs(place) as start:

        def run(act=(), second=None, **settings):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            shared = {"mesh": "fsdp=2", "coordinator_address": address, "num_processes": 2} | settings
            children = [
                start(
                    arguments(place, **(shared | {"process_id": number} | ((second or {}) if number else {}))),
                    act=act if number else (),
                )
                for number in range(2)
            ]
            return [(child.wait(), child.said, child.printed) for child in children]

        yield run


@pytest.fixture(scope="module")
def one(place):
    """The same run in one process, on one device."""
    assert train.main(arguments(place, output_dir=place / "one", per_device_train_batch_size=4)) == 0
    return place / "one"


def without_gloo(said: str) -> str:
    return "".join(line for line in said.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def test_two_processes_give_the_losses_of_one_and_only_the_first_speaks_and_writes(two, one, place):
    out = place / "two"
    first, second = two(output_dir=out, per_device_train_batch_size=2, save_total_limit=1)
    assert first[0] == 0 and second[0] == 0, first[1] + second[1]
    assert losses_of(out) == pytest.approx(losses_of(one), abs=1e-6) and len(losses_of(out)) == 5
    assert [line["step"] for line in lines_of(out)] == [line["step"] for line in lines_of(one)]  # each written once
    assert "on 2 × cpu" in first[1] and "adapter written to" in first[1]
    assert without_gloo(second[1]) == "" and without_gloo(second[2]) == without_gloo(first[2]) == ""
    assert {path.name for path in out.iterdir()} == {path.name for path in one.iterdir()}
    text = (out / "config.yaml").read_text()
    assert "coordinator_address: null" in text and "process_id: null" in text and "num_processes: null" in text
    load_file = pytest.importorskip("safetensors.numpy").load_file
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (out, one))
    assert mine.keys() == theirs.keys()
    assert all(abs(mine[name] - theirs[name]).max() < 1e-5 for name in theirs)


@pytest.mark.long
def test_a_signal_to_one_stops_both_after_the_same_step_and_one_process_goes_on(two, one, place):
    out = place / "stopped"
    held = {"eval_dataset": place / "held.jsonl", "per_device_eval_batch_size": 1}
    act = [("loop.put_batch", 4, signal.SIGTERM, True)]
    first, second = two(act, output_dir=out, per_device_train_batch_size=2, **held)
    assert first[0] == second[0] == 128 + signal.SIGTERM, first[1] + second[1]
    assert "stopped by SIGTERM after step 4 of 5" in first[1].splitlines()[-1]
    assert Checkpoints(out / "checkpoints").latest() == 4
    resumed = arguments(place, output_dir=out, per_device_train_batch_size=4, resume_from_checkpoint="auto")
    assert train.main(resumed) == 0
    assert losses_of(out) == pytest.approx(losses_of(one), abs=1e-5)


@pytest.mark.long
def test_two_processes_evaluate_answer_and_keep_the_best_as_one_does(two, place):
    settings = {
        "eval_dataset": place / "held.jsonl",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "sample_prompts": 1,
    }
    settings |= {"greater_is_better": True, "eval_metric": "gsm8k", "eval_max_new_tokens": 3, "save_total_limit": 1}
    alone, out = place / "best of one", place / "best of two"
    assert train.main(arguments(place, output_dir=alone, per_device_train_batch_size=4, **settings)) == 0
    first, second = two(output_dir=out, per_device_train_batch_size=2, **settings)
    assert first[0] == second[0] == 0, first[1] + second[1]
    assert "the best evaluation was after step 2" in first[1] and without_gloo(second[1]) == ""
    assert Checkpoints(out / "checkpoints").steps() == Checkpoints(alone / "checkpoints").steps() == [2, 5]
    assert (out / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()


@pytest.mark.long
def test_a_process_that_dies_ends_the_other_with_an_error(two, place):
    out, began = place / "dead", time.monotonic()
    first, second = two([("loop.put_batch", 3, signal.SIGKILL, True)], output_dir=out, per_device_train_batch_size=2)
    assert second[0] == -signal.SIGKILL and first[0] not in (0, 2) and time.monotonic() - began < 60
    # this process's own line, or that of JAX's service where it is the quicker one
    assert re.search("error: a computation of all 2 processes failed|another task died", first[1])
    assert not (out / "adapter_model.safetensors").exists()


def test_an_error_in_one_process_is_said_by_it_and_ends_the_other(two, place):
    out = place / "wrong"
    first, second = two(second={"dataset": place / "none.jsonl"}, output_dir=out, per_device_train_batch_size=2)
    assert second[0] == 2 and "error: data set" in second[1] and "there is no such file" in second[1]
    assert first[0] not in (0, 2)
    assert not (out / "adapter_model.safetensors").exists()


def test_processes_are_named_by_flags_or_the_environment_and_what_is_wrong_with_them_is_said(monkeypatch, place):
    def given(**settings):
        return asked_for(parse("train", flags(**settings))[0])

    assert given() == {}
    named = {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2}
    assert given(**named) == named
    for name, value in (("JAX_COORDINATOR_ADDRESS", "b:2"), ("JAX_NUM_PROCESSES", "4"), ("JAX_PROCESS_ID", "0")):
        monkeypatch.setenv(name, value)
    assert given() == {"coordinator_address": "b:2", "num_processes": 4, "process_id": 0}
    assert given(process_id=3) == {"coordinator_address": "b:2", "num_processes": 4, "process_id": 3}
    for settings, words in (
        ({"process_id": 4}, "process_id is 4 of num_processes 4; it counts from 0 to 3"),
        ({"coordinator_address": "localhost"}, "coordinator_address is 'localhost'; expected HOST:PORT"),
        ({"num_processes": 0}, "--num_processes is 0; it must be at least 1"),
        ({"process_id": -1}, "--process_id is -1; it must be at least 0"),
    ):
        with pytest.raises(InputError, match=words):
            given(**settings)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'one'; expected a whole number"):
        given()
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name)

    def initialize(**_):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(InputError, match=r"processes must be defined\.; give --num_processes, --process_id or JAX_NUM"):
        train.main(arguments(place, output_dir=place / "unnamed"))
