"""A PEFT LoRA adapter in llama.cpp's adapter format: A and B of each layer, to be put on the base's own GGUF file."""

from pathlib import Path
from typing import Any

import numpy as np

import gguf
from jaxft.convert import peft
from jaxft.convert.gguf.families import ARCHITECTURES, row_order
from jaxft.convert.gguf.write import Origin, add_keys, as_stored, stored_names
from jaxft.convert.merge import Source
from jaxft.errors import InputError


def write_adapter(origin: Origin, path: Path) -> dict[str, Any]:
    """Writes the adapter alone, whole or not at all; returns what was written.

    llama.cpp multiplies B A by alpha / rank, with one alpha for all layers: where a layer's own scale differs (rsLoRA,
    rank_pattern, alpha_pattern), B is multiplied by the ratio. Raises InputError for an adapter that trains whole
    matrices or has other parts than A and B, which its format has no place for.
    """
    source, c = origin.source, origin.model.config
    assert origin.adapter is not None
    beyond = [name for name in source.adapter if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if source.whole or beyond:
        raise InputError(
            f"{origin.adapter} holds more than A and B ({(*source.whole.values(), *beyond)[0]}), for which llama.cpp's "
            "adapters have no place; merge it: jaxft.convert gguf MODEL OUT --adapter DIR"
        )
    kind, names = ARCHITECTURES[c.model_type], stored_names(source)
    alpha = peft.read_adapter_config(origin.adapter).lora_alpha
    temporary = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(temporary, kind.name)
    keys = {"general.type": "adapter", "general.name": origin.adapter.resolve().name}
    add_keys(writer, keys | {"adapter.type": "lora", "adapter.lora.alpha": float(alpha)})
    try:
        for module, branch in source.branches.items():
            a, b = (_read(source, module, part) for part in "AB")
            ratio = branch.scale * len(a) / alpha
            b = b if ratio == 1 else b * np.float32(ratio)
            order = row_order(kind.interleaved, f"{module}.weight", c.num_heads, c.num_kv_heads, c.head_dim)
            stored = names[f"{module}.weight"]
            writer.add_tensor(f"{stored}.lora_a", a)
            writer.add_tensor(f"{stored}.lora_b", b if order is None else as_stored(b, *order))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return {"file": str(path), "bytes": path.stat().st_size, "layers": len(source.branches)}


def _read(source: Source, module: str, part: str) -> np.ndarray:
    return peft.read_tensor(source.adapter, f"{peft.PREFIX}{module}.lora_{part}.weight")
