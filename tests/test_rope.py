"""Rotary tables of every rope type: transformers' own numbers, each document of a packed row as if it were alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import describe_model
from jaxft.errors import InputError
from jaxft.models import decoder
from jaxft.models.rope import Rope, document_lengths, rope_from_config
from tests.tiny_models import LENGTHS, LONGROPE, OLD_LLAMA3, YARN, hf_config, micro_logits, packed_batch, tiny_model

H, T = 8, 74
TYPES: dict[str, dict] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": OLD_LLAMA3["rope_scaling"],
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn, bounds that are not whole": YARN | {"truncate": False},
    "yarn, its scaling of attention given": YARN | {"attention_factor": 1.3},
    "yarn, scaling by two weights": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, one weight alone": YARN | {"mscale": 0.7},
    "yarn, other bounds": YARN | {"beta_fast": 4.0, "beta_slow": 0.25},
    "yarn, no room between the bounds": YARN | {"beta_fast": 1, "beta_slow": 1, "original_max_position_embeddings": 6},
    "longrope": LONGROPE,
    "longrope, its factor given": LONGROPE | {"factor": 32.0},
    "longrope, its scaling given": LONGROPE | {"attention_factor": 1.3},
}  # fmt: skip


def config(kind: str, **more):
    return hf_config("llama2", max_position_embeddings=24, rope_parameters={"rope_theta": 100.0} | TYPES[kind] | more)


def tables(rope: Rope, lengths: list[int]):
    """cos and sin (T, H/2) of a row with documents of these lengths, and padding."""
    segments = np.concatenate([np.full(n, number, np.int32) for number, n in enumerate(lengths, 1)])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    row = [jnp.asarray(np.pad(array, (0, T - len(array))))[None] for array in (segments, positions)]
    return [np.asarray(table[0]) for table in rope.tables(row[1], document_lengths(*row))]


@pytest.mark.parametrize("kind", TYPES)
def test_tables_of_one_document_are_those_of_transformers(kind):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    found = []
    for length in (5, 8, 9, 24, 25, 60):  # on both sides of where dynamic (24) and longrope (8) begin
        reference = LlamaRotaryEmbedding(config(kind))  # a new one each time: it remembers the longest
        expected = reference(torch.zeros(1), torch.arange(length)[None])
        ours = tables(rope_from_config(config(kind), H), [length])
        for mine, theirs in zip(ours, expected, strict=True):
            np.testing.assert_allclose(mine[:length], theirs[0, :, : H // 2], atol=1e-5, err_msg=f"length {length}")
        found.append(ours[0][4])
    by_length = np.abs(np.diff(found, axis=0)).max(axis=1) > 1e-3
    assert by_length.tolist() == {
        "dynamic": [False, False, False, True, True], "longrope": [False, True, False, False, False],
    }.get(kind.split(",")[0], [False] * 5)  # fmt: skip


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_documents_of_a_packed_row_get_the_tables_that_they_have_alone(kind):
    rope = rope_from_config(config(kind), H)
    lengths = [30, 5, 9, 26]  # some on each side
    packed, start = tables(rope, lengths), 0
    for n in lengths:
        for ours, theirs in zip(packed, tables(rope, [n]), strict=True):
            np.testing.assert_array_equal(ours[start : start + n], theirs[:n])
        start += n
    assert all(np.all(np.isfinite(table)) for table in packed)


@pytest.mark.parametrize("name", ["llama_dynamic", "llama_longrope"])
def test_scaling_by_the_row_instead_of_the_document_changes_the_logits(name, monkeypatch):
    model, params = tiny_model(name)
    right, micro = micro_logits(model, params)
    assert any(length > 8 for row in LENGTHS for length in row) and any(
        length <= 8 for row in LENGTHS for length in row
    )
    row = jnp.full(micro["tokens"].shape, micro["tokens"].shape[1], jnp.int32)
    monkeypatch.setattr(decoder, "document_lengths", lambda *_: row)
    assert np.abs(micro_logits(model, params)[0] - right).max() > 1e-3


def test_length_of_a_document_is_one_more_than_its_last_position():
    micro = {name: array[0] for name, array in packed_batch().items()}
    lengths = np.asarray(document_lengths(jnp.asarray(micro["segment_ids"]), jnp.asarray(micro["positions"])))
    for row, expected in enumerate(LENGTHS):
        for segment, length in enumerate(expected, 1):
            assert set(lengths[row][micro["segment_ids"][row] == segment]) == {length}


def test_ropes_that_cannot_be_computed_are_refused():
    wrong = config("yarn")
    for change, message in (
        ({"rope_type": "proportional"}, "rope type 'proportional' is not supported; supported: default, linear"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_type": "linear"}, "rope type 'linear' needs 'factor'"),
        (LONGROPE | {"long_factor": [1.0]}, "long_factor has 1 numbers; half a head has 4"),
    ):
        wrong.rope_parameters = {"rope_theta": 100.0} | change
        with pytest.raises(InputError, match=message):
            describe_model(wrong)
