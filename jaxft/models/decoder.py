"""What every decoder-only model does around its blocks: embed, run the layers, normalise, read the head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels import attention as attention_op
from jaxft.kernels.attention import documents, key_range
from jaxft.kernels.linear_cross_entropy import logits
from jaxft.models.layers import (
    KEPT_MLP,
    LEANEST,
    Cache,
    Context,
    Embedding,
    LayerData,
    Linear,
    RMSNorm,
    scan_layers,
    stack,
)  # fmt: skip
from jaxft.models.rope import Rope, document_lengths
from jaxft.sharding import constrain

HIDDEN = "hidden_states"  # the name of what the loss gets: there the forward pass of a traced step ends


@dataclass(frozen=True)
class ModelConfig:
    """The constants of one model, read from its config.json; nothing here has a default.

    attention_scale: what q kᵀ is multiplied by. Softcaps: c · tanh(x / c), of attention's scores and of the logits.
    ropes: the model's rotary embeddings; layer_rope[i] is layer i's. layer_window[i]: its keys, 0 all.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]
    layer_window: tuple[int, ...]


def documents_read(config: ModelConfig, most: int | None, tokens: int, dtype: jnp.dtype) -> int | None:
    """What a model's program depends on of `most`, how many documents a row of so many tokens holds; else None.

    dtype: of the activations. Counts with the same answer have the same program on one device.
    """
    q: Any = jax.ShapeDtypeStruct((1, tokens, config.num_heads, config.head_dim), dtype)
    windows, scale, softcap = any(config.layer_window), config.attention_scale, config.attention_softcap
    return attention_op.documents_read(most, q, windows=windows, scale=scale, softcap=softcap)


class Decoder(nnx.Module):
    """Embedding, runs of equal blocks, final norm, head. Called with tokens it returns the normed hidden states.

    The layers stand in `layers` as runs: the key is the index of a run's first layer, its leaves are stacked on a
    leading L.
    """

    first_norm = 1.0  # what a norm's weight starts with

    def __init__(self, config: ModelConfig, block: Callable[[ModelConfig], nnx.Module], runs: tuple[int, ...]):
        """runs: the first layer of each run, starting with 0."""
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        ends = (*runs[1:], config.num_layers)
        self.layers = nnx.Dict({str(a): stack(block(config), b - a) for a, b in zip(runs, ends, strict=True)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = nnx.data(
            None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, axes=("vocab", "embed"))
        )

    def head(self) -> jax.Array:
        """The (V, D) matrix that turns hidden states into logits."""
        return self.embed_tokens.weight[...] if self.lm_head is None else self.lm_head.weight[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden (..., D) to logits (..., V) float32."""
        return logits(hidden, self.head(), softcap=self.config.final_softcap)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        *,
        dtype: jnp.dtype | None = None,
        key: jax.Array | None = None,
        gradient_checkpointing: str = "none",
        mlp_tiles: int = 1,
        kept_layers: int = 0,
        max_documents: int | None = None,
    ) -> jax.Array:
        """Hidden states (B, T, D) of packed rows; tokens, segment_ids, positions (B, T) int32.

        dtype: what activations are computed in, the embedding's own where None. key: LoRA's dropout, off where None.
        mlp_tiles: in how many parts the MLPs take the tokens; more need less memory. kept_layers: how many of the last
        layers keep on the device what "products" keeps. max_documents: how many documents, padding included, a row
        holds at most, where that is known; it decides which attention kernel is the fastest. Where some row holds more
        and that kernel reads it (`documents_read`), all hidden states are NaN.
        """
        tiles = None if mlp_tiles == 1 and gradient_checkpointing in KEPT_MLP else mlp_tiles
        dtype = dtype or self.embed_tokens.weight[...].dtype
        read = documents_read(self.config, max_documents, tokens.shape[1], dtype)
        context = self.context(segment_ids, positions, tiles, read, scratch=gradient_checkpointing != LEANEST)
        hidden = self._run(tokens, context, None, dtype, key, gradient_checkpointing, kept_layers)[0]
        hidden = checkpoint_name(hidden, HIDDEN)
        return hidden if context.documents is None else jnp.where(context.documents.exact, hidden, jnp.nan)

    def context(
        self, segment_ids: jax.Array, positions: jax.Array, mlp_tiles: int | None = None, read: int | None = None,
        scratch: bool = True,
    ) -> Context:  # fmt: skip
        """What every layer reads of packed rows (B, T), see `Context`; read: how many documents of each, see
        `documents_read`."""
        first_key, windows = key_range(segment_ids), any(self.config.layer_window)
        described = None if read is None else documents(first_key, read)
        lengths = document_lengths(segment_ids, positions)
        ropes = [rope.tables(positions, lengths) for rope in self.config.ropes]
        return Context(
            first_key, None, ropes, mlp_tiles=mlp_tiles, windows=windows, documents=described, scratch=scratch
        )

    def with_cache(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        first_key: jax.Array,
        index: jax.Array,
        cache: dict[str, Cache],
        *,
        dtype: jnp.dtype | None = None,
    ) -> tuple[jax.Array, dict[str, Cache]]:
        """Hidden states (B, T, D) of new tokens that stand at cache slots index … index + T − 1, and the new cache.

        first_key: (B,) int32, the first slot of each prompt (what stands before is left padding).
        """
        B, T = tokens.shape
        last_key = jnp.broadcast_to(index + jnp.arange(T, dtype=jnp.int32), (B, T))
        # a padding slot would see no key at all; let it see itself
        first = jnp.minimum(jnp.broadcast_to(first_key[:, None], (B, T)), last_key)
        # of the document so far: keys in the cache stay as they were rotated, as transformers leaves them
        lengths = jnp.broadcast_to(positions[:, -1:] + 1, (B, T))
        context = Context(first, last_key, [rope.tables(positions, lengths) for rope in self.config.ropes], index)
        return self._run(tokens, context, cache, dtype, None, "none")

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype | None = None) -> dict[str, Cache]:
        """A key/value cache for `batch` sequences of at most `slots` tokens: zeros (L, B, S, K, H) a run."""
        c = self.config
        dtype = dtype or self.embed_tokens.weight[...].dtype
        shape = (batch, slots, c.num_kv_heads, c.head_dim)
        return {
            start: (jnp.zeros((count, *shape), dtype), jnp.zeros((count, *shape), dtype))
            for start, count in self.run_lengths().items()
        }

    def run_lengths(self) -> dict[str, int]:
        """How many layers each run has."""
        starts = sorted((int(start) for start in self.layers), key=int)
        ends = [*starts[1:], self.config.num_layers]
        return {str(a): b - a for a, b in zip(starts, ends, strict=True)}

    def layer_data(self, start: str, count: int, keys: jax.Array | None = None) -> LayerData:
        """What differs between the `count` layers of the run that begins at `start`; keys: dropout's, of all layers."""
        c, span = self.config, slice(int(start), int(start) + count)
        return LayerData(
            jnp.asarray(np.array(c.layer_window[span], np.int32)),
            jnp.asarray(np.array(c.layer_rope[span], np.int32)),
            None if keys is None else keys[span],
        )

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Token embeddings (B, T, D)."""
        return self.embed_tokens.weight[...][tokens].astype(dtype)

    def finish(self, x: jax.Array) -> jax.Array:
        """What the last layer gives (B, T, D), as the head reads it."""
        return self.norm(x)

    def _run(self, tokens, context, cache, dtype, key, remat, kept_layers=0):
        c = self.config
        x = self.embed(tokens, dtype or self.embed_tokens.weight[...].dtype)
        x = constrain(x, ("batch", "length", "embed_activation"))
        keys = None if key is None else jax.random.split(key, c.num_layers)
        new_cache = {}
        for start, count in self.run_lengths().items():
            layers = self.layer_data(start, count, keys)
            run_cache = None if cache is None else cache[start]
            kept = min(count, max(0, kept_layers - (c.num_layers - int(start) - count)))  # of this run's layers
            x, new_cache[start] = scan_layers(self.layers[start], x, layers, context, run_cache, remat, kept)
        return self.finish(x), new_cache
