"""Blocks of GGUF files: gguf's own bits, llama.cpp's errors or smaller ones, and its mixtures tensor by tensor."""

import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxft.convert.ggml import QUANTS, TYPES, dequantize, file_type, quantize, tensor_type
from jaxft.errors import InputError
from tests.ggml_cases import MODELS, TENSORS, column_weights, errors, model_tensors, runs, tensor

GOLDEN = json.loads((Path(__file__).parent / "data" / "ggml_golden.json").read_text(encoding="utf-8"))
WRITTEN_BY_GGUF = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
SEARCHED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
BLOCKS = tuple(name for name in TYPES if TYPES[name].block > 1)


def rows_of_many_kinds() -> np.ndarray:
    """(60, 256) float32: sizes from 1e-8 to 1e4, grids with ties, constants, zeros, outliers."""
    random = np.random.default_rng(3)
    rows = random.standard_normal((60, 256))
    rows[:30] *= 10.0 ** np.linspace(-8, 4, 30)[:, None]
    rows[30:40] = np.round(rows[30:40] * 4) / 4
    rows[40], rows[41], rows[42], rows[43] = 0.0, 1.5, -0.375, -0.0
    rows[44, np.arange(256) % 32 != 5] = 0.0  # one value a block
    rows[45, ::64] = 1000.0
    rows[46] = np.abs(rows[46])
    rows[47] = -np.abs(rows[47]) - 1
    return rows.astype(np.float32)


@pytest.mark.parametrize("name", WRITTEN_BY_GGUF)
def test_blocks_are_bit_for_bit_those_of_the_gguf_package(name):
    for rows in (rows_of_many_kinds(), *(tensor(which, "small") for which in TENSORS)):
        with np.errstate(divide="ignore"):
            theirs = gguf.quantize(rows, TYPES[name].gguf).view(np.uint8)
        np.testing.assert_array_equal(quantize(rows, name), theirs.reshape(len(rows), -1))


@pytest.mark.parametrize("name", TYPES)
def test_random_bytes_are_read_bit_for_bit_as_the_gguf_package_reads_them(name):
    kind = TYPES[name]
    for count in (3, 5000):  # the larger is read in pieces
        data = np.random.default_rng(4).integers(0, 256, (count, 1024 // kind.block * kind.bytes), np.uint8)
        ours = dequantize(data, name, 1024)
        with np.errstate(invalid="ignore", over="ignore"):
            theirs = gguf.dequantize(data, kind.gguf).reshape(count, 1024)
        assert ours.dtype == np.float32 and ours.shape == (count, 1024)
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", BLOCKS)
def test_errors_are_those_of_llama_cpp(name, weighted):
    check_errors(name, "small", weighted)


@pytest.mark.long
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", BLOCKS)
def test_errors_on_large_tensors_are_those_of_llama_cpp(name, weighted):
    check_errors(name, "large", weighted)


def check_errors(name: str, size: str, weighted: bool) -> None:
    importance = column_weights() if weighted else None
    for which in TENSORS:
        rows = tensor(which, size)
        error = errors(rows, dequantize(quantize(rows, name, importance), name, 1024), importance)
        theirs = GOLDEN["rmse"][name][size][which]["weighted" if weighted else "plain"]
        assert 0.9 * theirs < error <= 1.02 * theirs, f"{which}: {error / theirs}"


@pytest.mark.parametrize("name", SEARCHED)
def test_zeros_constants_single_values_and_outliers_are_kept(name):
    rows = rows_of_many_kinds()
    found = dequantize(quantize(rows, name), name, 256)
    np.testing.assert_array_equal(found[40], 0)
    np.testing.assert_array_equal(found[43], 0)
    coarse = {"q2_k": 0.07, "q3_k": 0.01}.get(name, 0.03 if name.startswith("iq4") else 0.005)
    np.testing.assert_allclose(found[41], rows[41], rtol=coarse)
    np.testing.assert_allclose(found[42], rows[42], rtol=coarse)
    few = 0.13 if name == "q2_k" else 0.05
    np.testing.assert_allclose(found[44], rows[44], atol=few * np.max(np.abs(rows[44])))
    step = {"q2_k": 1.0, "q3_k": 0.35, "q6_k": 0.04}.get(name, 0.2)
    normal = rows[15:]  # those before have scales among float16's smallest numbers
    assert np.all(np.abs(found[15:] - normal) <= step * np.max(np.abs(normal), axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "q4_0", "q5_1"])
def test_written_once_more_values_change_hardly(name):
    rows = tensor("gaussian", "small")
    once = dequantize(quantize(rows, name), name, 1024)
    twice = dequantize(quantize(once, name), name, 1024)
    assert errors(once, twice, None) <= 0.3 * errors(rows, once, None)


def test_single_and_odd_rows_are_blocks_of_their_own():
    rows = rows_of_many_kinds()
    for name in ("q8_0", "q4_k", "iq4_nl"):
        whole = quantize(rows, name)
        np.testing.assert_array_equal(quantize(rows[17:18], name), whole[17:18])
        np.testing.assert_array_equal(quantize(rows[:7], name), whole[:7])


def test_rows_in_pieces_are_the_rows_at_once(monkeypatch):
    from jaxft.convert.ggml import rows as module

    rows = rows_of_many_kinds()
    weights = column_weights()[:256]
    whole = {name: quantize(rows, name, weights) for name in ("q5_0", "q4_k")}
    monkeypatch.setattr(module, "LARGEST", {"cpu": 7 * 256})
    for name, expected in whole.items():
        np.testing.assert_array_equal(quantize(rows, name, weights), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, jnp.bfloat16])
def test_rows_may_be_of_any_float_type_and_be_jax_arrays(dtype):
    rows = tensor("gaussian", "small").astype(dtype)
    expected = {name: quantize(rows.astype(np.float32), name) for name in ("f32", "f16", "bf16", "q8_0", "q4_k")}
    for name, blocks in expected.items():
        np.testing.assert_array_equal(quantize(rows, name), blocks)
        np.testing.assert_array_equal(quantize(jnp.asarray(rows), name), blocks)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q2_k", "q4_k", "q6_k", "iq4_nl"])
def test_columns_of_no_importance_keep_their_values(name):
    rows = tensor("gaussian", "small")
    importance = np.where(np.arange(1024) < 512, 0, column_weights()).astype(np.float32)
    found = dequantize(quantize(rows, name, importance), name, 1024)
    plain = dequantize(quantize(rows, name), name, 1024)
    assert errors(rows[:, :512], found[:, :512], None) <= 1.1 * errors(rows[:, :512], plain[:, :512], None)
    none = dequantize(quantize(rows, name, np.zeros(1024, np.float32)), name, 1024)
    assert errors(rows, none, None) <= 1.1 * errors(rows, plain, None)


def test_importance_is_relative():
    rows, importance = tensor("gaussian", "small"), column_weights()
    np.testing.assert_array_equal(quantize(rows, "q4_k", importance), quantize(rows, "q4_k", importance * 2.0**30))


@pytest.mark.parametrize(
    ("rows", "name", "importance", "message"),
    [
        (np.ones((2, 96)), "q4_k", None, "q4_k holds 256 values a block and rows are 96 wide: .*q5_0 is the type"),
        (np.ones((2, 48)), "q8_0", None, "q8_0 holds 32 values .* 48 wide.*f16 is the type instead"),
        (np.full((2, 64), np.nan), "q8_0", None, "q8_0: a value is not finite"),
        (np.where(np.arange(64) == 7, np.nan, np.ones((2, 64))), "q4_0", None, "q4_0: a value is not finite"),
        (np.full((2, 256), np.nan), "f16", None, "f16: a value is not finite"),
        (np.full((2, 256), np.inf), "q4_k", None, "q4_k: a value is not finite"),
        (np.full((2, 64), -np.inf), "bf16", None, "bf16: a value is not finite"),
        (np.full((2, 64), 1e6), "f16", None, "f16: a value of 1e.06 is beyond float16"),
        (np.full((2, 64), 1e6), "q4_0", None, "q4_0: a value of 1e.06 is beyond float16"),
        (np.ones((2, 64)), "q4_0", np.ones(32), r"importance has shape \(32,\), rows are 64 wide"),
        (np.ones((2, 64)), "q4_0", np.full(64, -1), "importance has negative or non-finite numbers"),
    ],
)
def test_what_cannot_be_written_is_said(rows, name, importance, message):
    with pytest.raises(InputError, match=message):
        quantize(rows.astype(np.float32), name, importance)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(name):
    architecture, layers, group, _, _, tied, importance = MODELS[name]
    for quant in QUANTS:
        found = {
            tensor: tensor_type(
                quant, tensor, shape, layers=layers, group=group, tied=tied, importance=importance,
                architecture=architecture,
            )
            for tensor, shape in model_tensors(MODELS[name]).items()
        }  # fmt: skip
        assert runs(found) == GOLDEN["mixtures"][name][quant]


def test_file_types_are_the_gguf_packages_numbers():
    assert {quant: int(file_type(quant)) for quant in QUANTS} == {
        "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10,
        "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
        "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
    }  # fmt: skip


def test_matrices_of_one_row_stay_in_float32():
    assert tensor_type("q4_0", "blk.0.attn_q.weight", (1, 256), layers=1, group=1, tied=False) == "f32"
