"""The types of GGUF's tensors that are written here: how many values a block holds, and in how many bytes."""

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxft.errors import InputError


@dataclass(frozen=True)
class GgmlType:
    """A type of tensor: rows are cut into blocks of `block` values, each `bytes` long."""

    name: str
    gguf: GGMLQuantizationType
    block: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a value."""
        return 8 * self.bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values. Raises InputError where the width does not divide."""
        if columns % self.block:
            raise InputError(
                f"{self.name} holds {self.block} values a block and rows are {columns} wide: must divide"
                + (f"; {FALLBACK[self.name]} is the type instead" if self.name in FALLBACK else "")
            )
        return columns // self.block * self.bytes


NAMES = (
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
TYPES = {
    name: GgmlType(name, GGMLQuantizationType[name.upper()], *GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]])
    for name in NAMES
}

# what llama.cpp takes where a width does not divide by the block: first its 32-value type, then f16
FALLBACK = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
    "q8_0": "f16", "q4_0": "f16", "q4_1": "f16", "q5_0": "f16", "q5_1": "f16", "iq4_nl": "f16",
}  # fmt: skip


def fitting(name: str, columns: int) -> str:
    """The type itself where its block divides a row of `columns` values, or else the first that does after it."""
    while columns % TYPES[name].block:
        name = FALLBACK[name]
    return name
