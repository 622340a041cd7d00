"""What only Gemma has: norms that start at 0, a rounded √D, and the text part of a Gemma 3 that sees."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import LoraConfig, add_lora, describe_model, init_params, load_adapter, load_model, save_adapter, save_model
from jaxft.errors import InputError
from jaxft.models import decoder, gemma, model_of
from jaxft.quant import dense, is_quantized
from jaxft.trees import flatten, unflatten
from tests.tiny_models import CONFIGS, hf_config, micro_logits, nonzero_adapter, packed_batch, tiny_model

TEXT = {name: value for name, value in CONFIGS["gemma3"].items() if name != "model_type"}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_norms_of_a_new_model_start_at_nothing(name):
    model = describe_model(hf_config(name))
    norms = {path: leaf for path, leaf in flatten(init_params(model, jax.random.key(0))) if "norm" in path}
    assert len(norms) == {"gemma": 3, "gemma2": 5, "gemma3": 7}[name]
    assert all(not np.any(leaf) for leaf in norms.values())


def test_gelu_of_the_released_files_is_the_tanh_approximation():
    config = hf_config("gemma")
    config.hidden_act = "gelu"  # as transformers leaves it in some versions
    assert gemma.read_config(config).hidden_act == "gelu_pytorch_tanh"


def test_embeddings_are_multiplied_by_a_root_that_is_rounded_as_the_weights_are():
    model, params = tiny_model("gemma", dtype=jnp.bfloat16, hidden_size=3072 // 64)
    embedded = model.bind(params).embed(jnp.arange(9), jnp.dtype(jnp.bfloat16))
    root = jnp.bfloat16((3072 // 64) ** 0.5)
    assert float(root) == 6.9375  # √48 is 6.928
    assert np.array_equal(embedded, params["embed_tokens"]["weight"][:9] * root)


def test_gemma_without_its_root_or_last_norm_computes_something_else():
    class NoRoot(gemma.Decoder):
        embed = decoder.Decoder.embed

    class PlainNorm(gemma.Decoder):
        __init__ = decoder.Decoder.__init__

    model, params = tiny_model("gemma")
    right = micro_logits(model, params)[0]
    for broken in (NoRoot, PlainNorm):
        other = model_of(broken(model.config, model.family.block, (0,)), model.family, model.hf_config)
        assert np.abs(micro_logits(other, params)[0] - right).max() > 1e-2


def test_encoders_are_refused():
    with pytest.raises(InputError, match="use_bidirectional_attention is set: this is an encoder"):
        describe_model(hf_config("gemma3", use_bidirectional_attention=True))
    with pytest.raises(InputError, match=r"attn_logit_softcapping is 50\.0; Gemma 3 has none"):
        describe_model(hf_config("gemma3", attn_logit_softcapping=50.0))


def test_a_base_in_4_bits_computes_what_its_dense_values_compute(tmp_path):
    model, params = tiny_model("gemma2", head_dim=16)
    save_model(tmp_path, model, params)
    four, quantized = load_model(tmp_path, quantization="nf4")
    unpack = jax.jit(lambda leaf: jax.lax.map(lambda one: dense(one, jnp.float32), leaf))
    values = unflatten({path: unpack(leaf) if is_quantized(leaf) else leaf for path, leaf in flatten(quantized)})
    logits = micro_logits(four, quantized)[0]
    assert np.abs(logits - micro_logits(model, values)[0]).max() <= 1e-4
    assert np.abs(logits - micro_logits(model, params)[0]).max() > 1e-2


# a Gemma 3 that sees


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The directory of a tiny Gemma3ForConditionalGeneration written by transformers, under the names it writes."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3", text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(0, 0.05 if "embed_tokens" in path else 0.2)
    directory = tmp_path_factory.mktemp("seeing")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def seen_logits(seeing):
    """The reference's logits of the usual batch."""
    from scripts.compare_with_hf import reference_logits, reference_model

    return reference_logits(reference_model(seeing), {name: array[0] for name, array in packed_batch().items()})


def renamed(source: Path, target: Path, rename, keep=lambda name: True) -> Path:
    """A copy of a model directory with other names of tensors."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file({rename(name): t for name, t in tensors.items() if keep(name)}, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def of_today(name: str) -> str:
    for old, new in (("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower.")):
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return name


def test_text_of_a_model_that_sees_has_transformers_logits_under_any_names(seeing, seen_logits, tmp_path, capsys):
    tensors = load_file(seeing / "model.safetensors")
    vision = sum(name.startswith("vision_tower.") for name in tensors)
    assert vision > 10 and "language_model.model.norm.weight" in tensors
    today = renamed(seeing, tmp_path / "today", of_today)
    blind = renamed(seeing, tmp_path / "blind", str, lambda name: name.startswith("language_model."))
    for directory, said in (
        (seeing, f"passed over tensors: 2 of multi_modal_projector, {vision} of vision_tower"),
        (today, f"passed over tensors: {vision} of model.vision_tower, 2 of multi_modal_projector"),
        (blind, ""),
    ):
        model, params = load_model(directory)
        assert np.abs(micro_logits(model, params)[0] - seen_logits).max() <= 1e-4
        printed = capsys.readouterr().err
        assert said in printed and bool(said) == ("only the text model is loaded" in printed)


def test_tensor_that_is_there_under_two_names_is_refused(seeing, tmp_path):
    copy = renamed(seeing, tmp_path / "copy", str)
    tensors = load_file(copy / "model.safetensors")
    name = "model.language_model.norm.weight"
    save_file(tensors | {name: tensors["language_model.model.norm.weight"]}, copy / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {name} is there twice"):
        load_model(copy)


def test_adapters_of_a_model_that_sees_go_to_peft_and_come_back(seeing, seen_logits, tmp_path, capsys):
    from scripts.compare_with_hf import reference_logits, reference_model

    config = LoraConfig(r=4, lora_alpha=8)
    model, trainable, frozen = add_lora(*load_model(seeing), config, jax.random.key(0))
    trainable = nonzero_adapter(trainable, deviation=0.1)
    save_adapter(tmp_path / "ours", model, trainable, config, str(seeing))
    logits, micro = micro_logits(model, trainable, frozen)
    theirs = reference_model(seeing, tmp_path / "ours")
    assert np.abs(logits - reference_logits(theirs, micro)).max() <= 1e-4
    assert np.abs(logits - seen_logits).max() > 1e-2
    assert not any("vision_tower" in path and "lora" in path for path, _ in theirs.named_parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 7 * 2
    other = {"base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight": np.ones((4, 16), np.float32)}
    for more, said in (({}, ""), (other, "passed over 1 tensors of parts that are not loaded")):
        save_file(tensors | more, tmp_path / "theirs" / "adapter_model.safetensors")
        _, loaded, _, _ = load_adapter(tmp_path / "theirs", *load_model(seeing))
        jax.tree.map(np.testing.assert_array_equal, loaded, trainable)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_trained_text_of_a_model_that_sees_is_saved_as_a_text_model(
    quantization, seeing, seen_logits, tmp_path, capsys
):
    from scripts.compare_with_hf import reference_logits, reference_model

    model, params = load_model(seeing, quantization=quantization)
    save_model(tmp_path, model, params)
    assert "saved as gemma3_text, the text model alone" in capsys.readouterr().err
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    again, loaded = load_model(tmp_path)
    assert again.config.model_type == "gemma3_text" and len(jax.tree.leaves(loaded)) == len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(loaded), jax.tree.leaves(params))
    if quantization is None:
        micro = {name: array[0] for name, array in packed_batch().items()}
        assert np.abs(reference_logits(reference_model(tmp_path), micro) - seen_logits).max() <= 1e-6
