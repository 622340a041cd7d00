"""Attention's kernels for Hopper: what they refuse, and what they compute on Pallas' simulated GPU against the
definition."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import cards
from jaxft.kernels.attention import documents, key_range, mosaic, reference
from jaxft.kernels.attention.mosaic import Tile
from tests.ptx import MISSING, NEEDED, nothing_kept

NEW = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels are written for jax 0.11.2 and later")
T = 256
LENGTHS = (100, 1, 27, 77, 51)


def first_keys(rows: str) -> jax.Array:
    """(2, T) int32: of two rows, the second one document where the first is packed."""
    t = np.arange(T, dtype=np.int32)
    packed = key_range(jnp.asarray(np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)[None], jnp.int32))[0]
    first = {"one document": 0 * t, "packed": packed, "window": np.maximum(t - 69, 0), "tokens": t}[rows]
    return jnp.stack([jnp.asarray(first), jnp.zeros(T, jnp.int32)])


def arrays(H: int, dtype) -> list[jax.Array]:
    """q, k, v and dout of 4 query heads and 2 kv heads."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((2, T, heads, H)), dtype) for heads in (4, 2, 2, 4)]


def definition(q, k, v, first, scale):
    """What gives out, and the natural log-sum-exp (B, N, T), of arrays in float32."""
    last = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2))
    key = jnp.arange(T)[None, None, :]
    seen = (key <= last[..., None]) & (key >= first[..., None])
    lse = jax.nn.logsumexp(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return functools.partial(reference.attention, first_key=first, last_key=last, scale=scale, softcap=None), lse


def distances(got, want) -> list[float]:
    pairs = zip(got, want, strict=True)
    return [float(jnp.linalg.norm(jnp.asarray(g, jnp.float32) - w) / jnp.linalg.norm(w)) for g, w in pairs]


@NEW
@pytest.mark.parametrize(
    ("rows", "H", "dtype", "tile", "factor"),
    [  # whole tiles of hidden keys come first where there is a window, and by tiles of 64 keys where rows are packed
        ("one document", 64, jnp.float16, Tile(64, 2), 1),
        ("one document", 128, jnp.bfloat16, mosaic.FEW[128][1], 1),
        ("packed", 64, jnp.float16, Tile(64, 2), 1),
        ("packed", 64, jnp.bfloat16, Tile(128, 2), 1),
        ("packed", 128, jnp.bfloat16, Tile(64, 2), 16),  # hidden scores below what the largest begins with, not above
        ("window", 64, jnp.bfloat16, Tile(64, 3), 1),
        ("window", 128, jnp.float16, Tile(128, 2), 16),
        ("tokens", 64, jnp.bfloat16, Tile(128, 2), 1),
        ("tokens", 128, jnp.bfloat16, Tile(64, 2), 1),
    ],
)
def test_out_and_the_log_sum_exp_are_those_of_the_definition(rows, H, dtype, tile, factor):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, v, _ = arrays(H, dtype)
    q, scale, first = q / factor, factor * H**-0.5, first_keys(rows)
    in_float32 = [x.astype(jnp.float32) for x in (q, k, v)]
    attention, lse = definition(*in_float32, first, scale)
    natural = rows == "one document"
    got = mosaic.run_forward(
        q, k, v, None if natural else first, scale=scale, tile=tile, interpret=plgpu.InterpretGPUParams()
    )
    assert (got[0].dtype, got[1].dtype) == (q.dtype, jnp.float32)
    far = distances(got, (attention(*in_float32), lse if natural else lse / np.log(2)))
    assert far[0] < 5e-3 and far[1] < 1e-6


@NEW
@pytest.mark.parametrize(
    ("rows", "H", "dtype", "tiles", "heads"),
    [  # four steps through two slots, or fewer steps than slots
        ("one document", 64, jnp.float16, (Tile(64, 2), Tile(64, 3)), 2),
        ("one document", 128, jnp.bfloat16, (Tile(64, 3), Tile(128, 2)), 1),
        ("packed", 64, jnp.float16, (Tile(64, 2), Tile(64, 2)), 2),
        ("packed", 128, jnp.bfloat16, (Tile(128, 2), Tile(128, 2)), 1),
        ("window", 64, jnp.bfloat16, None, 1),
    ],
)
def test_the_gradients_are_those_of_the_definition(rows, H, dtype, tiles, heads):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, v, dout = arrays(H, dtype)
    first, scale = first_keys(rows), H**-0.5
    in_float32 = [x.astype(jnp.float32) for x in (q, k, v)]
    attention, lse = definition(*in_float32, first, scale)
    out, pull = jax.vjp(attention, *in_float32)
    want = pull(dout.astype(jnp.float32))
    natural = rows == "one document"
    got = mosaic.run_backward(
        q, k, v, None if natural else first, out.astype(q.dtype), lse if natural else lse / np.log(2), dout,
        scale=scale, tiles=tiles, heads=heads, interpret=plgpu.InterpretGPUParams(),
    )  # fmt: skip
    assert all(g.dtype == q.dtype and g.shape == w.shape for g, w in zip(got, want, strict=True))
    assert max(distances(got, want)) < 5e-3


@NEW
def test_the_backward_pass_reads_what_the_forward_pass_of_rows_that_are_not_one_document_leaves(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for name in ("run_forward", "run_backward"):
        simulated = functools.partial(getattr(mosaic, name), interpret=plgpu.InterpretGPUParams())
        monkeypatch.setattr(mosaic, name, simulated)
    q, k, v, dout = arrays(64, jnp.bfloat16)
    first, scale = first_keys("tokens"), 0.125
    in_float32 = [x.astype(jnp.float32) for x in (q, k, v)]
    want, pull = jax.vjp(definition(*in_float32, first, scale)[0], *in_float32)
    got, ours = jax.vjp(lambda *qkv: mosaic.attention(*qkv, first, None, scale=scale, capability=90), q, k, v)
    assert max(distances((got, *ours(dout)), (want, *pull(dout.astype(jnp.float32))))) < 5e-3


@pytest.mark.parametrize(
    ("H", "tiles"),  # with unknown documents, and with 2, 3, 5 and 6 in 2,048 tokens
    [(128, [None] + [Tile(128, 2)] * 3 + [None]), (64, [Tile(64, 2), Tile(128, 2)] + [Tile(64, 2)] * 3)],
)
def test_documents_choose_the_tile_of_their_forward_pass(H, tiles):
    q, first = QUERY.update(shape=(2, 2048, 4, H)), jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    known = [None, *(jax.eval_shape(functools.partial(documents, most=most), first) for most in (2, 3, 5, 6))]
    assert [mosaic.packed_tile(q, one) for one in known] == tiles


def all_kernels(q, k, first, lse):
    """The gradients of rows of one document and of packed ones, added up, and the forward passes of both."""
    grads = [mosaic.run_backward(q, k, k, ranges, q, lse, q, scale=0.1) for ranges in (None, first)]
    outs = [mosaic.run_forward(q, k, k, None, scale=0.1, tile=mosaic.FEW[128][1])]
    outs += [
        mosaic.run_forward(q, k, k, first, scale=0.1, tile=tile) for tile in filter(None, mosaic.PACKED[q.shape[3]])
    ]
    return jax.tree.map(jnp.add, *grads), outs


def shapes(H: int) -> list[jax.ShapeDtypeStruct]:
    """Of q, k, first_key and lse."""
    all_of = [((1, 2048, 32, H), jnp.bfloat16), ((1, 2048, 8, H), jnp.bfloat16), ((1, 2048), jnp.int32)]
    return [jax.ShapeDtypeStruct(*one) for one in (*all_of, ((1, 32, 2048), jnp.float32))]


@NEW
@pytest.mark.skipif("jax_cuda13_plugin" in MISSING, reason=NEEDED)
def test_the_kernels_lower_without_a_card():
    lowered = jax.jit(all_kernels).trace(*shapes(128)).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu_v2") == 6


@NEW
@pytest.mark.parametrize("H", [64, 128])
def test_the_kernels_fit_into_a_card_and_no_product_waits_for_another(H, monkeypatch, capfd):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the compiler for CUDA: jax-cuda13-pjrt")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    there = jax.sharding.SingleDeviceSharding(cards.absent_card("h200"))
    with nothing_kept():
        jax.jit(all_kernels, in_shardings=there, out_shardings=there).lower(*shapes(H)).compile()
    said = "".join(capfd.readouterr())
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores, \d+ bytes spill loads\n.*Used", said)]
    assert len(spilled) == {64: 7, 128: 6}[H] and max(spilled) <= 256, said
    assert "serialized" not in said  # for want of registers (C7512)


QUERY = jax.ShapeDtypeStruct((2, T, 4, 128), jnp.bfloat16)
ONE = documents(jnp.zeros((2, T), jnp.int32), 1)


@pytest.mark.parametrize(
    ("q", "change", "message"),
    [
        (QUERY, {"capability": 100}, "compute capability 10.0: needs 9.0"),
        (QUERY, {"softcap": 50.0}, "softcap: the kernels have none"),
        (QUERY, {"documents": ONE, "scale": -0.1}, "scale -0.1: needs a positive one"),
        (QUERY, {"last_key": QUERY}, "last_key"),
        (QUERY.update(shape=(2, T, 4, 96)), {}, "head size 96: needs 64 or 128"),
        (QUERY.update(shape=(2, 200, 4, 128)), {}, "200 tokens: needs a multiple of 128"),
        (QUERY.update(dtype=jnp.float32), {}, "dtype float32: needs bfloat16 or float16"),
    ],
)
def test_it_says_what_it_cannot_serve(q, change, message, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    fine = {"softcap": None, "last_key": None, "documents": None, "scale": 1.0, "capability": 90}
    with pytest.raises(NotImplementedError, match=message):
        mosaic.check(q, **(fine | change))


def test_it_refuses_a_jax_that_it_was_not_written_for(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match=r"needs 0\.11\.2 to 0\.12"):
        mosaic.check(QUERY, softcap=None, last_key=None, documents=ONE, scale=1.0, capability=90)


def test_few_programs_part_the_heads_of_a_group():
    assert [mosaic._heads(4, programs) for programs in (64, 128, 256)] == [1, 2, 4]
    assert [mosaic._heads(3, programs) for programs in (128, 256)] == [1, 3]
    assert mosaic._heads(1, 8) == 1
