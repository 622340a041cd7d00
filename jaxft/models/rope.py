"""Rotary embeddings of a Hugging Face configuration, a function a rope type, float32 as transformers has them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PretrainedConfig

from jaxft.errors import InputError
from jaxft.kernels.attention import key_range


@dataclass(frozen=True)
class Rope:
    """One rotary embedding: angle(position, h) = position · frequencies[h]; cos and sin are multiplied by `scaling`."""

    frequencies: tuple[float, ...]
    scaling: float

    def at(self, lengths: jax.Array) -> jax.Array:
        """The frequencies (B or 1, T or 1, H/2) float32 of tokens whose documents have these lengths (B, T) int32."""
        return jnp.asarray(np.array(self.frequencies, np.float32))[None, None]

    def tables(self, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin (B, T, H/2) float32 at positions (B, T) int32 of documents of these lengths (B, T) int32."""
        # float32, as transformers does: bf16 cannot tell position 257 from 256
        angles = positions[..., None].astype(jnp.float32) * self.at(lengths)
        return jnp.cos(angles) * self.scaling, jnp.sin(angles) * self.scaling


@dataclass(frozen=True)
class DynamicRope(Rope):
    """A base that grows with the document's length n beyond the model's positions P (NTK-aware scaling).

    theta · (factor · n / P − (factor − 1))^(H / (H − 2)); up to P the plain frequencies (Peng et al. 2023,
    https://arxiv.org/abs/2309.00071, section 3.3).
    """

    theta: float
    factor: float
    positions: int

    def at(self, lengths: jax.Array) -> jax.Array:
        H = 2 * len(self.frequencies)
        beyond = jnp.maximum(lengths, self.positions).astype(jnp.float32) / self.positions
        base = self.theta * jnp.power(self.factor * beyond - (self.factor - 1), H / (H - 2))
        exponents = jnp.asarray(np.arange(0, H, 2, dtype=np.float32) / np.float32(H))
        return 1 / jnp.power(base[..., None], exponents[None, None])


@dataclass(frozen=True)
class LongRope(Rope):
    """Other frequencies for documents of more than `threshold` tokens (https://arxiv.org/abs/2402.13753)."""

    long_frequencies: tuple[float, ...]
    threshold: int

    def at(self, lengths: jax.Array) -> jax.Array:
        short, long = (jnp.asarray(np.array(f, np.float32)) for f in (self.frequencies, self.long_frequencies))
        return jnp.where(lengths[..., None] > self.threshold, long[None, None], short[None, None])


def document_lengths(segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """How many tokens the document of each token has: one more than its last position. All (B, T) int32."""
    T = segment_ids.shape[1]
    last = T - 1 - jnp.flip(key_range(jnp.flip(segment_ids, 1)), 1)
    return jnp.take_along_axis(positions, last, axis=1) + 1


Parameters = dict[str, Any]


def _waves(parameters: Parameters, head_dim: int) -> np.ndarray:
    """theta^(2h/H) for h = 0 … H/2 − 1 (Su et al. 2021, section 3.2.2)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.float32(parameters["rope_theta"]), exponents).astype(np.float32)


def _rope(frequencies: np.ndarray, scaling: float = 1.0) -> Rope:
    return Rope(_floats(frequencies), scaling)


def _floats(array: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f) for f in array.astype(np.float32))


def _default(parameters: Parameters, head_dim: int, positions: int) -> Rope:
    return _rope(1 / _waves(parameters, head_dim))


def _linear(parameters: Parameters, head_dim: int, positions: int) -> Rope:
    """Positions divided by a factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""
    return _rope(1 / _waves(parameters, head_dim) / np.float32(parameters["factor"]))


def _llama3(parameters: Parameters, head_dim: int, positions: int) -> Rope:
    """Llama 3.1: long waves divided by the factor, short ones kept, a linear blend between (the model's own code)."""
    frequencies = 1 / _waves(parameters, head_dim)
    factor, old_length = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = old_length / (2 * math.pi / frequencies)  # how often a wave turns within the old length
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return _rope((1 - blend) * frequencies / factor + blend * frequencies)


def _dynamic(parameters: Parameters, head_dim: int, positions: int) -> Rope:
    plain = _default(parameters, head_dim, positions)
    return DynamicRope(plain.frequencies, 1.0, parameters["rope_theta"], parameters["factor"], positions)


def _yarn(parameters: Parameters, head_dim: int, positions: int) -> Rope:
    """YaRN: waves that turn seldom within the old length are divided by the factor, others kept, a ramp over h between;
    cos and sin grow with log(factor) (Peng et al. 2023, https://arxiv.org/abs/2309.00071, sections 3.2 and 3.4)."""
    old_length = parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or positions / old_length
    waves = _waves(parameters, head_dim)

    def turning(turns: float) -> float:
        """The h, not whole, of the wave that turns so often within the old length."""
        return head_dim * math.log(old_length / (turns * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = turning(parameters.get("beta_fast") or 32), turning(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # a step, not a division by 0
    divided = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = divided / (np.float32(factor) * waves) + (1 - divided) / waves

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    scaling = parameters.get("attention_factor")
    if scaling is None:
        one, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scaling = growth(one) / growth(all_dim) if one and all_dim else growth(1)
    return _rope(frequencies, scaling)


def _longrope(parameters: Parameters, head_dim: int, positions: int) -> Rope:
    """LongRoPE: each wave divided by a factor of its own, one list for short documents and one for long ones."""
    old_length = parameters["original_max_position_embeddings"]
    factor, scaling = parameters.get("factor") or positions / old_length, parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old_length))
    for name in ("short_factor", "long_factor"):
        if len(parameters[name]) != head_dim // 2:
            raise InputError(f"rope's {name} has {len(parameters[name])} numbers; half a head has {head_dim // 2}")
    waves = _waves(parameters, head_dim)
    short, long = (_floats(1 / (np.float32(parameters[f"{name}_factor"]) * waves)) for name in ("short", "long"))
    return LongRope(short, scaling, long, old_length)


TYPES: dict[str, Callable[[Parameters, int, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rope_from_config(hf: PretrainedConfig, head_dim: int, layer_type: str | None = None) -> Rope:
    """The rope that a configuration's `rope_parameters` describe, or their entry of a layer type.

    transformers has brought the older `rope_theta` and `rope_scaling` into that form (rope_type, rope_theta and the
    type's own). Raises InputError for a rope type that is not supported, or whose constants are not whole.
    """
    parameters = hf.rope_parameters if layer_type is None else hf.rope_parameters[layer_type]
    kind = parameters.get("rope_type")
    if kind not in TYPES:
        raise InputError(f"rope type {kind!r} is not supported; supported: {', '.join(TYPES)}")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        part = parameters["partial_rotary_factor"]
        raise InputError(f"partial_rotary_factor {part} is not supported: {hf.model_type} rotates whole heads here")
    try:
        return TYPES[kind](parameters, head_dim, hf.max_position_embeddings)
    except KeyError as missing:
        raise InputError(f"rope type {kind!r} needs {missing} in rope_parameters, which has {parameters}") from None
