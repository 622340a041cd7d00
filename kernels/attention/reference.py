"""The definition of packed causal attention in plain jnp, with the whole (T, S) score matrix in memory."""

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array,
    last_key: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """softmax(cap(scale · q kᵀ)) v over the keys first_key[b, t] … last_key[b, t] of each query; see `__init__`."""
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None  # float32 means float32, not TF32
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32, precision=precision)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    keys = jnp.arange(S, dtype=jnp.int32)[None, None, :]
    seen = (keys >= first_key[:, :, None]) & (keys <= last_key[:, :, None])  # (B, T, S)
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, preferred_element_type=jnp.float32, precision=precision)
    return mixed.reshape(B, T, N, H).astype(q.dtype)
