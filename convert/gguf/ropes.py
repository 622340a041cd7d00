"""Rotary embeddings in GGUF: keys for what scales all waves alike, tensors for what divides each by a factor."""

import math
from typing import Any

import numpy as np

from jaxft.convert.gguf.families import ARCHITECTURES
from jaxft.errors import InputError
from jaxft.models import Model
from jaxft.models.rope import LongRope, Rope

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LOCAL_BASE = 10000.0  # of Gemma 3's windows, where a file does not say it
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}

Keys = dict[str, Any]


def describe(model: Model) -> tuple[Keys, dict[str, np.ndarray], list[str]]:
    """(keys without the architecture's prefix, tensors, what llama.cpp will do otherwise) of a model's ropes.

    Raises InputError for a rope that GGUF cannot say.
    """
    c = model.config
    all_parameters = model.hf_config.get_text_config().rope_parameters
    if "rope_type" in all_parameters:
        return _one(all_parameters, model, c.ropes[0])
    whole, local = all_parameters["full_attention"], all_parameters["sliding_attention"]
    if local["rope_type"] != "default":
        raise InputError(f"the windows' rope is {local['rope_type']}; GGUF has a base for it and no scaling")
    kinds = sorted(set(model.hf_config.get_text_config().layer_types))
    rope = c.ropes[kinds.index("full_attention")] if "full_attention" in kinds else c.ropes[0]
    keys, tensors, said = _one(whole, model, rope)
    return keys | {"rope.freq_base_swa": float(local["rope_theta"])}, tensors, said


def _one(parameters: dict[str, Any], model: Model, rope: Rope) -> tuple[Keys, dict[str, np.ndarray], list[str]]:
    c, kind = model.config, parameters["rope_type"]
    keys: Keys = {"rope.dimension_count": c.head_dim, "rope.freq_base": float(parameters["rope_theta"])}
    waves = np.power(np.float64(parameters["rope_theta"]), np.arange(0, c.head_dim, 2) / c.head_dim)

    def factors(frequencies: tuple[float, ...]) -> np.ndarray:
        return (1 / (waves * np.asarray(frequencies, np.float64))).astype(np.float32)

    if kind in ("llama3", "longrope") and not ARCHITECTURES[c.model_type].factors:
        name = ARCHITECTURES[c.model_type].name
        raise InputError(f"its rope is {kind}, for which llama.cpp's architecture {name} has no tensors")
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}, {}, []
    if kind == "llama3":
        return keys, {FREQS: factors(rope.frequencies)}, []
    if kind == "longrope":
        assert isinstance(rope, LongRope)
        keys |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": rope.scaling}
        keys["rope.scaling.original_context_length"] = rope.threshold
        said = "its rope has other factors for texts beyond {} tokens; llama.cpp chooses by the context's size"
        return (
            keys,
            {LONG: factors(rope.long_frequencies), SHORT: factors(rope.frequencies)},
            [said.format(rope.threshold)],
        )
    if kind == "yarn":
        return keys | _yarn(parameters, c.max_position_embeddings, rope), {}, []
    if kind == "dynamic":
        positions = c.max_position_embeddings
        said = f"its rope is dynamic, which llama.cpp has not: answers are the model's up to {positions} tokens"
        return keys, {}, [said]
    return keys, {}, []


def _yarn(parameters: dict[str, Any], positions: int, rope: Rope) -> Keys:
    """YaRN's keys. llama.cpp multiplies cos and sin by 1 + 0.1 log(factor) itself, and by the key attn_factor."""
    for name, only in BETAS.items():
        if (parameters.get(name) or only) != only:
            raise InputError(
                f"yarn's {name} is {parameters[name]}; llama.cpp takes {only} and reads no other from a file"
            )
    if not parameters.get("truncate", True):
        raise InputError("yarn's truncate is false; llama.cpp rounds the ends of the ramp")
    old_length = parameters["original_max_position_embeddings"]
    factor = float(parameters["factor"] or positions / old_length)
    keys: Keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    keys["rope.scaling.original_context_length"] = old_length
    if not math.isclose(rope.scaling, growth(factor), rel_tol=1e-7):
        keys["rope.scaling.attn_factor"] = rope.scaling / growth(factor)
    return keys


def growth(factor: float) -> float:
    """What YaRN multiplies cos and sin by where nothing else is said."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1


def parameters_of(keys: Keys, tensors: dict[str, np.ndarray], head_dim: int, positions: int) -> dict[str, Any]:
    """transformers' rope_parameters from keys without prefix and the tensors of `TENSORS` that a file has.

    rope_freqs are llama3's where its released constants give them; others become a longrope with one list, which is
    the same computation. Raises InputError for a scaling that is unknown.
    """
    theta = shortest(keys.get("rope.freq_base", 10000.0))
    kind, factor = keys.get("rope.scaling.type", "linear"), shortest(keys.get("rope.scaling.factor", 0.0))
    old_length = int(keys.get("rope.scaling.original_context_length", positions))
    growing = shortest(keys.get("rope.scaling.attn_factor", 1.0))
    if FREQS in tensors:
        return _factored(theta, tensors[FREQS], head_dim, positions)
    if kind == "longrope":
        if not {LONG, SHORT} <= tensors.keys():
            raise InputError(f"the rope is longrope, and {LONG} or {SHORT} is missing")
        return {
            "rope_type": "longrope", "rope_theta": theta, "original_max_position_embeddings": old_length,
            "long_factor": _numbers(tensors[LONG]), "short_factor": _numbers(tensors[SHORT]),
            "attention_factor": growing,
        }  # fmt: skip
    if kind == "yarn" and factor not in (0.0, 1.0):
        found = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
        found["original_max_position_embeddings"] = old_length
        return found if growing == 1 else found | {"attention_factor": growing * growth(factor)}
    if kind in ("none", "yarn") or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise InputError(f"rope.scaling.type is {kind!r}; none, linear, yarn and longrope are read")


def _factored(theta: float, factors: np.ndarray, head_dim: int, positions: int) -> dict[str, Any]:
    from jaxft.models.rope import TYPES

    guess = {"rope_type": "llama3", "rope_theta": theta, "factor": float(f"{factors.max():.6g}"), **LLAMA3}
    waves = np.power(theta, np.arange(0, head_dim, 2) / head_dim)
    expected = 1 / (waves * np.asarray(TYPES["llama3"](guess, head_dim, positions).frequencies, np.float64))
    if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-5, atol=0):
        return guess
    return {
        "rope_type": "longrope", "rope_theta": theta, "original_max_position_embeddings": positions,
        "long_factor": _numbers(factors), "short_factor": _numbers(factors), "attention_factor": 1.0,
    }  # fmt: skip


def _numbers(array: np.ndarray) -> list[float]:
    return [shortest(value) for value in array.reshape(-1)]


def shortest(value: Any) -> float:
    """A float32 as the shortest decimal that reads back to it: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))
