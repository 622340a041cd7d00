"""Gemma 1 (and CodeGemma): Llama's block with norms by 1 + weight, GeGLU, and embeddings multiplied by √D."""

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import PretrainedConfig

from jaxft.errors import InputError
from jaxft.kernels.kept import kept_product
from jaxft.models import decoder
from jaxft.models.decoder import ModelConfig
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
from jaxft.models.rope import rope_from_config


def read_config(hf: PretrainedConfig) -> ModelConfig:
    """The constants of a Hugging Face GemmaConfig."""
    refuse_bidirectional(hf)
    return ModelConfig(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        # "gelu" in the released files means the tanh approximation that the models were trained with
        hidden_act="gelu_pytorch_tanh" if hf.hidden_act == "gelu" else hf.hidden_act,
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
        layer_window=(0,) * hf.num_hidden_layers,
    )


def refuse_bidirectional(hf: PretrainedConfig) -> None:
    """Raises InputError for an encoder made of a Gemma: every token of it sees every other."""
    if getattr(hf, "use_bidirectional_attention", False):
        raise InputError("use_bidirectional_attention is set: this is an encoder; only causal models are supported")


class Decoder(decoder.Decoder):
    """The decoder with what all Gemmas have: embeddings times √D, a last norm by 1 + weight."""

    first_norm = 0.0

    def __init__(self, config: ModelConfig, block, runs: tuple[int, ...]):
        super().__init__(config, block, runs)
        self.norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        weight = self.embed_tokens.weight[...]
        # in the weights' dtype, as the model was trained: in bfloat16 √3072 = 55.43 is 55.5
        return (weight[tokens] * jnp.asarray(self.config.hidden_size**0.5, weight.dtype)).astype(dtype)


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.heads, self.kv_heads = c.num_heads, c.num_kv_heads
        self.head_dim, self.scale = c.head_dim, c.attention_scale
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = Linear(D, N * H, bias=c.attention_bias, axes=("heads", "embed"))
        self.k_proj = Linear(D, K * H, bias=c.attention_bias, axes=("kv_heads", "embed"))
        self.v_proj = Linear(D, K * H, bias=c.attention_bias, axes=("kv_heads", "embed"))
        self.o_proj = Linear(N * H, D, bias=c.attention_bias, axes=("embed", "heads"))

    def __call__(
        self, x: jax.Array, layer: LayerData, context: Context, cache: Cache | None, add: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        B, T, _ = x.shape
        qkv_key, o_key, _, _ = layer.keys(4)
        q, k, v = attention_inputs(
            x, self.q_proj, self.k_proj, self.v_proj, head_dim=self.head_dim, tables=layer.tables(context), key=qkv_key,
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
        self.input_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def __call__(
        self, x: jax.Array, layer: LayerData, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        x, normed = self.input_layernorm.beside(x)
        x, cache = self.self_attn(normed, layer, context, cache, add=x)
        x, normed = self.post_attention_layernorm.beside(kept_product(x, "layer_middle"))
        return self.mlp(normed, layer, context, add=x), cache
