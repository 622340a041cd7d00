"""The lines of a report and a card by which other programs load a result: each kind of adapter has its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxft.config import parse
from jaxft.initial import Factors
from jaxft.lora_config import AdaLora, LoraConfig
from jaxft.usage import usage

RUN = Path("runs/mine")


def lines(lora: LoraConfig, *argv: str, **facts: Any) -> dict[str, str]:
    settings, _ = parse("train", ["--model_name_or_path=base", "--dataset=rows.jsonl", *argv])
    prepared: Any = SimpleNamespace(
        **{"lora": lora, "subtracted": {}, "quantized": settings.quantization is not None, "changes": {},
           "new_tokens": (), "tokenizer": SimpleNamespace(chat_template="x"), "directory": Path("base"), **facts}
    )  # fmt: skip
    return usage(prepared, settings, RUN)


SUBTRACTED: dict[str, Factors | None] = {"subtracted": {"q_proj": None}}


@pytest.mark.parametrize("lora", [LoraConfig(use_dora=True), LoraConfig(r=12, adalora=AdaLora())])
def test_adapters_with_more_than_a_and_b_are_merged_for_vllm(lora):
    found = lines(lora)
    assert found["vLLM"] == (
        "python -m jaxft.convert merge base runs/mine runs/mine-merged\nvllm serve runs/mine-merged"
    )
    assert "base mine.gguf --quant q4_k_m --adapter runs/mine" in found["llama.cpp"]


def test_plain_adapters_are_served_by_vllm_with_the_rank_that_is_written():
    assert "vllm serve base --enable-lora --max-lora-rank 16 " in lines(LoraConfig(r=16))["vLLM"]
    pissa = LoraConfig(r=16, init_lora_weights="pissa", rank_pattern={"q_proj": 20})
    assert "--max-lora-rank 64 " in lines(pissa, **SUBTRACTED)["vLLM"]
    found = lines(LoraConfig(r=16), "--load_in_4bit")
    assert "vllm serve base --enable-lora" in found["vLLM"]
    assert "--model_name_or_path base --load_in_4bit --adapter runs/mine" in found["jaxft"]


def test_an_adapter_over_a_base_of_its_own_names_that_base_everywhere():
    found = lines(LoraConfig(init_lora_weights="pissa"), "--load_in_4bit", **SUBTRACTED)
    assert "from_pretrained('runs/mine/quantized_base')" in found["PEFT"]
    assert "--model_name_or_path runs/mine/quantized_base --adapter runs/mine" in found["jaxft"]
    assert found["vLLM"].startswith("python -m jaxft.convert merge runs/mine/quantized_base runs/mine ")
    assert "jaxft.convert gguf runs/mine/quantized_base mine.gguf" in found["llama.cpp"]


def test_loftq_is_loaded_and_merged_over_four_bits_only():
    found = lines(LoraConfig(init_lora_weights="loftq"), "--load_in_4bit")
    assert "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'" in found["PEFT"]
    compile(found["PEFT"], "lines", "exec")
    assert "base --load_in_4bit --adapter runs/mine" in found["jaxft"]
    for tool, line in (("vLLM", "merge runs/mine-base runs/mine"), ("llama.cpp", "gguf runs/mine-base mine.gguf")):
        assert found[tool].startswith("python -m jaxft.convert quantize base runs/mine-base\n"), tool
        assert line in found[tool], tool
