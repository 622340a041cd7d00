"""Root mean square normalisation over the last axis (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from functools import partial

import jax

from jaxft.kernels.gpu import serving
from jaxft.kernels.rms_norm import reference, triton


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """Normalises the last axis of x and multiplies it by weight.

    x: (..., D) in any float dtype; weight: (D,). Read in their dtypes, computed in float32, returned in x's dtype.
    Raises ValueError where weight is not (D,).
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}, x {x.shape}; weight must be ({x.shape[-1]},)")
    return reference.rms_norm(x, weight.reshape((1,) * (x.ndim - 1) + weight.shape), eps)


def residual_rms_norm(
    x: jax.Array, weight: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """x as it is and `rms_norm` of it: where a residual stream goes on beside its norm, so that backward is one pass.

    Shapes and dtypes as `rms_norm`. implementation: "triton" (reverse-mode derivatives only), "reference", or None: the
    first that serves. Raises ValueError where weight is not (D,) or the name is unknown, NotImplementedError where the
    implementation that was asked for cannot serve.
    """
    if implementation not in (None, "triton", "reference"):
        raise ValueError(f"implementation {implementation!r}: must be 'triton' or 'reference'")
    if implementation != "reference" and weight.shape == x.shape[-1:]:
        capability = serving("residual_rms_norm", partial(triton.check, x), implementation)
        if capability is not None:
            return triton.residual_rms_norm(x, weight, eps, capability)
    return x, rms_norm(x, weight, eps=eps)
