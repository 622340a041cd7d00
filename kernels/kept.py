"""Names for what a rematerialisation policy may keep."""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")


def kept_product(x: T, name: str) -> T:
    """`checkpoint_name` of arrays that matrix products give.

    Behind a barrier, without which XLA lets a product write straight into the stack of what is kept of all layers, and
    computes it a second time for those who read it at once.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), jax.lax.optimization_barrier(x))
