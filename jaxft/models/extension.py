"""Rows longer than a model's positions: what in its config.json has to change, so that it takes them."""

import copy
import math
from typing import Any

from transformers import PretrainedConfig

from jaxft.errors import InputError
from jaxft.models import describe_model

Changes = dict[str, Any]  # fields of the text model's configuration, with their new values


def extend_positions(hf: PretrainedConfig, max_length: int) -> Changes:
    """The changes under which a model takes rows of `max_length` tokens; {} where it does so as it is.

    A plain rope becomes `linear` with factor max_length / positions, rounded up to three decimals; linear and yarn
    factors grow; `dynamic` ropes scale themselves by each document's length. Layers that look back no further than a
    window within the model's positions need no scaling, so a rope of their own is left alone. Raises InputError for
    rope types that nobody can say how to extend.
    """
    text = hf.get_text_config()
    positions, windows = text.max_position_embeddings, describe_model(hf).config.layer_window
    if max_length <= positions:
        return {}
    far = [not 0 < window <= positions for window in windows]
    rope = copy.deepcopy(text.rope_parameters)
    if "rope_type" in rope:
        parts = {"": rope} if any(far) else {}
    else:
        parts = {kind: rope[kind] for kind, is_far in zip(text.layer_types, far, strict=True) if is_far}
    if any(part["rope_type"] == "dynamic" for part in parts.values()):
        return {}
    for part in parts.values():
        _lengthen(part, positions, max_length)
    return {"max_position_embeddings": max_length, "rope_parameters": rope}


def _lengthen(rope: dict[str, Any], positions: int, max_length: int) -> None:
    """Changes one rope's parameters in place."""
    kind, ratio = rope["rope_type"], max_length / positions
    if kind in ("default", "linear"):
        rope.update(rope_type="linear", factor=_rounded_up(rope.get("factor", 1.0) * ratio))
    elif kind == "yarn":  # its factor counts from the length before scaling, and may reach that far already
        needed = max_length / rope["original_max_position_embeddings"]
        rope["factor"] = max(rope["factor"] or 0.0, _rounded_up(needed))
    else:
        raise InputError(
            f"max_length {max_length} is longer than the model's {positions} positions, and its rope type {kind!r} "
            f"cannot be extended by a rule: set --max_length {positions} or less, or give a copy of the model other "
            "rope_parameters and max_position_embeddings in its config.json"
        )


def _rounded_up(factor: float) -> float:
    return math.ceil(round(factor * 1000, 6)) / 1000


def with_changes(hf: PretrainedConfig, changes: Changes) -> PretrainedConfig:
    """A copy of a configuration with changed fields of its text model."""
    changed = copy.deepcopy(hf)
    changed.get_text_config().update(copy.deepcopy(changes))
    return changed


def describe_changes(changes: Changes) -> str:
    """In words what happens to the rope: 'linear, factor 2.0'; says so where nothing does."""
    rope = changes["rope_parameters"]
    parts = {"": rope} if "rope_type" in rope else rope
    said = [
        f"{kind + ' layers: ' if kind else ''}{part['rope_type']}, factor {part['factor']}"
        for kind, part in parts.items()
        if "factor" in part
    ]
    return "; ".join(said) or "left as it is: no layer looks back further than its window"
