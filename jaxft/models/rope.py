"""Rotary frequencies of a Hugging Face configuration, a function a rope type, float32 as transformers has them."""

import math
from typing import Any

import numpy as np

from jaxft.errors import InputError
from jaxft.models.layers import Rope


def _default(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """theta^(−2h/H) for h = 0 … H/2 − 1 (Su et al. 2021, section 3.2.2)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.power(np.float32(parameters["rope_theta"]), exponents)).astype(np.float32)


def _linear(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """Positions divided by a factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""
    return _default(parameters, head_dim) / np.float32(parameters["factor"])


def _llama3(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """Llama 3.1: long waves divided by the factor, short ones kept, a linear blend between (the model's own code)."""
    frequencies = _default(parameters, head_dim)
    factor, old_length = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = old_length / (2 * math.pi / frequencies)  # how often a wave turns within the old length
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32)


TYPES = {"default": _default, "linear": _linear, "llama3": _llama3}


def rope_from_config(parameters: dict[str, Any], head_dim: int) -> Rope:
    """The rope that `rope_parameters` (transformers' form: rope_type, rope_theta and the type's own) describes.

    Raises InputError for a rope type that is not supported.
    """
    kind = parameters["rope_type"]
    if kind not in TYPES:
        raise InputError(f"rope type {kind!r} is not supported yet; supported: {', '.join(TYPES)}")
    return Rope(tuple(float(f) for f in TYPES[kind](parameters, head_dim)))
