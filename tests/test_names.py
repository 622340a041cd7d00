"""The tables of names against the gguf package's own map from Hugging Face's names to GGUF's."""

import pytest

from jaxft.convert import gemma3 as gemma3_names
from jaxft.convert.hf import places
from jaxft.models import FAMILIES
from tests.tiny_models import CONFIGS, tiny_model

gguf = pytest.importorskip("gguf", reason="it knows GGUF's names")
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # where GGUF calls a model_type otherwise


@pytest.mark.parametrize("name", [name for name in CONFIGS if "bias" not in name])
def test_gguf_names_are_those_of_the_gguf_package(name):
    model, _ = tiny_model(name)
    kind = model.config.model_type
    arch = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES.get(kind, kind)]
    known = gguf.get_tensor_name_map(arch, model.config.num_layers)
    table = {row.hf: row.gguf for row in model.family.names}
    for hf in places(model.family.names, model.shapes):
        parts = hf.split(".")
        layer = parts[2] if parts[1] == "layers" else None
        row = hf if layer is None else hf.replace(f"layers.{layer}.", "layers.{i}.")
        stem, kind_of_tensor = hf.rsplit(".", 1)
        if hf == "lm_head.weight" and gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[arch]:
            continue  # tied in every released file
        assert table[row].format(i=layer) == f"{known.get_name(stem)}.{kind_of_tensor}"


def test_tables_have_each_name_once():
    for kind, family in FAMILIES.items():
        for column in ("hf", "path", "gguf"):
            names = [getattr(name, column) for name in family.names]
            assert len(set(names)) == len(names), (kind, column)
    assert [row[1:] for row in gemma3_names.MULTIMODAL] == [row[1:] for row in gemma3_names.NAMES]
