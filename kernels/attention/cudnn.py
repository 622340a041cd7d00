"""Packed causal attention by cuDNN on Hopper and later.

cuDNN knows documents that stand one behind another, not key ranges. `documents` turns first_key into documents, once
for all layers, and says whether they describe it exactly: every first key is the start of its document (no sliding
window) and no row has more documents than the static bound. The caller looks at that once; a choice at run time in
every layer would make the host wait for a copy from the device each time (seen in a trace).

One document a row uses plain causal attention; more use the packed layout of
`jax._src.cudnn.fused_attention_stablehlo` (private; read for jax 0.11.1 … 0.12): lengths (B, M) and offsets (B, M + 1),
offsets within the row, −1 where a row has fewer documents. Before jax 0.11.1 packed grouped-query attention is wrong.
Kept for the backward: out and cuDNN's softmax statistics (B · M, N, T) float32, so a large M costs memory.
Measured on an H200, jax 0.11.2, 8×2048 tokens, 32/8 heads of 128, milliseconds forward and backward together for 1, 2,
3, 5, 7 and 10 documents a row of many lengths: 2.42, 1.85, 1.58, 1.55, 1.39, 1.52; Triton on the same rows: 3.20, 2.43,
1.97, 1.70, 1.23, 1.11. Of equal documents beside `mosaic`: docs/log.md, "A backward pass of our own".
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Documents(NamedTuple):
    """Lengths (B, M) and offsets (B, M + 1) int32 of the documents in each row, −1 past the last.

    exact, () bool: whether they say all of the first keys that they were made from."""

    lengths: jax.Array
    offsets: jax.Array
    exact: jax.Array


def check(
    q: jax.Array,
    *,
    softcap: float | None,
    window: jax.Array | int | None,
    last_key: jax.Array | None,
    documents: Documents | None,
    capability: int,
) -> None:
    """Raises NotImplementedError with the reason where cuDNN cannot serve."""
    if softcap is not None:
        raise NotImplementedError("softcap: cuDNN has none")
    if window is not None:
        raise NotImplementedError("window: the packed layout has none")
    if last_key is not None:
        raise NotImplementedError("last_key: documents end every range at its query")
    if documents is None:
        raise NotImplementedError("documents: needs to know them")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {q.dtype}: needs bfloat16 or float16")
    H = q.shape[3]
    if H % 8 or H > 256:
        raise NotImplementedError(f"head size {H}: needs a multiple of 8 up to 256")
    if capability < 90:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 9.0")
    if capability >= 120 and documents.lengths.shape[1] > 1:
        raise NotImplementedError(f"compute capability {capability / 10}: cuDNN has no packed backward there")
    if not (0, 11, 1) <= jax.__version_info__[:3] < (0, 13):
        raise NotImplementedError(f"jax {jax.__version__}: needs 0.11.1 to 0.12")


def documents(first_key: jax.Array, most: int) -> Documents:
    """The documents that first_key (B, T) int32 describes, at most `most` a row."""
    T = first_key.shape[1]
    most = min(most, T)
    t = jnp.arange(T, dtype=jnp.int32)[None, :]
    starts = first_key == t
    exact = jnp.all(first_key == jax.lax.cummax(jnp.where(starts, t, 0), axis=1))
    exact &= jnp.all(jnp.sum(starts, axis=1, dtype=jnp.int32) <= most)
    ordered = jnp.sort(jnp.where(starts, t, T), axis=1)  # the starts of the documents, then T
    ordered = jnp.pad(ordered, ((0, 0), (0, most + 1)), constant_values=T)[:, : most + 1]
    lengths = jnp.where(ordered[:, :-1] < T, ordered[:, 1:] - ordered[:, :-1], -1)
    return Documents(lengths, jnp.where(ordered < T, ordered, -1), exact)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents, scale: float) -> jax.Array:
    """`attention` of this folder with last_key and softcap None, as `check` allows it, where documents.exact holds."""
    return run_forward(q, k, v, documents, scale)[0]


def _attention_fwd(q, k, v, documents, scale):
    out, lse = run_forward(q, k, v, documents, scale)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, documents, out, lse)


def _attention_bwd(scale, kept, dout):
    q, k, v, documents, out, lse = kept
    private, operands, parameters = _arguments(q, documents, scale)
    dq, dk, dv = private._dot_product_attention_bwd_p_wrapper.bind(q, k, v, *operands, lse, out, dout, **parameters)
    return dq, dk, dv, Documents(None, None, None)  # type: ignore[arg-type]  # integers have no derivative


attention.defvjp(_attention_fwd, _attention_bwd)


def _arguments(q, documents, scale):
    """The operands behind q, k, v and the parameters that both of cuDNN's primitives take."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    packs = documents.lengths.shape[1] > 1
    none = jnp.zeros(0, q.dtype)
    packed = (documents.lengths, documents.lengths, documents.offsets, documents.offsets) if packs else (none,) * 4
    parameters = dict(
        scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), sliding_window_length=None,
        mask_type=private.MaskType.PADDING_CAUSAL if packs else private.MaskType.CAUSAL,
        layout=private.AttentionLayout.BTNH.value,
    )  # fmt: skip
    if jax.__version_info__[:2] >= (0, 12):
        parameters["score_mod"] = None
    return private, (none, *packed, none, none), parameters


def run_forward(q, k, v, documents, scale):
    """out (B, T, N, H) and cuDNN's statistics (B · M, N, T) float32."""
    private, operands, parameters = _arguments(q, documents, scale)
    out, lse = private._dot_product_attention_fwd_p_wrapper.bind(q, k, v, *operands, is_training=True, **parameters)
    return out, lse
