"""Runs Triton kernels (linear layers, MLP, norms, cross entropy) by Triton's interpreter; compares with references.

Its own process, because of `tests/interpreted.py`: `python tests/interpret_blocks.py` prints one line a case and fails
on the first one that is off. float32 shows the formulas exactly; float16 and bfloat16 what is rounded before a product.
"""

from collections.abc import Callable
from typing import Any

from tests import interpreted  # before triton  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.linear import Weights
from jaxft.kernels.linear import fused as linear
from jaxft.kernels.linear import reference as linear_reference
from jaxft.kernels.linear import triton as linear_triton
from jaxft.kernels.linear_cross_entropy import reference as cross_entropy_reference
from jaxft.kernels.linear_cross_entropy import tiled
from jaxft.kernels.linear_cross_entropy import triton as cross_entropy_triton
from jaxft.kernels.mlp import fused, reference
from jaxft.kernels.mlp.triton import Kernels
from jaxft.kernels.norm_rope import reference as norm_rope_reference
from jaxft.kernels.norm_rope import triton as norm_rope_triton
from jaxft.kernels.qkv import reference as qkv_reference
from jaxft.kernels.qkv import triton as qkv_triton
from jaxft.kernels.rms_norm import reference as rms_norm_reference
from jaxft.kernels.rms_norm import triton as rms_norm_triton

CARD = 90
EXACT, HALF, BRAIN = 5e-6, 5e-3, 3e-2
ROUNDED = float(jnp.finfo(jnp.bfloat16).eps)  # where nothing in between is rounded to bfloat16


def with_gradients(op: Callable, arguments: tuple, *, of: tuple[int, ...], seed: int = 1) -> dict[str, Any]:
    """Output and the gradients of some arguments, for random upstream gradients, in one compiled program."""

    @jax.jit
    def run(arguments):
        def some(*chosen):
            every = list(arguments)
            for index, value in zip(of, chosen, strict=True):
                every[index] = value
            return op(*every)

        out, pull = jax.vjp(some, *(arguments[index] for index in of))
        leaves, structure = jax.tree.flatten(out)
        random = np.random.default_rng(seed)
        upstream = [jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
        return {"out": out, "gradients": pull(jax.tree.unflatten(structure, upstream))}

    return run(arguments)


def raised(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def mlp(
    name, *, T, F, ranks, D=24, activation="silu", dtype=jnp.float32, added=True, tiles=None, low_rank=True,
    trained=False, tolerance=EXACT,
):  # fmt: skip
    random = np.random.default_rng(T)

    def draw(*shape, scale=0.3):
        return jnp.asarray(random.normal(0, scale, shape), dtype)

    layers = tuple(
        Weights(draw(rows, columns), None, (draw(rank, columns), draw(rows, rank), jnp.asarray(1.7, dtype)))
        for rows, columns, rank in zip((F, F, D), (D, D, F), ranks, strict=True)
    )
    loras = tuple(layer.lora for layer in layers)
    weights = tuple(layer.weight for layer in layers)
    x, add = draw(1, T, D, scale=1.0), draw(1, T, D, scale=1.0) if added else None

    def put(loras, weights):
        return tuple(Weights(weight, None, lora) for weight, lora in zip(weights, loras, strict=True))

    def kernels(x, loras, add, weights):
        keys = (None,) * 3
        kernels = Kernels(CARD, low_rank)
        if tiles is None:
            return fused.mlp(x, put(loras, weights), activation, 0.0, keys, add, kernels)
        return fused.tiled_mlp(x, put(loras, weights), activation, 0.0, keys, add, kernels, tiles)

    def wanted(x, loras, add, weights):
        y = reference.mlp(x, *put(loras, weights), activation, 0.0, (None,) * 3)
        return y if add is None else y + add

    arguments = (x, loras, add, weights)
    of = (0, 1, *(2,) * added, *(3,) * trained)
    interpreted.compare(
        name, with_gradients(kernels, arguments, of=of), with_gradients(wanted, raised(arguments), of=of), tolerance
    )


def mlp_of_b(name, tiles):
    """Gradients of B alone, of layers whose A is frozen."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(0, 0.3, shape), jnp.float32)  # noqa: E731
    weights, pairs = (draw(32, 24), draw(32, 24), draw(24, 32)), [(24, 32), (24, 32), (32, 24)]
    factors = [(draw(4, inner), draw(outer, 4)) for inner, outer in pairs]
    x = draw(1, 70, 24)

    def layers(bs):
        return tuple(
            Weights(weight, None, (a, b, jnp.float32(1.7)))
            for weight, (a, _), b in zip(weights, factors, bs, strict=True)
        )

    def kernels(bs):
        return fused.tiled_mlp(x, layers(bs), "silu", 0.0, (None,) * 3, None, Kernels(CARD, True), tiles)

    def definition(bs):
        return reference.mlp(x, *layers(bs), "silu", 0.0, (None,) * 3)

    arguments = ([b for _, b in factors],)
    got = with_gradients(kernels, arguments, of=(0,))
    interpreted.compare(name, got, with_gradients(definition, arguments, of=(0,)), EXACT)


def norm_rope(name, *, B, T, N, H, dtype=jnp.float32, of=(0, 1), tolerance=EXACT):
    random = np.random.default_rng(T)
    x, w = jnp.asarray(random.standard_normal((B, T, N, H)), dtype), jnp.asarray(random.standard_normal(H), jnp.float32)
    angle = random.uniform(0, 6, (B, T, H // 2)).astype(np.float32)
    arguments = x, w, jnp.cos(angle), jnp.sin(angle)
    got = with_gradients(lambda *a: norm_rope_triton.norm_rope(*a, 1e-6, CARD), arguments, of=of)
    wanted = with_gradients(lambda *a: norm_rope_reference.norm_rope(*a, 1e-6), raised(arguments), of=of)
    interpreted.compare(name, got, wanted, tolerance)


def qkv(
    name, *, B, T, N, K, H, ranks, norms=True, D=24, dtype=jnp.float16, of=(0, 1, 2), tolerance=HALF, programs=256
):  # fmt: skip
    """q, k and v, and the gradients of x, of LoRA's factors and of the norms' weights; programs: that fill a card."""
    norm_rope_triton.PROGRAMS = programs
    random = np.random.default_rng(T)

    def draw(*shape, scale=0.3):
        return jnp.asarray(random.normal(0, scale, shape), dtype)

    rows = N * H, K * H, K * H
    weights = tuple(draw(size, D) for size in rows)
    loras = tuple(
        None if rank == 0 else (draw(rank, D), draw(size, rank), jnp.asarray(1.7, dtype))
        for rank, size in zip(ranks, rows, strict=True)
    )
    angle = random.uniform(0, 6, (B, T, H // 2)).astype(np.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    arguments = draw(B, T, D, scale=1.0), loras, (draw(H), draw(H)) if norms else None, weights

    def layers(loras, weights):
        return tuple(Weights(weight, None, lora) for weight, lora in zip(weights, loras, strict=True))

    def kernels(x, loras, norms, weights):
        qkv_triton.check(x, layers(loras, weights), H, False, CARD)
        return qkv_triton.qkv(x, layers(loras, weights), norms, cos, sin, H, 1e-6, CARD)

    def definition(x, loras, norms, weights):
        return qkv_reference.qkv(
            x, layers(loras, weights), norms, cos, sin, head_dim=H, eps=1e-6, dropout=0.0, key=None
        )

    got = with_gradients(kernels, arguments, of=of)
    interpreted.compare(name, got, with_gradients(definition, raised(arguments), of=of), tolerance)


def summed(name, *, T, O, R, dtype=jnp.float32, tolerance=EXACT):
    """With a bias and a residual, with one of them, and with neither; u stands among other columns."""
    random = np.random.default_rng(T)
    product, u, b, bias, add = (
        jnp.asarray(random.standard_normal(shape), dtype)
        for shape in ((1, T, O), (1, T, R + 5), (O, R), (O,), (1, T, O))
    )
    product, bias = product.astype(jnp.float32), bias.astype(jnp.float32)
    beside = {"both": (bias, add), "bias": (bias, None), "residual": (None, add), "neither": (None, None)}
    got = {
        which: linear_triton.summed(product, u, b, CARD, start=3, bias=one, add=two)
        for which, (one, two) in beside.items()
    }
    product, u, b, bias, add = raised((product, u, b, bias, add))
    y = product + u[..., 3 : 3 + R] @ b.T
    wanted = {"both": y + bias + add, "bias": y + bias, "residual": y + add, "neither": y}
    interpreted.compare(name, got, wanted, tolerance)


def thin_products(name, *, T, columns, ranks, programs=512, dtype=jnp.float32, tolerance=EXACT):
    """Sums over tokens of each wide array with its own columns of u and of the first with all of them, and the products
    that stand side by side."""
    linear_triton.PROGRAMS = programs
    random = np.random.default_rng(T)
    xs = [jnp.asarray(random.standard_normal((1, T, count)), dtype) for count in columns]
    u = jnp.asarray(random.standard_normal((1, T, sum(ranks))), dtype)
    bs = [jnp.asarray(random.standard_normal(shape), dtype) for shape in zip(columns, ranks, strict=True)]
    starts = [sum(ranks[:number]) for number in range(len(ranks))]
    asked = [linear_triton.Thin(*one, False) for one in zip(xs, [u] * len(xs), starts, ranks, strict=True)]
    asked += [linear_triton.Thin(xs[0], u, 0, sum(ranks), True), linear_triton.Thin(xs[0], u, starts[-1], 1, True)]
    got = {
        "sums": linear_triton.over_tokens(asked, CARD),
        "beside": linear_triton.side_by_side(xs, bs, CARD),
    }
    xs, u, bs = raised((xs, u, bs))
    parts = [u[0, :, start : start + rank] for start, rank in zip(starts, ranks, strict=True)]
    sums = [x[0].T @ part for x, part in zip(xs, parts, strict=True)]
    sums += [u[0].T @ xs[0][0], parts[-1][:, :1].T @ xs[0][0]]
    beside = jnp.concatenate([x @ b for x, b in zip(xs, bs, strict=True)], axis=-1)
    interpreted.compare(name, got, {"sums": sums, "beside": beside}, tolerance)


def linears(name, *, T, O, I, ranks, rate=0.0, dtype=jnp.float16, tolerance=HALF):
    """Layers that read one x, the first beside a residual, the last with a bias, and their gradients."""
    random = np.random.default_rng(T)

    def draw(*shape, scale=0.3):
        return jnp.asarray(random.normal(0, scale, shape), dtype)

    loras = tuple((draw(rank, I), draw(O, rank), jnp.asarray(1.7, dtype)) if rank else None for rank in ranks)
    weights = tuple(draw(O, I) for _ in ranks)
    keys = tuple(jax.random.split(jax.random.key(0), len(ranks))) if rate else (None,) * len(ranks)
    arguments = draw(1, T, I, scale=1.0), loras, draw(1, T, O, scale=1.0), draw(O)

    def layers(loras, bias, dtype):
        biases = [*[None] * (len(ranks) - 1), bias]
        together = zip(weights, biases, loras, strict=True)
        return tuple(Weights(weight.astype(dtype), bias, lora) for weight, bias, lora in together)

    def kernels(x, loras, add, bias):
        return linear.linears(x, layers(loras, bias, x.dtype), rate, keys, add, CARD)

    def definition(x, loras, add, bias):
        together = zip(layers(loras, bias, x.dtype), keys, strict=True)
        first, *rest = (linear_reference.linear(x, *layer[:3], rate, key) for layer, key in together)
        return first + add, *rest

    of = 0, 1, 2, 3
    got = with_gradients(kernels, arguments, of=of)
    interpreted.compare(name, got, with_gradients(definition, raised(arguments), of=of), tolerance)


def young_adapter(name):
    """What a B far below the rounding of every sum changes: as much, over all numbers, as its own numbers say.

    Rounding a small part away changes nothing; adding it to sums that lie halfway between two numbers changes too much.
    """
    random = np.random.default_rng(0)
    T, D, F, N, H, R = 512, 64, 128, 4, 32, 8

    def draw(*shape, scale):
        return jnp.asarray(random.normal(0, scale, shape), jnp.bfloat16)

    def layer(O, I):
        return Weights(
            draw(O, I, scale=I**-0.5), None, (draw(R, I, scale=I**-0.5), draw(O, R, scale=3e-4), jnp.bfloat16(1))
        )

    def without(layer):
        a, b, scale = layer.lora
        return layer._replace(lora=(a, 0 * b, scale))

    residual, *inner = layer(D, D), *(layer(F, D) for _ in range(2)), layer(D, F)
    rotated = tuple(layer(N * H, D) for _ in range(3))
    x, add = draw(1, T, D, scale=1.0), draw(1, T, D, scale=2.0)
    angle = random.uniform(0, 6, (1, T, H // 2)).astype(np.float32)
    norms = draw(H, scale=1.0), draw(H, scale=1.0)
    keys = (None,) * 3

    def kernels(residual, inner, rotated, x, add):
        q, k, v = qkv_triton.qkv(x, rotated, norms, jnp.cos(angle), jnp.sin(angle), H, 1e-6, CARD)
        return {
            "linear": linear.linears(x, (residual,), 0.0, keys[:1], add, CARD)[0],
            "mlp": fused.mlp(x, inner, "silu", 0.0, keys, add, Kernels(CARD, True)),
            "q": q, "k": k, "v": v,
        }  # fmt: skip

    def definition(residual, inner, rotated, x, add):
        q, k, v = qkv_reference.qkv(
            x, rotated, norms, jnp.cos(angle), jnp.sin(angle), head_dim=H, eps=1e-6, dropout=0.0, key=None
        )
        return {
            "linear": linear_reference.linear(x, *residual[:3], 0.0, None) + add,
            "mlp": reference.mlp(x, *inner, "silu", 0.0, keys) + add,
            "q": q, "k": k, "v": v,
        }  # fmt: skip

    def change(op, arguments):
        layers = residual, tuple(inner), rotated
        bare = jax.tree.map(without, layers, is_leaf=lambda leaf: isinstance(leaf, Weights))
        put = lambda layers: raised(op(*arguments(layers), *arguments((x, add))))  # noqa: E731
        return jax.tree.map(jnp.subtract, put(layers), put(bare))

    got, wanted = change(kernels, lambda tree: tree), change(definition, raised)
    for way, exact in wanted.items():
        share = float(jnp.vdot(got[way], exact) / jnp.vdot(exact, exact))
        assert abs(share - 1) < 0.1, f"{name}, {way}: {share:.2f} of what the numbers say"
    print(f"{name}: ok", flush=True)


def rms_norm(name, *, shape, dtype=jnp.float32, of=(0, 1), tolerance=EXACT):
    random = np.random.default_rng(shape[-1])
    x, w = (
        jnp.asarray(random.standard_normal(shape), dtype),
        jnp.asarray(random.standard_normal(shape[-1]), jnp.float32),
    )
    got = with_gradients(lambda x, w: rms_norm_triton.residual_rms_norm(x, w, 1e-6, CARD), (x, w), of=of)

    def both(x, w):
        return x, rms_norm_reference.rms_norm(x, jnp.expand_dims(w, tuple(range(x.ndim - 1))), 1e-6)

    interpreted.compare(name, got, with_gradients(both, raised((x, w)), of=of), tolerance)


def cross_entropy(name, *, M, V, softcap=None, block=512, dtype=jnp.float32, tolerance=EXACT):
    """Losses and the gradient of scores, some of whose rows have weight 0 and are not finite; the gradient alone and
    written into an array of more rows."""
    random = np.random.default_rng(V)
    scores = jnp.asarray(20 * random.standard_normal((M, V)), jnp.float32)
    scores = scores.at[1].set(jnp.nan).at[2, 3].set(-1e30).at[2, 4].set(-jnp.inf).at[3].set(0.0)
    targets = jnp.asarray(random.integers(0, V, M), jnp.int32)
    weights = jnp.asarray(random.uniform(0.5, 2, M), jnp.float32).at[jnp.array([1, M - 1])].set(0.0)
    cross_entropy_triton.BLOCK = block
    run = lambda scores, gradient, into=None: cross_entropy_triton.losses(  # noqa: E731
        scores, targets, weights, softcap, dtype, gradient, CARD, into
    )
    array = jnp.full((3 * M, V), 7, dtype)
    again, among = run(scores, True, (array, jnp.int32(M + 2)))
    got = (*run(scores, True), run(scores, False)[0], again, among[M + 2 : 2 * M + 2])
    np.testing.assert_array_equal(jnp.delete(among, jnp.arange(M + 2, 2 * M + 2), axis=0), array[: 2 * M])

    def total(scores):
        capped = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        rows = jax.vmap(cross_entropy_reference.cross_entropy)(capped[:, None], targets[:, None], weights[:, None])
        return jnp.sum(rows), rows

    finite = jnp.where(weights[:, None] != 0, scores, 0.0)
    gradient, rows = jax.grad(total, has_aux=True)(finite)
    interpreted.compare(name, got, (rows, gradient, rows, rows, gradient), tolerance)
    if softcap is not None:  # which makes an infinite score finite
        return
    bad = run(jnp.zeros((3, V)).at[0, 1].set(jnp.inf).at[2, V - 1].set(jnp.nan), False)[0]
    assert jnp.isfinite(bad).tolist()[::2] == [False, False], bad


def tiled_cross_entropy(name, *, M=75, of=(0, 1), dtype=jnp.float32, tolerance=EXACT):
    """The op as a GPU runs it: tiles of 8 rows, four a block, rows of weight 0 and gradients around the kernel. The
    used rows end at a block's edge, at a tile's, in a tile, before the first, with the last."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal(shape), dtype) for shape in ((M, 8), (301, 8))]
    targets = jnp.asarray(random.integers(0, 301, M), jnp.int32)
    spread = random.uniform(0.5, 2, M)

    def by(op, arrays):
        return jax.jit(lambda w: jax.value_and_grad(lambda *two: op(*two, targets, w, 9.0), of)(*arrays))

    run = by(lambda *inputs: tiled.linear_cross_entropy(*inputs, 8, 1, CARD), arrays)
    wanted = by(cross_entropy_reference.linear_cross_entropy, raised(arrays))
    some = [jnp.asarray(spread * (random.permutation(M) < used), jnp.float32) for used in (32, 48, 51, 0, M)]
    interpreted.compare(name, [run(w) for w in some], [wanted(w) for w in some], tolerance)


if __name__ == "__main__":
    mlp("mlp, odd T and F, rank 16", T=75, F=137, ranks=(16, 16, 16))
    mlp("mlp, ranks 8, 40, 16, gelu", T=64, F=192, ranks=(8, 40, 16), activation="gelu_pytorch_tanh")
    mlp("mlp, rank 40, chunks of two tiles and a short last one", T=9 * 64 + 5, F=72, ranks=(40, 8, 40), added=False)
    mlp("mlp, computed again in place", T=131, F=64, ranks=(8, 8, 8), tiles=1)
    mlp("mlp, two tiles of tokens", T=131, F=64, ranks=(8, 8, 8), tiles=2)
    mlp("mlp, LoRA outside of the kernels, in place", T=75, F=137, ranks=(16, 16, 16), low_rank=False, tiles=1)
    mlp("mlp, weights trained, LoRA outside", T=64, F=96, ranks=(8, 8, 8), low_rank=False, trained=True)
    mlp(
        "mlp, weights and LoRA trained, gelu", T=64, F=96, ranks=(8, 8, 8), activation="gelu_pytorch_tanh", trained=True
    )
    mlp("mlp, float16", T=70, F=130, ranks=(16, 8, 40), dtype=jnp.float16, tolerance=HALF)
    mlp("mlp, bfloat16", T=70, F=130, ranks=(16, 8, 40), dtype=jnp.bfloat16, tolerance=BRAIN)
    mlp_of_b("mlp, B alone, two tiles of tokens", 2)
    norm_rope("norm_rope", B=2, T=7, N=5, H=32)
    norm_rope("norm_rope, weight frozen", B=1, T=9, N=3, H=64, of=(0,))
    norm_rope("norm_rope, several programs, float16", B=2, T=13, N=3, H=128, dtype=jnp.float16, tolerance=HALF)
    norm_rope("norm_rope, bfloat16", B=2, T=7, N=3, H=32, dtype=jnp.bfloat16, tolerance=ROUNDED)
    qkv("qkv", B=2, T=21, N=4, K=2, H=32, ranks=(5, 16, 8))
    qkv("qkv, bfloat16", B=2, T=21, N=4, K=2, H=32, ranks=(5, 16, 8), dtype=jnp.bfloat16, tolerance=BRAIN)
    qkv("qkv, norms frozen, one without LoRA", B=1, T=70, N=3, K=1, H=64, ranks=(4, 0, 4), of=(0, 1))
    qkv("qkv, no norms", B=1, T=40, N=4, K=4, H=128, ranks=(16, 16, 16), norms=False, of=(0, 1))
    qkv("qkv, eight and four heads a program", B=1, T=80, N=8, K=4, H=32, ranks=(8, 8, 8), programs=1)
    qkv("qkv, two and one, no norms", B=1, T=70, N=6, K=3, H=64, ranks=(4, 4, 0), norms=False, of=(0, 1), programs=1)
    norm_rope("norm_rope, four heads a program", B=2, T=7, N=4, H=32)  # as the last one left it
    summed("linear, summed", T=37, O=130, R=5)
    summed("linear, summed, float16", T=64, O=256, R=16, dtype=jnp.float16, tolerance=HALF)
    summed("linear, summed, bfloat16", T=37, O=130, R=5, dtype=jnp.bfloat16, tolerance=ROUNDED)
    young_adapter("a young adapter")
    linears("linear, one beside a residual", T=37, O=70, I=48, ranks=(5,))
    thin_products("thin products", T=75, columns=(96, 64, 33), ranks=(5, 16, 3))
    thin_products("thin products, one token, one array", T=1, columns=(130,), ranks=(16,))
    thin_products("thin products, chunks of tokens", T=300, columns=(130, 40, 64), ranks=(8, 40, 16), programs=12)
    thin_products("thin products, float16", T=140, columns=(64, 72), ranks=(4, 8), dtype=jnp.float16, tolerance=HALF)
    thin_products(
        "thin products, bfloat16", T=75, columns=(64, 33), ranks=(5, 3), dtype=jnp.bfloat16, tolerance=ROUNDED
    )
    linears("linear, three layers, one without LoRA", T=150, O=70, I=48, ranks=(5, 0, 16))
    linears("linear, three layers, bfloat16", T=150, O=70, I=48, ranks=(5, 8, 16), dtype=jnp.bfloat16, tolerance=BRAIN)
    linears("linear, ranks that do not fit together", T=20, O=140, I=130, ranks=(100, 70))
    linears("linear, a rank that the kernel does not take", T=20, O=140, I=150, ranks=(8, 130))
    linears("linear, two layers under dropout", T=40, O=70, I=48, ranks=(5, 8), rate=0.3)
    mlp("mlp, weights and LoRA trained", T=64, F=96, ranks=(8, 8, 8), trained=True)
    mlp_of_b("mlp, B alone", 1)
    qkv("qkv, v without LoRA", B=1, T=30, N=3, K=1, H=64, ranks=(4, 4, 0), of=(0, 1))
    rms_norm("rms_norm", shape=(3, 7, 200))
    rms_norm("rms_norm, weight frozen", shape=(1, 5, 129), of=(0,))
    rms_norm("rms_norm, one program, float16", shape=(1, 8, 256), dtype=jnp.float16, tolerance=HALF)
    rms_norm("rms_norm, bfloat16", shape=(2, 5, 200), dtype=jnp.bfloat16, tolerance=ROUNDED)
    cross_entropy("cross entropy, one part", M=6, V=300)
    cross_entropy("cross entropy, three parts, capped", M=7, V=1100, softcap=15.0)
    cross_entropy("cross entropy, float16", M=5, V=1024, dtype=jnp.float16, tolerance=HALF)
    cross_entropy("cross entropy, bfloat16, capped", M=6, V=300, softcap=15.0, dtype=jnp.bfloat16, tolerance=ROUNDED)
    tiled_cross_entropy("cross entropy, blocks of tiles")
    tiled_cross_entropy("cross entropy, blocks of tiles, head frozen", of=(0,))
    tiled_cross_entropy("cross entropy, blocks of tiles, head alone", of=(1,))
    tiled_cross_entropy("cross entropy, blocks of tiles, bfloat16", dtype=jnp.bfloat16, tolerance=ROUNDED)
    tiled_cross_entropy("cross entropy, one tile", M=8)
