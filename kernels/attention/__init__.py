"""Causal attention over packed documents: each query sees one unbroken range of keys.

Packing, sliding windows and a key/value cache are one mechanism here: query t of row b sees the keys
first_key[b, t] … last_key[b, t], both included. `key_range` makes the range of packed training rows.
"""

import jax
import jax.numpy as jnp

from jaxft.kernels.attention import reference


def key_range(segment_ids: jax.Array) -> jax.Array:
    """The first key each token may see: where its document starts.

    segment_ids: (B, T) int32, documents unbroken. Returns (B, T) int32. Padding (segment 0) is a document like any
    other, so that no query is without a key and none gives NaN; its loss weight is zero.
    """
    T = segment_ids.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None, :]
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :T]
    return jax.lax.cummax(jnp.where(segment_ids != before, index, 0), axis=1)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    first_key: jax.Array,
    last_key: jax.Array | None = None,
    window: jax.Array | int | None = None,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) over key ranges.

    q: (B, T, N, H); k, v: (B, S, K, H) with N a multiple of K, same dtype as q; first_key, last_key: (B, T) int32.
    last_key None means T == S and last_key[b, t] = t. window: a query sees at most the last `window` keys of its
    range, 0 or None means all; it may be a traced scalar, so that layers with different windows share one program.
    softcap: cap · tanh(score / cap) before the softmax (Gemma 2). Scores, softmax and both products accumulate in
    float32; returns (B, T, N, H) in q's dtype. Raises ValueError on shapes or dtypes that do not fit.
    """
    B, T, N, H = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != H or N % k.shape[2]:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}, v {v.shape}; need (B, T, N, H) and (B, S, K, H), K | N")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; all three must have one dtype")
    if last_key is None:
        if k.shape[1] != T:
            raise ValueError(f"{T} queries and {k.shape[1]} keys need last_key")
        last_key = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if first_key.shape != (B, T) or last_key.shape != (B, T):
        raise ValueError(f"first_key has shape {first_key.shape}, last_key {last_key.shape}; both must be {(B, T)}")
    if window is not None:
        window = jnp.asarray(window, jnp.int32)
        first_key = jnp.where(window > 0, jnp.maximum(first_key, last_key - window + 1), first_key)
    return reference.attention(q, k, v, first_key, last_key, scale=scale, softcap=softcap)
