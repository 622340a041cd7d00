"""The way to the first step: compiled from shapes, once, before a weight is on a device, while the files are read."""

import logging
import os
import re
import sys
import threading
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import prepare, train
from jaxft.errors import run_command
from jaxft.read_ahead import reading_ahead
from tests.tiny_runs import flags, losses_of, sums, write_base, write_rows

RUN = flags(max_length=64, per_device_train_batch_size=4, save_steps=0, max_steps=4)
COMPILED = "Finished XLA compilation of jit(train_step)"
READER = "reading ahead"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with base/ and train.jsonl."""
    directory = tmp_path_factory.mktemp("first_step")
    write_base(directory / "base", num_hidden_layers=1)
    write_rows(directory / "train.jsonl", sums(12))
    return directory


class Told(logging.Handler):
    """What a run says on stderr and what jax logs of its compilations, in the order in which they came."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def write(self, text):
        self.lines += filter(None, text.split("\n"))

    def flush(self):
        pass

    def index(self, start: str) -> int:
        found = [number for number, line in enumerate(self.lines) if line.startswith(start)]
        assert len(found) == 1, (start, self.lines)
        return found[0]


@pytest.fixture
def command(place, monkeypatch):
    """command(*argv, base=…, **settings): exit code of jaxft.train in this process, and what was `Told`."""

    def run(*argv, base=None, **settings):
        told, logger = Told(), logging.getLogger("jax")
        named = flags(model_name_or_path=base or place / "base", dataset=place / "train.jsonl", dataset_cache="none")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", told)
            jax.config.update("jax_log_compiles", True)  # in all threads
            logger.addHandler(told)
            try:
                code = run_command(train.main, [*RUN, *named, *argv, *flags(**settings)])
            finally:
                jax.config.update("jax_log_compiles", False)
                logger.removeHandler(told)
        return code, told

    return run


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == READER]


@pytest.mark.parametrize("more", [{}, {"memory_budget": "1GiB"}])
def test_the_step_is_compiled_once_and_before_a_weight_is_read(command, monkeypatch, tmp_path, more):
    monkeypatch.setattr("jaxft.budget.CPU_LADDER", (("full", 1),))
    earlier, held = jax.live_arrays(), []  # held here, so that no id is given again
    before = {id(array) for array in earlier}

    def read(*args):
        held.extend(array.nbytes for array in jax.live_arrays() if id(array) not in before)
        return read_weights(*args)

    read_weights = train.read_weights
    monkeypatch.setattr(train, "read_weights", read)
    code, told = command(output_dir=tmp_path / "out", **more)
    assert code == 0, told.lines
    assert told.index("model: ") < told.index(COMPILED) < told.index("weights: read in")
    assert sum(held) < 64  # no weight, state or batch was on the device
    assert len(losses_of(tmp_path / "out")) == 4 and not readers()


def test_few_programs_are_compiled_before_the_first_step_is_done(command, tmp_path):
    jax.clear_caches()
    code, told = command(output_dir=tmp_path / "out", max_steps=1)
    assert code == 0, told.lines
    before = "\n".join(told.lines[: told.index("step 1 ")])
    programs = re.findall(r"Finished XLA compilation of jit\((\w+)\)", before)
    assert programs.count("zeros") == programs.count("_drawn") == 1  # all weights, all of the adapter
    assert len([name for name in programs if name != "write_rows"]) <= 14, programs  # of weights: one a shape


def test_the_adapter_is_drawn_while_the_weights_are_read(command, tmp_path, monkeypatch):
    drawn, draw, read = threading.Event(), prepare.draw, prepare.read_params

    def noted(*arguments):
        values = draw(*arguments)
        drawn.set()
        return values

    def waiting(*arguments, **options):
        assert drawn.wait(60)
        return read(*arguments, **options)

    code, _ = command(output_dir=tmp_path / "alone")
    assert code == 0
    monkeypatch.setattr(prepare, "draw", noted)
    monkeypatch.setattr(prepare, "read_params", waiting)
    code, _ = command(output_dir=tmp_path / "beside")
    assert code == 0 and losses_of(tmp_path / "beside") == losses_of(tmp_path / "alone")


def test_a_resumed_run_compiles_its_step_once(command, tmp_path):
    code, _ = command(output_dir=tmp_path / "out", max_steps=2, lr_scheduler_type="constant")
    assert code == 0
    code, told = command(
        "--resume_from_checkpoint", str(tmp_path / "out"), output_dir=tmp_path / "more", lr_scheduler_type="constant"
    )
    assert code == 0, told.lines
    assert any("2 of 4 steps done" in line for line in told.lines)
    assert told.index(COMPILED) < told.index("weights: read in")


def damaged(place: Path, target: Path) -> Path:
    """The base with a tensor that lacks a row."""
    write_base(target, num_hidden_layers=1)
    weights = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:-1]}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_what_headers_tell_of_wrong_weights_ends_the_run_before_data_are_tokenised_or_a_step_compiled(
    command, place, tmp_path
):
    code, told = command(base=damaged(place, tmp_path / "damaged"), output_dir=tmp_path / "out")
    assert code == 2 and "mlp.up_proj.weight has shape" in told.lines[-1]
    assert not any("% filled" in line or line.startswith(COMPILED) for line in told.lines)
    assert not (tmp_path / "out").exists() and not readers()


def test_an_error_in_reading_the_weights_ends_the_run_with_its_own_message(command, tmp_path):
    code, told = command(init_lora_weights="pissa", lora_r=4096, output_dir=tmp_path / "out")
    assert code == 2 and told.lines[-1].startswith("error: init_lora_weights pissa: rank 4096 is larger than")
    assert not (tmp_path / "out").exists() and not readers()


def test_ctrl_c_while_the_step_compiles_leaves_no_thread(command, monkeypatch, tmp_path):
    def interrupted(*_):
        assert threading.current_thread() is threading.main_thread()
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "plan_run", interrupted)
    monkeypatch.setattr(train, "files_of", lambda _: [Path("/dev/zero")])  # which has no end
    code, _ = command(output_dir=tmp_path / "out")
    assert code == 130 and not readers()


def test_files_are_read_while_the_block_runs(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with reading_ahead([pipe]), pipe.open("wb", buffering=0) as end:
        # many times what a pipe holds: this ends only if somebody reads
        assert sum(end.write(bytes(1 << 20)) for _ in range(20)) == 20 << 20
    assert not readers()


def test_reading_ends_with_the_block_and_leaves_what_cannot_be_read_to_others(tmp_path):
    with reading_ahead([Path("/dev/zero")]):
        assert len(readers()) == 1
    assert not readers()
    with reading_ahead([tmp_path / "absent"]):
        pass
    assert not readers()
