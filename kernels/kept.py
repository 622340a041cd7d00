"""Names for what a rematerialisation policy may keep, and whether dense copies of quantised weights are among it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")
_dense_kept: ContextVar[bool] = ContextVar("dense_kept", default=False)


@contextmanager
def recomputing(dense: bool) -> Iterator[None]:
    """What is differentiated inside is computed again in a layer's backward pass. dense: where that is right before
    a gradient reads the same quantised weight, so that one dense copy may serve both and costs no memory elsewhere."""
    before = _dense_kept.set(dense)
    try:
        yield
    finally:
        _dense_kept.reset(before)


def keeps_dense() -> bool:
    """Whether an op may keep dense copies of quantised weights for its backward pass."""
    return _dense_kept.get()


def later(arrays: T, after: jax.Array) -> T:
    """The arrays behind a barrier that `after`, which is computed before, must pass. XLA may forget the order, as
    nothing reads what it waits for; it does not take them for the same arrays elsewhere."""
    first = jax.lax.slice(after, (0,) * after.ndim, (1,) * after.ndim)
    return jax.lax.optimization_barrier((arrays, first))[0]


def kept_product(x: T, name: str) -> T:
    """`checkpoint_name` of arrays that matrix products give.

    Behind a barrier, without which XLA lets a product write straight into the stack of what is kept of all layers, and
    computes it a second time for those who read it at once.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), jax.lax.optimization_barrier(x))
