"""Moments on the host: the same numbers as without, none of them on the device, checkpoints that go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import LoraConfig, make_train_step
from jaxft.config import parse
from jaxft.errors import InputError
from jaxft.load import new_adapter, on_mesh
from jaxft.memory import device_bytes
from jaxft.optim import make_optimizer, state_shapes
from jaxft.optim_paged import HOST, check_device, holds_paged, is_paged
from jaxft.sharding import make_mesh, mesh_sizes, put_batch
from jaxft.trees import flatten
from tests.tiny_models import packed_batch, tiny_model
from tests.tiny_runs import flags, losses_of, same_tensors, sums, write_base, write_rows

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}


def placed(state):
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def steps(optim: str, full: bool):
    """Parameters, states and losses after two steps of a tiny model."""
    mesh = make_mesh(mesh_sizes(None, 1), jax.devices()[:1])
    model, params = tiny_model("qwen3", num_hidden_layers=2, **SIZES)
    trainable, frozen = on_mesh(model, params, {}, mesh)
    if not full:
        model, trainable, frozen = new_adapter(model, params, LoraConfig(r=64), jax.random.key(0), mesh=mesh)
    optimizer = make_optimizer(0.01, optim=optim, weight_decay=0.1, embedding_factor=0.5)
    places = placed(state_shapes(optimizer, trainable))
    state = jax.jit(optimizer.init, out_shardings=places)(trainable)
    step = jax.jit(
        make_train_step(model, optimizer=optimizer), donate_argnums=(0, 1),
        out_shardings=(placed(trainable), places, None),
    )  # fmt: skip
    losses = []
    with jax.set_mesh(mesh):
        for number in range(2):
            one = put_batch(packed_batch(number), mesh)
            trainable, state, metrics = step(trainable, state, frozen, one, jax.random.key(number))
            losses.append(float(metrics["loss"]))
    return trainable, state, losses


@pytest.mark.parametrize("optim, full", [pytest.param("adamw", True, marks=pytest.mark.long), ("adamw_8bit", False)])
def test_the_numbers_are_those_of_the_optimizer_on_the_device_and_the_moments_are_on_the_host(optim, full):
    trained, state, losses = steps(optim, full)
    paged, host_state, paged_losses = steps(f"paged_{optim}", full)
    np.testing.assert_allclose(paged_losses, losses, rtol=1e-6)
    for (path, one), (_, two) in zip(flatten(paged), flatten(trained), strict=True):
        # the 8-bit step on the device is in place, and rounds otherwise: a code at a middle may fall to the other side
        assert np.linalg.norm(one - two) <= (1e-4 if "8bit" in optim else 1e-5) * np.linalg.norm(two), path
    assert jax.tree.map(jnp.shape, jax.tree.leaves(host_state)) == jax.tree.map(jnp.shape, jax.tree.leaves(state))
    count, *moments = next(filter(is_paged, jax.tree.leaves(host_state, is_leaf=is_paged))).inner
    assert count.sharding.memory_kind == "device" and int(count) == 2
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moments)} == {HOST}
    assert holds_paged(host_state) and not holds_paged(state)
    on_device = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert device_bytes(state) == on_device
    assert device_bytes(host_state) == on_device - sum(leaf.nbytes for leaf in jax.tree.leaves(moments))


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_updates_and_moments_are_those_without_paging(optim):
    params = {"layers": {"0": jnp.sin(jnp.arange(2.0 * 64 * 128)).reshape(2, 64, 128)}, "norm": {"weight": jnp.ones(3)}}
    found = []
    for name in (optim, f"paged_{optim}"):
        optimizer = make_optimizer(0.1, optim=name, weight_decay=0.1)
        update = jax.jit(lambda g, s, p, optimizer=optimizer: optimizer.update(g, s, p))
        updates, state = update(params, optimizer.init(params), params)
        found.append(jax.tree.leaves(update(updates, state, params)))
    assert len(found[0]) == len(found[1])
    for one, two in zip(*(map(np.asarray, leaves) for leaves in found), strict=True):
        if one.dtype == jnp.uint8:  # codes
            np.testing.assert_array_equal(one, two)
        else:  # of two programs the compiler joins other products and sums into one rounding
            assert np.linalg.norm(one - two) <= 1e-6 * np.linalg.norm(two)


@pytest.mark.parametrize("optim", ["paged_adamw", "paged_adamw_8bit"])
def test_a_step_that_is_not_finite_leaves_the_moments_as_they_were(optim):
    optimizer = make_optimizer(0.1, optim=optim, max_grad_norm=0)
    params = {"a": jnp.ones((64, 128)), "b": {"weight": jnp.ones(3)}}
    update = jax.jit(lambda state, finite: optimizer.update(params, state, params, finite=finite))
    first = optimizer.init(params)
    updates, state = update(first, jnp.bool(False))
    assert np.all(np.asarray(updates["a"]) < 0)
    jax.tree.map(np.testing.assert_array_equal, state, first)
    _, state = update(first, jnp.bool(True))
    count, mu, _ = next(filter(is_paged, jax.tree.leaves(state, is_leaf=is_paged))).inner
    assert int(count) == 1
    np.testing.assert_allclose(mu["b"]["weight"], 0.1, rtol=1e-6)


RUN = flags(max_length=64, per_device_train_batch_size=4, learning_rate=0.01, max_steps=4, save_steps=2, lora_r=64)


def test_a_run_with_moments_on_the_host_resumes_bit_for_bit(tmp_path):
    from jaxft import train

    write_base(tmp_path / "base", **SIZES)
    write_rows(tmp_path / "train.jsonl", sums(20))

    def run(name: str, *argv: str):
        own = flags(model_name_or_path=tmp_path / "base", dataset=tmp_path / "train.jsonl", output_dir=tmp_path / name)
        assert train.main([*own, *RUN, "--lr_scheduler_type=constant", "--optim=paged_adamw_8bit", *argv]) == 0
        return tmp_path / name

    whole = run("whole")
    run("part", "--max_steps=2")
    part = run("part", "--resume_from_checkpoint=auto")
    assert losses_of(part) == losses_of(whole) and len(losses_of(whole)) == 4
    assert same_tensors(whole / "adapter_model.safetensors", part / "adapter_model.safetensors")


def test_the_names_of_transformers_are_understood():
    assert parse("train", ["--optim", "paged_adamw_32bit"])[0].optim == "paged_adamw"
    assert parse("train", ["--optim", "paged_adamw_8bit"])[0].optim == "paged_adamw_8bit"


def test_a_device_without_pinned_host_memory_is_refused():
    memory = type("Memory", (), {"kind": "device"})()
    device = type("Device", (), {"device_kind": "card X", "addressable_memories": lambda self: [memory]})()
    with pytest.raises(InputError, match="card X has device only; choose the same --optim without paged_"):
        check_device(device)
    check_device(jax.devices()[0])


def test_one_leafs_moments_are_fetched_when_those_before_it_are_back():
    optimizer = make_optimizer(0.1, optim="paged_adamw", max_grad_norm=0)
    params = {name: jnp.ones(16) for name in "abc"}
    program = jax.make_jaxpr(lambda p, s: optimizer.update(p, s, p))(params, optimizer.init(params)).jaxpr
    moves = [eqn for eqn in program.eqns if eqn.primitive.name in ("optimization_barrier", "device_put")]
    assert [eqn.primitive.name for eqn in moves] == ["optimization_barrier", "device_put", "device_put"] * 3
    for back, barrier in zip(moves[2::3], moves[3::3], strict=False):
        assert set(back.outvars) <= set(barrier.invars)  # they are back before the next ones are asked for
    for barrier, fetch in zip(moves[::3], moves[1::3], strict=True):
        assert set(fetch.invars) <= set(barrier.outvars)
