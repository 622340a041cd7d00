"""Names for what a rematerialisation policy may keep, and whether what has none is computed again."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")
_recomputed: ContextVar[bool] = ContextVar("recomputed", default=False)


@contextmanager
def recomputing() -> Iterator[None]:
    """Of what is differentiated inside, residuals without a name are made again in the layer's backward pass: one that
    is large costs no memory for longer than that."""
    before = _recomputed.set(True)
    try:
        yield
    finally:
        _recomputed.reset(before)


def is_recomputed() -> bool:
    """Whether this is inside of `recomputing`."""
    return _recomputed.get()


def kept_product(x: T, name: str) -> T:
    """`checkpoint_name` of arrays that matrix products give.

    Behind a barrier, without which XLA lets a product write straight into the stack of what is kept of all layers, and
    computes it a second time for those who read it at once.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), jax.lax.optimization_barrier(x))
