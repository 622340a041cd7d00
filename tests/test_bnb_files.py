"""Directories with 4-bit and 8-bit weights: read and written as bitsandbytes lays them out, refused where damaged."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import load_model, save_model
from jaxft.convert import bnb
from jaxft.convert.hf import quantize_matrix
from jaxft.errors import InputError
from jaxft.kernels.dequantize.tables import dynamic_map, nf4_levels
from jaxft.models.quantized import all_linears, with_quantized
from jaxft.quant import NF4, Int8, is_quantized, kind_of
from jaxft.trees import flatten
from tests.tiny_models import micro_logits, tiny_model

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
def test_the_stored_values_are_quantised_before_any_cast(kind, directories):
    leaves = [
        dict(flatten(load_model(directories / "plain", dtype=dtype, quantization=kind)[1]))
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    plain = dict(flatten(load_model(directories / "plain")[1]))
    moved = 0
    for path, leaf in leaves[0].items():
        if is_quantized(leaf):
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(leaf), jax.tree.leaves(leaves[1][path]))
            cast = quantize_matrix(plain[path][0].astype(jnp.bfloat16), kind)
            moved += int(np.sum(np.asarray(cast.codes) != leaf.codes[0]))
        else:
            assert leaves[1][path].dtype == jnp.bfloat16
    assert moved > 0  # of values that were cast first other codes are made


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


def singly_quantised(scale):
    """A change to scales in float32, all of one value."""

    def change(tensors):
        with_state(nested_blocksize=None, nested_dtype=None, nested_offset=None)(tensors)
        for name in ("nested_absmax", "nested_quant_map"):
            tensors.pop(f"{WEIGHT}.{name}")
        tensors[f"{WEIGHT}.absmax"] = np.full(128, scale, np.float32)

    return change


def in_bfloat16(tensors):
    """The bytes of the codes, two in a number, as bnb_4bit_quant_storage=bfloat16 stores them."""
    tensors[WEIGHT] = tensors[WEIGHT].reshape(-1).view(ml_dtypes.bfloat16)[:, None]


BAD = {
    "cut off": (lambda t: t.update({STATE: t[STATE][:-9]}), "is damaged"),
    "not JSON": (replaced(STATE, np.full(30, 200, np.uint8)), "is damaged"),
    "not an object": (replaced(STATE, np.frombuffer(b"[1]", np.uint8)), "is damaged"),
    "no shape": (with_state(shape=None), "'shape'"),
    "another block": (with_state(blocksize=48), "blocks of 48"),
    "another nested block": (with_state(nested_blocksize=128), "nested blocks of 128"),
    "another type inside": (with_state(quant_type="fp4"), "quant_type 'fp4'; only nf4"),
    "fp4": (renamed(STATE, STATE.replace("nf4", "fp4")), "type fp4; only nf4"),
    "half a block": (with_state(blocksize=64.5), r"64\.5 is no whole number"),
    "blocks without end": (with_state(blocksize=float("inf")), "inf is no whole number"),
    "a true block": (with_state(blocksize=True), "True is no whole number"),
    "half a nested block": (with_state(nested_blocksize=256.5), r"256\.5 is no whole number"),
    "half a row": (with_state(shape=[127.5, 64]), r"127\.5 is no whole number"),
    "rows without end": (with_state(shape=[float("inf"), 64]), "inf is no whole number"),
    "more rows than there are": (with_state(shape=[10**40, 64]), "its quant_state says uint8"),
    "offset NaN": (with_state(nested_offset=float("nan")), "nested_offset nan, which is not finite"),
    "offset without end": (with_state(nested_offset=float("-inf")), "nested_offset -inf, which is not finite"),
    "offset beyond float32": (with_state(nested_offset=1e300), r"nested_offset 1e\+300, which is not finite"),
    "offset beyond float64": (with_state(nested_offset=10**400), "is damaged: OverflowError"),
    "no offset": (with_state(nested_offset=None), "'nested_offset'"),
    "another nested dtype": (with_state(nested_dtype="float16"), "nested_dtype 'float16'; only float32"),
    "no nested dtype": (with_state(nested_dtype=None), "'nested_dtype'"),
    "second scale NaN": (replaced(f"{WEIGHT}.nested_absmax", np.float32([np.nan])), "nested_absmax holds NaN"),
    "second scale infinite": (replaced(f"{WEIGHT}.nested_absmax", np.float32([np.inf])), "nested_absmax holds NaN"),
    "scale NaN": (singly_quantised(np.nan), r"weight\.absmax holds NaN"),
    "scale infinite": (singly_quantised(-np.inf), r"weight\.absmax holds NaN"),
    "another shape": (with_state(shape=[64, 64]), r"uint8 \(4096, 1\); its quant_state says uint8 \(2048, 1\)"),
    "transposed": (with_state(shape=[64, 128]), r"quantised as \(64, 128\), this model needs \(128, 64\)"),
    "no scales": (lambda t: t.pop(f"{WEIGHT}.absmax"), "absmax is missing"),
    "no state": (lambda t: t.pop(STATE), "quant_state or SCB is missing"),
    "short scales": (lambda t: t.update({f"{WEIGHT}.absmax": t[f"{WEIGHT}.absmax"][1:]}), r"uint8 \(127,\)"),
    "another code book": (replaced(f"{WEIGHT}.quant_map", np.linspace(-1, 1, 16, dtype=np.float32)), "own code book"),
    "a level moved": (replaced(f"{WEIGHT}.quant_map", nf4_levels() + np.float32(1e-5)), "own code book"),
    "a level NaN": (replaced(f"{WEIGHT}.quant_map", nf4_levels() * np.float32(np.nan)), "own code book"),
    "an entry moved": (replaced(f"{WEIGHT}.nested_quant_map", dynamic_map() - np.float32(1e-5)), "own code book"),
    "codes in bfloat16": (in_bfloat16, r"\(bnb_4bit_quant_storage=bfloat16\), which is not read; quantise .*=uint8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_unknown_four_bit_weight_is_refused_by_name(name, directories, tmp_path):
    change, expected = BAD[name]
    with pytest.raises(InputError, match=expected) as refusal:
        load_model(changed(directories / "nf4", tmp_path / "bad", change))
    assert WEIGHT in str(refusal.value)


def test_code_books_that_are_rounded_otherwise_are_read_as_bitsandbytes_own(directories, tmp_path):
    def nudge(tensors):
        for name in [name for name in tensors if name.endswith("quant_map")]:
            book = tensors[name]
            inner = np.nextafter(book, np.float32(0)).astype(np.float32)
            tensors[name] = np.where(np.abs(book) == 1, book, inner)
            assert not np.array_equal(tensors[name], book)

    _, params = load_model(directories / "nf4")
    _, found = load_model(changed(directories / "nf4", tmp_path / "nudged", nudge))
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_damaged_eight_bit_weight_is_refused_by_name(directories, tmp_path):
    scales = WEIGHT.removesuffix("weight") + "SCB"
    with pytest.raises(InputError, match="SCB is missing"):
        load_model(changed(directories / "int8", tmp_path / "none", lambda t: t.pop(scales)))
    with pytest.raises(InputError, match=r"float32 \(127,\)"):
        load_model(changed(directories / "int8", tmp_path / "short", lambda t: t.update({scales: t[scales][1:]})))
    with pytest.raises(InputError, match=r"up_proj\.SCB holds NaN or an infinity"):
        load_model(changed(directories / "int8", tmp_path / "nan", lambda t: t.update({scales: t[scales] * np.nan})))


def test_a_quantised_directory_is_not_quantised_again_in_another_way(directories):
    with pytest.raises(InputError, match="already quantised as nf4, int8 was asked for"):
        load_model(directories / "nf4", quantization="int8")
    assert load_model(directories / "nf4", quantization="nf4")[0].shapes["layers"]["0"]["mlp"]["up_proj"]


def test_a_quantised_head_is_refused():
    model, _ = tiny_model("llama2", **SIZES)
    with pytest.raises(InputError, match="only linear layers other than the head"):
        with_quantized(model, {"lm_head.weight": Int8(None, None, (96, 64))})


# against bitsandbytes itself

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
DOUBLE = FOUR | {"bnb_4bit_use_double_quant": True}
KINDS = {
    "nf4": DOUBLE,
    "nf4, scales in float32": FOUR,
    "nf4, one layer kept": DOUBLE | {"llm_int8_skip_modules": ["lm_head", WEIGHT.removesuffix(".weight")]},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_transformers_with_bitsandbytes_load_here_and_ours_there(kind, directories, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    pytest.importorskip("bitsandbytes", reason="the reference quantises with it")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from scripts.compare_with_hf import reference_logits, reference_model

    def within(found, expected):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    theirs = AutoModelForCausalLM.from_pretrained(
        directories / "plain", dtype=torch.float32, attn_implementation="eager",
        quantization_config=BitsAndBytesConfig(**KINDS[kind]),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_model(tmp_path / "theirs")
    quantised = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(leaf)]
    assert {kind_of(leaf) for leaf in quantised} == {kind.split(",")[0]}
    ours, micro = micro_logits(model, params)
    expected = reference_logits(theirs.train(), micro)  # in evaluation bitsandbytes computes in bfloat16
    within(ours, expected)
    exact = reference_logits(reference_model(directories / "plain"), micro)
    assert np.abs(expected - exact).max() > 1e-3 * np.abs(exact).max()  # it is quantised
    # what was read is written with the same bits, and read there
    save_model(tmp_path / "ours", model, params)
    within(reference_logits(reference_model(tmp_path / "ours").train(), micro), ours)
    written, read = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == read.keys()
    for name in (name for name in read if STATE.removeprefix(WEIGHT) not in name):
        assert written[name].dtype == read[name].dtype, name
        np.testing.assert_array_equal(written[name], read[name], err_msg=name)
    if kind in ("nf4", "int8"):  # and what is quantised here
        found = reference_logits(reference_model(directories / kind).train(), micro)
        within(found, micro_logits(*load_model(directories / kind))[0])
