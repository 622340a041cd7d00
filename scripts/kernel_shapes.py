"""The shapes that kernels are measured at, of `jaxft.bench`'s workloads and a few more, and arrays of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.bench import CONFIGS, WORKLOADS
from jaxft.kernels.attention import key_range
from jaxft.quant import NF4, quantize_nf4

LAYERS = 16  # of products in one program: one alone takes less time than its call


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, widths D and F, N query heads on K kv heads of size H, V words; mean_document None: one a
    row; qk_norm: q and k are normalised; nf4: frozen weights are held so; full: every weight is trained."""

    B: int
    T: int
    N: int
    K: int
    H: int
    D: int
    F: int
    V: int
    mean_document: int | None = None
    window: int | None = None
    softcap: float | None = None
    qk_norm: bool = False
    nf4: bool = False
    full: bool = False


def of_workload(name: str) -> Shape:
    w = WORKLOADS[name]
    c = CONFIGS[w.model]
    return Shape(
        w.batch, w.length, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["hidden_size"],
        c["intermediate_size"], c["vocab_size"], w.mean_document or None,
        qk_norm=c["model_type"] == "qwen3", nf4=w.load_in_4bit, full=w.full_finetuning,
    )  # fmt: skip


SHAPES = {name: of_workload(name) for name in ("A1", "A3", "A6", "A7", "A8", "A9")} | {
    "gemma": Shape(4, 4096, 16, 8, 256, 3584, 14336, 256000, window=1024, softcap=50.0),
    "docs-1024": Shape(8, 2048, 32, 8, 128, 2560, 9728, 151936, mean_document=1024),
    "odd": Shape(2, 1537, 16, 4, 96, 1000, 2720, 32003, mean_document=150),
    "tiny": Shape(1, 40, 4, 2, 32, 128, 96, 250, mean_document=12),
}


def normal(
    key: jax.Array, shapes: tuple[tuple[int, ...], ...], dtype: jnp.dtype, scale: float = 1.0
) -> list[jax.Array]:
    keys = jax.random.split(key, len(shapes))
    return [scale * jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def segments(shape: Shape, seed: int = 0) -> np.ndarray:
    """Segment ids (B, T): documents of exponential length around the mean, the last one cut off by the row's end."""
    rng = np.random.default_rng(seed)
    ids = np.ones((shape.B, shape.T), np.int32)
    for row in ids if shape.mean_document else ():
        start = number = 0
        while start < shape.T:
            number += 1
            end = start + max(8, int(rng.exponential(shape.mean_document)))
            row[start:end] = number
            start = end
    return ids


def folded(shape: Shape, first_key: jax.Array) -> jax.Array:
    """first_key with the window in it, as the kernels take it."""
    t = jnp.arange(shape.T, dtype=jnp.int32)[None, :]
    return first_key if shape.window is None else jnp.maximum(first_key, t - shape.window + 1)


def attention_inputs(shape: Shape, key: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    q, kv = (shape.B, shape.T, shape.N, shape.H), (shape.B, shape.T, shape.K, shape.H)
    return normal(key, (q, kv, kv), dtype)


def first_keys(shape: Shape) -> np.ndarray:
    """(B, T) int32, without the window."""
    return np.asarray(key_range(jnp.asarray(segments(shape))))


def stacked_nf4(key: jax.Array, size: tuple[int, int], dtype: jnp.dtype) -> NF4:
    """A stack of layers' weights, equal but each with memory of its own: together more than an L2 cache holds."""
    leaf = quantize_nf4(jax.random.normal(key, size, dtype))
    return jax.tree.map(lambda part: jnp.stack([part] * LAYERS), leaf)


def through_layers(product: Callable[[jax.Array, NF4], jax.Array], x: jax.Array, stack: NF4) -> jax.Array:
    """Every layer's product, one after the other: the next x waits for what the last one gave."""
    found = []
    for layer in range(LAYERS):
        y = product(x, replace(stack, layer=jnp.int32(layer)))
        x = x + y[..., :1] * jnp.asarray(1e-9, x.dtype)
        found.append(y)
    return jnp.stack(found)
