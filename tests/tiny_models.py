"""The tiny models and packed batches that the tests share: small enough for a CPU, and no part of them without effect.

Weights are large (deviation 0.2, norm weights up to 0.5 from where they start, biases around 0.3), so that every part
moves the logits.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoConfig, PretrainedConfig

from jaxft import Model, describe_model
from jaxft.trees import Tree, flatten, unflatten

V = 96
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # large, so that a wrong one is seen
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# transformers' older spelling, as most directories on the hub have it: rope_theta and rope_scaling at the top
OLD_LLAMA3 = {
    "rope_theta": 500.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    },
}
GEMMA = SIZES | {"tie_word_embeddings": True, "head_dim": 12, "query_pre_attn_scalar": 20}
# Gemma 3's older spelling: the second of every two layers sees all, by a rope of its own
OLD_GEMMA3 = {
    "sliding_window_pattern": 2,
    "rope_theta": 1000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 8,  # some of the documents are longer
}
CONFIGS: dict[str, dict] = {
    "llama2": SIZES | {"model_type": "llama", "num_key_value_heads": 4, "rope_theta": 100.0},
    "llama3": SIZES | OLD_LLAMA3 | {"model_type": "llama"},
    "llama_linear_tied": SIZES
    | {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}
    | {"tie_word_embeddings": True, "head_dim": 12},
    "llama_bias": SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "qwen2_tied": SIZES | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": SIZES | WINDOWS | {"model_type": "qwen2"},
    "qwen3": SIZES | {"model_type": "qwen3", "head_dim": 12},
    "mistral": SIZES | {"model_type": "mistral", "sliding_window": 5, "head_dim": 12},
    "mistral_yarn": SIZES | {"model_type": "mistral", "sliding_window": None, "rope_parameters": YARN},
    "llama_dynamic": SIZES
    | {"model_type": "llama", "max_position_embeddings": 8}
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}},
    "llama_longrope": SIZES | {"model_type": "llama", "rope_parameters": LONGROPE},
    "gemma": GEMMA | {"model_type": "gemma", "hidden_act": "gelu"},
    "gemma2": GEMMA
    | {"model_type": "gemma2", "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    | {"tie_word_embeddings": False},
    "gemma3": GEMMA | OLD_GEMMA3 | {"model_type": "gemma3_text", "sliding_window": 5},
    "granite": SIZES
    | {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 0.5}
    | {"attention_multiplier": 0.6},
    "qwen3_window_bias": SIZES | WINDOWS | {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
}


def hf_config(name: str, **changes) -> PretrainedConfig:
    """The configuration of a tiny model, with some fields changed."""
    return AutoConfig.for_model(**(CONFIGS[name] | changes))


def deviation(path: str, model: Model) -> float:
    """Of the weights at a path. Gemma multiplies embeddings by √D: larger ones would drown the layers."""
    if "embed_tokens" in path and model.family.decoder.first_norm == 0:
        return 0.05
    return 0.3 if path.endswith("bias") else 0.2


def random_params(model: Model, seed: int = 0, dtype=jnp.float32) -> Tree:
    """Parameters that make every part matter; no torch needed."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        if "norm" in path:
            return model.family.decoder.first_norm + random.uniform(-0.5, 0.5, shape)
        return random.normal(0, deviation(path, model), shape)

    return unflatten({path: jnp.asarray(leaf(path, s.shape), dtype) for path, s in flatten(model.shapes)})


def tiny_model(name: str, seed: int = 0, dtype=jnp.float32, **changes) -> tuple[Model, Tree]:
    """A described model and its random parameters."""
    model = describe_model(hf_config(name, **changes))
    return model, random_params(model, seed, dtype)


def nonzero_adapter(trainable: Tree, seed: int = 1, deviation: float = 0.2) -> Tree:
    """An adapter whose B is not zero, so that A has a gradient and the scale an effect."""
    random = np.random.default_rng(seed)
    return unflatten(
        {path: jnp.asarray(random.normal(0, deviation, leaf.shape), jnp.float32) for path, leaf in flatten(trainable)}
    )


def documents(lengths: list[int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, loss weights) of random documents: the first third of each is its prompt, of weight 0."""
    random = np.random.default_rng(seed)
    found = []
    for length in lengths:
        weights = np.ones(length, np.float32)
        weights[: max(1, length // 3)] = 0
        found.append((random.integers(3, V, length).astype(np.int32), weights))
    return found


def pack(rows: list[list[tuple[np.ndarray, np.ndarray]]], length: int) -> dict[str, np.ndarray]:
    """Rows of documents as one batch (1, B, T), padded with segment 0."""
    shape = (1, len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_weights"] = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        at = 0
        for segment, (tokens, weights) in enumerate(row, 1):
            span = (0, b, slice(at, at + len(tokens)))
            batch["tokens"][span], batch["loss_weights"][span] = tokens, weights
            batch["segment_ids"][span], batch["positions"][span] = segment, np.arange(len(tokens))
            at += len(tokens)
    return batch


LENGTHS = [[7, 9], [12, 5, 3], [15], [4, 14]]  # of the documents in the four rows of the usual batch
T = 20


def packed_batch(seed: int = 0, accumulation: int = 1) -> dict[str, np.ndarray]:
    """Four packed rows of T tokens with padding, as (A, 4 / A, T)."""
    rows = [documents(lengths, seed * 10 + row) for row, lengths in enumerate(LENGTHS)]
    return {name: array.reshape(accumulation, -1, T) for name, array in pack(rows, T).items()}


def write_hf_model(directory: Path, name: str, seed: int = 0) -> Path:
    """A model directory made by transformers itself, with the same kind of weights. Needs torch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(name), dtype=torch.float32)
    ours = describe_model(hf_config(name))
    norm = ours.family.decoder.first_norm
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.uniform_(norm - 0.5, norm + 0.5)
            else:
                parameter.normal_(0, deviation(path, ours))
    model.save_pretrained(directory)
    return directory


def micro_logits(model: Model, *trees: Tree) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits (tokens, V) of the usual batch, padding left out, and that batch as one micro-batch (B, T)."""
    micro = {name: array[0] for name, array in packed_batch().items()}

    @jax.jit
    def run(trees):
        decoder = model.bind(*trees)
        return decoder.logits(decoder(micro["tokens"], micro["segment_ids"], micro["positions"]))

    return np.asarray(run(trees))[micro["segment_ids"] > 0], micro
