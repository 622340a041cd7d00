"""Packed causal attention by cuDNN on Hopper and later, where the data allow it, decided at run time.

cuDNN knows documents that stand one behind another, not key ranges. `documents` turns first_key into documents and says
whether they describe it: every first key is the start of its document (no sliding window bites) and no row has more
documents than the static bound. Where that is false, `lax.cond` takes the fallback on the device: a bound that is too
low or a window costs speed, never correctness.

max_documents 1 uses plain causal attention (a row is one document); more use the packed layout of
`jax._src.cudnn.fused_attention_stablehlo` (private; read for jax 0.11.1 … 0.12): lengths (B, M) and offsets (B, M + 1),
offsets within the row, −1 where a row has fewer documents. Before jax 0.11.1 packed grouped-query attention is wrong.
Kept for the backward: out and cuDNN's softmax statistics (B · M, N, T) float32, so a large M costs memory.
Measured on an H200, jax 0.11.2, 8×2048 tokens, 32/8 heads of 128, milliseconds forward and forward + backward:
0.59, 2.66 with one document a row; 0.49, 2.03 with at most 5; 0.34, 2.02 with 19. Triton on the same rows: 0.88, 3.37;
0.76, 2.82; 0.47, 1.62.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Fallback(NamedTuple):
    """What runs where the data are not documents: forward (q, k, v, first_key) -> out, lse (B, N, T) float32;
    backward (q, k, v, first_key, out, lse, dout) -> dq, dk, dv."""

    forward: Callable
    backward: Callable


def check(
    q: jax.Array,
    *,
    softcap: float | None,
    window: jax.Array | int | None,
    last_key: jax.Array | None,
    max_documents: int | None,
    capability: int,
) -> None:
    """Raises NotImplementedError with the reason where cuDNN cannot serve. A traced window is decided at run time."""
    if softcap is not None:
        raise NotImplementedError("softcap: cuDNN has none")
    if isinstance(window, int) and window > 0:
        raise NotImplementedError(f"window {window}: the packed layout has none")
    if last_key is not None:
        raise NotImplementedError("last_key: documents end every range at its query")
    if max_documents is None:
        raise NotImplementedError("max_documents: needs the static number of documents a row")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {q.dtype}: needs bfloat16 or float16")
    H = q.shape[3]
    if H % 8 or H > 256:
        raise NotImplementedError(f"head size {H}: needs a multiple of 8 up to 256")
    if capability < 90:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 9.0")
    if capability >= 120 and max_documents > 1:
        raise NotImplementedError(f"compute capability {capability / 10}: cuDNN has no packed backward there")
    if not (0, 11, 1) <= jax.__version_info__[:3] < (0, 13):
        raise NotImplementedError(f"jax {jax.__version__}: needs 0.11.1 to 0.12")


def documents(first_key: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengths (B, most) and offsets (B, most + 1) int32, −1 past the last; whether they say all of first_key."""
    T = first_key.shape[1]
    t = jnp.arange(T, dtype=jnp.int32)[None, :]
    starts = first_key == t
    exact = jnp.all(first_key == jax.lax.cummax(jnp.where(starts, t, 0), axis=1))
    exact &= jnp.all(jnp.sum(starts, axis=1, dtype=jnp.int32) <= most)
    ordered = jnp.sort(jnp.where(starts, t, T), axis=1)  # the starts of the documents, then T
    ordered = jnp.pad(ordered, ((0, 0), (0, most + 1)), constant_values=T)[:, : most + 1]
    lengths = jnp.where(ordered[:, :-1] < T, ordered[:, 1:] - ordered[:, :-1], -1)
    return lengths, jnp.where(ordered < T, ordered, -1), exact


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array,
    *,
    scale: float,
    max_documents: int,
    fallback: Fallback,
) -> jax.Array:
    """`attention` of this folder with last_key and softcap None, as `check` allows it."""
    return _attention(q, k, v, first_key, scale, min(max_documents, q.shape[1]), fallback)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, first_key, scale, most, fallback):
    return run_forward(q, k, v, first_key, scale, most, fallback)[0]


def _attention_fwd(q, k, v, first_key, scale, most, fallback):
    out, lse = run_forward(q, k, v, first_key, scale, most, fallback)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, first_key, out, lse)


def _attention_bwd(scale, most, fallback, kept, dout):
    q, k, v, first_key, out, lse = kept
    return *run_backward(q, k, v, first_key, out, lse, dout, scale, most, fallback), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _arguments(q, lengths, offsets, scale, most):
    """The operands behind q, k, v and the parameters that both of cuDNN's primitives take."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    none = jnp.zeros(0, q.dtype)
    packed = (lengths, lengths, offsets, offsets) if most > 1 else (none,) * 4
    parameters = dict(
        scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), sliding_window_length=None,
        mask_type=private.MaskType.PADDING_CAUSAL if most > 1 else private.MaskType.CAUSAL,
        layout=private.AttentionLayout.BTNH.value,
    )  # fmt: skip
    if jax.__version_info__[:2] >= (0, 12):
        parameters["score_mod"] = None
    return private, (none, *packed, none, none), parameters


def run_forward(q, k, v, first_key, scale, most, fallback):
    """out (B, T, N, H) and statistics (B · most, N, T) float32, whose first B are the fallback's where that ran."""
    lengths, offsets, exact = documents(first_key, most)

    def served(q, k, v, first_key):
        private, operands, parameters = _arguments(q, lengths, offsets, scale, most)
        out, lse = private._dot_product_attention_fwd_p_wrapper.bind(q, k, v, *operands, is_training=True, **parameters)
        return out, lse

    def other(q, k, v, first_key):
        out, lse = fallback.forward(q, k, v, first_key)
        return out, jnp.pad(lse, ((0, lse.shape[0] * (most - 1)), (0, 0), (0, 0)))

    return jax.lax.cond(exact, served, other, q, k, v, first_key)


def run_backward(q, k, v, first_key, out, lse, dout, scale, most, fallback):
    """The gradients of q, k and v."""
    lengths, offsets, exact = documents(first_key, most)

    def served(q, k, v, first_key, out, lse, dout):
        private, operands, parameters = _arguments(q, lengths, offsets, scale, most)
        dq, dk, dv = private._dot_product_attention_bwd_p_wrapper.bind(
            q, k, v, *operands, lse, out, dout, **parameters
        )  # fmt: skip
        return dq, dk, dv

    def other(q, k, v, first_key, out, lse, dout):
        return fallback.backward(q, k, v, first_key, out, lse[: q.shape[0]], dout)

    return jax.lax.cond(exact, served, other, q, k, v, first_key, out, lse, dout)
