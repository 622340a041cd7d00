"""Residuals summed into products, what the MLP keeps under a policy, and what the Triton kernels of blocks refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import quant
from jaxft.kernels import dequantize, gpu
from jaxft.kernels import linear as linear_module
from jaxft.kernels import mlp as mlp_module
from jaxft.kernels import norm_rope as norm_rope_module
from jaxft.kernels import qkv as qkv_module
from jaxft.kernels import rms_norm as rms_norm_module
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.mlp import mlp
from jaxft.kernels.norm_rope import norm_rope
from jaxft.kernels.rms_norm import residual_rms_norm
from jaxft.models.layers import REMAT
from jaxft.quant import dense, describe_leaf, quantize
from tests.tiny_layers import KEY, distance, group, layer, mlp_case, products, with_gradients


def held(layers, kind):
    """The layers with quantised weights and, second, with the dense arrays of those; both as they are for None."""
    if kind is None:
        return layers, layers
    weights = jax.jit(lambda weights: [quantize(w, kind) for w in weights])([one.weight for one in layers])
    changed = [one._replace(weight=w) for one, w in zip(layers, weights, strict=True)]
    return changed, [one._replace(weight=dense(one.weight, jnp.float32)) for one in changed]


def residual(shape):
    return jnp.asarray(np.random.default_rng(9).normal(0, 2, shape), jnp.float32)


@pytest.mark.parametrize(
    "name, kind, dropout", [("qkv_bias", None, 0.3), ("some_lora", "nf4", 0.0), ("no_lora", None, 0)]
)
def test_a_residual_is_added_to_the_first_linear_with_its_gradient(name, kind, dropout):
    x, layers = group(name, jnp.float32)
    fast, plain = held(layers, kind)
    add = residual((2, 7, 16))
    loras = [one.lora for one in layers]

    def run(x, add, loras, weights, implementation, summed):
        weights = tuple(one._replace(lora=lora) for one, lora in zip(weights, loras, strict=True))
        first, *rest = linears(
            x, weights, dropout=dropout, key=KEY, add=None if summed else add, implementation=implementation
        )
        return first + add if summed else first, *rest

    wanted = with_gradients(lambda *a: run(*a, plain, "reference", True), x, add, loras)
    for way, weights in (("fused", fast), ("reference", plain)):
        found = with_gradients(lambda *a, w=weights, way=way: run(*a, w, way, False), x, add, loras)
        assert distance(found, wanted) < 1e-5, way


@pytest.mark.parametrize("tiles, kind", [(None, None), (1, None), (3, None), (1, "nf4"), (3, "nf4"), (3, "int8")])
def test_a_residual_is_added_to_the_mlp_with_its_gradient(tiles, kind):
    x, *layers = mlp_case(jnp.float32)
    fast, plain = held(layers, kind)
    add, loras = residual(x.shape), [one.lora for one in layers]

    def run(x, loras, weights, **how):
        weights = (one._replace(lora=lora) for one, lora in zip(weights, loras, strict=True))
        return mlp(x, *weights, activation="silu", **how)

    wanted = with_gradients(lambda x, add, loras: run(x, loras, plain, implementation="reference") + add, x, add, loras)
    found = with_gradients(lambda x, add, loras: run(x, loras, fast, add=add, tiles=tiles), x, add, loras)
    assert distance(found, wanted) < 1e-5


def test_in_backward_a_four_bit_mlp_makes_each_weight_dense_once_and_down_before_the_others(monkeypatch):
    x, *layers = mlp_case(jnp.float32)
    (gate, up, down), _ = held(layers, "nf4")
    made = []

    def dense_array(weights, **how):
        made.append([weight.shape[0] for weight in weights])
        return dequantize.dequantize_nf4(weights, **how)

    def product(x, weight, **how):
        made.append([weight.shape[0]])
        return dequantize.multiply_nf4(x, weight, **how)

    monkeypatch.setattr(quant, "dequantize_nf4", dense_array)
    monkeypatch.setattr(quant, "multiply_nf4", product)
    run = lambda x, tiles: jnp.sum(mlp(x, gate, up, down, activation="silu", tiles=tiles))  # noqa: E731
    for tiles, gate_and_up in ((1, [[20, 20]]), (None, [[20], [20]])):
        made.clear()
        jax.make_jaxpr(jax.grad(run), static_argnums=1)(x, tiles)
        assert made == [[20, 20], [12], [12], *gate_and_up]  # forward, and dh before e, v and dx
    made.clear()
    jax.make_jaxpr(run, static_argnums=1)(x[:, :2], None)
    assert made == [[20], [20], [12]]  # 4 tokens of 12 numbers: what stands between the products is smaller than W


def test_a_young_adapter_is_not_rounded_away_beside_a_large_residual():
    random = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    x, add, weight = draw(1, 4096, 64), draw(1, 4096, 32) * 4, draw(32, 64) * 0.1
    a, b = draw(4, 64).astype(jnp.float32), draw(32, 4).astype(jnp.float32) * 1e-4  # B is zero when training begins

    def run(lora):
        return linears(x, (Weights(weight, None, lora),), add=add)[0].astype(jnp.float32)

    low = x.astype(jnp.float32) @ a.T @ b.T
    effect = jax.jit(lambda lora: run(lora) - run(None))((a, b, jnp.float32(1)))
    share = float(jnp.sum(effect * low) / jnp.sum(low * low))
    assert float(jnp.mean(jnp.abs(low))) < 2**-9  # a quarter of bfloat16's step between 1 and 2
    assert 0.8 < share < 1.2, f"{share:.2f} of what the adapter does arrives"


def test_a_residual_of_another_shape_or_dtype_is_an_error():
    x, *layers = mlp_case(jnp.float32)
    with pytest.raises(ValueError, match=r"add is float32 \(2, 7, 1\)"):
        mlp(x, *layers, activation="silu", add=residual((2, 7, 1)))
    with pytest.raises(ValueError, match=r"add is bfloat16"):
        linears(x, (layers[0],), add=residual((2, 7, 20)).astype(jnp.bfloat16))


@pytest.mark.parametrize("tiles", [None, 1, 7])
def test_the_full_policy_does_not_run_downs_low_rank_input_again(tiles):
    random = np.random.default_rng(0)
    gate, up = (layer(random, 20, 12, jnp.bfloat16, rank=3) for _ in range(2))
    down = layer(random, 12, 20, jnp.bfloat16, rank=5)
    x = jnp.asarray(random.normal(0, 1, (2, 7, 12)), jnp.bfloat16)

    def thin(policy) -> int:
        """Products that give 5 columns for each token: down's low-rank input u, and its gradient g."""

        def run(x, loras):
            some = (one._replace(lora=lora) for one, lora in zip((gate, up, down), loras, strict=True))
            return mlp(x, *some, activation="silu", tiles=tiles)

        body = jax.checkpoint(run, policy=policy)
        loss = lambda loras: jnp.sum(body(x, loras).astype(jnp.float32))  # noqa: E731
        found = products(jax.grad(loss), [one.lora for one in (gate, up, down)])
        return [shape for shape, _ in found].count((2, 5) if tiles == 7 else (2, 7, 5))

    nothing, full = thin(jax.checkpoint_policies.nothing_saveable), thin(REMAT["full"])
    assert (nothing, full) == (3, 2)  # u in forward, g in backward; where nothing is kept, u once more


# what the kernels serve, with a device and packages that say yes


@pytest.fixture
def card(monkeypatch):
    """Devices of compute capability 9.0 with triton and jax-triton; what a way would run is recorded, not run."""
    monkeypatch.setattr(gpu, "device_capability", lambda: 90)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    return monkeypatch


once = functools.cache(mlp_case)  # its arrays cannot be made under a mesh without devices


def mlp_way(dtype=jnp.bfloat16, *, rank=8, bias=False, implementation=None, patch, **how):
    """The kernels that `mlp` takes, None where it takes plain XLA."""
    seen = []
    patch.setattr(mlp_module.fused, "mlp", lambda x, *rest: (seen.append(rest[-1]), x)[1])
    case = once(dtype, rank=rank, bias=bias)
    jax.eval_shape(lambda *a: mlp(*a, **{"activation": "silu", "implementation": implementation} | how), *case)
    return seen[0]


MLP_REFUSED = {
    "dtype float32": dict(dtype=jnp.float32),
    "activation gelu:": dict(activation="gelu"),
}
MLP_WITHOUT_LORA = {
    "dropout": dict(dropout=0.1, keys=(KEY, KEY)),
    "a bias": dict(bias=True),
    "no LoRA": dict(rank=0),
    "rank 129": dict(rank=129),
}


def test_the_mlp_kernels_are_taken_where_they_serve(card):
    assert mlp_way(patch=card) == (90, True)
    assert mlp_way(patch=card, implementation="triton", rank=128) == (90, True)
    assert mlp_way(patch=card, dropout=0.1) == (90, True)  # no key: off
    assert mlp_way(patch=card, implementation="fused") is None


@pytest.mark.parametrize("case", MLP_WITHOUT_LORA)
def test_what_the_mlp_kernels_cannot_take_in_of_lora_stays_outside_of_them(case, card):
    assert mlp_way(patch=card, implementation="triton", **MLP_WITHOUT_LORA[case]) == (90, False)


@pytest.mark.parametrize("reason", MLP_REFUSED)
def test_the_mlp_kernels_refuse_by_name_and_are_passed_over_by_default(reason, card):
    with pytest.raises(NotImplementedError, match=f"mlp by triton: .*{reason}"):
        mlp_way(patch=card, implementation="triton", **MLP_REFUSED[reason])
    assert mlp_way(patch=card, **MLP_REFUSED[reason]) is None


def norm_rope_way(implementation=None, *, patch, H=32, dtype=jnp.bfloat16):
    seen = []
    patch.setattr(norm_rope_module.triton, "norm_rope", lambda x, *_: (seen.append("triton"), x)[1])
    x, w, angle = (
        jax.ShapeDtypeStruct(*s) for s in (((1, 2, 3, H), dtype), ((H,), dtype), ((1, 2, H // 2), "float32"))
    )
    jax.eval_shape(lambda x, w, c: norm_rope(x, w, c, c, eps=1e-6, implementation=implementation), x, w, angle)
    return seen[0] if seen else None


def rms_norm_way(implementation=None, *, patch, D=128, dtype=jnp.bfloat16):
    seen = []
    patch.setattr(rms_norm_module.triton, "residual_rms_norm", lambda x, *_: (seen.append("triton"), (x, x))[1])
    x, w = jax.ShapeDtypeStruct((2, 3, D), dtype), jax.ShapeDtypeStruct((D,), dtype)
    jax.eval_shape(lambda x, w: residual_rms_norm(x, w, eps=1e-6, implementation=implementation), x, w)
    return seen[0] if seen else None


def adapted(rows, columns, dtype, *, rank=8, bias=False, magnitude=False):
    """The shapes of a linear layer with LoRA."""
    like = jax.ShapeDtypeStruct
    lora = (like((rank, columns), "float32"), like((rows, rank), "float32"), like((), "float32")) if rank else None
    return Weights(
        like((rows, columns), dtype), like((rows,), dtype) if bias else None, lora,
        like((rows,), "float32") if magnitude else None,
    )  # fmt: skip


def qkv_way(implementation=None, *, patch, H=32, dtype=jnp.bfloat16, dropout=0.0, ranks=(8, 8, 8), **how):
    seen = []
    patch.setattr(qkv_module.triton, "qkv", lambda x, *_: (seen.append("triton"), (x, x, x))[1])
    patch.setattr(linear_module.triton, "summed", lambda product, u, *_, **__: product.astype(u.dtype))
    x, angle = jax.ShapeDtypeStruct((1, 2, 16), dtype), jax.ShapeDtypeStruct((1, 2, H // 2), "float32")
    layers = [adapted(heads * H, 16, dtype, rank=rank, **how) for heads, rank in zip((4, 2, 2), ranks, strict=True)]
    jax.eval_shape(
        lambda x, layers, c: qkv_module.qkv(
            x, *layers, head_dim=H, cos=c, sin=c, dropout=dropout, key=KEY, implementation=implementation
        ),
        x, layers, angle,
    )  # fmt: skip
    return seen[0] if seen else None


def linear_way(implementation=None, *, patch, dtype=jnp.bfloat16, added=True, beside=None, **how):
    seen = []
    patch.setattr(linear_module.triton, "summed", lambda product, *_, **__: (seen.append("triton"), product)[1])
    x, add = jax.ShapeDtypeStruct((1, 2, 16), dtype), jax.ShapeDtypeStruct((1, 2, 8), dtype) if added else None
    layers = (adapted(8, 16, dtype, **how), *([] if beside is None else [adapted(8, 16, dtype, **beside)]))
    jax.eval_shape(
        lambda x, layers, add: linears(x, layers, add=add, implementation=implementation), x, layers, add
    )  # fmt: skip
    return seen[0] if seen else None


NORMS_REFUSED = [
    (qkv_way, dict(H=48), "qkv by triton: head size 48"),
    (qkv_way, dict(H=512), "qkv by triton: head size 512: needs at most 256"),
    (qkv_way, dict(dtype=jnp.float32), "qkv by triton: dtype float32"),
    (qkv_way, dict(dropout=0.1), "qkv by triton: dropout"),
    (qkv_way, dict(bias=True), "qkv by triton: biases or magnitudes"),
    (qkv_way, dict(magnitude=True), "qkv by triton: biases or magnitudes"),
    (qkv_way, dict(ranks=(0, 0, 8)), r"qkv by triton: ranks \[0, 0, 8\]: needs LoRA on q or k"),
    (qkv_way, dict(ranks=(8, 8, 129)), r"qkv by triton: ranks \[8, 8, 129\]: .*of at most 128"),
    (linear_way, dict(rank=0), "linear by triton: nothing to add up"),
    (linear_way, dict(magnitude=True), r"linear by triton: a magnitude \(DoRA\)"),
    (linear_way, dict(beside=dict(magnitude=True)), r"linear by triton: a magnitude \(DoRA\)"),
    (linear_way, dict(dtype=jnp.float32), "linear by triton: dtype float32"),
    (linear_way, dict(rank=129), "linear by triton: rank 129"),
    (norm_rope_way, dict(H=48), "norm_rope by triton: head size 48"),
    (norm_rope_way, dict(H=1024), "norm_rope by triton: head size 1024"),
    (norm_rope_way, dict(dtype=jnp.float8_e4m3fn), "norm_rope by triton: dtype float8_e4m3fn"),
    (rms_norm_way, dict(D=96), "residual_rms_norm by triton: width 96"),
    (rms_norm_way, dict(D=16385), "residual_rms_norm by triton: width 16385"),
    (rms_norm_way, dict(dtype=jnp.float8_e4m3fn), "residual_rms_norm by triton: dtype float8_e4m3fn"),
]


@pytest.mark.parametrize("way, case, reason", NORMS_REFUSED)
def test_the_norms_kernels_refuse_by_name_and_are_passed_over_by_default(way, case, reason, card):
    with pytest.raises(NotImplementedError, match=reason):
        way("triton", patch=card, **case)
    assert way(patch=card, **case) is None


def dequantize_way(implementation=None, patch=None):
    """The card that a 4-bit weight is made dense for by Triton, None where it is by the reference."""
    seen = []
    patch.setattr(dequantize.triton, "dequantize_nf4", lambda *a: (seen.append(a[-1]), [jnp.zeros((64, 128))])[1])
    leaf = describe_leaf("nf4", (64, 128), None, jnp.bfloat16)
    jax.eval_shape(lambda leaf: dense(leaf, jnp.bfloat16, implementation=implementation), leaf)
    return seen[0] if seen else None


WAYS = [(way, dict()) for way in (mlp_way, norm_rope_way, rms_norm_way, dequantize_way, qkv_way, linear_way)]
WAYS += [(linear_way, case) for case in (dict(added=False), dict(bias=True), dict(rank=0, beside=dict(rank=8)))]
WAYS.append((linear_way, dict(rank=129, beside=dict(rank=8))))


@pytest.mark.parametrize("way, case", WAYS)
def test_devices_meshes_and_packages_are_refused_by_name_and_passed_over_by_default(way, case, card):
    assert way(patch=card, **case) in (90, (90, True), "triton")

    def refused(reason):
        with pytest.raises(NotImplementedError, match=f"by triton: {reason}"):
            way(implementation="triton", patch=card, **case)
        assert way(patch=card, **case) is None

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("fsdp",))):
        refused("a mesh of several devices")
    for missing in ("triton", "jax_triton"):
        card.setattr(gpu, "find_spec", lambda name, missing=missing: None if name == missing else name)
        refused(f"{missing} is not installed: pip install 'jaxft")
    card.setattr(gpu, "device_capability", lambda: 70)
    refused("compute capability 7.0")
    card.undo()
    refused("cpu device")


def test_four_bits_are_read_for_the_card_of_a_plan_and_for_the_device_here_after_it(monkeypatch):
    card = type("Card", (), {"platform": "gpu", "compute_capability": "8.9"})()
    assert dequantize_way(patch=monkeypatch) is None
    with monkeypatch.context() as patch, gpu.compiling_for(card):
        patch.setattr(gpu, "find_spec", lambda name: name)
        assert dequantize_way(patch=patch) == 89
    assert dequantize_way(patch=monkeypatch) is None


@pytest.mark.parametrize("normed", [False, True])
def test_only_a_norm_has_the_products_kept_that_it_read(normed):
    pytest.importorskip("jax_triton", reason="needs the kernels that are traced")
    N, K, H, D = 4, 2, 64, 128
    shaped = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, norms = shaped((2, 24, D)), (shaped((H,)), shaped((H,))) if normed else None
    layers = tuple(
        Weights(shaped((O, D)), lora=tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, D), (O, 8), ())))
        for O in (N * H, K * H, K * H)
    )
    angle = jax.ShapeDtypeStruct((2, 24, H // 2), jnp.float32)

    def kept(x, layers, norms, angle):
        return jax.vjp(lambda x: qkv_module.triton.qkv(x, layers, norms, angle, angle, H, 1e-6, 90), x)[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, x, layers, norms, angle))]
    assert ((2, 24, N, H) in shapes) == ((2, 24, K, H) in shapes) == normed
