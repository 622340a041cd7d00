"""Granite 3 (dense): Llama's attention and MLP, with constant factors on embeddings, branches, scores and logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import PretrainedConfig

from jaxft.kernels.kept import kept_product
from jaxft.models import decoder
from jaxft.models.decoder import ModelConfig
from jaxft.models.layers import Cache, Context, LayerData, RMSNorm
from jaxft.models.llama import MLP, Attention
from jaxft.models.rope import rope_from_config


@dataclass(frozen=True)
class GraniteConfig(ModelConfig):
    """What embeddings and both branches of a layer are multiplied by, and what logits are divided by."""

    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float


def read_config(hf: PretrainedConfig) -> GraniteConfig:
    """The constants of a Hugging Face GraniteConfig."""
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return GraniteConfig(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        hidden_act=hf.hidden_act,
        rms_norm_eps=hf.rms_norm_eps,
        attention_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
        attention_scale=hf.attention_multiplier,
        attention_softcap=None,
        final_softcap=None,
        ropes=(rope_from_config(hf, head_dim),),
        layer_rope=(0,) * hf.num_hidden_layers,
        layer_window=(0,) * hf.num_hidden_layers,
        embedding_multiplier=hf.embedding_multiplier,
        residual_multiplier=hf.residual_multiplier,
        logits_scaling=hf.logits_scaling,
    )


class Decoder(decoder.Decoder):
    config: GraniteConfig

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return super().embed(tokens, dtype) * self.config.embedding_multiplier

    def finish(self, x: jax.Array) -> jax.Array:
        return super().finish(x) / self.config.logits_scaling  # the head is linear: it divides the logits


class Block(nnx.Module):
    def __init__(self, c: GraniteConfig):
        self.factor = c.residual_multiplier
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def __call__(
        self, x: jax.Array, layer: LayerData, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        x, normed = self.input_layernorm.beside(x)
        attended, cache = self.self_attn(normed, layer, context, cache)
        x, normed = self.post_attention_layernorm.beside(kept_product(x + attended * self.factor, "layer_middle"))
        return x + self.mlp(normed, layer, context) * self.factor, cache
