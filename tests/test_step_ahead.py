"""The step compiled while the data are tokenised: which, when, when not, and that nothing else changes."""

import logging
import threading
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import budget, make_run, memory, train
from jaxft import step_ahead as ahead
from jaxft.config import parse
from jaxft.data import tokenize_dataset
from jaxft.errors import InputError, run_command
from jaxft.files import open_rows
from jaxft.kernels import attention, gpu, launch
from jaxft.models.decoder import documents_read
from jaxft.prepare import prepare_shapes
from tests.ptx import MISSING, NEEDED
from tests.tiny_runs import flags, losses_of, make_tokenizer, same_tensors, sums, write_base, write_rows

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
RUN = flags(max_length=64, per_device_train_batch_size=2, max_steps=1, save_steps=0)
THREAD = "step ahead"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with base/, whose layers every kernel serves, and train.jsonl."""
    directory = tmp_path_factory.mktemp("step_ahead")
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
    yield tmp_path / "xla" / "kernels"
    for name, value in before.items():
        jax.config.update(name, value)


def settings_of(place, **more):
    """A run's settings and what it prepares, with the schedule that is guessed."""
    named = {"model_name_or_path": place / "base", "dataset": place / "train.jsonl"}
    settings, _ = parse("train", [*RUN, *flags(**(named | more))])
    prepared = prepare_shapes(settings, str(place / "base"))
    return replace(settings, dry_run=False, device=None), make_run.guessed(settings, prepared)


@pytest.fixture
def on_h200(place):
    """on_h200(**flags): `settings_of`, with a card that is not here for the device."""
    if MISSING:
        pytest.skip(NEEDED)
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the compiler for CUDA: jax-cuda13-pjrt")
    return lambda **more: settings_of(place, bf16=True, dry_run=True, device="h200", **more)


@pytest.fixture
def programs(monkeypatch):
    """The texts of what was to be compiled, by thread; nothing is."""
    found: list[tuple[str, str]] = []

    def compile_none(lowered, *_, **__):
        found.append((threading.current_thread().name, lowered.as_text()))
        sizes = dict.fromkeys(("argument", "temp", "output", "alias", "host_argument", "host_temp"), 0)
        sizes = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
        return SimpleNamespace(memory_analysis=lambda: sizes)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_none)
    return found


def begun(settings, prepared):
    """`step_ahead` of a run on a device where it pays."""
    return ahead.step_ahead(settings, prepared, lambda some: make_run.some_optimizer(settings, some))


def run_of(settings, prepared, documents, steps=1000):
    """What `plan_run` reads of a run of so many steps."""
    optimizer = make_run.optimizer_of(settings, prepared, make_run.schedule_of(settings, steps))
    return SimpleNamespace(
        settings=settings, optimizer=optimizer, batches=SimpleNamespace(max_documents=documents), total_steps=steps
    )


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def refuse_to_compile(patch):
    import jax_triton

    def refused(*_, **__):
        raise AssertionError("compiled again")

    patch.setattr(jax_triton, "triton_call", refused)


@pytest.fixture
def gains(monkeypatch):
    """As if the device were a GPU that somebody waits for."""
    monkeypatch.setattr(ahead, "pays", lambda *_: True)


@pytest.mark.parametrize(
    "flags",
    [
        *({}, {"optim": "adamw_8bit", "gradient_accumulation_steps": 2}, {"packing": False, "mlp_tiles": 2}),
        {"peft_type": "adalora", "init_r": 6, "target_r": 4},
    ],
)
def test_the_step_made_ahead_is_the_one_that_a_run_makes_with_the_same_kernels(
    on_h200, kernels, programs, gains, flags, monkeypatch
):
    monkeypatch.setattr(launch, "_compiling", {})
    settings, prepared = on_h200(**flags)
    run = run_of(settings, prepared, 2 if settings.packing is False else None)
    with begun(settings, prepared) as (begin, take):
        begin()
        begin()
        planned = budget.plan_run(run, prepared, print, take)
    ((thread, early),) = programs
    assert thread.startswith(THREAD) and isinstance(planned, memory.Plan)
    assert "module @jit_train_step" in early and len(names(kernels)) > 5
    before = names(kernels)
    with monkeypatch.context() as patch:
        refuse_to_compile(patch)  # they are kept
        budget.plan_run(run, prepared, print)
    jax.clear_caches()
    for path in kernels.iterdir():
        path.unlink()
    budget.plan_run(run, prepared, print)
    assert [text == early for _, text in programs] == [True] * 3
    assert names(kernels) == before


def test_a_wrong_guess_of_the_way_of_attention_changes_nothing_in_the_step(on_h200, kernels, programs, gains):
    settings, prepared = on_h200()
    run = run_of(settings, prepared, 3)
    budget.plan_run(run, prepared, print)
    needed = names(kernels)
    jax.clear_caches()
    with begun(settings, prepared) as (begin, take):
        begin()
        assert take(run_of(settings, prepared, None), prepared) is not None  # it is made
        assert len(names(kernels) - needed) == 3  # Triton's for attention, which cuDNN takes here
        budget.plan_run(run, prepared, print, take)
    (_, late), (thread, other), (_, again) = programs
    assert thread.startswith(THREAD) and late == again != other and "cudnn" in late.lower()


def test_counts_of_documents_that_no_kernel_is_told_have_the_same_step(on_h200):
    _, prepared = on_h200()
    config, dtype = prepared.model.config, jnp.dtype("bfloat16")
    read = lambda most, tokens: documents_read(config, most, tokens, dtype)  # noqa: E731
    assert [read(most, 1024) for most in (None, 1, 2, 10, 11)] == [None, 1, 2, 10, None]  # by cuDNN, were it a GPU
    with gpu.compiling_for(prepared.mesh.devices.flat[0]):
        assert [read(most, 1024) for most in (None, 1, 2, 10, 11)] == [None, 1, None, None, None]  # `mosaic` serves
        assert [read(most, 4096) for most in (None, 1, 2, 4, 5)] == [None, 1, 4, 4, None]  # by two tiles
        assert [read(most, 64) for most in (None, 1, 2, 10, 11)] == [None, 1, 2, 10, None]  # and does not
    windowed = replace(config, layer_window=(0, 16))
    assert documents_read(windowed, 2, 1024, dtype) is None


@pytest.fixture
def planned_by(monkeypatch):
    """The threads that planned the steps of the runs, in order."""
    found, plan = [], memory.plan

    def noted(*arguments, **options):
        found.append(threading.current_thread().name)
        return plan(*arguments, **options)

    monkeypatch.setattr(memory, "plan", noted)
    return found


@pytest.fixture
def trained(place, tmp_path):
    """trained(name, **flags): the directory of a finished run of three steps."""

    def run(name, **more):
        named = {"model_name_or_path": place / "base", "dataset": place / "train.jsonl", "output_dir": tmp_path / name}
        assert (
            run_command(train.main, [*RUN, *flags(**(named | {"dataset_cache": "none", "max_steps": 3} | more))]) == 0
        )
        return tmp_path / name

    return run


def same_run(one, two) -> bool:
    return losses_of(one) == losses_of(two) and same_tensors(
        *(path / "adapter_model.safetensors" for path in (one, two))
    )


@pytest.mark.parametrize(
    ("more", "right"),
    [
        ({"packing": False}, True),
        (
            {"packing": False, "optim": "adamw_8bit", "max_steps": -1, "num_train_epochs": 0.5, "warmup_ratio": 0.5},
            True,
        ),
        ({}, False),  # so few documents are told to cuDNN, for all that is known on a CPU
        ({"packing": False, "peft_type": "adalora", "init_r": 6, "target_r": 4}, True),
        ({"packing": False, "peft_type": "adalora", "max_steps": -1, "num_train_epochs": 0.5}, False),
    ],
)
def test_a_run_takes_the_step_that_was_guessed_right_and_compiles_it_once(
    more, right, trained, planned_by, gains, monkeypatch
):
    beside = trained("beside", **more)
    own = planned_by.count("MainThread")
    assert own == 0 and len(planned_by) == 1 if right else own == 1
    monkeypatch.setattr(ahead, "pays", lambda *_: False)
    assert same_run(trained("alone", **more), beside)


def test_many_documents_in_a_row_are_guessed_right(trained, planned_by, gains, monkeypatch):
    monkeypatch.setattr(attention, "CUDNN_DOCUMENTS", 1)
    trained("many")
    assert len(planned_by) == 1 and planned_by[0].startswith(THREAD)


def test_a_run_waits_for_the_step_that_is_being_compiled(trained, planned_by, gains, monkeypatch):
    asked, plan_of = threading.Event(), ahead.plan_of

    def late(*arguments, **options):
        assert asked.wait(60)
        return plan_of(*arguments, **options)

    def same(*_):
        asked.set()  # the run wants it now, and it has not begun
        return True

    monkeypatch.setattr(ahead, "plan_of", late)
    monkeypatch.setattr(ahead, "is_same", same)
    trained("waiting", packing=False)
    assert len(planned_by) == 1 and planned_by[0].startswith(THREAD)


def test_a_run_does_not_wait_for_a_step_that_is_not_its_own(trained, planned_by, gains, monkeypatch):
    go, plan_of, ended = threading.Event(), ahead.plan_of, Future()

    def stuck(*arguments, **options):
        assert go.wait(60)
        try:
            plan_of(*arguments, **options)
        except CancelledError:
            ended.set_result("without compiling it")
            raise

    monkeypatch.setattr(ahead, "plan_of", stuck)
    trained("packed")
    assert planned_by == ["MainThread"]
    go.set()
    assert ended.result(60) == "without compiling it"


def test_what_fails_ahead_fails_no_run_and_is_met_by_its_own_plan(trained, planned_by, gains, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("broken ahead")

    with monkeypatch.context() as patch:
        patch.setattr(ahead, "plan_of", broken)
        trained("whole", packing=False)
    assert planned_by == ["MainThread"] and "broken ahead" not in capsys.readouterr().err

    def refused(*_, **__):
        planned_by.append(threading.current_thread().name)
        raise InputError("no such step")

    planned_by.clear()
    monkeypatch.setattr(memory, "plan", refused)
    with pytest.raises(AssertionError):
        trained("refused", packing=False)
    assert len(planned_by) == 2 and planned_by[1] == "MainThread"
    assert capsys.readouterr().err.endswith("error: no such step\n")


def test_nothing_is_said_of_a_step_before_a_run_takes_it(place, gains, programs, caplog, monkeypatch):
    gpu._log_once.cache_clear()
    settings, prepared = settings_of(place, packing=False)

    def said():
        return [record.getMessage() for record in caplog.records if record.name == "jaxft"]

    def same(*_):
        assert ended.wait(60) and not said()
        return True

    ended, plan_of = threading.Event(), ahead.plan_of

    def noted(*arguments, **options):
        try:
            return plan_of(*arguments, **options)
        finally:
            ended.set()

    monkeypatch.setattr(ahead, "plan_of", noted)
    monkeypatch.setattr(ahead, "is_same", same)
    with caplog.at_level(logging.INFO, "jaxft"), begun(settings, prepared) as (begin, take):
        begin()
        assert take(run_of(settings, prepared, 2), prepared) is not None
    ways = dict(line.split(": ", 1) for line in said())
    assert len(ways) == len(said()) and {"attention", "mlp", "qkv"} <= ways.keys()  # each once
    assert ways["attention"].startswith("reference")


@pytest.fixture
def card():
    """What `pays` looks at, of a run on one GPU."""

    def prepared(size=1, platform="gpu"):
        devices = np.array([SimpleNamespace(platform=platform)] * size)
        return SimpleNamespace(mesh=SimpleNamespace(size=size, devices=devices))

    return prepared


def test_a_step_is_compiled_ahead_only_where_a_run_waits_for_it(card, monkeypatch):
    def settings(**more):
        return parse("train", flags(model_name_or_path="m", dataset="d", **more))[0]

    assert ahead.pays(settings(), card()) and ahead.pays(settings(packing=False), card())
    assert not ahead.pays(settings(dry_run=True), card())
    assert not ahead.pays(settings(memory_budget="9GiB"), card())
    assert not ahead.pays(settings(), card(size=2)) and not ahead.pays(settings(), card(platform="cpu"))
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)  # XLA needs no Triton
    assert ahead.pays(settings(), card())


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


def test_a_run_whose_tokens_are_kept_plans_its_step_itself(trained, tmp_path, planned_by, gains):
    kept = {"dataset_cache": tmp_path / "tokens", "packing": False}
    trained("cold", **kept)
    trained("warm", **kept)
    assert planned_by[0].startswith(THREAD) and planned_by[1:] == ["MainThread"]


def test_a_run_on_a_cpu_plans_its_step_itself(trained, planned_by):
    trained("alone", packing=False)
    assert planned_by == ["MainThread"]


@pytest.mark.parametrize("last", range(4))
def test_a_plan_ends_at_the_next_part_of_its_work(last, place, programs, monkeypatch):
    parts, compiling, done = [], [Future()], Exception("ended")
    compiling[0].set_result(None)
    monkeypatch.setattr(memory, "begin_compiling", lambda _: parts.append("kernels") or compiling)

    def between(kernels):
        parts.append(len(kernels))
        if len([part for part in parts if part != "kernels"]) > last:
            raise done

    settings, prepared = settings_of(place)
    with pytest.raises(Exception, match="ended"):
        memory.plan_of(settings, prepared, make_run.some_optimizer(settings, prepared), None, between=between)
    assert parts == [0, "kernels", 1, 0, 0][: last + 1 + (last > 0)] and not programs


@pytest.fixture
def failing(gains, monkeypatch):
    """failing(until): runs that fail after `until`, with a plan whose parts are stood in for."""
    running, queued = Future(), [Future(), Future()]
    running.set_running_or_notify_cancel()
    found = SimpleNamespace(
        running=running,
        queued=queued,
        go=threading.Event(),
        begun=threading.Event(),
        left=threading.Event(),
        parts=[],
        thread=Future(),
    )

    def plan_of(*_, between):
        found.thread.set_result(threading.current_thread())
        assert found.go.wait(60)
        between([])
        found.parts.append("traced")
        between([running, *queued])
        found.begun.set()
        assert found.left.wait(60)
        between([])
        found.parts.append("kernels compiled")

    def run(until):
        with ahead.step_ahead(None, None, lambda _: None) as (begin, _):
            begin()
            found.thread.result(60)
            until()
            raise InputError("no row is left")

    monkeypatch.setattr(ahead, "guess", lambda _: None)
    monkeypatch.setattr(ahead, "plan_of", plan_of)
    found.run = run
    return found


def test_a_run_that_fails_while_the_step_is_traced_does_not_wait_and_begins_no_kernel(failing):
    with pytest.raises(InputError, match="no row is left"):
        failing.run(lambda: None)
    failing.go.set()
    failing.thread.result().join(60)
    assert not failing.parts and not failing.begun.is_set()


def test_a_run_that_fails_leaves_no_kernel_waiting_for_its_turn_and_compiles_no_step(failing):
    def compiling():
        failing.go.set()
        assert failing.begun.wait(60)

    with pytest.raises(InputError, match="no row is left"):
        failing.run(compiling)
    assert failing.running.running() and all(future.cancelled() for future in failing.queued)
    failing.left.set()
    failing.thread.result().join(60)
    assert failing.parts == ["traced"]
