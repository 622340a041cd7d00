"""The tiled cross entropy against its definition, forward and gradient; what it costs, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.linear_cross_entropy import linear_cross_entropy, reference, tile_rows, tiled
from tests.tiny_layers import KEY, QUICKLY, distance, products


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
