"""The kernels of a step compiled while the data are tokenised: which, when, when not, and that nothing else changes."""

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxft import kernels_ahead as ahead
from jaxft import memory, train
from jaxft.config import parse
from jaxft.data import tokenize_dataset
from jaxft.errors import InputError, run_command
from jaxft.files import open_rows
from jaxft.kernels import attention, gpu, launch
from jaxft.prepare import prepare_shapes
from tests.ptx import MISSING, NEEDED
from tests.tiny_runs import flags, losses_of, make_tokenizer, sums, write_base, write_rows

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
RUN = flags(max_length=64, per_device_train_batch_size=2, max_steps=1, save_steps=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with base/, whose layers every kernel serves, and train.jsonl."""
    directory = tmp_path_factory.mktemp("kernels_ahead")
    write_base(directory / "base", head_dim=64, **SIZES)
    write_rows(directory / "train.jsonl", sums(12))
    return directory


@pytest.fixture
def kernels(tmp_path):
    """The folder of kept kernels, which is new."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path / "xla"), True), strict=True):
        jax.config.update(name, value)
    yield tmp_path / "xla" / "triton"
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def on_h200(place):
    """on_h200(**flags): a run's settings and what it prepares, with a card that is not here for the device."""
    if MISSING:
        pytest.skip(NEEDED)
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the compiler for CUDA: jax-cuda13-pjrt")

    def prepared(**more):
        named = {"model_name_or_path": place / "base", "dataset": place / "train.jsonl", "bf16": True}
        settings, _ = parse("train", [*RUN, *flags(**named, dry_run=True, device="h200", **more)])
        return replace(settings, dry_run=False, device=None), prepare_shapes(settings, str(place / "base"))

    return prepared


def optimizer(settings):
    return lambda prepared: train.some_optimizer(settings, prepared)


class Lowered(Exception):
    """The text of a step, in place of what it would be compiled to."""


def lowered(settings, prepared, documents, monkeypatch) -> str:
    """The step that `plan_run` would have XLA compile."""

    def text(step, *_, **__):
        raise Lowered(step.as_text())

    run = SimpleNamespace(
        settings=settings, optimizer=train.some_optimizer(settings, prepared),
        batches=SimpleNamespace(max_documents=documents),
    )  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Lowered) as found:
        patch.setattr(jax.stages.Lowered, "compile", text)
        memory.plan_run(run, prepared, print)
    return str(found.value)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def refuse_to_compile(patch):
    import jax_triton

    def refused(*_, **__):
        raise AssertionError("compiled again")

    patch.setattr(jax_triton, "triton_call", refused)


@pytest.mark.parametrize(
    "flags",
    [
        *({}, {"optim": "adamw_8bit", "gradient_accumulation_steps": 2}, {"packing": False, "mlp_tiles": 2}),
        {"peft_type": "adalora", "init_r": 6, "target_r": 4},
    ],
)
def test_the_step_finds_its_kernels_and_no_other_ones_were_compiled(on_h200, kernels, flags, monkeypatch):
    monkeypatch.setattr(launch, "_compiling", {})
    settings, prepared = on_h200(**flags)
    with ahead.kernels_ahead(settings, prepared, optimizer(settings)) as begin:
        begin()
        begin()
        (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("kernels ahead"))
        deadline = time.monotonic() + 120
        while not (found := list(launch._compiling.values())) or not all(future.done() for future in found):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(names(kernels)) > 5
        with monkeypatch.context() as patch:
            refuse_to_compile(patch)
            early = lowered(settings, prepared, None if settings.packing else 2, monkeypatch)
    thread.join()
    before = names(kernels)
    jax.clear_caches()
    for path in kernels.iterdir():
        path.unlink()
    assert lowered(settings, prepared, None if settings.packing else 2, monkeypatch) == early
    assert names(kernels) == before


def test_a_wrong_guess_of_the_way_of_attention_changes_nothing_in_the_step(on_h200, kernels, monkeypatch):
    settings, prepared = on_h200()
    late = lowered(settings, prepared, 3, monkeypatch)
    needed = names(kernels)
    jax.clear_caches()
    traced = ahead.trace(settings, prepared, optimizer(settings)(prepared))
    launch.compile_ahead(traced.jaxpr.jaxpr)
    assert len(names(kernels) - needed) == 3  # Triton's for attention, which cuDNN takes here
    assert lowered(settings, prepared, 3, monkeypatch) == late and "cudnn" in late.lower()


def test_the_rehearsal_says_nothing_and_the_step_says_its_way_once(on_h200, kernels, caplog, monkeypatch):
    attention._log_once.cache_clear()
    settings, prepared = on_h200()
    with caplog.at_level(logging.INFO, "jaxft"):
        ahead.trace(settings, prepared, optimizer(settings)(prepared))
        assert not [record for record in caplog.records if record.name == "jaxft"]
        lowered(settings, prepared, None, monkeypatch)
    said = [record.getMessage() for record in caplog.records if record.name == "jaxft"]
    assert len(said) == 1 and said[0].startswith("attention: triton (mosaic: 64 tokens")


@pytest.fixture
def card(monkeypatch):
    """What `pays` looks at, of a run on one GPU with all packages."""
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)

    def prepared(size=1, platform="gpu"):
        devices = np.array([SimpleNamespace(platform=platform)] * size)
        return SimpleNamespace(mesh=SimpleNamespace(size=size, devices=devices))

    return prepared


def test_kernels_are_compiled_ahead_only_where_a_run_waits_for_them(card, kernels, monkeypatch):
    def settings(**more):
        return parse("train", flags(model_name_or_path="m", dataset="d", **more))[0]

    assert ahead.pays(settings(), card()) and ahead.pays(settings(packing=False), card())
    assert not ahead.pays(settings(dry_run=True), card())
    assert not ahead.pays(settings(memory_budget="9GiB"), card())
    assert not ahead.pays(settings(), card(size=2)) and not ahead.pays(settings(), card(platform="cpu"))
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "jax_triton" else name)
    assert not ahead.pays(settings(), card())
    monkeypatch.undo()
    jax.config.update("jax_enable_compilation_cache", False)
    assert not ahead.pays(settings(), card())


def test_nothing_is_begun_where_the_tokens_are_kept(place, tmp_path):
    times = []
    for _ in range(2):
        tokenize_dataset(
            open_rows(str(place / "train.jsonl")), make_tokenizer(), max_length=64, vocab_size=264, cache=tmp_path,
            anew=lambda: times.append("anew"),
        )  # fmt: skip
        assert times == ["anew", "anew"]  # before the rows are read, and before they are tokenised
    tokenize_dataset(
        open_rows(str(place / "train.jsonl")), make_tokenizer(), max_length=64, vocab_size=264,
        anew=lambda: times.append("not kept"),
    )  # fmt: skip
    assert set(times[2:]) == {"not kept"}


@pytest.fixture
def failing(monkeypatch):
    """failing(until): runs that fail after `until`, with a step whose trace and kernels are stood in for."""
    running, queued = Future(), [Future(), Future()]
    running.set_running_or_notify_cancel()
    found = SimpleNamespace(running=running, queued=queued, go=threading.Event(), begun=threading.Event())

    def trace(*_):
        assert found.go.wait(60)
        return SimpleNamespace(jaxpr=SimpleNamespace(jaxpr=None))

    def begin_compiling(_):
        found.begun.set()
        return [running, *queued]

    def run(until):
        with ahead.kernels_ahead(None, None, lambda _: None) as begin:
            begin()
            (found.thread,) = (one for one in threading.enumerate() if one.name.startswith("kernels ahead"))
            until()
            raise InputError("no row is left")

    monkeypatch.setattr(ahead, "pays", lambda *_: True)
    monkeypatch.setattr(ahead, "trace", trace)
    monkeypatch.setattr(ahead, "begin_compiling", begin_compiling)
    found.run = run
    return found


def test_a_run_that_fails_while_the_step_is_traced_does_not_wait_and_begins_no_kernel(failing):
    with pytest.raises(InputError, match="no row is left"):
        failing.run(lambda: None)
    failing.go.set()
    failing.thread.join(60)
    assert not failing.begun.is_set()


def test_a_run_that_fails_leaves_no_kernel_waiting_for_its_turn(failing):
    def compiling():
        failing.go.set()
        assert failing.begun.wait(60)

    with pytest.raises(InputError, match="no row is left"):
        failing.run(compiling)
    failing.thread.join(60)
    assert failing.running.running() and all(future.cancelled() for future in failing.queued)


def test_a_run_on_a_device_without_kernels_is_left_alone(place, tmp_path, monkeypatch):
    def refused(*_):
        raise AssertionError("traced ahead")

    monkeypatch.setattr(ahead, "trace", refused)
    named = {"model_name_or_path": place / "base", "dataset": place / "train.jsonl", "output_dir": tmp_path / "run"}
    assert run_command(train.main, [*RUN, *flags(**named, dataset_cache="none")]) == 0
    assert len(losses_of(tmp_path / "run")) == 1


def test_what_fails_ahead_fails_no_run(place, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("broken ahead")

    monkeypatch.setattr(ahead, "pays", lambda *_: True)
    monkeypatch.setattr(ahead, "trace", broken)
    named = {"model_name_or_path": place / "base", "dataset": place / "train.jsonl", "output_dir": tmp_path / "run"}
    assert run_command(train.main, [*RUN, *flags(**named, dataset_cache="none")]) == 0
    assert "broken ahead" not in capsys.readouterr().err
