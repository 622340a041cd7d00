"""Attention's ways against its reference on the CPU, and which way is taken when."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import attention as op
from jaxft.kernels import gpu
from jaxft.kernels.attention import attention, chunked, cudnn, documents, key_range, triton

ROWS = {
    "one document a row": [[37], [37]],
    "one token a document": [[1] * 37, [1] * 37],
    "ragged, single tokens, padding at the end": [[9, 1, 13, 1, 5], [20, 17]],
    "padding only": [[], []],
}


def segments(rows: list[list[int]], T: int) -> np.ndarray:
    """Segment ids (B, T) of rows given as document lengths; 0 behind them."""
    ids = np.zeros((len(rows), T), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return ids


def draw(dtype, *, B=2, T=37, N=4, K=2, H=12):
    """q, k, v and the output's gradient."""
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.cache
def compiled(way: str, block: int | None, **arguments):
    """One way's out, dq, dk, dv as a jitted function of q, k, v, dout and key ranges."""

    @jax.jit
    def both(q, k, v, dout, ranges):
        with pytest.MonkeyPatch.context() as patch:
            if block is not None:
                patch.setattr(chunked, "block_size", lambda *_: block)
            out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, implementation=way, **ranges, **arguments), q, k, v)
            return out, *vjp(dout)

    return both


def tolerance(dtype) -> float:
    """Relative L2 distance: a few roundings of the type; sums are float32 in all ways."""
    return 8 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("more", [{}, {"window": 5, "softcap": 2.0}], ids=["plain", "window and softcap"])
def test_chunked_equals_reference_with_gradients(rows, dtype, more):
    arrays = draw(dtype)
    ranges = {"first_key": key_range(jnp.asarray(segments(rows, 37)))}
    want = compiled("reference", None, scale=0.3, **more)(*[x.astype(jnp.float32) for x in arrays], ranges)
    got = compiled("chunked", 8, scale=0.3, **more)(*arrays, ranges)  # 37 = 4 · 8 + 5: a part block
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == dtype
        # a gradient that cancels (dq of documents of one token is 0) is held to the size of what went into it
        size = max(np.linalg.norm(b), np.linalg.norm(np.float32(arrays[3])))
        assert np.linalg.norm(np.float32(a) - b) / size < tolerance(dtype), name


def test_chunked_serves_last_key_and_more_keys_than_queries():
    q, _, _, dout = draw(jnp.float32, T=7)
    _, k, v, _ = draw(jnp.float32, T=20)
    last = jnp.broadcast_to(11 + jnp.arange(7, dtype=jnp.int32), (2, 7))
    ranges = {"first_key": jnp.full((2, 7), 2, jnp.int32), "last_key": last}
    want = compiled("reference", None, scale=0.3)(q, k, v, dout, ranges)
    got = compiled("chunked", 3, scale=0.3)(q, k, v, dout, ranges)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunked_holds_one_block_of_scores_and_not_all():
    q = jax.ShapeDtypeStruct((1, 8192, 8, 8), jnp.float32)
    first = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(way, q, first):
        return attention(q, q, q, first_key=first, scale=1.0, implementation=way).sum()

    program = jax.jit(jax.grad(lambda q, first: loss("chunked", q, first))).lower(q, first).compile()
    scores = 4 * 8 * 8192 * 8192
    assert program.memory_analysis().temp_size_in_bytes < scores / 4
    assert chunked.block_size(1, 8192, 8, 8192) * 8 * 8192 <= chunked.SCORES


def test_named_residuals_keep_the_backward_from_running_the_forward_again():
    q, k, v, _ = draw(jnp.float32)
    first = jnp.zeros((2, 37), jnp.int32)

    def loss(q, policy):
        layer = lambda q: attention(jnp.sin(q), k, v, first_key=first, scale=1.0, implementation="chunked")  # noqa: E731
        return jax.checkpoint(layer, policy=policy)(q).sum()

    def scans(policy) -> int:
        return str(jax.make_jaxpr(jax.grad(lambda q: loss(q, policy)))(q)).count("= scan[")

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    assert scans(jax.checkpoint_policies.nothing_saveable) == 3  # forward, forward again, backward
    assert scans(names) == 2


def test_reach_covers_every_query_that_sees_a_key_of_the_tile():
    for rows, window in ((ROWS["ragged, single tokens, padding at the end"], 0), ([[30, 7], [37]], 5)):
        t = np.arange(37)
        first = np.asarray(key_range(jnp.asarray(segments(rows, 37))))
        first = np.maximum(first, t - window + 1) if window else first
        full_end, last_end = (np.asarray(x) for x in triton.reach(jnp.asarray(first), 8))
        for b in range(2):
            for tile, start in enumerate(range(0, 37, 8)):
                keys = np.arange(start, min(start + 8, 37))
                seen = (keys[None] <= t[:, None]) & (keys[None] >= first[b][:, None])  # (T, keys)
                assert last_end[b, tile] == 1 + max(t[seen.any(1)])
                assert (first[b, start : full_end[b, tile]] <= start).all()
                assert full_end[b, tile] == 37 or first[b, full_end[b, tile]] > start


def test_documents_describe_packed_rows_and_refuse_windows_and_too_many():
    first = key_range(jnp.asarray(segments([[3, 1, 4], [5]], 8)))
    lengths, offsets, exact = documents(first, 4)
    assert lengths.tolist() == [[3, 1, 4, -1], [5, 3, -1, -1]]  # padding is a document like any other
    assert offsets.tolist() == [[0, 3, 4, -1, -1], [0, 5, -1, -1, -1]]
    assert bool(exact)
    assert not bool(documents(first, 2).exact)
    assert not bool(documents(jnp.maximum(first, jnp.arange(8, dtype=jnp.int32)[None] - 2), 4).exact)


def test_default_takes_the_reference_when_small_and_chunked_when_long(monkeypatch, caplog):
    gpu._log_once.cache_clear()
    q, k, v, _ = draw(jnp.float32)
    first = jnp.zeros((2, 37), jnp.int32)
    with caplog.at_level(logging.INFO, "jaxft"):
        attention(q, k, v, first_key=first, scale=1.0)
        attention(q, k, v, first_key=first, scale=1.0)
        monkeypatch.setattr(op, "REFERENCE_SCORES", 37 * 36)
        attention(q, k, v, first_key=first, scale=1.0)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # the second call chose what the first did
    assert messages[0].startswith("attention: reference (mosaic: cpu device: needs an NVIDIA GPU; cudnn: cpu device")
    assert messages[1].startswith("attention: chunked (") and "37 x 37 scores" in messages[1]


@pytest.mark.parametrize("way", ["triton", "cudnn", "mosaic"])
def test_a_kernel_asked_for_by_name_fails_loudly_on_the_cpu(way):
    q, k, v, _ = draw(jnp.float32)
    with pytest.raises(NotImplementedError, match=f"attention by {way}: cpu device: needs an NVIDIA GPU"):
        attention(q, k, v, first_key=jnp.zeros((2, 37), jnp.int32), scale=1.0, implementation=way)


def test_an_unknown_implementation_is_named():
    q, k, v, _ = draw(jnp.float32)
    with pytest.raises(
        ValueError, match="implementation 'flash': must be one of mosaic, cudnn, triton, reference, chunked"
    ):
        attention(q, k, v, first_key=jnp.zeros((2, 37), jnp.int32), scale=1.0, implementation="flash")


@pytest.mark.parametrize(
    ("capability", "H", "T", "most", "way"),
    [
        (90, 128, 2048, 1, "mosaic"),
        (90, 64, 2048, 5, "mosaic"),
        (90, 64, 4224, 1, "cudnn"),  # one document for which its backward pass is faster
        (90, 64, 4224, 2, "mosaic"),
        (90, 128, 2000, 5, "cudnn"),  # no whole tiles
        (90, 128, 2000, 6, "triton"),  # of 333 tokens
        (90, 96, 2048, 5, "cudnn"),  # another head size
        (90, 96, 2048, 6, "triton"),  # the tiles of 128
        (90, 256, 2048, 6, "cudnn"),  # other tiles
        (100, 128, 2048, 6, "cudnn"),
        (100, 128, 2048, 11, "triton"),
        (90, 128, 250, 2, "triton"),
        (90, 128, 250, 1, "cudnn"),  # short, but there is nothing to skip
    ],
)
def test_each_row_goes_to_the_kernels_that_were_measured_to_win(capability, H, T, most, way, monkeypatch):
    monkeypatch.setattr(op, "device_capability", lambda: capability)
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    taken = []
    for name in ("mosaic", "cudnn", "triton"):
        monkeypatch.setattr(getattr(op, name), "attention", lambda q, *_, name=name, **__: taken.append(name) or q)
    q, first = jnp.zeros((1, T, 1, H), jnp.bfloat16), jnp.zeros((1, T), jnp.int32)
    attention(q, q, q, first_key=first, scale=1.0, documents=documents(first, most))
    attention(q, q, q, first_key=first, scale=1.0, documents=documents(first, most), scratch=False)
    read = op.documents_read(most, q, windows=False, scale=1.0, softcap=None)
    attention(q, q, q, first_key=first, scale=1.0, documents=None if read is None else documents(first, read))
    # a long row that has no memory to spare; and what is not read decides nothing
    assert taken == [way, "mosaic" if T == 4224 else way, way]
    assert read == most or way != "cudnn"


def test_a_window_of_0_is_none(monkeypatch):
    monkeypatch.setattr(op, "device_capability", lambda: 90)
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    known = documents(jnp.zeros((1, 256), jnp.int32), 1)
    monkeypatch.setattr(op.mosaic, "attention", lambda q, k, v, first, described, **_: described is known)
    q = jnp.zeros((1, 256, 1, 128), jnp.bfloat16)
    calls = functools.partial(
        op.attention, q, q, q, first_key=jnp.zeros((1, 256), jnp.int32), scale=1.0, documents=known
    )
    assert [calls(window=window) for window in (None, 0, 8)] == [True, True, False]


FOUR = documents(jnp.zeros((2, 64), jnp.int32), 4)


def query(H=128, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, 64, 4, H), dtype)


@pytest.mark.parametrize(
    ("q", "change", "message"),
    [
        (query(H=512), {}, "head size 512: needs 16 to 256"),
        (query(dtype=jnp.float64), {}, "dtype float64: needs bfloat16, float16 or float32"),
        (query(), {"capability": 75}, "compute capability 7.5: needs 8.0"),
        (query(), {"last_key": query()}, "last_key"),
        (query(), {"scale": 0.0}, "scale 0.0: needs a positive one"),
    ],
)
def test_triton_says_what_it_cannot_serve(q, change, message):
    with pytest.raises(NotImplementedError, match=message):
        triton.check(q, **({"scale": 1.0, "last_key": None, "capability": 90} | change))


def test_triton_without_jax_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "jax_triton" else object())
    with pytest.raises(NotImplementedError, match=r"jax_triton is not installed: pip install 'jaxft\[cuda\]'"):
        triton.check(query(), scale=1.0, last_key=None, capability=90)


@pytest.mark.parametrize(
    ("q", "change", "message"),
    [
        (query(), {"softcap": 50.0}, "softcap"),
        (query(), {"window": 128}, "window"),
        (query(), {"last_key": query()}, "last_key"),
        (query(), {"documents": None}, "documents"),
        (query(dtype=jnp.float32), {}, "dtype float32: needs bfloat16 or float16"),
        (query(H=100), {}, "head size 100: needs a multiple of 8 up to 256"),
        (query(), {"capability": 89}, "compute capability 8.9: needs 9.0"),
        (query(), {"capability": 120}, "compute capability 12.0: cuDNN has no packed backward"),
    ],
)
def test_cudnn_says_what_it_cannot_serve(q, change, message, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    fine = {"softcap": None, "window": None, "last_key": None, "documents": FOUR, "capability": 90}
    with pytest.raises(NotImplementedError, match=message):
        cudnn.check(q, **(fine | change))


def test_cudnn_refuses_a_jax_whose_packed_grouped_queries_are_wrong(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    with pytest.raises(NotImplementedError, match=r"needs 0\.11\.1 to 0\.12"):
        cudnn.check(query(), softcap=None, window=None, last_key=None, documents=FOUR, capability=90)
