"""Adam's moments in pinned host memory: the device holds those of one leaf at a time, while a step updates it.

Peers call such optimizers paged. Here nothing is paged by a driver: the step copies a leaf's moments to the device,
updates them, copies them back, and begins with the next leaf when that is done.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import InputError
from jaxft.trees import flatten, unflatten

HOST = "pinned_host"


class Paged(NamedTuple):
    """The state of an Adam whose moments are on the host: inner is (steps, mu, nu), steps on the device."""

    inner: Any


def is_paged(node: Any) -> bool:
    """For `jax.tree.map(…, is_leaf=is_paged)` too."""
    return isinstance(node, Paged)


def holds_paged(state: Any) -> bool:
    """Whether some part of an optimizer's state is on the host."""
    return any(map(is_paged, jax.tree.leaves(state, is_leaf=is_paged)))


def paged(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation with moments on the host; its states are (steps, mu, nu), trees like the parameters.

    update's `finite`, a bool () array: where it is False the state comes back as it was. The caller cannot see to that:
    it would need all moments on the device.
    """

    def init(params):
        return Paged(adam.init(params))

    def update(updates, state, params=None, *, finite=None, **extra):
        del params, extra
        steps, mu, nu = state.inner
        moments = {path: (leaf, dict(flatten(nu))[path]) for path, leaf in flatten(mu)}
        found: dict[str, Any] = {}
        new: dict[str, Any] = {}
        counted, before = steps, ()
        for path, gradient in flatten(updates):
            # the copy to the device waits until the moments of the leaf before are on the host again
            waiting, _ = jax.lax.optimization_barrier((moments[path], before))
            old = jax.device_put(waiting, jax.memory.Space.Device)
            one = type(state.inner)(steps, *(unflatten({path: moment}) for moment in old))
            update, after = adam.update(unflatten({path: gradient}), one)
            counted, *pair = (part if i == 0 else dict(flatten(part))[path] for i, part in enumerate(after))
            if finite is not None:
                counted, pair = jax.tree.map(
                    lambda now, then: jnp.where(finite, now, then), (counted, tuple(pair)), (steps, tuple(old))
                )
            found[path] = dict(flatten(update))[path]
            new[path] = before = jax.device_put(tuple(pair), jax.memory.Space.Host)
        trees = [unflatten({path: pair[i] for path, pair in new.items()}) for i in (0, 1)]
        return unflatten(found), Paged(type(state.inner)(counted, *trees))

    return optax.GradientTransformationExtraArgs(init, update)


def on_host(state: Any) -> Any:
    """The shardings of an optimizer's state, a tree of arrays or shapes, with the moments of `Paged` on the host."""

    def place(leaf: Any) -> Any:
        return leaf.sharding.with_memory_kind(HOST)

    def one(node: Any) -> Any:
        if not is_paged(node):
            return node.sharding
        steps, *moments = node.inner
        return Paged(type(node.inner)(steps.sharding, *(jax.tree.map(place, moment) for moment in moments)))

    return jax.tree.map(one, state, is_leaf=is_paged)


def check_device(device: jax.Device) -> None:
    """Raises InputError where a device that is here cannot read pinned host memory."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    if HOST not in kinds:
        raise InputError(
            f"a paged optimizer keeps its states in {HOST} memory, and {device.device_kind} has {', '.join(kinds)} "
            "only; choose the same --optim without paged_"
        )
