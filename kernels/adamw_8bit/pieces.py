"""The 8-bit AdamW step in plain XLA, one piece of a tensor at a time, so that the float32 numbers of one piece are all
that it adds to memory."""

import jax

from jaxft.kernels.adamw_8bit import reference
from jaxft.optim_8bit import BLOCK, Moment8, parts


def adamw_8bit(
    param: jax.Array, grad: jax.Array, mu: Moment8, nu: Moment8, scalars: jax.Array, key: jax.Array,
    b1: float, b2: float, eps: float, decay: float,
) -> tuple[jax.Array, Moment8, Moment8]:  # fmt: skip
    """As the reference; random bits are drawn by the piece."""
    layers, blocks = mu.largest.shape
    # equal pieces near `CHUNK` numbers, or one a layer where layers fill no whole block
    count = parts(layers * blocks) if param.size == layers * blocks * BLOCK else layers
    if count == 1:
        return reference.adamw_8bit(param, grad, mu, nu, scalars, key, b1, b2, eps, decay)

    def cut(tree):
        kept = {1: (), 2: (), 3: (BLOCK,)}
        param, mu, nu = tree
        moments = jax.tree.map(lambda a: a.reshape(count, 1, -1, *kept[a.ndim]), (mu, nu))
        return (param.reshape(count, 1, -1), *moments)

    grads = grad.reshape(count, 1, -1)

    def body(index, carry):
        at = lambda tree: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)  # noqa: E731
        param, mu, nu = at(carry)
        own = jax.random.fold_in(key, index)
        new = reference.adamw_8bit(param, at(grads), mu, nu, scalars, own, b1, b2, eps, decay)
        return jax.tree.map(lambda to, row: jax.lax.dynamic_update_index_in_dim(to, row, index, 0), carry, new)

    found = jax.lax.fori_loop(0, count, body, cut((param, mu, nu)))
    return jax.tree.map(lambda a, like: a.reshape(like.shape), found, (param, mu, nu))
