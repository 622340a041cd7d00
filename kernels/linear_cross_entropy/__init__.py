"""Cross entropy of a linear head over a vocabulary, without the logits of all tokens in memory at once."""

import jax
import jax.numpy as jnp

from jaxft.kernels.linear_cross_entropy import reference, tiled

TILE = 2048  # tokens a tile


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Σ_m weights[m] · (logsumexp_v z[m, v] − z[m, targets[m]]) with z = cap(hidden headᵀ).

    hidden: (M, D); head: (V, D); targets: (M,) int in [0, V); weights: (M,) float32, rows of weight 0 count nothing.
    Logits, softmax and the sum are float32; returns a float32 scalar. implementation: "tiled" (default) or
    "reference"; both differentiate with respect to hidden and head. Raises ValueError on shapes that do not fit.
    """
    M, D = hidden.shape
    if head.shape[1:] != (D,) or targets.shape != (M,) or weights.shape != (M,):
        raise ValueError(
            f"hidden has shape {hidden.shape}, head {head.shape}, targets {targets.shape}, weights {weights.shape}; "
            "need (M, D), (V, D), (M,), (M,)"
        )
    weights = weights.astype(jnp.float32)
    if implementation == "reference":
        return reference.linear_cross_entropy(hidden, head, targets, weights, softcap)
    if implementation not in (None, "tiled"):
        raise ValueError(f"implementation {implementation!r}: must be 'tiled' or 'reference'")
    return tiled.linear_cross_entropy(hidden, head, targets, weights, softcap, min(TILE, M))


def logits(hidden: jax.Array, head: jax.Array, *, softcap: float | None = None) -> jax.Array:
    """cap(hidden headᵀ): hidden (..., D), head (V, D), result (..., V) float32."""
    flat = reference.logits(hidden.reshape(-1, hidden.shape[-1]), head, softcap)
    return flat.reshape(*hidden.shape[:-1], head.shape[0])
