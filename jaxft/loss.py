"""Losses: functions from a bound model and one micro-batch to (Σ weight · loss, Σ weight)."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.kernels.linear_cross_entropy import linear_cross_entropy
from jaxft.models.decoder import Decoder

Batch = dict[str, jax.Array]


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """For each position the token that follows it and what predicting that token weighs; both (B, T).

    The first token of a document is never a target: what stands before it is another document.
    """
    tokens, segments, weights = batch["tokens"], batch["segment_ids"], batch["loss_weights"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    weights = jnp.where(same, weights[:, 1:], jnp.zeros_like(weights[:, 1:]))
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), jnp.pad(weights, ((0, 0), (0, 1)))


def sft_loss(
    model: Decoder,
    batch: Batch,
    key: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Next-token cross entropy of packed rows: (Σ weight · nll, Σ weight), both float32 scalars.

    batch: tokens, segment_ids, positions (B, T) int32 and loss_weights (B, T) float32, where loss_weights[b, t] weighs
    predicting tokens[b, t] from what stands before it. options: the model's own (dtype, gradient_checkpointing,
    mlp_tiles, kept_layers, max_documents), see `Decoder.__call__`.
    """
    hidden = model(
        batch["tokens"], batch["segment_ids"], batch["positions"], key=key, **options
    )  # fmt: skip
    targets, weights = next_token_targets(batch)
    total = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), model.head(), targets.ravel(), weights.ravel(),
        softcap=model.config.final_softcap,
    )  # fmt: skip
    return total, weights.sum()
