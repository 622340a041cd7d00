"""Adapters with every option, made by PEFT itself on the tiny models. Needs torch and peft."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import torch

from scripts.compare_with_hf import reference_model

BOTH = ["embed_tokens", "lm_head"]
# (base, PEFT's settings, tensors of the file)
OPTIONS: dict[str, tuple[str, dict, int]] = {
    "regular expression": ("llama2", {"target_modules": r".*\.[02]\.(self_attn\.(q|v)_proj|mlp\.down_proj)"}, 12),
    "layers": (
        "qwen3",
        {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [1, 2],
         "exclude_modules": ["2.mlp.up_proj"]}, 6,
    ),
    "whole names": (
        "qwen3", {"target_modules": ["model.layers.0.mlp.gate_proj", "v_proj"], "layers_to_transform": 1}, 4
    ),
    "patterns": (
        "llama3",
        {"target_modules": "all-linear", "use_rslora": True,
         "rank_pattern": {"q_proj": 2, r"1\.mlp\.(up|down)_proj": 7},
         "alpha_pattern": {r"layers\.2\..*": 3, "q_proj": 16, "proj": 1}}, 42,
    ),
    "embedding and head": ("llama2", {"target_modules": ["q_proj"], "modules_to_save": BOTH}, 8),
    "embedding of a tied model": ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 7),
    "head of a tied model": ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 7),
    "tied model that stays tied": (
        "qwen2_tied",
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}, 14,
    ),
    "magnitudes": (
        "llama_bias",
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"q_proj": 2},
         "alpha_pattern": {"down_proj": 1}}, 63,
    ),
    "magnitudes in some layers": (
        "qwen3", {"target_modules": ["v_proj", "up_proj"], "use_dora": True, "layers_to_transform": [0, 2]}, 12,
    ),
    "everything": (
        "llama_linear_tied",
        {"target_modules": ["v_proj", "gate_proj", "lm_head"], "modules_to_save": BOTH, "layers_to_transform": [0, 2],
         "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"gate_proj": 2}, "use_rslora": True}, 10,
    ),
}  # fmt: skip


def make_adapter(hf_model: Callable[[str], Path], directory: Path, option: str) -> tuple[Path, Path]:
    """(base, directory) of an adapter of `OPTIONS` in which nothing is without effect."""
    torch.manual_seed(1)
    name, settings, count = OPTIONS[option]
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(reference_model(hf_model(name)), config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path or "modules_to_save" in path:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    with (directory / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert len(header.keys() - {"__metadata__"}) == count
    return hf_model(name), directory
