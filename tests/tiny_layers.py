"""Layers of a few numbers, and what their tests say of results: distances, gradients, products of a program."""

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
