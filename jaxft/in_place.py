"""The end of a train step without copies: parameters and 8-bit moments are written over where they lie.

optax's `update` returns the updates of all leaves and new states before any parameter changes: for full fine-tuning in
bfloat16 with 8-bit moments that is 6 bytes a parameter beside the 6 that have to be there. `apply` takes a leaf at a
time (`kernels.adamw_8bit`) and ends with the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.kernels.adamw_8bit import adamw, adamw_8bit
from jaxft.optim_8bit import Adam8State, Moment8, corrections
from jaxft.schedules import Numbers, Schedule, scheduled
from jaxft.trees import Tree, flatten, unflatten


class InPlace(NamedTuple):
    """An optax transformation that can also end a step by itself.

    apply(grads, state, params, key, factor, finite) -> (params, state): what `update` on grads · factor and
    `jaxft.optim.apply_updates` give, or, where finite is False, what came in. factor: () float32, with the clipping in
    it. max_grad_norm: what `update` clips to; 0 does not.
    """

    init: Callable[[Tree], optax.OptState]
    update: Callable[..., tuple[Tree, optax.OptState]]
    apply: Callable[[Tree, optax.OptState, Tree, jax.Array, jax.Array, jax.Array], tuple[Tree, optax.OptState]]
    max_grad_norm: float

    def clipping(self, norm: jax.Array) -> jax.Array:
        """What gradients of this global norm, a () float32, are multiplied by."""
        return jnp.minimum(1.0, self.max_grad_norm / norm) if self.max_grad_norm else jnp.float32(1)


def adamw_8bit_in_place(
    whole: optax.GradientTransformation,
    schedule: optax.Schedule | float,
    *,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
    max_grad_norm: float,
    weight_decay: Callable[[Tree], Tree],
    rate_factor: Callable[[str], float],
) -> InPlace:
    """whole: the transformation that this one is the other half of; in its state are one `Adam8State`, counters, and
    the `Numbers` of a schedule that has them.

    weight_decay: of a tree's leaves, a tree of numbers. rate_factor: what the schedule's learning rate is multiplied by
    for the leaf at a path.
    """

    def apply(grads, state, params, key, factor, finite):
        adam = next(node for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node))
        corrected = corrections(adam.steps + 1, adam_beta1, adam_beta2)
        if isinstance(schedule, Schedule):
            rate = schedule.rate(adam.steps, scheduled(state).numbers)
        else:
            rate = jnp.asarray(schedule(adam.steps) if callable(schedule) else schedule, jnp.float32)
        given, mu, nu = (dict(flatten(tree)) for tree in (grads, adam.mu, adam.nu))
        decay, leaves = dict(flatten(weight_decay(params))), list(flatten(params))
        found = {}
        for (path, leaf), own in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            scalars = jnp.stack([factor, rate * rate_factor(path), *corrected, finite.astype(jnp.float32)])
            constants = dict(b1=adam_beta1, b2=adam_beta2, eps=adam_epsilon, decay=decay[path])
            step = adamw_8bit if isinstance(mu[path], Moment8) else _small
            found[path] = step(leaf, given[path], mu[path], nu[path], scalars, own, **constants)
        params, mu, nu = (unflatten({path: parts[i] for path, parts in found.items()}) for i in range(3))
        counted = lambda count: jnp.where(finite, count + 1, count)  # noqa: E731
        new = Adam8State(counted(adam.steps), mu, nu)

        def after(node):
            return new if _is_adam(node) else node if isinstance(node, Numbers) else counted(node)

        return params, jax.tree.map(after, state, is_leaf=lambda node: isinstance(node, Adam8State | Numbers))

    return InPlace(whole.init, whole.update, apply, max_grad_norm)


def _small(leaf, grad, mu, nu, scalars, key, *, b1, b2, eps, decay):
    """The same step for a leaf whose moments are float32."""
    noise = jax.random.bits(key, leaf.shape, jnp.uint16) if leaf.dtype == jnp.bfloat16 else None
    new = adamw(leaf, grad, mu, nu, scalars, noise, b1, b2, eps, decay)
    return jax.tree.map(lambda new, old: jnp.where(scalars[4] != 0, new, old), new, (leaf, mu, nu))


def _is_adam(node: Any) -> bool:
    return isinstance(node, Adam8State)
