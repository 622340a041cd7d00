"""The commands on meshes of several devices: the same losses, answers and checkpoints on every one of them."""

import json
import os
import random
import signal
import time

import pytest

from jaxft import evaluate, generate, train
from jaxft.checkpoint import Checkpoints
from jaxft.metrics import MetricsFile
from tests.forked_runs import devices, forked_runs
from tests.tiny_runs import flags, lines_of, losses_of, sums, write_base, write_rows

RUN = flags(
    max_length=64, learning_rate=0.01, max_steps=9, save_steps=3, lora_r=4, lora_dropout=0.2, weight_decay=0.1,
    gradient_checkpointing="none", lr_scheduler_type="constant",
)  # fmt: skip
ROWS = 4  # a step, on every mesh
DATA_PARALLEL = {None: 1, "tensor=2": 1, "data=2,tensor=2": 2, "data=2,fsdp=2": 4, "fsdp=2": 2, "fsdp=2,tensor=2": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("meshes")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(24))
    write_rows(directory / "ask.jsonl", [{"prompt": row["question"]} for row in sums(5)])
    return directory


def arguments(place, mesh, **settings) -> list[str]:
    rows = ROWS // DATA_PARALLEL[mesh]
    named = {
        "model_name_or_path": place / "base",
        "dataset": place / "train.jsonl",
        "per_device_train_batch_size": rows,
    }
    return [*RUN, *flags(**(named | on(mesh)["flags"] | settings))]


def on(mesh) -> dict:
    """The flags and the environment that a mesh needs."""
    if mesh is None:
        return {"flags": {}, "environment": devices(1)}
    count = 4 if "," in mesh else 2
    return {"flags": {"mesh": mesh}, "environment": devices(count)}


@pytest.fixture(scope="module")
def start(place):
    with forked_runs(place) as start:
        yield start


@pytest.fixture(scope="module")
def whole(place):
    """The run on one device, from start to end."""
    assert train.main(arguments(place, None, output_dir=place / "whole")) == 0
    return place / "whole"


@pytest.fixture
def trained(place, start):
    """trained(out, mesh, act=…) trains on a mesh, going on where `out` has a checkpoint: (exit code, stderr)."""

    def run(out, mesh, act=(), watch=None, **settings):
        argv = arguments(place, mesh, output_dir=out, resume_from_checkpoint="auto", **settings)
        child = start(argv, act=act, environment=on(mesh)["environment"])
        if watch is not None:
            watch(child.pid)
        return child.wait(), child.said

    return run


def test_a_run_goes_on_from_mesh_to_mesh_with_the_losses_of_one_device(trained, place, whole):
    out = place / "moved"
    for mesh, stop_after, done in (("data=2,fsdp=2", 4, 0), (None, 7, 4), ("tensor=2", 9, 7)):
        act = [("metrics.MetricsFile.write", stop_after - done, signal.SIGTERM, True)] if stop_after < 9 else []
        found, said = trained(out, mesh, act)
        assert found == (0 if stop_after == 9 else 128 + signal.SIGTERM), said
        assert done == 0 or f"{done} of 9 steps done" in said
        assert f"on {on(mesh)['environment']['XLA_FLAGS'][-1]} × cpu" in said
        assert Checkpoints(out / "checkpoints").latest() == stop_after
    assert [line["step"] for line in lines_of(out)] == list(range(1, 10))
    assert losses_of(out) == pytest.approx(losses_of(whole), abs=1e-5)


@pytest.mark.parametrize("command", ["generate", pytest.param("evaluate", marks=pytest.mark.long)])
def test_commands_on_a_mesh_say_what_they_say_on_one_device(command, start, place, whole, capsys):
    settings = {"model_name_or_path": place / "base", "adapter": whole}
    if command == "evaluate":
        settings |= {"dataset": place / "train.jsonl", "max_length": 64}
    else:
        settings |= {"prompts": place / "ask.jsonl", "max_new_tokens": 20, "temperature": 0.7}
    assert {"evaluate": evaluate, "generate": generate}[command].main(flags(**settings)) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    mesh = on("data=2,tensor=2")
    child = start(flags(**settings, **mesh["flags"]), command, environment=mesh["environment"])
    assert child.wait() == 0, child.said
    found = [json.loads(line) for line in child.printed.splitlines()]
    if command == "evaluate":
        assert found == [pytest.approx(line, rel=1e-5) for line in expected]
    else:
        assert found == expected and len({row["completion"] for row in found}) == 5


@pytest.mark.long
def test_a_run_killed_ten_times_between_meshes_at_random_moments_has_the_losses_of_one_device(trained, place):
    longer = {"max_steps": 60, "save_steps": 2}
    assert train.main(arguments(place, None, output_dir=place / "long", **longer)) == 0
    out, chance = place / "killed", random.Random(0)
    checkpoints, metrics = Checkpoints(out / "checkpoints", repair=False), MetricsFile(out / "metrics.jsonl")
    killed_at = []

    def kill(child):
        first = checkpoints.latest() or 0
        wanted, delay = first + chance.randrange(7), chance.random() * 0.1
        deadline = time.monotonic() + 300
        while first + len(metrics.lines()[first:]) < max(wanted, 1) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)  # some moment of a step or of a save
        os.kill(child, signal.SIGKILL)
        killed_at.append(wanted)

    meshes = [chance.choice(list(DATA_PARALLEL)) for _ in range(11)]
    assert len(set(meshes)) >= 4
    for number, mesh in enumerate(meshes):
        found, said = trained(out, mesh, watch=kill if number < 10 else None, **longer)
        assert found == (-signal.SIGKILL if number < 10 else 0), said
    assert [line["step"] for line in lines_of(out)] == list(range(1, 61)) and len(set(killed_at)) >= 5
    assert losses_of(out) == pytest.approx(losses_of(place / "long"), abs=1e-5)
