"""Residuals on the host: the same numbers as keeping them, and only what was asked for is kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxft import doctor, offload_check
from jaxft.errors import RunError
from jaxft.models.offload import checkpointed_scan, unrolled_scan

L, B, D = 5, 4, 8
kept = jax.checkpoint_policies.save_only_these_names


def body(policy):
    def block(x, layer, shared, number):
        hidden = checkpoint_name(jnp.tanh(x @ layer["in"]), "hidden")
        small = checkpoint_name(jnp.sum(hidden, axis=1, keepdims=True), "small")
        factor = layer["factor"].astype(jnp.float32) / (1 + number).astype(jnp.float32)
        return x + hidden * shared @ layer["out"] * factor + jnp.sin(small) * jnp.sin(hidden)

    return jax.checkpoint(block, prevent_cse=False, policy=policy)


def plain(x, layers, shared):
    numbers = jnp.arange(len(layers["factor"]))
    return jax.lax.scan(lambda x, own: (body(None)(x, own[0], shared, own[1]), None), x, (layers, numbers))[0]


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    layers = {
        "in": jax.random.normal(keys[0], (L, D, D)),
        "out": jax.random.normal(keys[1], (L, D, D)),
        "factor": jnp.arange(1, L + 1, dtype=jnp.int32),
    }
    return jax.random.normal(keys[2], (B, D)), layers, jax.random.normal(keys[3], (B, D))


def trained_part(layers):
    return {name: layers[name] for name in ("in", "out")}


def loss(run, x, trained, layers, shared):
    return jnp.sum(jnp.sin(run(x, {**layers, **trained}, shared)))


@pytest.mark.parametrize("count", [1, 3, L])
@pytest.mark.parametrize(
    ("names", "host", "ahead"),
    [
        *(((), True, None), (("hidden",), True, None), (("hidden",), True, 1), (("hidden",), True, 0)),
        *((("small",), True, None), (("hidden", "small"), True, 1), (("hidden", "small"), False, None)),
    ],
    ids=str,
)
def test_it_equals_a_scan_that_keeps_everything(inputs, names, host, ahead, count):
    x, layers, shared = inputs
    layers = jax.tree.map(lambda leaf: leaf[:count], layers)

    def offloaded(x, layers, shared):
        return checkpointed_scan(body(kept(*names)), host, ahead, False, (), x, layers, shared)

    grads = [
        jax.jit(jax.value_and_grad(lambda x, trained, run=run: loss(run, x, trained, layers, shared), (0, 1)))(
            x, trained_part(layers)
        )
        for run in (plain, offloaded)
    ]
    for want, got in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(grads[1]), strict=True):
        assert jnp.max(jnp.abs(want - got)) <= 1e-5 * jnp.max(jnp.abs(want))


@pytest.mark.parametrize(("names", "kept_layers"), [((), 1), (("hidden",), 2), (("hidden", "small"), L - 1)])
def test_the_last_layers_may_keep_more_and_on_the_device(inputs, names, kept_layers):
    x, layers, shared = inputs

    def run(x, layers, shared):
        tail = (body(kept("hidden", "small")),) * kept_layers
        return checkpointed_scan(body(kept(*names)), True, 1, False, tail, x, layers, shared)

    gradient = lambda run: jax.value_and_grad(lambda x, own: loss(run, x, own, layers, shared), (0, 1))  # noqa: E731
    wanted, got = (jax.jit(gradient(one))(x, trained_part(layers)) for one in (plain, run))
    for want, one in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert jnp.max(jnp.abs(want - one)) <= 1e-5 * jnp.max(jnp.abs(want))
    text = str(jax.make_jaxpr(gradient(run))(x, trained_part(layers)))
    rows = L - kept_layers
    assert f"f32<host>[{rows},{B},{D}]" in text and f"f32<host>[{L},{B},{D}]" not in text


@pytest.mark.parametrize(("names", "far"), [((), 1), (("hidden",), 2), (("small",), 1), (("hidden", "small"), 2)])
def test_only_the_input_and_what_is_named_and_large_goes_to_the_host(inputs, names, far):
    x, layers, shared = inputs
    run = lambda *inputs: checkpointed_scan(body(kept(*names)), True, None, False, (), *inputs)  # noqa: E731
    grad = jax.grad(lambda x, trained: loss(run, x, trained, layers, shared), (0, 1))
    loops = [
        equation
        for equation in jax.make_jaxpr(grad)(x, trained_part(layers)).eqns
        if equation.primitive.name == "while"
    ]
    stacks = [variable.aval for variable in loops[0].outvars if variable.aval.memory_space == jax.memory.Space.Host]
    # no two of one shape: XLA would make them one array and copy it whole
    assert [stack.shape for stack in stacks] == [(L + number, B, D) for number in range(far)]


def test_an_array_without_numbers_has_a_gradient_without_numbers(inputs):
    x, _, shared = inputs
    nothing, one = jnp.zeros((L, 0, D)), jnp.ones((L, D))

    def run(nothing, one):
        own = lambda x, layer, shared, _: x * jnp.expand_dims(layer[1], 0) + jnp.sum(layer[0])  # noqa: E731
        return jnp.sum(checkpointed_scan(jax.checkpoint(own), False, None, False, (), x, (nothing, one), shared))

    grads = jax.grad(run, (0, 1))(nothing, one)
    assert grads[0].shape == nothing.shape and jnp.all(jnp.isfinite(grads[1]))


def test_a_derivative_of_what_all_layers_share_is_refused(inputs):
    x, layers, shared = inputs
    with pytest.raises(TypeError, match="share"):
        jax.grad(lambda shared: jnp.sum(checkpointed_scan(body(kept()), True, None, False, (), x, layers, shared)))(
            shared
        )


@pytest.mark.parametrize(
    "transformed",
    [lambda grad: jax.vmap(grad), lambda grad: jax.vmap(jax.jit(grad)), lambda grad: jax.jit(jax.vmap(grad))],
)
def test_a_gradient_under_vmap_is_refused_where_residuals_wait_on_the_host(inputs, transformed):
    x, layers, shared = inputs
    both = jnp.stack([x, x])

    def grad(host):
        return jax.grad(
            lambda x: jnp.sum(checkpointed_scan(body(kept("hidden")), host, None, False, (), x, layers, shared))
        )

    assert transformed(grad(False))(both).shape == both.shape
    with pytest.raises(NotImplementedError, match=r"no gradient under jax\.vmap; take gradient_checkpointing='full'"):
        transformed(grad(True))(both)


def constants(x, layers, shared):
    """A scan whose layers all read a table that is no argument."""
    table = np.linspace(0.01, 0.02, 3 * D, dtype=np.float32).reshape(3, D)

    def block(x, layer, shared, number):
        factor = layer["factor"].astype(jnp.float32) / (1 + number).astype(jnp.float32)
        return x + jnp.tanh(x @ layer["in"]) * jnp.sin(table).sum(axis=0, keepdims=True) * factor

    return checkpointed_scan(jax.checkpoint(block, prevent_cse=False), False, None, False, (), x, layers, shared)


@pytest.mark.parametrize(
    "run", [constants, lambda *a: checkpointed_scan(body(kept("hidden")), False, None, False, (), *a)]
)
def test_without_jit_the_gradients_are_the_same(inputs, run):
    x, layers, shared = inputs
    gradient = jax.grad(lambda x, trained: loss(run, x, trained, layers, shared), (0, 1))
    wanted = jax.jit(gradient)(x, trained_part(layers))
    with jax.disable_jit():
        got = gradient(x, trained_part(layers))
    for want, one in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert jnp.max(jnp.abs(want - one)) <= 1e-5 * jnp.max(jnp.abs(want))


def test_what_is_the_same_in_each_layer_is_not_put_away_for_each(inputs):
    x, layers, shared = inputs
    gradient = jax.grad(lambda x, trained: loss(constants, x, trained, layers, shared), (0, 1))
    text = jax.jit(gradient).lower(x, trained_part(layers)).as_text()
    assert f"tensor<3x{D}xf32>" in text and f"tensor<{L}x3x{D}xf32>" not in text


def unrolled(x, layers, shared):
    return unrolled_scan(body(None), x, layers, shared)


@pytest.mark.parametrize("count", [1, L])
def test_unrolled_layers_give_the_gradients_of_a_scan_and_are_a_loop_where_nothing_is_differentiated(inputs, count):
    x, layers, shared = inputs
    layers = jax.tree.map(lambda leaf: leaf[:count], layers)

    def gradient(run):
        return jax.value_and_grad(lambda x, trained: loss(run, x, trained, layers, shared), (0, 1))

    wanted, got = (jax.jit(gradient(run))(x, trained_part(layers)) for run in (plain, unrolled))
    for want, one in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert jnp.max(jnp.abs(want - one)) <= 1e-5 * jnp.max(jnp.abs(want))
    forward = jax.jit(lambda x, trained: loss(unrolled, x, trained, layers, shared))
    texts = [run.lower(x, trained_part(layers)).as_text() for run in (forward, jax.jit(gradient(unrolled)))]
    assert [len(re.findall(r"stablehlo\.while", text)) for text in texts] == [1, 0]
    with pytest.raises(TypeError, match="share"):
        jax.grad(lambda shared: jnp.sum(unrolled(x, layers, shared)))(shared)


def test_the_check_before_a_run_finds_equal_gradients_here_and_wrong_ones_where_a_residual_is_swapped(monkeypatch):
    assert offload_check.difference() <= 1e-5 < offload_check.TOLERANCE
    assert doctor.offload_finding().status == doctor.OK

    # what a wrong slot gives: the layers' residuals in another order
    def swapped(body, host, ahead, dense, tail, x, layers, shared):
        return checkpointed_scan(body, host, ahead, dense, tail, x, layers[::-1], shared)

    monkeypatch.setattr(offload_check, "checkpointed_scan", swapped)
    with pytest.raises(RunError, match=r"other gradients with jax .*; take --gradient_checkpointing full"):
        offload_check.check_offload()
    assert doctor.offload_finding().status == doctor.FAIL
    monkeypatch.setattr(offload_check, "difference", lambda: float("nan"))
    with pytest.raises(RunError, match="nan"):
        offload_check.check_offload()
