"""Each op of `kernels/` at a tiny shape: every way that serves here, forward and backward, against its definition."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.adamw_8bit import adamw_8bit
from jaxft.kernels.attention import attention, documents, key_range
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.linear_cross_entropy import linear_cross_entropy
from jaxft.kernels.mlp import mlp
from jaxft.kernels.norm_rope import norm_rope
from jaxft.kernels.qkv import qkv
from jaxft.kernels.rms_norm import residual_rms_norm
from jaxft.kernels.rope import apply_rope
from jaxft.optim_8bit import dequantize, quantize
from jaxft.quant import dense, dense_together, multiply, quantize_nf4

# B, T, N, K, H, D, F, V and R of the legend; the largest sum is over 144 numbers. Widths below 128 the norm's kernel
# refuses, and T is no multiple of any tile
B, T, N, K, H, D, F, V, R = 2, 72, 4, 2, 32, 128, 144, 250, 8


def mixed_rows(T: int) -> tuple[tuple[int, ...], ...]:
    """Lengths in each row: one document, one a token, ones of single tokens among others with padding behind, and none,
    which is padding alone. Of 384 tokens a single one ends a tile and the next begins one."""
    return (T,), (1,) * T, (T // 3 - 1, 1, 1, T // 2, 1), ()


# rows of whole tiles and the size of heads: what our kernels for Hopper need, forward and backward. 64 rows have so
# many programs that one of them goes through all query heads of a group; short documents have another forward pass with
# heads of 128 than with heads of 64
WHOLE_TILES = {
    "whole tiles": (mixed_rows(384), 64),
    "short documents": (mixed_rows(384), 128),
    "long documents": (((300, 724), (1000, 24)), 128),
    "one document": (((512,), (512,)), 64),
    "few rows": (((512,), (512,)), 128),
    "many rows": (((256,),) * 64, 64),
}


@dataclass(frozen=True)
class Case:
    """An op, the arrays of one call, which of them are differentiated, its ways by name, and its definition.

    definition: the same function in plain jnp; it is given the same numbers in float32. most: another tolerance
    than the dtype's.
    """

    op: str
    arguments: tuple
    of: tuple[int, ...]
    ways: Mapping[str, Callable]
    definition: Callable
    most: float | None = None


@dataclass(frozen=True)
class Result:
    """What became of one way: "PASS" or "FAIL" with the largest relative distance, or "-" where it does not serve.

    distance: ‖got − want‖ / ‖want‖, the largest of output and gradients. reason: why it failed or does not serve.
    """

    op: str
    way: str
    verdict: str
    distance: float | None = None
    tolerance: float | None = None
    reason: str | None = None
    seconds: float | None = None

    def line(self) -> str:
        head = f"{self.verdict:4}  {self.op:20} {self.way:10}"
        if self.distance is None:
            return f"{head} {self.reason}"
        found = f"{head} {self.distance:.1e} of at most {self.tolerance:.1e}"
        return f"{found}: {self.reason}" if self.reason else found


def tolerance(dtype: Any) -> float:
    """The largest relative distance: a few roundings to a 16-bit type, or the roundings of sums in float32."""
    eps = float(jnp.finfo(dtype).eps)
    return 2 * eps if jnp.dtype(dtype).itemsize == 2 else 100 * eps


def self_test(dtype: Any) -> Iterator[Result]:
    """The results of every way of every op in a compute dtype, one after the other, on jax's default device.

    The definition is computed in float32 by the host's CPU where jax has it beside the device.
    """
    device = jax.local_devices()[0]
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        host = device
    for case in cases(dtype):
        dy = _upstream(case)
        wanted = cache(partial(_wanted, case, dy, host))  # not where no way serves
        alone = True
        for way, function in case.ways.items():
            if way != "reference" or device.platform != "cpu":
                yield (result := _tested(case, way, function, dy, wanted, case.most or tolerance(dtype)))
                alone = alone and result.verdict == "-"
            elif alone:
                yield Result(
                    case.op, way, "-", reason="runs here; it is the definition, so there is nothing to compare"
                )


def _wanted(case: Case, dy: Any, host: jax.Device) -> list[np.ndarray]:
    with jax.default_device(host):
        return _flat(jax.jit(partial(_both, case.definition, case.of))(_raised(case.arguments), _raised(dy)))


def _tested(
    case: Case, way: str, function: Callable, dy: Any, wanted: Callable[[], list[np.ndarray]], most: float
) -> Result:
    began = time.perf_counter()
    try:
        got = _flat(jax.jit(partial(_both, function, case.of))(case.arguments, dy))
    except NotImplementedError as refusal:
        return Result(case.op, way, "-", reason=str(refusal).rpartition(f" by {way}: ")[2])
    except Exception as error:  # whatever a broken install raises is what is to be told
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Result(case.op, way, "FAIL", reason=text if len(text) < 300 else f"{text[:297]}...")
    pairs = zip(got, wanted(), strict=True)
    distances = [float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in pairs]
    worst = max(distances, key=lambda x: np.inf if np.isnan(x) else x)
    verdict = "PASS" if worst <= most else "FAIL"  # not so for NaN
    reason = None if verdict == "PASS" else f"output and gradients: {', '.join(f'{x:.1e}' for x in distances)}"
    return Result(case.op, way, verdict, worst, most, reason, time.perf_counter() - began)


def cases(dtype: Any) -> Iterator[Case]:
    """One case an op, of numbers that `dtype` holds."""
    random = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0, dtype: Any = dtype) -> jax.Array:
        return jnp.asarray(scale * random.standard_normal(shape), dtype)

    def low_rank(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
        both = normal(R, columns, scale=0.1), normal(rows, R, scale=0.1)
        return both[0].astype(jnp.float32), both[1].astype(jnp.float32)  # as adapters are held

    angle = random.uniform(0, 6, (B, T, H // 2)).astype(np.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    near_one = jnp.asarray(1 + 0.1 * random.standard_normal(D), dtype)

    def attention_case(op: str, rows: tuple[tuple[int, ...], ...], H: int, ways: tuple[str, ...], **more: Any) -> Case:
        segments = np.zeros((len(rows), max(map(sum, rows))), np.int32)  # 0 is padding
        for segment, row in zip(segments, rows, strict=True):
            segment[: sum(row)] = np.repeat(np.arange(1, len(row) + 1), row)
        first_key = key_range(jnp.asarray(segments))
        most = max(len(np.unique(row)) for row in segments)  # padding is a document like any other

        def attend(way: str, q, k, v, first_key):
            known = documents(first_key, most) if way in ("cudnn", "mosaic") else None
            return attention(q, k, v, first_key=first_key, scale=H**-0.5, documents=known, implementation=way, **more)

        heads = [normal(*segments.shape, count, H) for count in (N, K, K)]
        named = {way: partial(attend, way) for way in ways}
        return Case(op, (*heads, first_key), (0, 1, 2), named, partial(attend, "reference"))

    yield attention_case("attention", mixed_rows(T), H, ("mosaic", "cudnn", "triton", "chunked", "reference"))
    capped = {"window": T // 4, "softcap": 2.0}  # a cap that scores come near
    yield attention_case("attention, capped", mixed_rows(T), H, ("triton", "chunked", "reference"), **capped)
    for of, (packed, head) in WHOLE_TILES.items():
        yield attention_case(f"attention, {of}", packed, head, ("mosaic", "cudnn", "triton"))
    for head in (64, 128):  # before Mosaic's backward pass its own forward pass, and Triton's
        yield attention_case(f"attention, window, {head}", mixed_rows(384), head, ("mosaic", "triton"), window=100)
    yield attention_case("attention, capped, 256", mixed_rows(384), 256, ("triton",), window=100, softcap=2.0)

    def layers(loras, weights) -> tuple[Weights, ...]:
        return tuple(Weights(w, None, (a, b, jnp.float32(2))) for (a, b), w in zip(loras, weights, strict=True))

    def linear(way: str, x, loras, weights):
        return linears(x, layers(loras, weights), implementation=way)

    x, sizes = normal(B, T, D), ((F, D), (D, D))
    weights, loras = [normal(*size, scale=D**-0.5) for size in sizes], [low_rank(*size) for size in sizes]
    ways = {way: partial(linear, way) for way in ("triton", "fused", "reference")}
    yield Case("linear", (x, loras, weights), (0, 1), ways, partial(linear, "reference"))

    def added(way: str, x, loras, weights, residual):
        first, second = layers(loras, weights)
        return linears(x, (first, second._replace(bias=near_one)), add=residual, implementation=way)

    to_end = {way: partial(added, way) for way in ("triton", "fused", "reference")}
    yield Case("linear, added", (x, loras, weights, normal(B, T, F)), (0, 1, 3), to_end, partial(added, "reference"))

    def magnitudes(weights) -> list[jax.Array]:
        return [
            jnp.linalg.norm(w.astype(jnp.float32), axis=1) * (1 + 0.1 * normal(len(w), dtype=jnp.float32))
            for w in weights
        ]

    def with_magnitudes(loras, weights, lengths) -> tuple[Weights, ...]:
        found = layers(loras, weights)
        return tuple(layer._replace(magnitude=one) for layer, one in zip(found, lengths, strict=True))

    def linear_dora(way: str, x, loras, lengths, weights):
        return linears(x, with_magnitudes(loras, weights, lengths), implementation=way)

    yield Case(
        "linear, DoRA", (x, loras, magnitudes(weights), weights), (0, 1, 2),
        {"dora": partial(linear_dora, "fused"), "reference": partial(linear_dora, "reference")},
        partial(linear_dora, "reference"),
    )  # fmt: skip
    held = [jax.jit(quantize_nf4)(weight) for weight in weights]

    def linear_of_nf4(x, loras, held):
        plain = [dense(weight, x.dtype, implementation="reference") for weight in held]  # never the device's own kernel
        return linear("reference", x, loras, plain)

    yield Case("linear, NF4", (x, loras, held), (0, 1), ways, linear_of_nf4)

    def dequantized(way: str, leaf):
        return dense(leaf, dtype, implementation=way)

    yield Case(
        "dequantize", (held[0],), (), {way: partial(dequantized, way) for way in ("triton", "reference")},
        lambda leaf: dense(leaf, jnp.float32, implementation="reference"),
    )  # fmt: skip

    def together(way: str, held):
        return dense_together(held, dtype, implementation=way)

    yield Case(
        "dequantize, together", (held,), (), {way: partial(together, way) for way in ("triton", "reference")},
        lambda held: dense_together(held, jnp.float32, implementation="reference"),
    )  # fmt: skip

    def multiplied(way: str, x, leaf):
        return multiply(x, leaf, implementation=way)

    ways_of_product = {way: partial(multiplied, way) for way in ("triton", "reference")}
    yield Case("dequantize, product", (x[:, 0], held[0]), (), ways_of_product, partial(multiplied, "reference"))

    def block(way: str, tiles: int | None, x, loras, weights):
        return mlp(x, *layers(loras, weights), activation="silu", implementation=way, tiles=tiles)

    def trained(way: str, tiles: int | None, x, weights):
        bare = (Weights(weight, None, None) for weight in weights)
        return mlp(x, *bare, activation="silu", implementation=way, tiles=tiles)

    inner = ((F, D), (F, D), (D, F))
    weights, loras = [normal(*size, scale=D**-0.5) for size in inner], [low_rank(*size) for size in inner]
    # as a step has them: computed once more in the backward pass, in place; and kept
    for op, run, arguments in (("mlp", block, (x, loras, weights)), ("mlp, trained", trained, (x, weights))):
        ways = {"triton": partial(run, "triton", 1), "fused": partial(run, "fused", 1)}
        ways["reference"] = partial(run, "reference", None)
        yield Case(op, arguments, (0, 1), ways, ways["reference"])
    kept = {"triton": partial(block, "triton", None), "fused": partial(block, "fused", None)}
    yield Case("mlp, kept", (x, loras, weights), (0, 1), kept, partial(block, "reference", None))

    def block_dora(way: str | None, x, loras, lengths, weights):
        return mlp(x, *with_magnitudes(loras, weights, lengths), activation="silu", implementation=way)

    yield Case(
        "mlp, DoRA", (x, loras, magnitudes(weights), weights), (0, 1, 2),
        {"composed": partial(block_dora, None), "reference": partial(block_dora, "reference")},
        partial(block_dora, "reference"),
    )  # fmt: skip

    def norm(way: str, x, weight):
        return residual_rms_norm(x, weight, eps=1e-6, implementation=way)

    ways = {way: partial(norm, way) for way in ("triton", "reference")}
    yield Case("rms_norm", (x, near_one), (0, 1), ways, partial(norm, "reference"))

    def norm_rotated(way: str, x, weight, cos, sin):
        return norm_rope(x, weight, cos, sin, eps=1e-6, implementation=way)

    ways = {way: partial(norm_rotated, way) for way in ("triton", "reference")}
    q = normal(B, T, N, H)
    yield Case("norm_rope", (q, near_one[:H], cos, sin), (0, 1), ways, partial(norm_rotated, "reference"))
    yield Case("rope", (q, cos, sin), (0,), {"reference": apply_rope}, apply_rope)

    def inputs(normed: bool, way: str, x, loras, weights, norms):
        return qkv(
            x, *layers(loras, weights), head_dim=H, cos=cos, sin=sin, norms=norms if normed else None, eps=1e-6,
            implementation=way,
        )  # fmt: skip

    heads = ((N * H, D), (K * H, D), (K * H, D))
    weights, loras = [normal(*size, scale=D**-0.5) for size in heads], [low_rank(*size) for size in heads]
    for op, normed in (("qkv", True), ("qkv, without norms", False)):
        ways = {way: partial(inputs, normed, way) for way in ("triton", "composed", "reference")}
        read = x, loras, weights, (near_one[:H], near_one[-H:])
        yield Case(op, read, (0, 1, 3) if normed else (0, 1), ways, ways["reference"])

    def entropy(way: str, hidden, head, targets, weights, softcap=None):
        return linear_cross_entropy(hidden, head, targets, weights, softcap=softcap, tile=40, implementation=way)

    def entropies(way: str, hidden, head, targets, *weights):  # of each of the weights
        return jnp.stack([entropy(way, hidden, head, targets, one, 2.0) for one in weights])

    targets, share = random.integers(0, V, B * T).astype(np.int32), np.full(B * T, 1 / (B * T), np.float32)
    share[::5] = 0
    scored = normal(B * T, D), normal(V, D, scale=D**-0.5), jnp.asarray(targets), jnp.asarray(share)
    ways = {way: partial(entropy, way) for way in ("triton", "tiled", "reference")}
    yield Case("linear_cross_entropy", scored, (0, 1), ways, partial(entropy, "reference"))
    ways = {way: partial(entropies, way) for way in ("triton", "tiled", "reference")}
    twice = *scored, jnp.zeros(B * T)  # where no row counts, the loss is 0 and the gradients are
    yield Case("linear_cross_entropy, capped", twice, (0, 1), ways, partial(entropies, "reference"))

    def stepped(way: str, param, grad, mu, nu, scalars):
        return adamw_8bit(
            param, grad, mu, nu, scalars, jax.random.key(0), b1=0.9, b2=0.999, eps=1e-8, decay=0.1, implementation=way
        )

    def parameters(dtype: Any, way: str, param, *rest):
        return stepped(way, param.astype(dtype), *rest)[0]

    def moments(way: str, *arrays):
        _, mu, nu = stepped(way, *arrays)
        return dequantize(mu, True), dequantize(nu, False)

    # two stacked tensors of no whole number of blocks, second moments over several decades, others of a like size
    size, blocks = (2, F, V), -(-F * V // 256)
    root = np.exp(random.normal(0, 0.7, (2, blocks * 256)))
    root[:, F * V :] = 0
    mu, nu = (
        quantize(jnp.asarray(moment.reshape(2, blocks, 256), jnp.float32), signed)
        for moment, signed in ((random.standard_normal(root.shape) * root, True), (root**2, False))
    )
    grad = jnp.asarray(random.standard_normal(size) * root[:, : F * V].reshape(size), dtype)
    step = normal(*size), grad, mu, nu, jnp.asarray([0.5, 1, 0.19, 0.002, 1], jnp.float32)
    exact = partial(parameters, jnp.float32)

    def adamw(op: str, function: Callable, definition: Callable, most: float | None) -> Case:
        ways = {way: partial(function, way) for way in ("triton", "pieces", "reference")}
        return Case(op, step, (), ways, partial(definition, "reference"), most)

    yield adamw("adamw_8bit", exact, exact, tolerance(jnp.float32))  # a parameter as adapters are held
    # the code of a moment may fall to either side of a middle between two levels, at most 1.6e-3 of these
    yield adamw("adamw_8bit, moments", moments, moments, 2e-3)
    if jnp.dtype(dtype).itemsize == 2:  # as all weights may be held, rounded to one of the two neighbours
        yield adamw(f"adamw_8bit, {jnp.dtype(dtype).name}", partial(parameters, dtype), exact, None)


def _both(function: Callable, of: tuple[int, ...], arguments: tuple, dy: Any) -> Any:
    """The output of a function and the gradients of its arguments `of`."""
    if not of:
        return function(*arguments)

    def some(*chosen):
        every = dict(enumerate(arguments)) | dict(zip(of, chosen, strict=True))
        return function(*(every[index] for index in range(len(arguments))))

    out, pull = jax.vjp(some, *(arguments[index] for index in of))
    return out, pull(dy)


def _upstream(case: Case) -> Any:
    """Random arrays like the output."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(case.definition, *case.arguments)
    return jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype), shapes)


def _raised(tree: Any) -> Any:
    """On the host, 16-bit floats as float32, the same numbers."""

    def one(leaf):
        found = np.asarray(leaf)
        return found.astype(np.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else found

    return jax.tree.map(one, tree)


def _flat(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf).astype(np.float32).ravel() for leaf in jax.tree.leaves(tree)]
