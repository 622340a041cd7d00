"""Mistral: Llama's block without biases, with one sliding window for all layers where the config has one."""

from transformers import PretrainedConfig

from jaxft.models.decoder import ModelConfig
from jaxft.models.llama import Block as Block
from jaxft.models.rope import rope_from_config


def read_config(hf: PretrainedConfig) -> ModelConfig:
    """The constants of a Hugging Face MistralConfig."""
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
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
        attention_scale=hf.head_dim**-0.5,
        attention_softcap=None,
        final_softcap=None,
        ropes=(rope_from_config(hf, hf.head_dim),),
        layer_rope=(0,) * hf.num_hidden_layers,
        layer_window=(hf.sliding_window or 0,) * hf.num_hidden_layers,
    )
