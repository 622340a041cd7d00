"""Schedules against transformers' own, and as data of an optimizer: its program is the same for every run's length."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxft import LoraConfig, make_optimizer, make_schedule, make_train_step
from jaxft.config import parse
from jaxft.errors import InputError
from jaxft.load import new_adapter
from jaxft.loop import initial_optimizer_state
from jaxft.make_run import schedule_of
from jaxft.memory import batch_shapes, key_shape
from jaxft.optim import OPTIMS, state_shapes, with_loss_scale
from jaxft.schedules import SCHEDULES, Numbers, scheduled, with_numbers
from jaxft.sharding import make_mesh, mesh_sizes
from tests.tiny_models import tiny_model
from tests.tiny_runs import flags

RATE, TOTAL = 3e-4, 23
OPTIONS: dict[str, list[dict]] = {
    "cosine": [{"num_cycles": 1.5}],
    "cosine_with_restarts": [{"num_cycles": 3}],
    "cosine_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.2}],
    "polynomial": [{"lr_end": 1e-5, "power": 2.0}],
    "inverse_sqrt": [{"timescale": 5}],
    "warmup_stable_decay": [{"num_decay_steps": 8, "min_lr_ratio": 0.1}],
}
NEEDED = {"cosine_with_min_lr", "warmup_stable_decay"}  # these have no meaning without options
CASES = [(name, {}) for name in SCHEDULES if name not in NEEDED] + [(n, o) for n, each in OPTIONS.items() for o in each]


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_schedule_has_the_rates_of_transformers(name, options, warmup):
    torch = pytest.importorskip("torch", reason="transformers' schedules need torch")
    adam = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    theirs = transformers.get_scheduler(
        name, adam, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=dict(options)
    )
    expected = []
    for _ in range(TOTAL + 5):
        expected.append(theirs.get_last_lr()[0])
        adam.step()
        theirs.step()
    schedule = jax.jit(jax.vmap(make_schedule(name, RATE, warmup, TOTAL, options)))
    ours = schedule(jnp.arange(TOTAL + 5, dtype=jnp.int32))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * RATE)


def test_linear_schedule_is_the_one_written_down():
    schedule = make_schedule("linear", 1.0, 2, 6)
    rates = [round(float(schedule(step)), 6) for step in range(8)]
    assert rates == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]


def test_unknown_schedule_or_option_is_refused():
    with pytest.raises(InputError, match="'cosin' is unknown; known: linear, cosine"):
        make_schedule("cosin", RATE, 0, TOTAL)
    with pytest.raises(InputError, match=r"lr_scheduler_kwargs \{'cycles': 2\} do not fit"):
        make_schedule("cosine", RATE, 0, TOTAL, {"cycles": 2})
    with pytest.raises(InputError, match="num_decay_steps"):
        make_schedule("warmup_stable_decay", RATE, 0, TOTAL)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_schedule_whose_numbers_are_data_has_the_same_bits(name, options, warmup):
    schedule = make_schedule(name, RATE, warmup, TOTAL, options)
    constants, data = jax.jit(schedule), jax.jit(schedule.rate)
    for step in range(TOTAL + 5):
        assert constants(step) == data(step, schedule.numbers)


def test_a_schedule_of_ones_own_stays_a_closure_and_has_the_same_updates():
    params = {"w": jnp.ones((64, 80))}
    own = make_schedule("cosine", 0.1, 2, 6)
    for optim in OPTIMS:
        found = []
        for schedule in (own, lambda step: own(step)):
            tx = make_optimizer(schedule, optim=optim)
            state, update = tx.init(params), jax.jit(tx.update)
            for _ in range(4):
                updates, state = update(params, state, params)
            found.append(updates["w"])
        np.testing.assert_array_equal(*found)


@pytest.fixture(scope="module")
def adapter():
    """(model, trainable, frozen, mesh) of a tiny model on one device."""
    mesh = make_mesh(mesh_sizes(None, 1), jax.devices()[:1])
    model, params = tiny_model("qwen3", num_hidden_layers=1)
    return *new_adapter(model, params, LoraConfig(r=64), jax.random.key(0), mesh=mesh), mesh


def scheduled_by(steps: int, **more):
    """The schedule of the flags, for a run of so many steps."""
    return schedule_of(parse("train", flags(model_name_or_path="m", dataset="d", **more))[0], steps)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.1, "lr_scheduler_type": "cosine"}, {"warmup_steps": 7}])
def test_the_step_is_the_same_program_for_every_number_of_steps(optim, warmup, scaled, adapter):
    model, trainable, frozen, mesh = adapter

    def program(steps: int) -> str:
        optimizer = make_optimizer(scheduled_by(steps, **warmup), optim=optim, weight_decay=0.1)
        optimizer = with_loss_scale(optimizer) if scaled else optimizer
        step = jax.jit(make_train_step(model, optimizer=optimizer), donate_argnums=(0, 1))
        states = state_shapes(optimizer, trainable)
        with jax.set_mesh(mesh):
            return step.lower(trainable, states, frozen, batch_shapes(mesh, 1, 2, 16), key_shape(mesh)).as_text()

    assert program(10) == program(1000)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_optimizer_updates_by_the_same_program_for_every_number_of_steps(name):
    options = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "warmup_stable_decay": {"num_decay_steps": 3}}.get(name, {})
    params = {"w": jnp.ones((64, 80)), "small": jnp.ones(3)}

    def program(optim: str, warmup: int, total: int) -> str:
        tx = make_optimizer(make_schedule(name, RATE, warmup, total, options), optim=optim)
        return jax.jit(tx.update).lower(params, tx.init(params), params).as_text()

    for optim in OPTIMS:
        assert program(optim, 0, 10) == program(optim, 100, 1000)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 1), (1000, 100)])
def test_a_first_state_has_the_numbers_of_the_run_where_they_were_planned(steps, warmup, adapter):
    _, trainable, _, _ = adapter
    schedule = scheduled_by(steps, warmup_ratio=0.1)
    run = SimpleNamespace(optimizer=make_optimizer(schedule), schedule=schedule)
    found = initial_optimizer_state(run, SimpleNamespace(trainable=trainable))
    shares = np.float32(1) / np.float32([warmup, steps - warmup])
    assert scheduled(found).numbers == Numbers(warmup, steps, *shares)
    shapes = state_shapes(run.optimizer, trainable)
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    for array, shape in zip(jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)
    assert scheduled(with_numbers(found, None)) == (scheduled(found).count, None)
