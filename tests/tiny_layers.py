"""Layers of a few numbers, and how their results are compared: distances, gradients, the products of a program."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.linear import Weights
from jaxft.programs import equations_in

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


def products(function, *arguments) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    """Shape and dtype of every matrix product that a function's program holds."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return [
        (e.outvars[0].aval.shape, e.outvars[0].aval.dtype)
        for e in equations_in(jaxpr)
        if e.primitive.name == "dot_general"
    ]


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


def mlp_case(dtype, *, rank=3, bias=False, tokens=7):
    random = np.random.default_rng(5)
    D, F = 12, 20
    sizes = ((F, D), (F, D), (D, F))
    gate, up, down = (layer(random, rows, columns, dtype, rank=rank, bias=bias) for rows, columns in sizes)
    return jnp.asarray(random.normal(0, 1, (2, tokens, D)), dtype), gate, up, down
