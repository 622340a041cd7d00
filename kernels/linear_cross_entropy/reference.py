"""The definition of cross entropy behind a linear head, in plain jnp, with all the logits in memory."""

import jax
import jax.numpy as jnp


def logits(hidden: jax.Array, head: jax.Array, softcap: float | None) -> jax.Array:
    """cap(hidden headᵀ): hidden (..., D), head (V, D), result (..., V) float32."""
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None  # float32 means float32, not TF32
    scores = jnp.einsum(
        "...D,VD->...V", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32, precision=precision
    )
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def cross_entropy(scores: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_m weights[m] · (logsumexp_v z[m, v] − z[m, targets[m]]) for logits z (M, V) float32."""
    target = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    # a row of weight 0 counts nothing even where its logits are not finite
    return jnp.sum(jnp.where(weights != 0, weights * (jax.nn.logsumexp(scores, axis=1) - target), 0.0))


def linear_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, softcap: float | None
) -> jax.Array:
    """Cross entropy of cap(hidden headᵀ); see `__init__`."""
    return cross_entropy(logits(hidden, head, softcap), targets, weights)
