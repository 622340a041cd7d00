"""The fused linear and MLP operations against their references, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.linear import Weights, dora, linears, times_scale
from jaxft.kernels.mlp import mlp
from jaxft.quant import dense, quantize
from tests.tiny_layers import KEY, QUICKLY, distance, group, layer, mlp_case, products, raised, with_gradients


@pytest.mark.parametrize("kind", ["linears", "mlp"])
def test_factors_rounded_beforehand_change_no_bit_and_the_gradients_are_those_of_the_factors(kind):
    random = np.random.default_rng(3)
    sizes = [(16, 12), (16, 12), (12, 16)]
    layers = tuple(layer(random, *size, jnp.bfloat16) for size in sizes)
    x = jnp.asarray(random.normal(0, 1, (2, 5, 12)), jnp.bfloat16)

    def outputs(ready: bool):
        def of(x, loras):
            own = tuple(one._replace(lora=lora) for one, lora in zip(layers, loras, strict=True))
            if ready:
                a_and_b = [(a.astype(x.dtype), times_scale(b, scale).astype(x.dtype)) for a, b, scale in loras]
                own = tuple(
                    one._replace(rounded=jax.lax.stop_gradient(both)) for one, both in zip(own, a_and_b, strict=True)
                )
            return linears(x, own[:2]) if kind == "linears" else mlp(x, *own, activation="silu", tiles=1)

        return with_gradients(of, x, tuple(one.lora for one in layers))

    assert distance(outputs(True), outputs(False)) == 0


@pytest.mark.parametrize(
    "name, dropout",
    [("qkv", 0.0), ("qkv_bias", 0.3), ("some_lora", 0.0), ("some_lora", 0.3), ("no_lora", 0.0), ("one", 0.0)],
)
def test_fused_linears_equal_the_reference_in_float32(name, dropout):
    x, layers = group(name, jnp.float32)

    def run(implementation):
        return with_gradients(
            lambda x, layers: linears(x, layers, dropout=dropout, key=KEY, implementation=implementation), x, layers
        )

    assert distance(run("fused"), run("reference")) < 1e-5


@pytest.mark.parametrize("name", ["qkv_bias", "some_lora"])
def test_fused_linears_in_bfloat16_are_no_further_from_the_truth_than_the_reference(name):
    x, layers = group(name, jnp.bfloat16)
    truth = with_gradients(lambda x, layers: linears(x, layers, implementation="reference"), raised(x), raised(layers))
    errors = {}
    for implementation in ("fused", "reference"):
        found = with_gradients(lambda x, layers, i=implementation: linears(x, layers, implementation=i), x, layers)
        errors[implementation] = distance(found, truth)
    assert errors["fused"] < 2**-7  # a result rounded a few times to 8 bits of mantissa
    assert errors["fused"] < 1.2 * errors["reference"]


@pytest.mark.parametrize("scanned", [False, True])
def test_a_frozen_weight_costs_no_gradient_and_a_trained_one_does(scanned):
    x, layers = group("qkv", jnp.bfloat16)
    frozen = tuple(one.weight for one in layers)
    loras = tuple(one.lora for one in layers)

    def loss(loras, frozen, x):
        def body(x, _):
            weights = tuple(Weights(w, None, lora) for w, lora in zip(frozen, loras, strict=True))
            q, k, v = linears(x, weights)
            return x + q[..., :12], (k, v)

        if scanned:
            out = jax.lax.scan(jax.checkpoint(body), x, None, length=2)
        else:
            out = body(x, None)
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(out))

    weight_shapes = {w.shape for w in frozen}
    lora_only = products(jax.grad(loss), loras, frozen, x)
    assert not weight_shapes & {shape for shape, _ in lora_only}
    everything = products(jax.grad(loss, argnums=(0, 1)), loras, frozen, x)
    assert weight_shapes <= {shape for shape, _ in everything}
    # A's gradients are one product for all three layers, (3R, I), and B's are (O, R): float32
    small = {shape: dtype for shape, dtype in lora_only if shape in ((9, 12), (16, 3), (8, 3), (6, 3))}
    assert small == {(9, 12): jnp.float32, (16, 3): jnp.float32, (8, 3): jnp.float32, (6, 3): jnp.float32}


def test_x_is_read_once_for_all_low_rank_products():
    x, layers = group("qkv", jnp.bfloat16)
    shapes = [shape for shape, _ in products(lambda x, layers: linears(x, layers), x, layers)]
    assert shapes.count((2, 7, 9)) == 1 and (2, 7, 3) not in shapes


def test_linears_refuses_an_unknown_implementation():
    x, layers = group("one", jnp.float32)
    with pytest.raises(ValueError, match="'fast'"):
        linears(x, layers, implementation="fast")


@pytest.mark.parametrize(
    "activation, how, dropout",
    [
        ("silu", dict(bias=True), 0.3),
        ("silu", dict(rank=0), 0.0),
        ("gelu", dict(rank=0, bias=True), 0.0),
        ("gelu_pytorch_tanh", dict(), 0.0),
    ],
)
def test_fused_mlp_equals_the_reference_in_float32(activation, how, dropout):
    case = mlp_case(jnp.float32, **how)
    keys = tuple(jax.random.split(KEY))

    def run(implementation):
        return with_gradients(
            lambda *arguments: mlp(
                *arguments, activation=activation, dropout=dropout, keys=keys, implementation=implementation
            ),
            *case,
        )

    assert distance(run("fused"), run("reference")) < 1e-5


@pytest.mark.parametrize("tokens, tiles", [(7, 1), (7, 3), (1, 3)])
def test_tiled_mlp_equals_the_whole_one(tokens, tiles):
    case = mlp_case(jnp.float32, bias=True, tokens=tokens)
    whole = with_gradients(lambda *arguments: mlp(*arguments, activation="silu"), *case)
    assert distance(with_gradients(lambda *a: mlp(*a, activation="silu", tiles=tiles), *case), whole) < 1e-5


@pytest.mark.parametrize("tiles", [None, 3])
def test_fused_mlp_in_bfloat16_is_no_further_from_the_truth_than_the_reference(tiles):
    case = mlp_case(jnp.bfloat16, tokens=64)
    truth = with_gradients(lambda *a: mlp(*a, activation="silu", implementation="reference"), *raised(case))
    reference = with_gradients(lambda *a: mlp(*a, activation="silu", implementation="reference"), *case)
    found = with_gradients(lambda *a: mlp(*a, activation="silu", tiles=tiles), *case)
    assert distance(found, truth) < 2**-6
    assert distance(found, truth) < 1.2 * distance(reference, truth)


@pytest.mark.parametrize("kind, tiles", [("nf4", None), ("nf4", 1), ("int8", 2)])
def test_quantised_weights_give_what_their_dense_arrays_give(kind, tiles):
    x, *plain = mlp_case(jnp.float32, bias=True)
    held = jax.jit(lambda weights: [quantize(weight, kind) for weight in weights])([one.weight for one in plain])

    def run(weights, x, loras):
        return mlp(
            x,
            *(Weights(w, one.bias, lora) for w, one, lora in zip(weights, plain, loras, strict=True)),
            activation="silu",
            tiles=tiles,
        )

    arguments = x, [one.lora for one in plain]
    found = with_gradients(lambda *a: run(held, *a), *arguments)
    wanted = with_gradients(lambda *a: run([dense(w, jnp.float32) for w in held], *a), *arguments)
    assert distance(found, wanted) < 1e-6


def test_a_quantised_weight_is_kept_as_it_is_held():
    x, layers = group("qkv", jnp.bfloat16)
    layers = tuple(
        layer._replace(weight=jax.jit(quantize, static_argnums=1)(layer.weight, "nf4")) for layer in layers[:2]
    )
    _, pull = jax.vjp(lambda x: linears(x, layers), x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
    assert not {layer.weight.shape for layer in layers} & set(shapes)
    assert {layer.weight.codes.shape for layer in layers} <= set(shapes)


def test_tiled_mlp_with_dropout_draws_the_same_masks_in_backward():
    x, gate, up, down = mlp_case(jnp.float32)
    keys = tuple(jax.random.split(KEY))

    def run(scale):
        scaled = (down.lora[0], down.lora[1] * scale, down.lora[2])
        changed = Weights(down.weight, None, scaled)
        return jnp.sum(mlp(x, gate, up, changed, activation="silu", dropout=0.4, keys=keys, tiles=3))

    # the output is linear in B, so that the slope is the difference of two values, if the masks are the same ones
    value, slope = (jax.jit(function, compiler_options=QUICKLY) for function in (run, jax.grad(run)))
    assert np.isclose(slope(1.0), value(2.0) - value(1.0), rtol=1e-4)


def test_the_mlp_keeps_what_it_says_for_backward():
    x, gate, up, down = mlp_case(jnp.bfloat16, tokens=32)

    def residuals(tiles):
        _, pull = jax.vjp(
            lambda gate_a: mlp(
                x, Weights(gate.weight, None, (gate_a, *gate.lora[1:])), up, down, activation="silu", tiles=tiles
            ),
            gate.lora[0],
        )
        shapes = [leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
        return sorted(shape for shape in shapes if shape[:2] == (2, 32))

    assert residuals(tiles=None) == [(2, 32, 3), (2, 32, 6), (2, 32, 12), (2, 32, 20), (2, 32, 20)]
    assert residuals(tiles=1) == [(2, 32, 3), (2, 32, 12)]
    assert residuals(tiles=4) == [(2, 32, 12)]


def test_gate_and_up_can_be_kept_by_name():
    x, gate, up, down = mlp_case(jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names("mlp_gate", "mlp_up")

    def shapes(policy):
        function = jax.checkpoint(lambda x: mlp(x, gate, up, down, activation="silu"), policy=policy)
        return [shape for shape, _ in products(jax.grad(lambda x: jnp.sum(function(x).astype(jnp.float32))), x)]

    wide = (2, 7, 20)  # gate and up with their branches, dh with its own: 6 products, and 4 more where computed again
    assert shapes(policy).count(wide) == 6
    assert shapes(jax.checkpoint_policies.nothing_saveable).count(wide) == 10


def test_a_tiled_mlp_needs_the_memory_of_one_tile():
    x, gate, up, down = mlp_case(jnp.float32, tokens=2048)

    def temporary(tiles):
        def loss(x, gate, up, down):
            return jnp.sum(mlp(x, gate, up, down, activation="silu", tiles=tiles))

        compiled = jax.jit(jax.grad(loss, argnums=0)).lower(x, gate, up, down).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    F_bytes = 2 * 2048 * 20 * 4
    assert temporary(1) > 3 * F_bytes
    assert temporary(8) < 2 * F_bytes  # a tile's arrays, and x, dx cut into tiles


def test_a_doras_parts_are_summed_in_float32_and_rounded_once():
    random = np.random.default_rng(0)
    x, w, a, b, bias, add = (
        jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
        for shape in ((1, 64, 32), (48, 32), (4, 32), (48, 4), (48,), (1, 64, 48))
    )
    layer = Weights(w, bias, (a, b, jnp.float32(0.1)), jnp.asarray(random.uniform(5, 7, 48), jnp.float32))
    (y,) = linears(x, (layer,), add=add)
    (product,) = linears(x, (layer._replace(bias=None, magnitude=None),))
    c = dora.factor(layer.magnitude, dora.norm(layer))
    parts = (np.float32(part) for part in (product, c, bias, add))
    product, c, bias, add = parts
    np.testing.assert_array_equal(y, jnp.asarray(product * c + bias + add).astype(jnp.bfloat16))
