"""A model's configuration as GGUF's keys and tensors, and config.json rebuilt from them."""

from typing import Any

import numpy as np

from jaxft.convert.gguf import ropes
from jaxft.convert.gguf.families import ARCHITECTURES, MODEL_TYPES, attention_scale
from jaxft.convert.gguf.read import Header
from jaxft.convert.gguf.ropes import Keys, shortest
from jaxft.errors import InputError
from jaxft.models import Model

TOKENS = "tokenizer.ggml.tokens"
PERIODS = {"gemma2": 2, "gemma3": 6}  # every so-manieth layer has no window, where a file does not say it
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "granite": "Granite", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3",
}  # fmt: skip


def describe(model: Model) -> tuple[Keys, dict[str, np.ndarray], list[str]]:
    """(keys, tensors beside the weights, what llama.cpp will do otherwise) of a model's configuration.

    Raises InputError for what GGUF cannot say.
    """
    c, kind = model.config, ARCHITECTURES[model.config.model_type]
    keys: Keys = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }
    if kind.name == "granite":
        hf = model.hf_config
        keys |= {"attention.scale": c.attention_scale, "embedding_scale": hf.embedding_multiplier}
        keys |= {"residual_scale": hf.residual_multiplier, "logit_scale": hf.logits_scaling}
    if c.attention_softcap is not None:
        keys["attn_logit_softcapping"] = c.attention_softcap
    if c.final_softcap is not None:
        keys["final_logit_softcapping"] = c.final_softcap
    if any(c.layer_window):
        keys["attention.sliding_window"] = max(c.layer_window)
        windowed = [window > 0 for window in c.layer_window]
        if windowed != _windowed({}, kind.name, c.num_layers):
            keys["attention.sliding_window_pattern"] = windowed
    rope_keys, tensors, said = ropes.describe(model)
    return {f"{kind.name}.{key}": value for key, value in (keys | rope_keys).items()}, tensors, said


def _windowed(keys: Keys, name: str, layers: int) -> list[bool]:
    """Which layers have a window, of a file that says how long it is."""
    said = keys.get("attention.sliding_window_pattern", PERIODS.get(name, 0))
    if np.ndim(said):
        if len(said) != layers:
            raise InputError(
                f"{name}.attention.sliding_window_pattern has {len(said)} entries, the model {layers} layers"
            )
        return [bool(one) for one in said]
    return [not said or i % said < said - 1 for i in range(layers)]


def config_of(header: Header, extra: dict[str, np.ndarray]) -> dict[str, Any]:
    """config.json of the model in a file. extra: those of `ropes.TENSORS` that the file has, as float32.

    Raises InputError for an architecture that is not read, and for constants that are missing or of the wrong kind.
    """
    name = header.metadata.get("general.architecture")
    if name not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{header.path} is of architecture {name!r}; these are read: {known}")
    prefix = f"{name}."
    keys = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    try:
        return _config(header, name, keys, extra)
    except KeyError as missing:
        raise InputError(f"{header.path} lacks the key {prefix}{missing.args[0]}; is it a model?") from None
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{header.path}: {error}") from error
        raise InputError(f"{header.path}: its constants are no model's: {error}") from error


def _config(header: Header, name: str, keys: Keys, extra: dict[str, np.ndarray]) -> dict[str, Any]:
    def whole(key: str, *default: int) -> int:
        found = keys[key] if not default else keys.get(key, default[0])
        if np.ndim(found) and len(set(found)) == 1:
            found = found[0]
        if np.ndim(found) or int(found) != found or not 0 < int(found) < 2**31:
            raise ValueError(f"{name}.{key} is {found}; one positive whole number is needed")
        return int(found)

    embedding = header.tensors.get("token_embd.weight")
    layers, hidden = whole("block_count"), whole("embedding_length")
    heads, positions = whole("attention.head_count"), whole("context_length")
    head_dim = whole("attention.key_length", hidden // heads)
    if whole("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{name}.rope.dimension_count is {keys['rope.dimension_count']}, heads are {head_dim} wide")
    model_type = MODEL_TYPES[name]
    if name == "llama" and "attention.sliding_window" in keys:
        model_type = "mistral"
    config: dict[str, Any] = {
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": embedding.shape[0] if embedding else whole("vocab_size", len(header.metadata.get(TOKENS, ""))),
        "hidden_size": hidden,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": ARCHITECTURES[model_type].activation,
        "max_position_embeddings": positions,
        "rms_norm_eps": shortest(keys["attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    rope = ropes.parameters_of(keys, extra, head_dim, positions)
    config["rope_parameters"] = rope
    if model_type in ("llama", "granite", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if model_type in ("llama", "granite"):
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    config |= _special(model_type, name, keys, layers, hidden, heads, head_dim)
    if model_type == "gemma3_text":
        local = shortest(keys.get("rope.freq_base_swa", ropes.LOCAL_BASE))
        config["rope_parameters"] = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return config


def _special(model_type: str, name: str, keys: Keys, layers: int, hidden: int, heads: int, head_dim: int) -> Keys:
    """The fields that only some architectures have."""

    def number(key: str, default: float | None) -> float | None:
        return default if key not in keys or not keys[key] else shortest(keys[key])

    window = int(keys.get("attention.sliding_window", 0)) or None
    kinds = ["sliding_attention" if one else "full_attention" for one in _windowed(keys, name, layers)]
    if window is None:
        kinds = ["full_attention"] * layers
    if model_type == "granite":
        return {
            "attention_multiplier": number("attention.scale", head_dim**-0.5),
            "embedding_multiplier": number("embedding_scale", 1.0),
            "residual_multiplier": number("residual_scale", 1.0),
            "logits_scaling": shortest(keys["logit_scale"]),
        }
    if model_type == "mistral":
        return {"sliding_window": window}
    if model_type in ("qwen2", "qwen3"):
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": next((i for i, kind in enumerate(kinds) if kind != "full_attention"), layers),
            "layer_types": kinds,
        }
    if model_type in ("gemma2", "gemma3_text"):
        scale = attention_scale(name, layers, hidden, heads, head_dim)
        # llama.cpp's defaults are those of the released models
        caps = (50.0, 30.0) if model_type == "gemma2" else (None, None)
        return {
            "hidden_activation": ARCHITECTURES[model_type].activation,
            "query_pre_attn_scalar": _whole_where_it_is(scale**-2),
            "sliding_window": window or 4096,
            "layer_types": kinds,
            "attn_logit_softcapping": number("attn_logit_softcapping", caps[0]),
            "final_logit_softcapping": number("final_logit_softcapping", caps[1]),
        }
    return {"hidden_activation": ARCHITECTURES[model_type].activation} if model_type == "gemma" else {}


def _whole_where_it_is(value: float) -> float | int:
    return round(value) if abs(round(value) - value) < 1e-6 * value else value
