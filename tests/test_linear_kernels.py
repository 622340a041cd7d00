"""The fused linear and MLP operations and the tiled cross entropy against their references, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.linear import Weights, dora, linears, times_scale
from jaxft.kernels.linear_cross_entropy import linear_cross_entropy, reference, tile_rows, tiled
from jaxft.kernels.mlp import mlp
from jaxft.programs import programs_in
from jaxft.quant import dense, quantize

KEY = jax.random.key(7)
QUICKLY = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}  # compiling is the time


def layer(random, rows, columns, dtype, *, rank=3, bias=False) -> Weights:
    def draw(*shape, scale=0.5):
        return jnp.asarray(random.normal(0, scale, shape), jnp.float32)

    lora = (draw(rank, columns), draw(rows, rank), jnp.float32(1.7)) if rank else None
    return Weights(draw(rows, columns, scale=0.3).astype(dtype), draw(rows).astype(dtype) if bias else None, lora)


def distance(found, wanted) -> float:
    """The largest ‖Δ‖ / ‖wanted‖ of any leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    as64 = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in as64)


def with_gradients(function, *arguments):
    """Outputs and gradients of a loss in which every output element has another weight.

    The square keeps the gradient of a scale, which is one number, from being a sum that cancels.
    """

    def loss(*arguments):
        out = function(*arguments)
        total = jnp.float32(0)
        for index, leaf in enumerate(jax.tree.leaves(out)):
            wave = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) + index).reshape(leaf.shape)
            value = leaf.astype(jnp.float32)
            total = total + jnp.sum(value * wave + value * value)
        return total, out

    both = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)
    (_, out), grads = jax.jit(both, compiler_options=QUICKLY)(*arguments)
    return out, grads


def raised(tree):
    """bfloat16 leaves as float32, the same numbers."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


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


# three layers as q, k, v; LoRA on all, on some, on none; with and without bias; ranks that differ
GROUPS = {
    "qkv": [dict(rank=3), dict(rank=3), dict(rank=3)],
    "qkv_bias": [dict(bias=True), dict(bias=True), dict(bias=True)],
    "some_lora": [dict(rank=2), dict(rank=0, bias=True), dict(rank=5)],
    "no_lora": [dict(rank=0), dict(rank=0)],
    "one": [dict(rank=4)],
}


def group(name, dtype):
    random = np.random.default_rng(len(name))
    layers = tuple(layer(random, rows, 12, dtype, **how) for rows, how in zip((16, 8, 6), GROUPS[name], strict=False))
    return jnp.asarray(random.normal(0, 1, (2, 7, 12)), dtype), layers


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


def products(function, *arguments) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    """Shape and dtype of every matrix product that a function's program holds."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return [
        (e.outvars[0].aval.shape, e.outvars[0].aval.dtype)
        for program in programs_in(jaxpr)
        for e in program.eqns
        if e.primitive.name == "dot_general"
    ]


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


def mlp_case(dtype, *, rank=3, bias=False, tokens=7):
    random = np.random.default_rng(5)
    D, F = 12, 20
    sizes = ((F, D), (F, D), (D, F))
    gate, up, down = (layer(random, rows, columns, dtype, rank=rank, bias=bias) for rows, columns in sizes)
    return jnp.asarray(random.normal(0, 1, (2, tokens, D)), dtype), gate, up, down


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


def cross_entropy_case(M, dtype=jnp.float32, D=8, V=50, masked=0.5):
    random = np.random.default_rng(M)
    share = (1 - masked) / 2
    weights = jnp.asarray(random.choice([0.0, 1.0, 0.5], M, p=[masked, share, share]), jnp.float32)
    hidden, head = random.normal(0, 1, (M, D)), random.normal(0, 1, (V, D))
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(random.integers(0, V, M)), weights


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tile, groups", [(4, 1), (5, 2), (30, 3), (1, 1)])
def test_tiles_and_groups_of_rows_change_nothing(tile, groups, softcap):
    hidden, head, targets, weights = cross_entropy_case(30)

    def run(function):
        return jax.jit(jax.value_and_grad(function, (0, 1)), compiler_options=QUICKLY)(hidden, head)

    found = run(lambda h, w: tiled.linear_cross_entropy(h, w, targets, weights, softcap, tile, groups, None))
    wanted = run(lambda h, w: reference.linear_cross_entropy(h, w, targets, weights, softcap))
    assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("of", [(0,), (1,), (0, 1)])
def test_rows_may_end_anywhere_in_a_block(of, groups):
    rows = 37  # of a group: two blocks of four tiles, and a tile that is short
    hidden, head, targets, _ = cross_entropy_case(rows * groups)

    def run(function):
        return jax.jit(
            lambda weights: jax.value_and_grad(lambda *a: function(*a, targets, weights), of)(hidden, head),
            compiler_options=QUICKLY,
        )

    found = run(lambda h, w, t, weights: tiled.linear_cross_entropy(h, w, t, weights, 3.0, 4, groups, None))
    wanted = run(lambda h, w, t, weights: reference.linear_cross_entropy(h, w, t, weights, 3.0))
    # none; a tile's edge in the first block and in the second; in a tile of either; whole blocks; all but one; all
    for used in (0, 8, 24, 3, 27, 16, 32, 36, 37):
        random = np.random.default_rng(used)
        weights = np.concatenate([np.where(random.permutation(rows) < used, 0.5, 0) for _ in range(groups)])
        weights = jnp.asarray(weights * random.uniform(1, 4, rows * groups), jnp.float32)
        assert distance(found(weights), wanted(weights)) < 1e-5, used


@pytest.mark.parametrize("masked, expected", [(0.0, 8), (1.0, 0), (0.75, 2), (0.3, 6)])
def test_tiles_of_masked_rows_are_not_computed(masked, expected):
    hidden, head, targets, _ = cross_entropy_case(32)
    weights = jnp.asarray(np.arange(32) >= 32 * masked, jnp.float32)[jax.random.permutation(KEY, 32)]
    seen = []
    original = tiled.reference.logits

    def counted(*arguments):
        jax.debug.callback(lambda: seen.append(1))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled.reference, "logits", counted)
        loss = jax.jit(lambda h: tiled.linear_cross_entropy(h, head, targets, weights, None, 4, 1, None))
        jax.block_until_ready(jax.grad(loss)(hidden))
        jax.effects_barrier()
    assert len(seen) == expected


def test_masked_rows_that_are_infinite_leave_the_head_gradient_alone():
    hidden, head, targets, weights = cross_entropy_case(12)
    weights = weights.at[3].set(0)

    def gradient(hidden):
        return jax.grad(lambda w: linear_cross_entropy(hidden, w, targets, weights, tile=8))(head)

    assert distance(gradient(hidden.at[3].set(jnp.inf)), gradient(hidden)) == 0


def test_each_gradient_costs_one_product_and_float32_never_enters_one():
    hidden, head, targets, weights = cross_entropy_case(32, jnp.bfloat16)

    def shapes(argnums):
        """Of a whole block, in which a tile stands once; the block with the tiles that are left must have the same."""
        loss = lambda h, w: linear_cross_entropy(h, w, targets, weights, tile=16)  # noqa: E731
        both = products(jax.grad(loss, argnums) if argnums is not None else loss, hidden, head)
        whole, left = both[: len(both) // 2], both[len(both) // 2 :]
        assert whole == left
        return whole

    z, d_head = ((1, 16, 50), jnp.float32), ((50, 8), jnp.float32)
    d_h, of_two_tiles = ((1, 16, 8), jnp.bfloat16), ((1, 32, 8), jnp.bfloat16)
    assert shapes(None) == [z]
    assert shapes(0) == [z, d_h]  # a frozen head
    assert shapes(1) == [z, d_head]
    assert shapes((0, 1)) == [z, of_two_tiles, d_head]


def test_a_block_of_tiles_needs_the_logits_of_one():
    hidden, head, targets, weights = cross_entropy_case(512, jnp.bfloat16, V=2048)
    loss = lambda h: tiled.linear_cross_entropy(h, head, targets, weights, None, 64, 1, None)  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(hidden).compile()
    tile = 64 * 2048 * 4
    assert tile < compiled.memory_analysis().temp_size_in_bytes < 3 * tile  # a tile's logits and dz, float32 on a CPU


def test_cross_entropy_with_logits_returns_both():
    hidden, head, targets, weights = cross_entropy_case(9)
    total, scores = linear_cross_entropy(hidden, head, targets, weights, softcap=3.0, return_logits=True)
    np.testing.assert_allclose(total, linear_cross_entropy(hidden, head, targets, weights, softcap=3.0), rtol=1e-6)
    expected = 3 * np.tanh(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / 3)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="return_logits"):
        linear_cross_entropy(hidden, head, targets, weights, implementation="tiled", return_logits=True)
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy by triton: .*needs an NVIDIA GPU"):
        linear_cross_entropy(hidden, head, targets, weights, implementation="triton")


@pytest.mark.parametrize("groups, loops", [(1, 2), (2, 1)])
def test_on_a_mesh_the_gradient_of_a_head_comes_of_one_loop(groups, loops):
    """XLA would add it up over the devices after each of two."""
    arrays = (jnp.ones((40, 4)), jnp.ones((12, 4)), jnp.zeros(40, jnp.int32), jnp.ones(40))

    def loss(hidden, head, targets, weights):
        return tiled.linear_cross_entropy(hidden, head, targets, weights, None, 2, groups, None)

    equations = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arrays).eqns
    assert sum(equation.primitive.name == "while" for equation in equations) == loops


def test_tile_rows_follow_the_vocabulary_and_leave_no_crumb():
    assert tile_rows(16384, 151936) == tile_rows(16384, 128256) == 512  # 300 MiB of float32 logits hold 517 rows
    assert tile_rows(16384, 262144) == 256
    assert tile_rows(65536, 256) == 4096
    assert tile_rows(2048, 151936) == 256  # an eighth of them
    assert tile_rows(5, 256) == 5
    assert tile_rows(200, 128256) == 100
    for M in (2049, 2305, 2561, 4000, 4097, 9000):  # what is computed for nothing
        tile = tile_rows(M, 151936)
        assert tile % 128 == 0 and -M % tile <= max(128, M // 8)
    assert tile_rows(16384, 10**9) == 1


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
