"""Directories with 4-bit and 8-bit weights: read and written as bitsandbytes lays them out, refused where damaged."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import load_model, save_model
from jaxft.convert import bnb
from jaxft.convert.hf import quantize_matrix
from jaxft.errors import InputError
from jaxft.models.quantized import all_linears, with_quantized
from jaxft.quant import NF4, Int8, is_quantized, kind_of
from jaxft.trees import flatten
from tests.tiny_models import tiny_model

# rows of whole blocks, as real models have them
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model directory in float32, and the same in 4 and 8 bits as this project writes it."""
    place = tmp_path_factory.mktemp("nf4")
    model, params = tiny_model("qwen3_window_bias", **SIZES)
    save_model(place / "plain", model, params)
    for kind in ("nf4", "int8"):
        save_model(place / kind, *load_model(place / "plain", quantization=kind))
    return place


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_directory_in_bitsandbytes_layout_loads_as_it_is(kind, directories):
    made, again = load_model(directories / "plain", quantization=kind)[1], load_model(directories / kind)[1]
    plain = dict(flatten(load_model(directories / "plain")[1]))
    for (path, one), (_, two) in zip(flatten(made), flatten(again), strict=True):
        assert is_quantized(one) == is_quantized(two) == path.endswith("proj/weight"), path
        np.testing.assert_array_equal(jax.tree.leaves(one)[0], jax.tree.leaves(two)[0])
        if is_quantized(one):
            assert kind_of(two) == kind and two.shape == plain[path].shape
            expected = quantize_matrix(plain[path][2], kind)
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(two[2]), jax.tree.leaves(expected))
    written = json.loads((directories / kind / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert written["quant_method"] == "bitsandbytes" and written["llm_int8_skip_modules"] == ["lm_head"]


def test_four_bit_tensors_have_the_names_shapes_and_state_of_bitsandbytes(directories):
    tensors = load_file(directories / "nf4" / "model.safetensors")
    parts = {
        name.removeprefix(WEIGHT): (a.dtype.name, a.shape) for name, a in tensors.items() if name.startswith(WEIGHT)
    }
    assert parts.pop(STATE.removeprefix(WEIGHT))[0] == "uint8"
    assert parts == {
        "": ("uint8", (4096, 1)), ".absmax": ("uint8", (128,)), ".quant_map": ("float32", (16,)),
        ".nested_absmax": ("float32", (1,)), ".nested_quant_map": ("float32", (256,)),
    }  # fmt: skip
    state = json.loads(tensors[STATE].tobytes())
    assert state.pop("nested_offset") > 0
    assert state == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [128, 64], "nested_blocksize": 256,
        "nested_dtype": "float32",
    }  # fmt: skip


def test_layers_that_differ_in_what_is_quantised_stand_in_runs_of_their_own(directories, tmp_path):
    model, params = tiny_model("llama3", **SIZES)
    leaves = all_linears(model, "nf4", jnp.float32)
    kept = {name: leaf for name, leaf in leaves.items() if "layers.1.mlp" not in name}
    mixed = with_quantized(model, kept)
    assert list(mixed.shapes["layers"]) == ["0", "1", "2"]
    assert not is_quantized(mixed.shapes["layers"]["1"]["mlp"]["up_proj"]["weight"])
    assert isinstance(mixed.shapes["layers"]["1"]["self_attn"]["q_proj"]["weight"], NF4)
    save_model(tmp_path / "plain", model, params)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors = {k: v for name, a in tensors.items() for k, v in quantized_tensors(name, a, kept).items()}
    save_model(tmp_path / "mixed", model, params)
    save_file(tensors, tmp_path / "mixed" / "model.safetensors")
    loaded, held = load_model(tmp_path / "mixed")
    assert list(held["layers"]) == ["0", "1", "2"]
    save_model(tmp_path / "again", loaded, held)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    skipped = [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", *skipped]


def quantized_tensors(name, array, leaves):
    """A tensor of a plain file as it stands in one where `leaves` are quantised."""
    if name not in leaves:
        return {name: array}
    return bnb.leaf_tensors(name, quantize_matrix(jnp.asarray(array), "nf4"))


def changed(directory: Path, target: Path, change) -> Path:
    """A copy of a model directory whose dict of tensors went through `change`."""
    target.mkdir()
    tensors = dict(load_file(directory / "model.safetensors"))
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    return target


def with_state(**fields):
    def change(tensors):
        state = json.loads(tensors[STATE].tobytes()) | fields
        state = {name: value for name, value in state.items() if value is not None}
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def renamed(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replaced(name, array):
    return lambda tensors: tensors.update({name: array})


BAD = {
    "cut off": (lambda t: t.update({STATE: t[STATE][:-9]}), "is damaged"),
    "not JSON": (replaced(STATE, np.full(30, 200, np.uint8)), "is damaged"),
    "not an object": (replaced(STATE, np.frombuffer(b"[1]", np.uint8)), "is damaged"),
    "no shape": (with_state(shape=None), "'shape'"),
    "another block": (with_state(blocksize=48), "blocks of 48"),
    "another nested block": (with_state(nested_blocksize=128), "nested blocks of 128"),
    "another type inside": (with_state(quant_type="fp4"), "quant_type 'fp4'; only nf4"),
    "fp4": (renamed(STATE, STATE.replace("nf4", "fp4")), "type fp4; only nf4"),
    "not finite": (with_state(nested_offset=float("nan")), "not finite"),
    "another shape": (with_state(shape=[64, 64]), r"uint8 \(4096, 1\); its quant_state says uint8 \(2048, 1\)"),
    "transposed": (with_state(shape=[64, 128]), r"quantised as \(64, 128\), this model needs \(128, 64\)"),
    "no scales": (lambda t: t.pop(f"{WEIGHT}.absmax"), "absmax is missing"),
    "no state": (lambda t: t.pop(STATE), "quant_state or SCB is missing"),
    "short scales": (lambda t: t.update({f"{WEIGHT}.absmax": t[f"{WEIGHT}.absmax"][1:]}), r"uint8 \(127,\)"),
    "another code book": (replaced(f"{WEIGHT}.quant_map", np.linspace(-1, 1, 16, dtype=np.float32)), "own code book"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_unknown_four_bit_weight_is_refused_by_name(name, directories, tmp_path):
    change, expected = BAD[name]
    with pytest.raises(InputError, match=expected) as refusal:
        load_model(changed(directories / "nf4", tmp_path / "bad", change))
    assert WEIGHT in str(refusal.value)


def test_a_damaged_eight_bit_weight_is_refused_by_name(directories, tmp_path):
    scales = WEIGHT.removesuffix("weight") + "SCB"
    with pytest.raises(InputError, match="SCB is missing"):
        load_model(changed(directories / "int8", tmp_path / "none", lambda t: t.pop(scales)))
    with pytest.raises(InputError, match=r"float32 \(127,\)"):
        load_model(changed(directories / "int8", tmp_path / "short", lambda t: t.update({scales: t[scales][1:]})))


def test_a_quantised_directory_is_not_quantised_again_in_another_way(directories):
    with pytest.raises(InputError, match="already quantised as nf4, int8 was asked for"):
        load_model(directories / "nf4", quantization="int8")
    assert load_model(directories / "nf4", quantization="nf4")[0].shapes["layers"]["0"]["mlp"]["up_proj"]


def test_a_quantised_head_is_refused():
    model, _ = tiny_model("llama2", **SIZES)
    with pytest.raises(InputError, match="only linear layers other than the head"):
        with_quantized(model, {"lm_head.weight": Int8(None, None, (96, 64))})
