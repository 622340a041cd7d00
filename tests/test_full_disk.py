"""A disk that is full during a save: the run ends with a plain error, what was saved is whole, and it goes on."""

import contextlib
import errno
import os
import resource
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import checkpoint, loop, metrics, train
from jaxft.checkpoint import Checkpoints
from jaxft.errors import RunError, run_command
from tests.tiny_runs import flags, lines_of, losses_of, same_tensors, sums, write_base, write_rows

# what Orbax leaves behind when its writing fails: a callback for an event loop that is gone
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
RUN = flags(
    max_length=64, per_device_train_batch_size=4, learning_rate=0.01, max_steps=4, save_steps=1, lora_r=4,
    lora_dropout=0.2, weight_decay=0.1, gradient_checkpointing="none", lr_scheduler_type="constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("full")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(16))
    return directory


def arguments(place, out) -> list[str]:
    return [*RUN, *flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=out)]


@pytest.fixture(scope="module")
def whole(place):
    """The run whose disk had room."""
    assert train.main(arguments(place, place / "whole")) == 0
    return place / "whole"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, small, and with room for several times what a run leaves: how much one checkpoint takes
    depends on how Orbax's threads met (four of them and the result: 0.7 to more than 1 MiB)."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"this process may not mount: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@contextlib.contextmanager
def filled(directory, room: int = 0):
    """Leaves at most `room` bytes free on the file system of `directory`."""
    ballast = directory / ".ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with ballast.open("r+b") as file:
        file.truncate(max(ballast.stat().st_size - room, 0))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def limited(directory, room: int = 0):
    """No file can grow past `room` bytes: a write past it fails as on a full disk, without a disk of its own."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def when_called(monkeypatch, owner, name, count, context):
    """The `count`-th call of owner.name happens inside context()."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        with context() if len(calls) == count else contextlib.nullcontext():
            return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def assert_goes_on(place, out, whole, capsys, steps, words):
    """The run ended with one plain line; every checkpoint is whole; the resumed run is the one that had room."""
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), error
    checkpoints = Checkpoints(out / "checkpoints", repair=False)
    assert checkpoints.steps() == steps
    assert {entry.name for entry in (out / "checkpoints").iterdir()} == set(map(str, steps))
    assert not (out / "adapter_model.safetensors").exists()
    assert train.main([*arguments(place, out), "--resume_from_checkpoint=auto"]) == 0
    assert f"{steps[-1]} of 4 steps done" in capsys.readouterr().err
    assert losses_of(out) == losses_of(whole) and [line["step"] for line in lines_of(out)] == [1, 2, 3, 4]
    assert same_tensors(out / "adapter_model.safetensors", whole / "adapter_model.safetensors")


@pytest.mark.parametrize("room", [0, pytest.param(40_000, marks=pytest.mark.long)])
def test_a_disk_that_is_full_at_a_checkpoint_costs_the_run_and_no_earlier_checkpoint(
    room, place, whole, small_disk, monkeypatch, capsys
):
    out = small_disk / "out"
    with monkeypatch.context() as patch:
        when_called(patch, checkpoint.Checkpoints, "save", 3, lambda: filled(small_disk, room))
        assert run_command(train.main, arguments(place, out)) == 1
    words = [f"checkpoint {out / 'checkpoints' / '3'} could not be written", "No space left on device"]
    words += ["The checkpoint of step 2 is intact. Make room, then go on by --resume_from_checkpoint auto"]
    assert_goes_on(place, out, whole, capsys, [1, 2], words)


@pytest.mark.long
def test_files_that_cannot_grow_cost_the_run_and_no_earlier_checkpoint(place, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        when_called(patch, checkpoint.Checkpoints, "save", 2, lambda: limited(out, 1000))
        assert run_command(train.main, arguments(place, out)) == 1
    words = [f"checkpoint {out / 'checkpoints' / '2'} could not be written", "File too large", "step 1 is intact"]
    assert_goes_on(place, out, whole, capsys, [1], words)


@pytest.mark.long
def test_metrics_that_cannot_be_written_end_the_run_with_what_to_do(place, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def one_byte_more():
        return limited(out, (out / "metrics.jsonl").stat().st_size + 1)

    with monkeypatch.context() as patch:
        when_called(patch, metrics.MetricsFile, "write", 3, one_byte_more)
        assert run_command(train.main, arguments(place, out)) == 1
    words = [f"{out / 'metrics.jsonl'} could not be written", "File too large", "go on from the last checkpoint"]
    assert_goes_on(place, out, whole, capsys, [1, 2], words)


def test_wherever_the_disk_fills_up_during_a_save_the_last_checkpoint_is_whole(small_disk):
    tree = {"x": jax.random.normal(jax.random.key(0), (50, 200)), "y": {"0": jnp.ones(3)}}
    trees = {1: tree, 2: jax.tree.map(lambda leaf: leaf + 1, tree)}
    checkpoints, failed = Checkpoints(small_disk / "checkpoints"), 0
    checkpoints.save(1, tree, {"n": 1})
    for room in range(0, 120_000, 8192):
        with filled(small_disk, room):
            try:
                checkpoints.save(2, trees[2], {"n": 2})
                saved = 2
            except RunError as failure:
                saved, failed = 1, failed + 1
                assert os.strerror(errno.ENOSPC) in str(failure)
        found, meta = Checkpoints(small_disk / "checkpoints").restore(None, tree)
        assert meta == {"n": saved} and np.array_equal(found["x"], trees[saved]["x"])
        if saved == 2:
            checkpoints.delete(2)
    assert 3 < failed < 15


def test_a_line_of_metrics_that_cannot_be_written_is_a_run_error_and_the_lines_before_it_stay(tmp_path):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": 2.0})
    with (
        limited(tmp_path, file.path.stat().st_size + 5),
        pytest.raises(RunError, match=r"metrics\.jsonl could not be written: .*File too large.*Make room, then go on"),
    ):
        file.write({"step": 2, "loss": 1.0})
    assert file.lines() == [{"step": 1, "loss": 2.0}]
    with limited(tmp_path, 3), pytest.raises(RunError, match="could not be written"):
        file.cut(1)
    assert file.lines() == [{"step": 1, "loss": 2.0}]
    file.cut(1)
    file.write({"step": 2, "loss": 1.0})
    assert [line["step"] for line in file.lines()] == [1, 2] and len(list(tmp_path.iterdir())) == 1


def test_a_batch_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path):
    found = {"loss": np.float32(np.nan), "grad_norm": np.float32(1)}
    with limited(tmp_path, 10):
        text = loop._non_finite(tmp_path, 3, {"tokens": np.zeros(500)}, found, Checkpoints(tmp_path / "none"))
    assert "step 3: loss nan" in text and "its batch could not be written to" in text and "File too large" in text
