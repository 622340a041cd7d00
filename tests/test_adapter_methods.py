"""LoRA+ and DoRA against PEFT's own: forward, gradients, twenty steps, files both ways, resuming and merging."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference needs torch")
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from jaxft import (
    LoraConfig,
    add_lora,
    evaluate,
    load_adapter,
    load_model,
    make_optimizer,
    save_adapter,
    save_model,
    sft_loss,
    train,
)
from jaxft.convert import __main__ as convert
from jaxft.errors import InputError, run_command
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.linear.reference import dropout
from jaxft.lora import padding
from jaxft.quant import quantize
from jaxft.trees import flatten
from scripts.compare_with_hf import (
    GRADIENTS,
    LOSSES,
    Training,
    by_reference_names,
    curve_error,
    gradient_errors,
    our_course,
    reference_course,
    reference_model,
)
from tests.forked_runs import devices
from tests.tiny_adapters import make_adapter
from tests.tiny_models import nonzero_adapter, packed_batch, tiny_model
from tests.tiny_runs import flags, lines_of, losses_of, same_tensors, sums, write_base, write_rows

STEPS = 20
TRAINING = Training(learning_rate=2e-3, weight_decay=0.3)
RUN = flags(
    max_length=64, per_device_train_batch_size=4, learning_rate=0.01, lora_r=4, max_steps=4, save_steps=2,
    lr_scheduler_type="constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ with a tokenizer, and rows."""
    directory = tmp_path_factory.mktemp("methods")
    write_base(directory / "base", hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)
    write_rows(directory / "train.jsonl", sums(20))
    write_rows(directory / "held.jsonl", sums(6, 20))
    return directory


def run(place: Path, name: str, *argv: str) -> Path:
    out = place / name
    model = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=out)
    assert train.main([*model, *RUN, *argv]) == 0
    return out


def batches(accumulation: int = 2):
    return [packed_batch(seed, accumulation=accumulation) for seed in range(STEPS)]


# LoRA+


def test_twenty_steps_of_loraplus_are_those_of_peft_s_optimizer(hf_model, tmp_path):
    base, adapter = make_adapter(hf_model, tmp_path, "embedding and head")
    model, trainable, frozen, _ = load_adapter(adapter, *load_model(base))
    reference = reference_model(base, adapter)
    adam = create_loraplus_optimizer(
        reference, torch.optim.AdamW, lr=TRAINING.learning_rate, loraplus_lr_ratio=16,
        loraplus_weight_decay=TRAINING.weight_decay,
    )  # fmt: skip
    theirs = reference_course(reference, batches(), STEPS, TRAINING, adam=adam)
    ours = our_course(
        model, trainable, frozen, batches(), STEPS, TRAINING, optimizer=partial(make_optimizer, loraplus_lr_ratio=16)
    )
    assert curve_error(ours, theirs) <= LOSSES
    plain = our_course(model, trainable, frozen, batches(), STEPS, TRAINING)
    assert curve_error(plain, theirs) > 20 * LOSSES


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_loraplus_gives_b_alone_a_multiple_of_the_update(optim):
    _, trainable, _ = add_lora(*tiny_model("qwen3"), LoraConfig(r=200, modules_to_save=("lm_head",)), jax.random.key(0))
    grads = jax.tree.map(lambda leaf: jnp.ones_like(leaf), trainable)
    found = {}
    for ratio in (None, 4.0):
        optimizer = make_optimizer(0.1, weight_decay=0.5, optim=optim, loraplus_lr_ratio=ratio)
        found[ratio], _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    for (path, plain), own in zip(
        jax.tree.leaves_with_path(found[None]), jax.tree.leaves(found[4.0]), strict=True
    ):  # fmt: skip
        np.testing.assert_array_equal(own, plain * (4 if path[-1].key == "b" else 1))


def test_a_run_with_loraplus_differs_from_one_without_and_resumes_bit_for_bit(place):
    whole = run(place, "loraplus", "--loraplus_lr_ratio=16")
    assert losses_of(whole) != losses_of(run(place, "plain"))
    part = run(place, "part", "--loraplus_lr_ratio=16", "--max_steps=2")
    with pytest.raises(InputError, match=r"loraplus_lr_ratio was 16\.0 and is None"):
        run(place, "part", "--resume_from_checkpoint=auto")
    run(place, "part", "--loraplus_lr_ratio=16", "--resume_from_checkpoint=auto")
    assert losses_of(part) == losses_of(whole)
    assert same_tensors(whole / "adapter_model.safetensors", part / "adapter_model.safetensors")


# DoRA


@pytest.mark.parametrize("option", ["magnitudes", pytest.param("magnitudes in some layers", marks=pytest.mark.long)])
def test_twenty_steps_of_dora_are_those_of_peft(option, hf_model, tmp_path):
    base, adapter = make_adapter(hf_model, tmp_path, option)
    model, trainable, frozen, _ = load_adapter(adapter, *load_model(base))
    theirs = reference_course(reference_model(base, adapter), batches(), STEPS, TRAINING)
    ours = our_course(model, trainable, frozen, batches(), STEPS, TRAINING)
    errors = gradient_errors(ours.gradients, theirs.gradients)
    assert any("magnitude" in name for name in errors)
    assert max(errors.values()) <= GRADIENTS, max(errors, key=errors.get)
    assert curve_error(ours, theirs) <= LOSSES


@pytest.mark.long  # a large model's steps, twice
@pytest.mark.parametrize("dora", [False, True])
def test_twenty_steps_over_four_bits_are_those_of_peft_over_bitsandbytes(dora, place, tmp_path):
    four = tmp_path / "four"
    save_model(four, *load_model(place / "base", quantization="nf4"))
    config = LoraConfig(r=4, lora_alpha=8, use_dora=dora)
    model, trainable, _ = add_lora(*load_model(four), config, jax.random.key(0))
    save_adapter(tmp_path / "adapter", model, nonzero_adapter(trainable), config, str(four))
    model, trainable, frozen, _ = load_adapter(tmp_path / "adapter", *load_model(four))
    reference = reference_model(four, tmp_path / "adapter").train()  # in evaluation bitsandbytes computes in bfloat16
    theirs = reference_course(reference, batches(), STEPS, TRAINING)
    ours = our_course(model, trainable, frozen, batches(), STEPS, TRAINING)
    errors = gradient_errors(ours.gradients, theirs.gradients)
    assert max(errors.values()) <= 1e-3, max(errors, key=errors.get)
    assert curve_error(ours, theirs) <= 1e-3


@pytest.mark.long  # a process of its own on eight virtual devices
def test_a_mesh_gives_the_losses_of_one_device_with_magnitudes(place):
    program = (
        "import json, sys; from jaxft import LoraConfig; from tests.eight_devices import run\n"
        "lora = LoraConfig(r=4, lora_alpha=8, use_dora=True)\n"
        "print(json.dumps([run(sys.argv[1], axes, 1, lora) for axes in (None, {'data': 2, 'fsdp': 2, 'tensor': 2})]))"
    )
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | devices(8) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", program, str(place / "base")], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] != one["losses"][0]


def test_new_magnitudes_are_those_that_peft_starts_with(hf_model):
    import peft

    settings = {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2], "use_dora": True}
    reference = peft.get_peft_model(
        reference_model(hf_model("qwen3")), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    )
    theirs = peft.get_peft_model_state_dict(reference)
    config = LoraConfig(r=4, target_modules=("v_proj", "up_proj"), layers_to_transform=(0, 2), use_dora=True)
    model, trainable, _ = add_lora(*load_model(hf_model("qwen3")), config, jax.random.key(0))
    ours = by_reference_names(model, trainable, lora=True)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("magnitude_vector"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    everything = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert everything - padding(model) == sum(tensor.numel() for tensor in theirs.values())


def dora_case(kind=None, dtype=jnp.float32):
    """x and weights of a layer with everything that one can have."""
    random = np.random.default_rng(0)

    def draw(*shape, size=1.0):
        return jnp.asarray(random.normal(0, size, shape), jnp.float32)

    weight = draw(24, 64)
    lora = (draw(3, 64, size=0.3), draw(24, 3), jnp.float32(0.5))
    magnitude = jnp.abs(draw(24)).at[3].set(0.0) + jnp.where(jnp.arange(24) == 3, 0.0, 0.1)
    weights = Weights(weight if kind is None else quantize(weight, kind), draw(24), lora, magnitude)
    return draw(2, 5, 64).astype(dtype), weights


def test_dropout_reaches_what_it_reaches_in_peft(monkeypatch):
    """PEFT's layer in training, with our masks in the place of torch's."""
    import peft

    x, weights = dora_case()
    (a, b, _), key = weights.lora, jax.random.key(3)
    weights = weights._replace(magnitude=weights.magnitude + 0.1)
    base = torch.nn.Linear(64, 24)
    model = peft.get_peft_model(
        torch.nn.Sequential(base),
        peft.LoraConfig(r=3, lora_alpha=1.5, lora_dropout=0.3, use_dora=True, target_modules=["0"]),
    ).train()
    layer = model.base_model.model[0]

    class Mask(torch.nn.Module):
        def forward(self, x):
            return torch.tensor(np.asarray(dropout(jnp.asarray(x.numpy()), 0.3, jax.random.split(key, 1)[0])))

    layer.lora_dropout["default"] = Mask()
    with torch.no_grad():
        tensors = {
            layer.base_layer.weight: weights.weight, layer.base_layer.bias: weights.bias,
            layer.lora_A["default"].weight: a, layer.lora_B["default"].weight: b,
            layer.lora_magnitude_vector["default"].weight: weights.magnitude,
        }  # fmt: skip
        for parameter, array in tensors.items():
            parameter.copy_(torch.tensor(np.asarray(array)))
        expected = model(torch.tensor(np.asarray(x))).numpy()
    for implementation in (None, "reference"):
        (found,) = linears(x, (weights,), dropout=0.3, key=key, implementation=implementation)
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(linears(x, (weights,), dropout=0.3, key=None)[0] - expected).max() > 0.1


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_layer_with_magnitudes_and_its_gradients_are_its_definition_s(kind, rate):
    x, weights = dora_case(kind)
    plain = weights._replace(magnitude=None)  # a neighbour that has none

    def run(trained, implementation):
        x, bias, lora, magnitude = trained
        layers = (weights._replace(bias=bias, lora=lora, magnitude=magnitude), plain)
        found = linears(
            x, layers, dropout=rate, key=jax.random.key(1), add=x[..., :24], implementation=implementation
        )  # fmt: skip
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in found), found

    trained = (x, weights.bias, weights.lora, weights.magnitude)
    got, want = (jax.grad(run, has_aux=True)(trained, implementation) for implementation in (None, "reference"))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5, rtol=2e-5)
    assert got[0][3][3] == 0 and np.abs(got[0][3]).min(where=np.arange(24) != 3, initial=1) > 0  # row 3 has none


@pytest.mark.long  # four programs to compile
def test_every_policy_and_tiling_gives_the_same_gradients_of_dora(place):
    config = LoraConfig(r=4, use_dora=True)
    model, trainable, frozen = add_lora(*load_model(place / "base"), config, jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, trainable)
    batch = {name: array[0] for name, array in packed_batch().items()}

    def gradients(**options):
        def loss(trainable):
            return sft_loss(model.bind(trainable, frozen), batch, None, **options)[0]

        return dict(flatten(jax.jit(jax.grad(loss))(trainable)))

    expected = gradients(gradient_checkpointing="none")
    for options in (("full", 3), ("products", 1), ("offload", 1)):
        found = gradients(gradient_checkpointing=options[0], mlp_tiles=options[1])
        for path, leaf in found.items():
            assert np.linalg.norm(leaf - expected[path]) <= 1e-5 * np.linalg.norm(expected[path]) > 0, (options, path)


METHODS = {"dora": ["--use_dora"], "dora over 4 bits": ["--use_dora", "--load_in_4bit"]}


@pytest.mark.long  # whole runs
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_bit_for_bit_evaluates_merges_and_loads_in_peft(method, place, tmp_path, capsys):
    argv = METHODS[method]
    held = [f"--eval_dataset={place / 'held.jsonl'}"]
    whole = run(place, method, *argv, *held)
    part = run(place, f"{method}, part", *argv, *held, "--max_steps=2")
    run(place, f"{method}, part", *argv, *held, "--resume_from_checkpoint=auto")
    assert losses_of(part) == losses_of(whole) and len(set(losses_of(whole))) == 4
    assert same_tensors(whole / "adapter_model.safetensors", part / "adapter_model.safetensors")
    capsys.readouterr()
    given = [f"--model_name_or_path={place / 'base'}", f"--adapter={whole}", *argv[1:]]
    assert evaluate.main([*given, f"--dataset={place / 'held.jsonl'}", "--max_length=64"]) == 0
    last = [line for line in lines_of(whole) if "eval_loss" in line][-1]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    base = place / "base"
    if "--load_in_4bit" in argv:
        base = tmp_path / "four"
        save_model(base, *load_model(place / "base", quantization="nf4"))
    assert run_command(convert.main, ["merge", str(base), str(whole), str(tmp_path / "merged")]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert merged["largest_logit_difference"] < 1e-5 * merged["largest_logit"]
    tokens = np.arange(3, 15, dtype=np.int64)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), whole)
    model, params = load_model(tmp_path / "merged")
    decoder = model.bind(params)
    hidden = decoder(tokens.astype(np.int32), np.ones_like(tokens, np.int32), np.arange(12, dtype=np.int32)[None])
    with torch.no_grad():
        expected = theirs.train()(torch.from_numpy(tokens)).logits.numpy()  # else bitsandbytes computes in bfloat16
    np.testing.assert_allclose(decoder.logits(hidden), expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_flags_that_contradict_an_adapter_with_magnitudes_are_refused(place, tmp_path):
    given = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=place / "never")
    config = LoraConfig(r=4, use_dora=True)
    model, trainable, _ = add_lora(*load_model(place / "base"), config, jax.random.key(0))
    save_adapter(tmp_path / "dora", model, trainable, config, "base")
    with pytest.raises(InputError, match="--use_dora has no meaning with --full_finetuning"):
        train.main([*given, "--use_dora", "--full_finetuning"])
    with pytest.raises(InputError, match=r"--use_dora False contradicts --adapter .*, whose use_dora is True"):
        train.main([*given, *RUN[:3], "--use_dora=false", f"--adapter={tmp_path / 'dora'}"])
