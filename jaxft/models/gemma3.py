"""Gemma 3 (text, and the text part of the models that see): local layers with a window and a rope of their own."""

import jax
from flax import nnx
from transformers import PretrainedConfig

from jaxft.errors import InputError
from jaxft.kernels.kept import kept_product
from jaxft.models.decoder import ModelConfig
from jaxft.models.gemma import refuse_bidirectional
from jaxft.models.layers import (
    Cache,
    Context,
    LayerData,
    Linear,
    OffsetRMSNorm,
    attend,
    attention_inputs,
    gated_mlp,
    linears,
)
from jaxft.models.qwen2 import sliding_windows
from jaxft.models.rope import rope_from_config


def read_config(hf: PretrainedConfig) -> ModelConfig:
    """The constants of a Hugging Face Gemma3TextConfig, or of the one inside a Gemma3Config."""
    text = hf.get_text_config()
    refuse_bidirectional(text)
    # fields that transformers reads and does nothing with
    for name in ("attn_logit_softcapping", *(() if text is hf else ("final_logit_softcapping",))):
        if getattr(text, name) is not None:
            raise InputError(f"{name} is {getattr(text, name)}; Gemma 3 has none: it must be null")
    kinds = sorted(set(text.layer_types))
    return ModelConfig(
        model_type=hf.model_type,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        hidden_act=text.hidden_activation,
        rms_norm_eps=text.rms_norm_eps,
        attention_bias=text.attention_bias,
        mlp_bias=False,
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=text.max_position_embeddings,
        attention_scale=text.query_pre_attn_scalar**-0.5,
        attention_softcap=None,
        final_softcap=text.final_logit_softcapping,
        ropes=tuple(rope_from_config(text, text.head_dim, kind) for kind in kinds),
        layer_rope=tuple(kinds.index(kind) for kind in text.layer_types),
        layer_window=sliding_windows(text),
    )


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.heads, self.kv_heads = c.num_heads, c.num_kv_heads
        self.head_dim, self.scale = c.head_dim, c.attention_scale
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = Linear(D, N * H, bias=c.attention_bias, axes=("heads", "embed"))
        self.k_proj = Linear(D, K * H, bias=c.attention_bias, axes=("kv_heads", "embed"))
        self.v_proj = Linear(D, K * H, bias=c.attention_bias, axes=("kv_heads", "embed"))
        self.o_proj = Linear(N * H, D, bias=c.attention_bias, axes=("embed", "heads"))
        self.q_norm = OffsetRMSNorm(H, c.rms_norm_eps)
        self.k_norm = OffsetRMSNorm(H, c.rms_norm_eps)

    def __call__(
        self, x: jax.Array, layer: LayerData, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        B, T, _ = x.shape
        qkv_key, o_key, _, _ = layer.keys(4)
        q, k, v = attention_inputs(
            x, self.q_proj, self.k_proj, self.v_proj, head_dim=self.head_dim, tables=layer.tables(context), key=qkv_key,
            norms=(self.q_norm, self.k_norm),
        )  # fmt: skip
        mixed, cache = attend(q, k, v, context=context, layer=layer, cache=cache, scale=self.scale)
        (out,) = linears(mixed.reshape(B, T, self.heads * self.head_dim), self.o_proj, key=o_key)
        return out, cache


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig):
        D, F = c.hidden_size, c.intermediate_size
        self.activation = c.hidden_act
        self.gate_proj = Linear(D, F, bias=False, axes=("ffw", "embed"))
        self.up_proj = Linear(D, F, bias=False, axes=("ffw", "embed"))
        self.down_proj = Linear(F, D, bias=False, axes=("embed", "ffw"))

    def __call__(self, x: jax.Array, layer: LayerData, context: Context) -> jax.Array:
        _, _, up_key, down_key = layer.keys(4)
        return gated_mlp(
            x, self.gate_proj, self.up_proj, self.down_proj, activation=self.activation, keys=(up_key, down_key),
            tiles=context.mlp_tiles,
        )  # fmt: skip


class Block(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.input_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_feedforward_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.post_feedforward_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)

    def __call__(
        self, x: jax.Array, layer: LayerData, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        x, normed = self.input_layernorm.beside(x)
        attended, cache = self.self_attn(normed, layer, context, cache)
        attended = kept_product(attended, "branch_out")
        x = kept_product(x + self.post_attention_layernorm(attended), "layer_middle")
        x, normed = self.pre_feedforward_layernorm.beside(x)
        fed = kept_product(self.mlp(normed, layer, context), "branch_out")
        return x + self.post_feedforward_layernorm(fed), cache
