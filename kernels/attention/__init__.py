"""Causal attention over packed documents: each query sees one unbroken range of keys.

Packing, sliding windows and a key/value cache are one mechanism here: query t of row b sees the keys
first_key[b, t] … last_key[b, t], both included. `key_range` makes the range of packed training rows.

The ways, one file each: `reference` (the definition), `chunked` (plain XLA, long rows), `triton` (own kernels, sm_80
and later), `cudnn` (Hopper and later, documents only), `mosaic` (own kernels for Hopper; the forward pass of many rows
of one document is cuDNN's). One that cannot serve a case says so by NotImplementedError.
"""

import logging

import jax
import jax.numpy as jnp

from jaxft.kernels.attention import chunked, cudnn, mosaic, reference, triton
from jaxft.kernels.attention.cudnn import Documents, documents
from jaxft.kernels.gpu import device_capability, took

__all__ = ["Documents", "attention", "documents", "documents_read", "key_range"]

ORDER = ("mosaic", "cudnn", "triton", "reference", "chunked")  # which way is tried first
# where `mosaic` does not serve: more of them in a row skip more by Triton (H200, 2,048 tokens: 19 documents 2.02 ms and
# 1.62)
CUDNN_DOCUMENTS = 10
REFERENCE_SCORES = 2**20  # T · S up to which the whole score matrix is small enough to be the fastest plain way


def key_range(segment_ids: jax.Array) -> jax.Array:
    """The first key each token may see: where its document starts.

    segment_ids: (B, T) int32, documents unbroken. Returns (B, T) int32. Padding (segment 0) is a document like any
    other, so that no query is without a key and none gives NaN; its loss weight is zero.
    """
    T = segment_ids.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None, :]
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :T]
    return jax.lax.cummax(jnp.where(segment_ids != before, index, 0), axis=1)


def documents_read(most: int | None, q: jax.Array, *, windows: bool, scale: float, softcap: float | None) -> int | None:
    """How many documents a row `documents` has to tell to `attention`; None where the way that it takes asks for none.

    most: how many a row of q (B, T, N, H), which may be a shape, holds at most, None where that is not known. windows:
    whether some layer has one. Counts with the same answer, which is never a smaller one, have the same program.
    """
    if most is None or windows:
        return None
    if most == 1:
        return most
    try:
        mosaic.check(q, softcap=softcap, last_key=None, documents=None, scale=scale, capability=device_capability())
    except NotImplementedError:
        return most if most <= CUDNN_DOCUMENTS else None
    return mosaic.most_alike(most, q)


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
    documents: Documents | None = None,
    scratch: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) over key ranges.

    q: (B, T, N, H); k, v: (B, S, K, H) with N a multiple of K, same dtype as q; first_key, last_key: (B, T) int32.
    last_key None means T == S and last_key[b, t] = t. window: a query sees at most the last `window` keys of its
    range, 0 or None means all; it may be a traced scalar, so that layers with different windows share one program.
    softcap: cap · tanh(score / cap) before the softmax (Gemma 2). Scores, softmax and both products accumulate in
    float32; returns (B, T, N, H) in q's dtype. Every query must see at least one key.

    implementation: one of `ORDER`; None takes the first that serves the case and logs once which and why.
    documents: what `documents` made of first_key, without which cuDNN is not asked; the caller vouches that
    documents.exact holds, for cuDNN sees nothing else (`Decoder` looks once for all layers).
    scratch: whether the backward pass may take memory beside its gradients where that is faster.
    Raises ValueError on shapes or dtypes that do not fit, NotImplementedError where the implementation that was asked
    for cannot serve.
    """
    B, T, N, H = q.shape
    if isinstance(window, int) and window == 0:
        window = None
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != H or N % k.shape[2]:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}, v {v.shape}; need (B, T, N, H) and (B, S, K, H), K | N")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; all three must have one dtype")
    if last_key is None and k.shape[1] != T:
        raise ValueError(f"{T} queries and {k.shape[1]} keys need last_key")
    if first_key.shape != (B, T) or (last_key is not None and last_key.shape != (B, T)):
        shape = None if last_key is None else last_key.shape
        raise ValueError(f"first_key has shape {first_key.shape}, last_key {shape}; both must be {(B, T)}")
    if implementation not in (None, *ORDER):
        raise ValueError(f"implementation {implementation!r}: must be one of {', '.join(ORDER)} or None")

    described = documents if window is None else None  # a query sees all that is before it in its document

    def serves(name: str) -> None:
        if name == "mosaic":
            mosaic.check(
                q, softcap=softcap, last_key=last_key, documents=described, scale=scale, capability=device_capability()
            )
            if implementation is None and scratch and mosaic.is_slow(q, described):
                raise NotImplementedError(f"{T} tokens of one document: cuDNN's backward pass is faster")
        elif name == "triton":
            triton.check(q, scale=scale, last_key=last_key, capability=device_capability())
        elif name == "cudnn":
            capability = device_capability()
            cudnn.check(
                q, softcap=softcap, window=window, last_key=last_key, documents=documents, capability=capability
            )
            most = 0 if documents is None else documents.lengths.shape[1]
            # one document: nothing to skip; a row that is not packed has two, of which its padding is one
            short = most > 1 and triton.short_documents(capability, H) * most > T
            if implementation is None and (most > CUDNN_DOCUMENTS or short):
                raise NotImplementedError(f"{most} documents in a row of {T} tokens: triton skips more")
        elif name == "reference" and implementation is None and T * k.shape[1] > REFERENCE_SCORES:
            raise NotImplementedError(f"{T} x {k.shape[1]} scores: by default up to {REFERENCE_SCORES}")

    chosen = _choose(implementation, serves)
    last = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)) if last_key is None else last_key
    if window is not None:
        window = jnp.asarray(window, jnp.int32)
        first_key = jnp.where(window > 0, jnp.maximum(first_key, last - window + 1), first_key)
    if chosen == "mosaic":
        return mosaic.attention(q, k, v, first_key, described, scale=scale, capability=device_capability())
    if chosen == "cudnn":
        assert documents is not None  # cudnn.check
        return cudnn.attention(q, k, v, documents, scale)
    if chosen == "triton":
        return triton.attention(
            q, k, v, first_key, scale=scale, softcap=softcap, capability=device_capability()
        )  # fmt: skip
    way = {"chunked": chunked, "reference": reference}[chosen]
    return way.attention(q, k, v, first_key, last, scale=scale, softcap=softcap)


def _choose(implementation, serves) -> str:
    """The first way that `serves` lets pass; the refusals of those before it go to the log."""
    refusals = []
    for name in ORDER if implementation is None else (implementation,):
        try:
            serves(name)
        except NotImplementedError as refusal:
            if implementation is not None:
                raise NotImplementedError(f"attention by {name}: {refusal}") from None
            refusals.append(f"{name}: {refusal}")
        else:
            # a GPU without a kernel is worth a warning
            served = name in ("mosaic", "cudnn", "triton") or jax.default_backend() == "cpu"
            took("attention", name, tuple(refusals), logging.INFO if served else logging.WARNING)
            return name
    raise AssertionError("chunked serves every case")
