"""Root mean square normalisation over the last axis (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

import jax

from jaxft.kernels.rms_norm import reference


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """Normalises the last axis of x and multiplies it by weight.

    x: (..., D) in any float dtype; weight: (D,). Read in their dtypes, computed in float32, returned in x's dtype.
    Raises ValueError where weight is not (D,).
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}, x {x.shape}; weight must be ({x.shape[-1]},)")
    return reference.rms_norm(x, weight.reshape((1,) * (x.ndim - 1) + weight.shape), eps)
