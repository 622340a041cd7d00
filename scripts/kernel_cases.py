"""What `bench_kernels.py` measures: for each op its arguments at a named shape, its ways, its definition, its work.

Every array is an argument of what is measured: XLA would spend minutes on a large constant. A `Case` without gradients
has `of` empty.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from kernel_shapes import LAYERS, Shape, attention_inputs, first_keys, folded, normal, stacked_nf4, through_layers

from jaxft.kernels.adamw_8bit import adamw_8bit
from jaxft.kernels.attention import attention, chunked, documents
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.linear.reference import matmul
from jaxft.kernels.linear_cross_entropy import linear_cross_entropy
from jaxft.kernels.linear_cross_entropy import reference as cross_entropy
from jaxft.kernels.mlp import mlp
from jaxft.kernels.norm_rope import norm_rope
from jaxft.kernels.qkv import qkv
from jaxft.kernels.qkv.reference import rotated
from jaxft.kernels.rms_norm import residual_rms_norm
from jaxft.optim_8bit import dequantize, scale_by_adam_8bit
from jaxft.quant import NF4, dense, multiply, quantize_nf4


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    arguments: key to the arrays of one call. ways: functions of those, by name. definition: the same function in plain
    jnp, run on float32 arguments; with own_gradients it takes (arguments, upstream) as they are and returns outputs and
    gradients. work: TFLOP or TB of forward, and of forward + backward. of: which arguments are differentiated, none
    where there is no backward. tolerance: another one than the dtype's for labels that contain its key. view: of a
    way's output, what is compared. baselines: the ways of earlier cases that the times are compared with.
    """

    name: str
    arguments: Callable[[jax.Array], tuple]
    ways: dict[str, Callable]
    definition: Callable
    work: tuple[float, float]
    unit: str = "TFLOP/s"
    of: tuple[int, ...] = ()
    tolerance: dict[str, float] = field(default_factory=dict)
    view: Callable = lambda out: out
    baselines: tuple[str, ...] = ()
    own_gradients: bool = False


def attention_cases(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    first_key = first_keys(shape)
    fixed = dict(window=shape.window, scale=shape.H**-0.5, softcap=shape.softcap)
    most = int(np.max(np.sum(first_key == np.arange(shape.T), axis=1)))

    def way(name: str, **more) -> Callable:
        return lambda q, k, v, first_key: attention(
            q, k, v, first_key=first_key, implementation=name, **fixed, **more
        )  # fmt: skip

    known = documents(first_key, most)
    ways = {
        "triton": way("triton"), f"cudnn(M={most})": way("cudnn", documents=known),
        "mosaic": way("mosaic", documents=known if most == 1 else None),
    }  # fmt: skip
    if most == 1 and shape.softcap is None and shape.window is None:
        ways["jax.nn cudnn causal"] = lambda q, k, v, _: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    elif most > 1:
        ways[f"cudnn(M={2 * most})"] = way("cudnn", documents=documents(first_key, 2 * most))
    ways["chunked"] = way("chunked")
    block = max(1, 2**28 // (shape.N * shape.T))

    def definition(arguments, dout):
        """Row by row so that it fits (`chunked` is held to reference.py by the tests)."""
        last = jnp.arange(shape.T, dtype=jnp.int32)[None, :]

        def row(inputs):
            q, k, v, first, dout = (x[None] for x in inputs)
            out, pull = jax.vjp(
                lambda q, k, v: chunked.attention(
                    q, k, v, first, last, scale=shape.H**-0.5, softcap=shape.softcap, block=block
                ),
                *(x.astype(jnp.float32) for x in (q, k, v)),
            )
            return jax.tree.map(lambda x: x[0], (out, pull(dout.astype(jnp.float32))))

        q, k, v, first = arguments
        return jax.lax.map(row, (q, k, v, folded(shape, first), dout))

    pairs = float(np.sum(np.arange(shape.T) - np.asarray(folded(shape, jnp.asarray(first_key))) + 1, dtype=np.float64))
    work = 4 * pairs * shape.N * shape.H / 1e12  # 2 products forward, 5 backward
    yield Case(
        "attention", lambda key: (*attention_inputs(shape, key, dtype), jnp.asarray(first_key)), ways, definition,
        (work, 3.5 * work), of=(0, 1, 2), own_gradients=True,
    )  # fmt: skip


BASELINES = "frozen products alone", "without LoRA"  # how the names of those ways end
Sizes = tuple[tuple[int, int], ...]  # (O, I) of each layer


def weights_and_loras(key: jax.Array, sizes: Sizes, shape: Shape, dtype: jnp.dtype, rank: int) -> tuple[list, list]:
    """Frozen weights (NF4 where the shape says so) and A, B float32 whose values `dtype` holds."""
    keys = jax.random.split(key, 3)
    weights = [w / size[1] ** 0.5 for w, size in zip(normal(keys[0], sizes, dtype), sizes, strict=True)]
    held: list = [jax.jit(quantize_nf4)(w) for w in weights] if shape.nf4 else weights
    a = normal(keys[1], tuple((rank, columns) for _, columns in sizes), dtype, 0.03)
    b = normal(keys[2], tuple((rows, rank) for rows, _ in sizes), dtype, 0.03)
    return held, [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in zip(a, b, strict=True)]


def layers(loras: list | None, weights: list) -> tuple[Weights, ...]:
    if loras is None:
        return tuple(map(Weights, weights))
    return tuple(Weights(w, None, (a, b, jnp.float32(2))) for w, (a, b) in zip(weights, loras, strict=True))


def block_cases(op: str, shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    """Linear layers that read one x ("linears"), the MLP, or both blocks ("qkv_mlp": q and k rotated, and normalised
    where the model does), each beside its large products alone, and beside itself without LoRA."""
    D, F, H, tokens = shape.D, shape.F, shape.H, shape.B * shape.T
    outer: Sizes = tuple((heads * H, D) for heads in (shape.N, shape.K, shape.K))
    inner, activation = ((F, D), (F, D), (D, F)), "silu" if shape.window is None else "gelu_pytorch_tanh"
    sizes: Sizes = {"linears": outer, "mlp": inner, "qkv_mlp": outer + inner}[op]
    down = op != "linears"

    def arguments(key):
        keys = jax.random.split(key)
        (x,) = normal(keys[0], ((shape.B, shape.T, D),), dtype)
        weights, loras = weights_and_loras(keys[1], sizes, shape, dtype, rank)
        return x, loras, weights

    def way(implementation: str | None) -> Callable:
        def run(x, loras, weights):
            found = layers(loras, weights)
            out: list[jax.Array] = []
            if op == "linears":
                out += linears(x, found, implementation=implementation)
            if op == "qkv_mlp":
                norms = (jnp.ones(H, dtype), jnp.ones(H, dtype)) if shape.qk_norm else None
                angle = 0.1 * jax.lax.broadcasted_iota(jnp.float32, (shape.B, shape.T, H // 2), 1)
                cos, sin = jnp.cos(angle), jnp.sin(angle)
                if implementation == "fused":  # all by plain XLA, which `qkv` has no name for
                    products = linears(x, found[:3], implementation="fused")
                    out += rotated(products, norms, cos, sin, head_dim=H, eps=1e-6, implementation="reference")
                else:
                    how: dict = dict(norms=norms, eps=1e-6, implementation=implementation)
                    out += qkv(x, *found[:3], head_dim=H, cos=cos, sin=sin, **how)
            if down:
                out.append(mlp(x, *found[-3:], activation=activation, implementation=implementation))
            return out

        return run

    def without_lora(implementation: str | None) -> Callable:
        return lambda x, weights: way(implementation)(x, None, weights)

    def frozen_arguments(key):
        x, _, weights = arguments(key)
        (h,) = normal(jax.random.fold_in(key, 1), ((shape.B, shape.T, F if down else 1),), dtype)
        return x, h, [dense(w, dtype) if isinstance(w, NF4) else w for w in weights]

    def products(x, h, weights):
        first, last = (weights[:-1], weights[-1:]) if down else (weights, [])
        return [matmul(x, w) for w in first] + [matmul(h, w) for w in last]

    large = 2 * tokens * sum(rows * columns for rows, columns in sizes) / 1e12
    small = 2 * tokens * rank * sum(rows + columns for rows, columns in sizes) / 1e12
    frozen, bare = (f"{op}: {baseline}" for baseline in BASELINES)
    yield Case(
        op, frozen_arguments, {frozen: products}, products, (large, 2 * large), of=(0, 1) if down else (0,)
    )  # fmt: skip
    yield Case(
        op, lambda key: arguments(key)[::2], {bare: without_lora(None)}, without_lora("reference"), (large, 2 * large),
        of=(0,), baselines=(frozen,),
    )  # fmt: skip
    yield Case(
        op, arguments, {name: way(name) for name in ("triton", "fused")}, way("reference"),
        (large + small, 2 * large + 3 * small), of=(0, 1), baselines=(frozen, bare),
    )  # fmt: skip


def norm_rope_cases(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    size = shape.B, shape.T, shape.N, shape.H

    def arguments(key):
        (x,) = normal(key, (size,), dtype)
        angle = jax.random.uniform(key, (shape.B, shape.T, shape.H // 2), jnp.float32, 0, 6)
        return x, 1 + 0.1 * jax.random.normal(key, size[-1:], dtype), jnp.cos(angle), jnp.sin(angle)

    def way(name):
        return lambda *a: norm_rope(*a, eps=1e-6, implementation=name)

    moved = np.prod(size, dtype=np.float64) * dtype.itemsize / 1e12
    ways = {name: way(name) for name in ("triton", "reference")}
    of = (0, 1) if shape.full else (0,)
    yield Case("norm_rope", arguments, ways, way("reference"), (2 * moved, 5 * moved), "TB/s", of)


def rms_norm_cases(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    size = shape.B, shape.T, shape.D

    def arguments(key):
        (x,) = normal(key, (size,), dtype)
        return x, 1 + 0.1 * jax.random.normal(key, size[-1:], dtype)

    def way(name):
        return lambda x, w: residual_rms_norm(x, w, eps=1e-6, implementation=name)

    moved = np.prod(size, dtype=np.float64) * dtype.itemsize / 1e12
    # forward reads x and writes y (and, as a function's result of its own, x once more); backward reads x, dx', dy
    ways = {name: way(name) for name in ("triton", "reference")}
    of = (0, 1) if shape.full else (0,)
    yield Case("rms_norm", arguments, ways, way("reference"), (3 * moved, 7 * moved), "TB/s", of)


def cross_entropy_cases(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    M, D, V = shape.B * shape.T, shape.D, shape.V
    parts = next(count for count in range(max(1, -(-M * V // 2**28)), M + 1) if M % count == 0)

    def arguments(key):
        hidden, head = normal(key, ((M, D), (V, D)), dtype)
        return hidden, head / D**0.5, jax.random.randint(key, (M,), 0, V), jnp.ones(M, jnp.float32) / M

    def definition(hidden, head, targets, weights):
        """The reference, some rows after the other so that it fits."""

        @jax.checkpoint
        def rows(inputs):
            hidden, targets, weights = inputs
            return cross_entropy.linear_cross_entropy(hidden, head, targets, weights, None)

        cut = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (hidden, targets, weights))
        return jnp.sum(jax.lax.map(rows, cut))

    product = 2.0 * M * D * V / 1e12
    of = (0, 1) if shape.full else (0,)
    ways = {
        "triton": lambda *a: linear_cross_entropy(*a, implementation="triton"),
        "tiled": lambda *a: linear_cross_entropy(*a, implementation="tiled"),
    }
    yield Case("linear_cross_entropy", arguments, ways, definition, (product, product * (1 + len(of))), of=of)


def dequantize_cases(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    sizes = {"q": (shape.N * shape.H, shape.D), "k": (shape.K * shape.H, shape.D), "gate": (shape.F, shape.D)}
    for name, size in sizes.items():

        def arguments(key, size=size):
            return (jax.jit(quantize_nf4)(jax.random.normal(key, size, dtype)),)

        ways = {way: lambda leaf, way=way: dense(leaf, dtype, implementation=way) for way in ("triton", "reference")}
        moved = size[0] * size[1] * (0.5 + 1 / 64 + dtype.itemsize) / 1e12
        yield Case(
            f"dequantize {name}", arguments, ways, ways["reference"], (moved, 0), "TB/s", tolerance={"": 0.0}
        )  # fmt: skip


def nf4_product_cases(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    """One step of generation: 1 and 8 rows with weights in 4 bits, read in the product or made dense before it."""
    sizes = {"q": (shape.N * shape.H, shape.D), "gate": (shape.F, shape.D), "down": (shape.D, shape.F)}
    for (name, size), rows in itertools.product(sizes.items(), (1, 8)):

        def arguments(key, size=size, rows=rows):
            (x,) = normal(key, ((rows, 1, size[1]),), dtype)
            return x, stacked_nf4(key, size, dtype)

        def way(implementation):
            return partial(through_layers, partial(multiply, implementation=implementation))

        def dense_first(x, leaf):
            return matmul(x, dense(leaf, dtype))

        def definition(x, leaf):
            return matmul(x, dense(leaf, dtype).astype(x.dtype))  # of the weights as they are read, summed in float32

        ways = {"triton": way("triton"), "dense first": partial(through_layers, dense_first)}
        moved = LAYERS * size[0] * size[1] * (0.5 + 1 / 64) / 1e12
        yield Case(
            f"nf4_product {name} {rows}, {LAYERS} layers", arguments, ways, partial(through_layers, definition),
            (moved, 0), "TB/s",
        )  # fmt: skip


def adamw_8bit_cases(shape: Shape, dtype: jnp.dtype, rank: int) -> Iterator[Case]:
    """The update of four stacked layers' gate weights from moments that are not zero; and steps that end in place."""
    L, size = 4, (4, shape.F, shape.D)
    fixed = dict(b1=0.9, b2=0.999, eps=1e-8)
    rule = scale_by_adam_8bit(**fixed)

    def arguments(key):
        before, now = ({"layers": 0.01 * jax.random.normal(k, size, dtype)} for k in jax.random.split(key))
        # XLA would work out at compile time what a step makes of the first state, since it knows its zeros
        first = jax.lax.optimization_barrier(rule.init(before))
        return now, rule.update(before, first)[1]

    def definition(grads, state):
        """optax's Adam on the float32 blocks that the codes stand for."""
        blocks = jax.tree.map(lambda g: g.astype(jnp.float32).reshape(L, -1, 256), grads)
        wide = as_float32((None, state))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            update, found = optax.scale_by_adam(**fixed).update(
                blocks, optax.ScaleByAdamState(state.steps, wide["mu"], wide["nu"])
            )
        return {"mu": found.mu, "nu": found.nu, "update": jax.tree.map(lambda u: u.reshape(size), update)}

    def as_float32(out):
        update, state = out
        return {
            "mu": {"layers": dequantize(state.mu["layers"], True)},
            "nu": {"layers": dequantize(state.nu["layers"], False)},
            "update": update,
        }

    # gradient, update, and twice the codes of both moments with a magnitude for 256 of them
    moved = np.prod(size, dtype=np.float64) * (dtype.itemsize + 4 + 4 * (1 + 4 / 256)) / 1e12
    yield Case(
        "adamw_8bit", arguments, {"xla": rule.update}, definition, (moved, 0), "TB/s", view=as_float32,
        tolerance={"update": 1e-4, "mu": 3e-2, "nu": 3e-2},  # a moment comes back rounded to 8 bits
    )  # fmt: skip

    # in one program, so that the copy of what the call may not overwrite is a small part of it
    steps = 16

    def held(key):
        keys = jax.random.split(key)
        grads, state = arguments(keys[0])
        return jax.random.normal(keys[1], size, dtype), grads["layers"], state.mu["layers"], state.nu["layers"]

    def way(name):
        def run(param, grad, mu, nu):
            scalars = jnp.asarray([1, 0.01, 0.19, 0.002, 1], jnp.float32)

            def step(index, carry):
                param, mu, nu = carry
                own = jax.random.fold_in(jax.random.key(0), index)
                return adamw_8bit(param, grad, mu, nu, scalars, own, decay=0.1, implementation=name, **fixed)

            return jax.lax.fori_loop(0, steps, step, (param, mu, nu))

        return run

    def wide(out):
        param, mu, nu = out
        return {"mu": dequantize(mu, True), "nu": dequantize(nu, False), "param": param}

    # parameter and codes read and written, gradient read: 10 bytes a bfloat16 number; and magnitudes
    moved = steps * np.prod(size, dtype=np.float64) * (3 * dtype.itemsize + 4 * (1 + 4 / 256)) / 1e12
    yield Case(
        f"adamw_8bit, {steps} steps", held, {name: way(name) for name in ("triton", "pieces")},
        lambda *a: wide(way("reference")(*a)), (moved, 0), "TB/s", view=wide,
        tolerance={"param": 2e-2, "mu": 3e-2, "nu": 3e-2},  # a 16-bit parameter is rounded at random in every step
    )  # fmt: skip


OPS: dict[str, Callable[[Shape, jnp.dtype, int], Iterator[Case]]] = {
    "attention": attention_cases,
    "linears": partial(block_cases, "linears"),
    "mlp": partial(block_cases, "mlp"),
    "qkv_mlp": partial(block_cases, "qkv_mlp"),
    "norm_rope": norm_rope_cases,
    "rms_norm": rms_norm_cases,
    "linear_cross_entropy": cross_entropy_cases,
    "dequantize": dequantize_cases,
    "nf4_product": nf4_product_cases,
    "adamw_8bit": adamw_8bit_cases,
}
