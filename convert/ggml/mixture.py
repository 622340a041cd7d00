"""Which type each tensor of a file gets: llama.cpp's mixtures, as data.

A quantisation such as q4_k_m names a type for most tensors and exceptions: values and down projections of some layers
keep more bits, norms and biases stay in float32. What stands here is what llama.cpp's quantiser (0.3.36 of its Python
package) does with the architectures that train here; rules for experts are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from gguf import LlamaFileType

from jaxft.convert.ggml.types import TYPES, fitting


class Place(NamedTuple):
    """Where a tensor stands: its layer of how many, query heads a key/value head, and whether importances are given."""

    layer: int
    layers: int
    group: int
    importance: bool


When = Callable[[Place], bool]
Rule = tuple[str, When]  # the type, and where; the first that holds is taken


def always(place: Place) -> bool:
    return True


def grouped(place: Place) -> bool:
    """Few key and value heads: their weights are small and matter much."""
    return place.group >= 4


def more_bits(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    first, n = place.layers // 8, place.layers
    return place.layer < first or place.layer >= 7 * n // 8 or (place.layer - first) % 3 == 2


def first_part(divisor: int) -> When:
    return lambda place: place.layer < place.layers // divisor


def first_layers(count: int) -> When:
    return lambda place: place.layer < count


def first_eighth_without(place: Place) -> bool:
    return not place.importance and place.layer < place.layers // 8


def first_eighth_with(place: Place) -> bool:
    return place.importance and place.layer < place.layers // 8


@dataclass(frozen=True)
class Mixture:
    """The type of most tensors, the number by which files say so, and the exceptions by the tensor's role."""

    type: str
    file_type: LlamaFileType
    value: tuple[Rule, ...] = ()
    down: tuple[Rule, ...] = ()
    output: tuple[Rule, ...] = ()
    plain: bool = False  # not quantised: embedding and head are as all others


_F, _all = LlamaFileType, always
_sixth: tuple[Rule, ...] = (("q6_k", more_bits),)
_grouped: tuple[Rule, ...] = (("q5_k", grouped),)
_early: tuple[Rule, ...] = (("q5_k", first_eighth_without),)
MIXTURES = {
    "f32": Mixture("f32", _F.ALL_F32, plain=True),
    "f16": Mixture("f16", _F.MOSTLY_F16, plain=True),
    "bf16": Mixture("bf16", _F.MOSTLY_BF16, plain=True),
    "q8_0": Mixture("q8_0", _F.MOSTLY_Q8_0),
    "q4_0": Mixture("q4_0", _F.MOSTLY_Q4_0, down=(("q4_1", first_eighth_with),)),
    "q4_1": Mixture("q4_1", _F.MOSTLY_Q4_1),
    "q5_0": Mixture("q5_0", _F.MOSTLY_Q5_0, down=(("q5_1", first_eighth_with),)),
    "q5_1": Mixture("q5_1", _F.MOSTLY_Q5_1),
    "q2_k": Mixture(
        "q2_k", _F.MOSTLY_Q2_K,
        value=(("q4_k", grouped), ("q3_k", _all)), down=(("q3_k", _all),), output=(("q3_k", _all),),
    ),
    "q3_k_s": Mixture("q3_k", _F.MOSTLY_Q3_K_S),
    "q3_k_m": Mixture(
        "q3_k", _F.MOSTLY_Q3_K_M,
        value=(("q5_k", first_layers(2)), ("q4_k", _all)),
        down=(("q5_k", first_part(16)), ("q4_k", _all)), output=(("q4_k", _all),),
    ),
    "q3_k_l": Mixture(
        "q3_k", _F.MOSTLY_Q3_K_L, value=(("q5_k", _all),), down=(("q5_k", _all),), output=(("q5_k", _all),)
    ),
    "q4_k_s": Mixture(
        "q4_k", _F.MOSTLY_Q4_K_S, value=(("q5_k", first_layers(4)),), down=(("q5_k", first_part(8)),)
    ),
    "q4_k_m": Mixture("q4_k", _F.MOSTLY_Q4_K_M, value=_sixth, down=_sixth),
    "q5_k_s": Mixture("q5_k", _F.MOSTLY_Q5_K_S),
    "q5_k_m": Mixture("q5_k", _F.MOSTLY_Q5_K_M, value=_sixth, down=_sixth),
    "q6_k": Mixture("q6_k", _F.MOSTLY_Q6_K),
    "iq4_nl": Mixture("iq4_nl", _F.MOSTLY_IQ4_NL, value=_grouped, down=_early),
    "iq4_xs": Mixture("iq4_xs", _F.MOSTLY_IQ4_XS, value=_grouped, down=_early),
}  # fmt: skip
QUANTS = tuple(MIXTURES)
ROLES = {"attn_v": "value", "attn_qkv": "value", "ffn_down": "down", "attn_output": "output"}


def file_type(quant: str) -> LlamaFileType:
    """The number of a quantisation under `general.file_type`."""
    return MIXTURES[quant].file_type


def tensor_type(
    quant: str, name: str, shape: tuple[int, ...], *,
    layers: int, group: int, tied: bool, importance: bool = False, architecture: str = "llama",
) -> str:  # fmt: skip
    """The type of one tensor of a file of the quantisation `quant`, a name in TYPES.

    name: GGUF's, `blk.{i}.ffn_down.weight`; shape: rows first, a row last. layers: of the model; group: query heads a
    key/value head; tied: whether the head is the embedding, which then is held like a head; importance: whether an
    importance matrix is given. architecture: GGUF's name of it.
    """
    mixture = MIXTURES[quant]
    matrix = len([*filter(lambda n: n > 1, shape[:-1])]) > 0
    if not matrix or not name.endswith("weight") or "_norm.weight" in name:
        return "f32"
    if mixture.plain:
        return mixture.type
    columns = shape[-1]
    if name == "output.weight" or (name == "token_embd.weight" and tied):
        fits = columns % TYPES[mixture.type].block == 0
        return fitting("q6_k" if fits and mixture.type != "q8_0" else "q8_0", columns)
    return fitting(_mixed(mixture, name, Place(_layer(name), layers, group, importance), architecture), columns)


def _mixed(mixture: Mixture, name: str, place: Place, architecture: str) -> str:
    part = name.split(".")[2] if name.startswith("blk.") else ""
    role = ROLES.get(part)
    rules: tuple[Rule, ...] = getattr(mixture, role) if role else ()
    found = next((type for type, when in rules if when(place)), mixture.type)
    seventy = place.layers == 80 and place.group > 1 and architecture in ("llama", "qwen2")
    if role == "value" and seventy and found in ("q3_k", "q4_k"):
        return "q5_k"  # the 70B models: eight heads share one value
    return found


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else 0
