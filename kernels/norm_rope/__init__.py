"""RMSNorm of each head followed by its rotation, as Qwen 3 and Gemma 3 treat queries and keys, in one operation."""

from functools import partial

import jax

from jaxft.kernels.gpu import serving
from jaxft.kernels.norm_rope import reference, triton

__all__ = ["norm_rope"]


def norm_rope(
    x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float, implementation: str | None = None
) -> jax.Array:
    """rotate(x / √(mean(x²) + eps) · weight): `kernels.rope` after `kernels.rms_norm`.

    x: (B, T, N, H), H even; weight: (H,); cos, sin: (B, T, H/2) float32, which have no derivative. Computed in float32,
    returned in x's dtype; "reference" also rounds between the two. implementation: "triton" (reverse-mode derivatives
    only), "reference", or None: the first that serves. Raises ValueError where a shape does not fit or the name is
    unknown, NotImplementedError where the implementation that was asked for cannot serve.
    """
    expected = (*x.shape[:2], x.shape[-1] // 2)
    if x.ndim != 4 or weight.shape != x.shape[-1:] or cos.shape != expected or sin.shape != expected:
        raise ValueError(
            f"x has shape {x.shape}, weight {weight.shape}, cos {cos.shape}, sin {sin.shape}; need (B, T, N, H), (H,) "
            "and (B, T, H/2)"
        )
    if implementation not in (None, "triton", "reference"):
        raise ValueError(f"implementation {implementation!r}: must be 'triton' or 'reference'")
    if implementation != "reference":
        capability = serving("norm_rope", partial(triton.check, x), implementation)
        if capability is not None:
            return triton.norm_rope(x, weight, cos, sin, eps, capability)
    return reference.norm_rope(x, weight, cos, sin, eps)
