"""What the linear layers read on calibration data: the inputs that transformers' own layers get, padding left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import LoraConfig, add_lora, load_model
from jaxft.activations import collect_activations
from jaxft.errors import RunError
from jaxft.models.quantized import with_quantized
from tests.tiny_models import nonzero_adapter, packed_batch, tiny_model

FAMILIES = (
    *("llama_bias", "qwen3_window_bias", "gemma2"),
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("gemma", "gemma3", "granite", "qwen2_tied", "mistral_yarn")
    ),
)


def documents_of(batch) -> list[np.ndarray]:
    """The tokens of every document of a batch (A, B, T)."""
    rows = zip(batch["tokens"].reshape(-1, 20), batch["segment_ids"].reshape(-1, 20), strict=True)
    return [tokens[segments == s] for tokens, segments in rows for s in range(1, segments.max() + 1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_mean_squares_are_those_of_the_inputs_of_transformers_layers(name, hf_model):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from scripts.compare_with_hf import reference_model

    reference, inputs = reference_model(hf_model(name)), {}
    for module_name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, module_name=module_name: inputs.setdefault(module_name, []).append(args[0][0])
            )
    batches = [packed_batch(0), packed_batch(1, accumulation=2)]
    with torch.no_grad():
        for document in (document for batch in batches for document in documents_of(batch)):
            reference(torch.from_numpy(document[None]).long())
    model, params = load_model(hf_model(name))
    found = collect_activations(model, (params,), batches, rows=10**6)
    expected = {module: torch.cat(parts).numpy() for module, parts in inputs.items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head"]
    assert found.mean_squares.keys() == expected.keys()
    assert found.tokens == sum(map(len, (d for b in batches for d in documents_of(b))))
    for module, rows in expected.items():
        if module == "lm_head" and name == "granite":
            rows = rows / model.config.logits_scaling  # there the logits are divided, here what the head reads
        mean = (rows.astype(np.float64) ** 2).mean(0)
        np.testing.assert_allclose(found.mean_squares[module], mean, rtol=2e-5, atol=1e-9, err_msg=module)
        np.testing.assert_allclose(found.rows[module], rows, rtol=1e-4, atol=2e-5, err_msg=module)


def test_padding_and_the_split_into_batches_change_nothing():
    model, params = tiny_model("llama3")
    batch = packed_batch()
    whole = collect_activations(model, (params,), [batch])
    split = [{name: array[:, i : i + 1] for name, array in batch.items()} for i in range(4)]
    garbage = [part | {"tokens": np.where(part["segment_ids"] == 0, 7, part["tokens"])} for part in split]
    for module, mean in collect_activations(model, (params,), garbage).mean_squares.items():
        np.testing.assert_allclose(mean, whole.mean_squares[module], rtol=1e-5, err_msg=module)


def test_rows_are_the_same_tokens_for_every_layer_and_drawn_by_the_seed():
    model, params = tiny_model("qwen3")
    batches = [packed_batch(0), packed_batch(1)]
    every, ten = (collect_activations(model, (params,), batches, rows=rows).rows for rows in (10**6, 10))
    q, down = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
    assert ten[q].shape == (10, 32) and ten[down].shape == (10, 48)
    chosen = [int(np.flatnonzero((np.abs(every[q] - row) < 1e-6).all(1))[0]) for row in ten[q]]
    assert chosen == sorted(set(chosen))
    np.testing.assert_allclose(ten[down], every[down][chosen], rtol=1e-5, atol=1e-6)
    assert np.shares_memory(ten[q], ten["model.layers.1.self_attn.v_proj"])
    other = collect_activations(model, (params,), batches, rows=10, seed=1).rows
    assert not np.allclose(other[q], ten[q])


def test_an_adapter_takes_part_and_runs_of_layers_change_nothing():
    model, params = tiny_model("llama2")
    plain = collect_activations(model, (params,), [packed_batch()]).mean_squares
    cut = with_quantized(model, {}, (2,))
    layers = params["layers"]["0"]
    runs = {"0": jax.tree.map(lambda leaf: leaf[:2], layers), "2": jax.tree.map(lambda leaf: leaf[2:], layers)}
    for module, mean in collect_activations(cut, (params | {"layers": runs},), [packed_batch()]).mean_squares.items():
        np.testing.assert_allclose(mean, plain[module], rtol=1e-6, err_msg=module)
    tuned, trainable, frozen = add_lora(model, params, LoraConfig(r=2, lora_alpha=4), jax.random.key(0))
    found = collect_activations(tuned, (nonzero_adapter(trainable), frozen), [packed_batch()]).mean_squares
    first, second = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    np.testing.assert_allclose(found[first], plain[first], rtol=1e-6)  # nothing trained stands before it
    assert np.abs(found[second] / plain[second] - 1).max() > 0.05


def test_activations_that_overflow_are_an_error():
    model, params = tiny_model("llama2", dtype=jnp.float16)
    huge = params | {"embed_tokens": {"weight": params["embed_tokens"]["weight"] * 1e5}}
    with pytest.raises(RunError, match="is not finite: weights or activations overflow"):
        collect_activations(model, (huge,), [packed_batch()])
