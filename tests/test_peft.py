"""LoRA adapters: PEFT loads what jaxft writes, jaxft loads what PEFT writes, and what it cannot use is refused."""

import json
import shutil
from functools import cache

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import LoraConfig, add_lora, load_adapter, load_model, save_adapter
from jaxft.errors import InputError
from jaxft.lora import linear_modules
from jaxft.lora_config import reaches
from jaxft.trees import flatten
from tests.tiny_models import micro_logits, nonzero_adapter, tiny_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def saved(tmp_path):
    """(model, params, trained tree, directory) of an adapter on a tiny Llama, written by jaxft."""
    model, params = tiny_model("llama2")
    config = LoraConfig(r=4, lora_alpha=8)
    with_lora, trainable, _ = add_lora(model, params, config, jax.random.key(0))
    trainable = nonzero_adapter(trainable)
    save_adapter(tmp_path / "adapter", with_lora, trainable, config, "the/base")
    return model, params, trainable, tmp_path / "adapter"


# what is trained


def test_new_adapter_starts_as_peft_s_does():
    model, params = tiny_model("qwen3")
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=True)
    _, trainable, frozen = add_lora(model, params, config, jax.random.key(0))
    leaves = dict(flatten(trainable))
    assert {path.split("/")[3] for path in leaves} == LINEARS  # all-linear: the head is not among them
    for path, leaf in leaves.items():
        assert leaf.dtype == np.float32
        if path.endswith("/b"):
            assert not np.any(leaf)
            continue
        bound = leaf.shape[-1] ** -0.5
        assert leaf.shape[1] == 8
        assert 0.97 * bound < np.abs(leaf).max() <= bound
        # uniform: variance bound²/3; the mean of n values strays by four standard errors at most
        assert abs(float(np.mean(leaf))) < 4 * bound / 3**0.5 / leaf.size**0.5
    a, other = leaves["layers/0/self_attn/q_proj/lora/a"], leaves["layers/0/self_attn/k_proj/lora/a"]
    assert not np.array_equal(a, other)
    assert not np.array_equal(a[0], a[1])
    scales = {path: leaf for path, leaf in flatten(frozen) if path.endswith("lora/scale")}
    assert len(scales) == 7
    np.testing.assert_allclose(np.stack(list(scales.values())), 16 / 8**0.5, rtol=1e-6)


def test_targets_are_matched_as_peft_matches_them():
    module = "model.layers.0.self_attn.q_proj"

    def reached(*targets, module=module, **fields):
        return reaches(
            LoraConfig(target_modules=targets[0] if targets[0] == "all-linear" else targets, **fields), module
        )

    assert reached("q_proj")
    assert reached("v_proj", "self_attn.q_proj")
    assert reached(module)
    assert reached("all-linear")
    assert not reached("proj")
    assert not reached("_attn.q_proj")
    assert not reached("all-linear", module="lm_head")


def test_unknown_target_is_refused_with_the_names_there_are():
    model, params = tiny_model("llama2")
    message = r"'query_key_value' is no linear layer of this llama model; its linear layers are down_proj, gate_proj"
    with pytest.raises(InputError, match=message):
        add_lora(model, params, LoraConfig(target_modules=("q_proj", "query_key_value")), jax.random.key(0))


def test_branch_on_the_head_is_refused():
    """The loss reads the head as one matrix: a branch there would be ignored."""
    model, params = tiny_model("llama2")
    with pytest.raises(InputError, match="a branch on lm_head is not supported yet"):
        add_lora(model, params, LoraConfig(target_modules=("q_proj", "lm_head")), jax.random.key(0))


def test_linear_modules_are_found_by_path():
    model, _ = tiny_model("llama2")
    found = linear_modules(model.bind(model.shapes))
    assert {path.split("/")[-1] for path in found} == LINEARS | {"lm_head"}


# round trips


def test_adapter_survives_writing_and_reading_bit_for_bit(saved):
    model, params, trainable, directory = saved
    again, loaded, frozen, config = load_adapter(directory, model, params)
    assert config == LoraConfig(r=4, lora_alpha=8, target_modules=tuple(sorted(LINEARS)))
    assert [path for path, _ in flatten(loaded)] == [path for path, _ in flatten(trainable)]
    for path, leaf in flatten(trainable):
        np.testing.assert_array_equal(dict(flatten(loaded))[path], leaf)
    plain, _ = micro_logits(model, params)
    assert np.abs(micro_logits(again, loaded, frozen)[0] - plain).max() > 0.1


def test_writing_again_replaces_the_adapter_and_keeps_other_files(saved):
    model, params, trainable, directory = saved
    (directory / "README.md").write_text("mine")
    again, loaded, _, config = load_adapter(directory, model, params)
    save_adapter(directory, again, jax.tree.map(lambda leaf: leaf * 2, loaded), config, "the/base")
    assert sorted(file.name for file in directory.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    _, doubled, _, _ = load_adapter(directory, model, params)
    for path, leaf in flatten(trainable):
        np.testing.assert_array_equal(dict(flatten(doubled))[path], 2 * leaf)
    assert [file.name for file in directory.parent.iterdir()] == ["adapter"]


ADAPTERS = {
    "all linear layers": ("llama_bias", LoraConfig(r=4, lora_alpha=8)),
    "rank stabilised": ("qwen3", LoraConfig(r=8, lora_alpha=12, use_rslora=True)),
    "post norms": ("gemma2", LoraConfig(r=4, lora_alpha=8)),
    "some layers": ("qwen2_window", LoraConfig(r=3, lora_alpha=6, target_modules=("v_proj", "mlp.down_proj"))),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_loads_what_is_written_with_equal_logits(kind, hf_model, tmp_path):
    pytest.importorskip("peft", reason="the reference is PEFT")
    from scripts.compare_with_hf import reference_logits, reference_model

    name, config = ADAPTERS[kind]
    model, params = load_model(hf_model(name))
    model, trainable, frozen = add_lora(model, params, config, jax.random.key(0))
    trainable = nonzero_adapter(trainable, deviation=0.1)
    save_adapter(tmp_path, model, trainable, config, str(hf_model(name)))
    logits, micro = micro_logits(model, trainable, frozen)
    assert np.abs(logits - reference_logits(reference_model(hf_model(name), tmp_path), micro)).max() <= 1e-5


@cache
def peft_default_fields():
    import peft

    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()


def test_every_field_that_peft_writes_by_default_is_understood(saved):
    """A new PEFT field with a default must not lock its adapters out."""
    pytest.importorskip("peft", reason="the reference is PEFT")
    model, params, trainable, directory = saved
    written = {name: value for name, value in peft_default_fields().items() if not isinstance(value, set)}
    written["peft_type"], written["task_type"] = "LORA", "CAUSAL_LM"
    written |= {"target_modules": sorted(LINEARS), "runtime_config": None}
    (directory / CONFIG).write_text(json.dumps(written, default=str))
    _, loaded, _, _ = load_adapter(directory, model, params)
    assert len(jax.tree.leaves(loaded)) == len(jax.tree.leaves(trainable))


# bad input


def edit(directory, **fields):
    config = json.loads((directory / CONFIG).read_text()) | fields
    (directory / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def edit_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
UNSUPPORTED = {
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layers_pattern": "h",
    "target_parameters": ["x"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
}
BAD = {
    "no config": (lambda d: (d / CONFIG).unlink(), f"has no {CONFIG}; a PEFT adapter directory is needed"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "config is not JSON": (lambda d: (d / CONFIG).write_text("no"), "is not a JSON object"),
    "garbage": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 999), "is not a whole safetensors file"),
    "cut": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-7]), "is not a whole safetensors file"),
    "another method": (lambda d: edit(d, peft_type="IA3"), "'IA3' is not supported; only LORA and ADALORA"),
    "no r": (lambda d: edit(d, r=...), "r, lora_alpha, their patterns and layers_to_transform must be numbers"),
    "r is a word": (lambda d: edit(d, r="many"), "r, lora_alpha, .* must be numbers"),
    "r is 0": (lambda d: edit(d, r=0), "a rank below 1 is none"),
    "a pattern's rank is a word": (lambda d: edit(d, rank_pattern={"q_proj": "x"}), "patterns .* must be numbers"),
    "a pattern is a list": (lambda d: edit(d, alpha_pattern=["q_proj"]), "patterns .* must be numbers"),
    "no targets": (lambda d: edit(d, target_modules=[]), "must be a regular expression or a list of module names"),
    "a pattern that matches nothing": (
        lambda d: edit(d, target_modules="proj"), "'proj' matches the whole name of no linear layer of this llama model"
    ),
    "no regular expression": (lambda d: edit(d, target_modules="("), r"'\(' is no regular expression"),
    "a layer that is not there": (lambda d: edit(d, layers_to_transform=[3]), "no layer 3; this model has layers 0"),
    "an unknown module to save": (
        lambda d: edit(d, modules_to_save=["norm"]), "'norm' is not supported; expected embed_tokens or lm_head"
    ),
    "a saved module without its tensor": (
        lambda d: edit(d, modules_to_save=["lm_head"]), "1 of its tensors are missing, e.g. base_model.model.lm_head"
    ),
    "targets of another model": (lambda d: edit(d, target_modules=["c_attn"]), "'c_attn' is no linear layer of this"),
    "a branch on the head": (
        lambda d: edit(d, target_modules=["q_proj", "lm_head"]), "a branch on lm_head is not supported yet"
    ),
    "another rank": (
        lambda d: edit(d, r=8), r"is for another model: .* has shape \(4, \d+\), this model needs \(8, \d+\)"
    ),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(A)), f"1 of its tensors are missing, e.g. {A}"),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({A.replace("layers.1", "layers.7"): t[A]})),
        "1 tensors belong to no part of this model, e.g. .*layers.7",
    ),
    **{
        f"{field} is set": (
            lambda d, field=field, value=value: edit(d, **{field: value}), f"{field} = .* is not supported"
        )
        for field, value in UNSUPPORTED.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_adapter_that_cannot_be_used_is_refused_with_what_was_seen(damage, saved):
    model, params, _, directory = saved
    harm, message = BAD[damage]
    harm(directory)
    with pytest.raises(InputError, match=message):
        load_adapter(directory, model, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8}, "is for another model"),
        ({"num_hidden_layers": 4}, "14 of its tensors are missing"),
        ({"num_hidden_layers": 2}, "14 tensors belong to no part of this model"),
    ],
)
def test_adapter_of_another_model_is_refused(changes, message, saved):
    directory = saved[3]
    with pytest.raises(InputError, match=message):
        load_adapter(directory, *tiny_model("llama2", **changes))


def test_adapter_that_is_nowhere_is_refused(saved):
    model, params, _, directory = saved
    shutil.rmtree(directory)
    with pytest.raises(InputError, match="adapter does not exist"):
        load_adapter(directory, model, params)
