"""Packed causal attention in plain XLA, one block of queries at a time: for long rows where no kernel serves.

    scores = cap(scale · q kᵀ) of one block      p = exp(scores − lse)      out = p v
    ds = p · (dout vᵀ − Σ_h dout · out) · cap'   dq = scale · ds k          dk = scale · Σ dsᵀ q      dv = Σ pᵀ dout

A `lax.scan` walks over blocks of queries, so that only (B, N, block, S) scores exist at a time. Kept for the backward:
out and the log-sum-exp, named attention_out and attention_lse; the scores are computed again. Sums are float32, also
those of dk and dv over blocks.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SCORES = 2**24  # elements of one block's scores: 64 MiB in float32


def block_size(B: int, T: int, N: int, S: int) -> int:
    """Queries a block: as many as SCORES allows, spread evenly over the blocks of T."""
    most = max(1, SCORES // (B * N * S))
    return math.ceil(T / math.ceil(T / most))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array,
    last_key: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    block: int | None = None,
) -> jax.Array:
    """`attention` of this folder, every case of it. block: queries a block; `block_size` where None."""
    B, T, N, _ = q.shape
    block = block_size(B, T, N, k.shape[1]) if block is None else min(block, T)
    return _attention(q, k, v, first_key, last_key, scale, softcap, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, first_key, last_key, scale, softcap, block):
    return run_forward(q, k, v, first_key, last_key, scale, softcap, block)[0]


def _attention_fwd(q, k, v, first_key, last_key, scale, softcap, block):
    out, lse = run_forward(q, k, v, first_key, last_key, scale, softcap, block)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, first_key, last_key, out, lse)


def _attention_bwd(scale, softcap, block, kept, dout):
    q, k, v, first_key, last_key, out, lse = kept
    gradients = run_backward(q, k, v, first_key, last_key, out, lse, dout, scale, softcap, block)
    return *gradients, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _einsum(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product accumulated in float32; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32, precision=precision)


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """(B, T, …) to (blocks, B, block, …), filled with zeros at the end."""
    B, T = x.shape[:2]
    count = math.ceil(T / block)
    x = jnp.pad(x, ((0, 0), (0, count * block - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, count, block, *x.shape[2:]), 1, 0)


def _rows(blocks: jax.Array, T: int) -> jax.Array:
    """The inverse of `_blocks`."""
    count, B, block = blocks.shape[:3]
    return jnp.moveaxis(blocks, 0, 1).reshape(B, count * block, *blocks.shape[3:])[:, :T]


def _grouped(x: jax.Array, K: int) -> jax.Array:
    """(B, T, N, …) to (B, T, K, G, …): query heads by the kv head that they read."""
    B, T, N = x.shape[:3]
    return x.reshape(B, T, K, N // K, *x.shape[3:])


def _scores(q, k, first_key, last_key, scale, softcap):
    """Capped scores (B, K, G, block, S), the lowest number where hidden, and tanh's value where capped."""
    scores = _einsum("BTKGH,BSKH->BKGTS", q, k) * scale
    tanh = None
    if softcap is not None:
        tanh = jnp.tanh(scores / softcap)
        scores = softcap * tanh
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    seen = (keys >= first_key[:, :, None]) & (keys <= last_key[:, :, None])
    return jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min), tanh


def run_forward(q, k, v, first_key, last_key, scale, softcap, block):
    """out (B, T, N, H) and the log-sum-exp (B, N, T) float32."""
    B, T, N, H = q.shape
    K = k.shape[2]

    def body(_, inputs):
        q, first, last = inputs
        scores, _ = _scores(q, k, first, last, scale, softcap)
        lse = jax.nn.logsumexp(scores, axis=-1)  # (B, K, G, block)
        out = _einsum("BKGTS,BSKH->BTKGH", jnp.exp(scores - lse[..., None]).astype(v.dtype), v)
        return None, (out.astype(q.dtype), jnp.transpose(lse, (0, 3, 1, 2)))

    inputs = [_blocks(x, block) for x in (_grouped(q, K), first_key, last_key)]
    _, (out, lse) = jax.lax.scan(body, None, inputs)
    return _rows(out, T).reshape(B, T, N, H), jnp.swapaxes(_rows(lse, T).reshape(B, T, N), 1, 2)


def run_backward(q, k, v, first_key, last_key, out, lse, dout, scale, softcap, block):
    """The gradients of q, k and v."""
    B, T, N, H = q.shape
    K = k.shape[2]
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # (B, T, N)

    def body(sums, inputs):
        dk, dv = sums
        q, dout, lse, delta, first, last = inputs
        scores, tanh = _scores(q, k, first, last, scale, softcap)
        lse, delta = (jnp.transpose(x, (0, 2, 3, 1))[..., None] for x in (lse, delta))  # (B, K, G, block, 1)
        p = jnp.exp(scores - lse)
        ds = p * (_einsum("BTKGH,BSKH->BKGTS", dout, v) - delta)
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
        ds = ds.astype(q.dtype)
        dv = dv + _einsum("BKGTS,BTKGH->BSKH", p.astype(dout.dtype), dout)
        dk = dk + _einsum("BKGTS,BTKGH->BSKH", ds, q) * scale
        dq = _einsum("BKGTS,BSKH->BTKGH", ds, k) * scale
        return (dk, dv), dq.astype(q.dtype)

    by_token = (_grouped(x, K) for x in (q, dout, jnp.swapaxes(lse, 1, 2), delta))
    inputs = [_blocks(x, block) for x in (*by_token, first_key, last_key)]
    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(body, (zeros, zeros), inputs)
    return _rows(dq, T).reshape(B, T, N, H), dk.astype(k.dtype), dv.astype(v.dtype)
