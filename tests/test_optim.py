"""The optimizer against torch's AdamW, and rounding and loss scaling alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxft import make_optimizer
from jaxft.convert.hf import places
from jaxft.optim import apply_updates, decays, next_loss_scale, stochastic_round, with_loss_scale
from jaxft.trees import flatten
from tests.tiny_models import CONFIGS, hf_config, tiny_model


def some_tree(seed, dtype=np.float32):
    random = np.random.default_rng(seed)
    shapes = {"q_proj": {"weight": (3, 4), "bias": (3,)}, "input_layernorm": {"weight": (4,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.7, 1e3])
def test_optimizer_takes_the_steps_of_torch_adamw(max_grad_norm):
    torch = pytest.importorskip("torch", reason="the reference is torch's AdamW")
    params = some_tree(0)
    theirs = {path: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for path, leaf in flatten(params)}
    decayed = theirs["q_proj/weight"]
    rest = [p for p in theirs.values() if p is not decayed]
    settings = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    adam = torch.optim.AdamW(
        [{"params": [decayed], "weight_decay": 0.3}, {"params": rest, "weight_decay": 0}], **settings
    )
    tx = make_optimizer(
        0.05, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.3, max_grad_norm=max_grad_norm
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(5):
        gradients = some_tree(step + 1)
        for path, gradient in flatten(gradients):
            theirs[path].grad = torch.tensor(np.asarray(gradient))
        torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm or float("inf"))
        adam.step()
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for path, leaf in flatten(params):
        np.testing.assert_allclose(leaf, theirs[path].detach().numpy(), rtol=2e-5, atol=1e-6, err_msg=path)


def test_moments_are_float32_whatever_the_parameters_are():
    params = some_tree(0, jnp.bfloat16)
    tx = make_optimizer(1e-3, weight_decay=0.1)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(some_tree(1, jnp.bfloat16), state, params)
    floats = [leaf for leaf in jax.tree.leaves((state, updates)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 9
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_decay_touches_what_transformers_trainer_decays(name):
    torch = pytest.importorskip("torch", reason="the reference is transformers' Trainer")
    model, _ = tiny_model(name)
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(hf_config(name))
    expected = set(transformers.Trainer.get_decay_parameter_names(None, reference))
    if reference.config.tie_word_embeddings:  # one tensor, which the Trainer lists under both of its names
        expected.discard("lm_head.weight")
    mask = dict(flatten(decays(model.shapes)))
    ours = {hf for hf, place in places(model.family.names, model.shapes).items() if mask[place.path]}
    assert ours == expected


def test_stochastic_rounding_keeps_the_expectation():
    value = jnp.float32(1 + 0.3 * 2**-7)  # three tenths of the way from 1 to the next bfloat16
    count = 20_000
    rounded = np.asarray(
        jax.jit(lambda key: stochastic_round(jnp.full(count, value), key))(jax.random.key(0)), np.float32
    )
    assert set(np.unique(rounded)) == {np.float32(1), np.float32(1 + 2**-7)}
    share = (rounded > 1).mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5  # four standard errors
    negative = np.asarray(stochastic_round(jnp.full(count, -value), jax.random.key(1)), np.float32)
    assert abs((negative < -1).mean() - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5


def test_stochastic_rounding_leaves_what_bfloat16_holds():
    exact = jnp.array([0.0, -0.0, 1.0, -2.5, 1.5 * 2.0**127, 2.0**-126, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for seed in range(3):
        rounded = stochastic_round(exact, jax.random.key(seed))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_small_updates_of_bfloat16_are_lost_only_most_of_the_time():
    """1 + 2⁻¹¹ is 1 in bfloat16; a thousand such steps make 1 + 1000 · 2⁻¹¹ on average."""
    params = {"weight": jnp.ones(512, jnp.bfloat16), "other": jnp.ones(3, jnp.float32)}
    updates = {"weight": jnp.full(512, 2.0**-11, jnp.float32), "other": jnp.full(3, 2.0**-11, jnp.float32)}

    @jax.jit
    def many(params):
        return jax.lax.scan(lambda p, key: (apply_updates(p, updates, key), None), params, keys)[0]

    keys = jax.random.split(jax.random.key(0), 1000)
    after = many(params)
    assert after["weight"].dtype == jnp.bfloat16
    assert abs(float(after["weight"].astype(jnp.float32).mean()) - (1 + 1000 * 2.0**-11)) < 0.01
    np.testing.assert_allclose(after["other"], 1 + 1000 * 2.0**-11, rtol=1e-6)


def test_loss_scale_halves_on_overflow_and_doubles_after_many_finite_steps():
    state = with_loss_scale(make_optimizer(1e-3)).init(some_tree(0))
    assert float(state.scale) == 65536
    halved = next_loss_scale(state._replace(finite_steps=jnp.int32(7)), jnp.bool_(False), state.inner)
    assert (float(halved.scale), int(halved.finite_steps)) == (32768, 0)
    grown = next_loss_scale(state._replace(finite_steps=jnp.int32(1999)), jnp.bool_(True), state.inner)
    assert (float(grown.scale), int(grown.finite_steps)) == (131072, 0)
    counted = next_loss_scale(state, jnp.bool_(True), state.inner)
    assert (float(counted.scale), int(counted.finite_steps)) == (65536, 1)
    smallest = next_loss_scale(state._replace(scale=jnp.float32(1)), jnp.bool_(False), state.inner)
    assert float(smallest.scale) == 1
