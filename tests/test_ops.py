"""The ops in kernels/: the definitions against numpy written out, the tiled cross entropy against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import linear_cross_entropy as lce
from jaxft.kernels.attention import attention, key_range
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.linear_cross_entropy import linear_cross_entropy, logits
from jaxft.kernels.rms_norm import rms_norm
from jaxft.kernels.rope import apply_rope


def tolerance(dtype, terms: int) -> float:
    """Relative error that a sum of `terms` products may have: eps √terms, for errors that are independent."""
    return 4 * float(jnp.finfo(dtype).eps) * terms**0.5


def assert_close(ours, ref, dtype, terms):
    """‖Δ‖ ≤ tolerance · ‖ref‖, both read as float64."""
    ours, ref = np.asarray(ours, np.float64), np.asarray(ref, np.float64)
    assert ours.shape == ref.shape
    assert np.linalg.norm(ours - ref) <= tolerance(dtype, terms) * np.linalg.norm(ref)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# cross entropy

# M, D, V, tile, softcap: one tile, exact tiles, a short last tile, one row a tile, sizes that no power of two divides
SIZES = [(5, 8, 11, 64, None), (12, 8, 16, 4, 3.0), (37, 24, 101, 8, 3.0), (3, 5, 7, 1, None), (97, 33, 130, 32, None)]


run = jax.jit(linear_cross_entropy, static_argnames=("softcap", "implementation"))


def cross_entropy_case(M, D, V, dtype):
    hidden, head = normal(0, M, D, dtype=dtype), normal(1, V, D, dtype=dtype)
    random = np.random.default_rng(2)
    targets = jnp.asarray(random.integers(0, V, M), jnp.int32)
    weights = jnp.asarray(random.choice([0.0, 1.0, 0.5], M), jnp.float32).at[0].set(1)
    return hidden, head, targets, weights


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_tiled_cross_entropy_equals_its_definition(size, dtype, monkeypatch):
    M, D, V, tile, softcap = size
    monkeypatch.setattr(lce, "TILE", tile)
    hidden, head, targets, weights = cross_entropy_case(M, D, V, dtype)

    @jax.jit
    def both(hidden, head):
        def loss(hidden, head, implementation):
            # an upstream factor that is not 1
            return 3.0 * linear_cross_entropy(
                hidden, head, targets, weights, softcap=softcap, implementation=implementation
            )

        tiled = jax.value_and_grad(loss, (0, 1))(hidden, head, "tiled")
        # the definition in float32 on the same (rounded) inputs: what is compared is the tiled way's own error
        exact = jax.value_and_grad(loss, (0, 1))(hidden.astype(jnp.float32), head.astype(jnp.float32), "reference")
        return tiled, exact

    tiled, exact = both(hidden, head)
    assert_close(tiled[0], exact[0], jnp.float32, M * D)
    assert [gradient.dtype for gradient in tiled[1]] == [dtype, dtype]
    assert_close(tiled[1][0], exact[1][0], dtype, V)
    assert_close(tiled[1][1], exact[1][1], dtype, M)


def test_cross_entropy_is_the_formula():
    hidden, head, targets, weights = cross_entropy_case(6, 4, 9, jnp.float32)
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(6), np.asarray(targets)]
    for implementation in ("tiled", "reference"):
        total = run(hidden, head, targets, weights, implementation=implementation)
        assert total.dtype == jnp.float32
        np.testing.assert_allclose(total, np.sum(np.asarray(weights) * nll), rtol=1e-6)
    np.testing.assert_allclose(logits(hidden, head, softcap=2.0), 2 * np.tanh(z / 2), rtol=1e-5, atol=1e-6)


def test_cross_entropy_with_one_operand_differentiated_gives_the_same_gradient():
    hidden, head, targets, weights = cross_entropy_case(9, 4, 12, jnp.float32)

    def loss(h, w):
        return linear_cross_entropy(h, w, targets, weights)

    both, hidden_alone, head_alone = jax.jit(lambda *a: [jax.grad(loss, n)(*a) for n in ((0, 1), 0, 1)])(hidden, head)
    np.testing.assert_allclose(hidden_alone, both[0], rtol=1e-6)  # LoRA: the head is frozen
    np.testing.assert_allclose(head_alone, both[1], rtol=1e-6)


def test_rows_of_weight_zero_count_nothing_even_where_they_are_not_finite():
    hidden, head, targets, weights = cross_entropy_case(9, 4, 12, jnp.float32)
    weights = weights.at[3].set(0)
    spoiled = hidden.at[3].set(jnp.inf)
    for implementation in ("tiled", "reference"):
        assert run(spoiled, head, targets, weights, implementation=implementation) == run(
            hidden, head, targets, weights, implementation=implementation
        )
    nothing = jnp.zeros_like(weights)
    total, gradients = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))(hidden, head, targets, nothing)
    assert total == 0
    assert all(float(jnp.abs(gradient).max()) == 0 for gradient in gradients)


def test_large_logits_do_not_overflow():
    hidden, head = jnp.full((3, 4), 100.0), jnp.eye(4) * jnp.float32(100.0)
    targets, weights = jnp.arange(3, dtype=jnp.int32), jnp.ones(3)
    for implementation in ("tiled", "reference"):
        total = run(hidden, head, targets, weights, implementation=implementation)
        np.testing.assert_allclose(total, 3 * np.log(4), rtol=1e-3)  # float32 at 10,000 has steps of 1e-3


def test_float16_gradient_survives_a_large_upstream_factor():
    """Loss scaling multiplies by 65536, which float16 itself cannot hold."""
    hidden, head, targets, weights = cross_entropy_case(9, 4, 12, jnp.float16)

    @jax.jit
    def gradient(factor, weights):
        return jax.grad(lambda h: linear_cross_entropy(h, head, targets, weights) * factor)(hidden)

    scaled = np.asarray(gradient(jnp.float32(65536), weights / 16), np.float32)
    assert_close(scaled / 4096, gradient(jnp.float32(1), weights), jnp.float16, 12)


def test_cross_entropy_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"need \(M, D\), \(V, D\), \(M,\), \(M,\)"):
        linear_cross_entropy(jnp.ones((3, 4)), jnp.ones((5, 6)), jnp.zeros(3, jnp.int32), jnp.ones(3))
    with pytest.raises(ValueError, match="must be 'triton', 'tiled' or 'reference'"):
        linear_cross_entropy(
            jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.zeros(3, jnp.int32), jnp.ones(3), implementation="fast"
        )


# attention


def attention_written_out(q, k, v, sees, scale, softcap=None):
    """One query and one head after the other, in float64; sees(b, t, s): whether query t of row b sees key s."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    B, T, N, _ = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
            for n in range(N):
                head = n // (N // k.shape[2])
                scores = np.array([scale * q[b, t, n] @ k[b, s, head] for s in keys])
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = sum(w * v[b, s, head] for w, s in zip(weights / weights.sum(), keys, strict=True))
    return out


def packed(window):
    """What the tokens of SEGMENTS see."""
    return lambda b, t, s: s <= t and SEGMENTS[b, s] == SEGMENTS[b, t] and (not window or t - s < window)


SEGMENTS = np.array([[1] * 4 + [2] * 5 + [3] + [0] * 3, [1] * 13, [1] * 6 + [2] * 7], np.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("N", "K", "window", "softcap"),
    [(4, 4, None, None), (4, 2, 3, None), (6, 2, 0, 2.0), (4, 1, 1, None), (4, 2, 50, 5.0)],
)
def test_attention_equals_a_loop_over_queries_and_heads(N, K, window, softcap, dtype):
    H = 10
    q, k, v = (normal(seed, 3, 13, heads, H, dtype=dtype) for seed, heads in enumerate((N, K, K)))
    ours = jax.jit(
        lambda segments: attention(
            q, k, v, first_key=key_range(segments), window=window, scale=H**-0.5, softcap=softcap
        )
    )(SEGMENTS)
    assert ours.dtype == dtype
    assert_close(ours, attention_written_out(q, k, v, packed(window), H**-0.5, softcap), dtype, 13)


def test_window_may_be_traced():
    q, k, v = (normal(seed, 1, 13, 2, 4) for seed in range(3))
    first = key_range(jnp.asarray(SEGMENTS[:1]))
    run = jax.jit(lambda window: attention(q, k, v, first_key=first, window=window, scale=0.5))
    for window in (0, 2, 5):
        expected = attention_written_out(q, k, v, packed(window), 0.5)
        assert_close(run(jnp.int32(window)), expected, jnp.float32, 13)


def test_keys_of_a_cache_are_seen_up_to_last_key():
    q, k, v = normal(0, 2, 3, 4, 8), normal(1, 2, 9, 2, 8), normal(2, 2, 9, 2, 8)
    first, last = jnp.array([[2] * 3, [0] * 3], jnp.int32), jnp.array([[4, 5, 6]] * 2, jnp.int32)
    ours = attention(q, k, v, first_key=first, last_key=last, scale=0.3)
    expected = attention_written_out(q, k, v, lambda b, t, s: (2, 0)[b] <= s <= 4 + t, 0.3)
    assert_close(ours, expected, jnp.float32, 9)


def test_key_range_is_where_each_document_starts():
    expected = [[0] * 4 + [4] * 5 + [9] + [10] * 3, [0] * 13, [0] * 6 + [6] * 7]
    assert key_range(jnp.asarray(SEGMENTS)).tolist() == expected


def test_attention_refuses_what_does_not_fit():
    q, k = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 3, 8))
    first = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"need \(B, T, N, H\) and \(B, S, K, H\), K \| N"):
        attention(q, k, k, first_key=first, scale=1.0)
    with pytest.raises(ValueError, match="must have one dtype"):
        attention(q, q.astype(jnp.bfloat16), q, first_key=first, scale=1.0)
    with pytest.raises(ValueError, match="3 queries and 5 keys need last_key"):
        attention(q, jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 4, 8)), first_key=first, scale=1.0)
    with pytest.raises(ValueError, match=r"both must be \(1, 3\)"):
        attention(q, q, q, first_key=first[:, :2], scale=1.0)


# linear, norm, rope


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_with_a_branch_is_the_formula(dtype):
    x, w, b = normal(0, 2, 3, 16, dtype=dtype), normal(1, 8, 16, dtype=dtype), normal(2, 8, dtype=dtype)
    lora_a, lora_b, scale = normal(3, 4, 16), normal(4, 8, 4), jnp.float32(0.7)
    plain, full = linears(x, (Weights(w), Weights(w, b, (lora_a, lora_b, scale))))
    assert plain.dtype == full.dtype == dtype
    xs, ws, bs = (np.asarray(array, np.float64) for array in (x, w, b))
    assert_close(plain, xs @ ws.T, dtype, 16)
    expected = xs @ ws.T + bs + 0.7 * xs @ np.asarray(lora_a, np.float64).T @ np.asarray(lora_b, np.float64).T
    assert_close(full, expected, dtype, 16)


def test_dropout_acts_on_the_branch_alone_and_differs_between_layers():
    features, entries = 256, 16 * 256
    x, eye = jnp.ones((16, features)), jnp.eye(features)
    lora = (eye, eye, jnp.float32(1))
    layers = (Weights(jnp.zeros_like(eye), None, lora), Weights(jnp.zeros_like(eye), None, lora), Weights(eye))
    first, second, plain = jax.jit(lambda key: linears(x, layers, dropout=0.25, key=key))(jax.random.key(0))
    assert set(np.unique(first).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert abs(float(np.mean(first)) - 1) < 4 * (0.25 / 0.75 / entries) ** 0.5  # four standard errors
    assert 0.3 < float(np.mean(np.asarray(first) != second)) < 0.45  # 2 · 0.25 · 0.75 of independent masks
    np.testing.assert_array_equal(plain, x)
    np.testing.assert_array_equal(linears(x, layers, dropout=0.25)[0], x)  # no key: off


def test_linear_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"A and B need \(R, I\), \(O, R\)"):
        linears(jnp.ones((2, 3)), (Weights(jnp.ones((4, 5))),))
    with pytest.raises(ValueError, match=r"A and B need \(R, I\), \(O, R\)"):
        branch = (jnp.ones((2, 3)), jnp.ones((5, 2)), jnp.float32(1))
        linears(jnp.ones((2, 3)), (Weights(jnp.ones((4, 3)), None, branch),))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_is_the_formula(dtype):
    x, weight = normal(0, 2, 3, 24, dtype=dtype), normal(1, 24, dtype=dtype)
    xs = np.asarray(x, np.float64)
    expected = xs / np.sqrt((xs**2).mean(-1, keepdims=True) + 0.1) * np.asarray(weight, np.float64)
    ours = rms_norm(x, weight, eps=0.1)
    assert ours.dtype == dtype
    assert_close(ours, expected, dtype, 1)
    with pytest.raises(ValueError, match=r"weight must be \(24,\)"):
        rms_norm(x, weight[:3], eps=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_rotates_each_pair_of_halves_by_its_angle(dtype):
    x = normal(0, 2, 5, 3, 8, dtype=dtype)
    angles = np.random.default_rng(1).uniform(-9, 9, (2, 5, 4))
    ours = apply_rope(x, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
    assert ours.dtype == dtype
    xs = np.asarray(x, np.float64)
    turned = (xs[..., :4] + 1j * xs[..., 4:]) * np.exp(1j * angles)[:, :, None]  # a rotation of the plane
    assert_close(ours, np.concatenate([turned.real, turned.imag], -1), dtype, 2)
    with pytest.raises(ValueError, match=r"need \(B, T, N, H\) and \(B, T, H/2\)"):
        apply_rope(x, jnp.ones((2, 5, 3)), jnp.ones((2, 5, 3)))
