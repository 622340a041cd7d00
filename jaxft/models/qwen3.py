"""Qwen 3 (dense): Llama's block with an RMSNorm on each head of q and k before the rotation."""

import jax
from flax import nnx
from transformers import PretrainedConfig

from jaxft.kernels.kept import kept_product
from jaxft.models.decoder import ModelConfig
from jaxft.models.layers import Cache, Context, LayerData, Linear, RMSNorm, attend, attention_inputs, gated_mlp, linears
from jaxft.models.qwen2 import sliding_windows
from jaxft.models.rope import rope_from_config


def read_config(hf: PretrainedConfig) -> ModelConfig:
    """The constants of a Hugging Face Qwen3Config."""
    return ModelConfig(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        hidden_act=hf.hidden_act,
        rms_norm_eps=hf.rms_norm_eps,
        attention_bias=hf.attention_bias,
        mlp_bias=False,
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
        attention_scale=hf.head_dim**-0.5,
        attention_softcap=None,
        final_softcap=None,
        ropes=(rope_from_config(hf, hf.head_dim),),
        layer_rope=(0,) * hf.num_hidden_layers,
        layer_window=sliding_windows(hf),
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
        self.q_norm = RMSNorm(H, c.rms_norm_eps)
        self.k_norm = RMSNorm(H, c.rms_norm_eps)

    def __call__(
        self, x: jax.Array, layer: LayerData, context: Context, cache: Cache | None, add: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        B, T, _ = x.shape
        qkv_key, o_key, _, _ = layer.keys(4)
        q, k, v = attention_inputs(
            x, self.q_proj, self.k_proj, self.v_proj, head_dim=self.head_dim, tables=layer.tables(context), key=qkv_key,
            norms=(self.q_norm, self.k_norm),
        )  # fmt: skip
        mixed, cache = attend(q, k, v, context=context, layer=layer, cache=cache, scale=self.scale)
        (out,) = linears(mixed.reshape(B, T, self.heads * self.head_dim), self.o_proj, key=o_key, add=add)
        return out, cache


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig):
        D, F = c.hidden_size, c.intermediate_size
        self.activation = c.hidden_act
        self.gate_proj = Linear(D, F, bias=False, axes=("ffw", "embed"))
        self.up_proj = Linear(D, F, bias=False, axes=("ffw", "embed"))
        self.down_proj = Linear(F, D, bias=False, axes=("embed", "ffw"))

    def __call__(self, x: jax.Array, layer: LayerData, context: Context, add: jax.Array) -> jax.Array:
        _, _, up_key, down_key = layer.keys(4)
        return gated_mlp(
            x, self.gate_proj, self.up_proj, self.down_proj, activation=self.activation, keys=(up_key, down_key),
            tiles=context.mlp_tiles, add=add,
        )  # fmt: skip


class Block(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def __call__(
        self, x: jax.Array, layer: LayerData, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        x, normed = self.input_layernorm.beside(x)
        x, cache = self.self_attn(normed, layer, context, cache, add=x)
        x, normed = self.post_attention_layernorm.beside(kept_product(x, "layer_middle"))
        return self.mlp(normed, layer, context, add=x), cache
