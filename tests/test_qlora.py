"""Training over a 4-bit or 8-bit base: its gradients, its memory, its commands, its mesh, its adapter in PEFT."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import (
    LoraConfig,
    add_lora,
    evaluate,
    generate,
    init_params,
    load_model,
    make_optimizer,
    make_train_step,
    save_model,
    sft_loss,
    train,
)
from jaxft.config import parse
from jaxft.errors import InputError
from jaxft.models.quantized import all_linears, with_quantized
from jaxft.quant import dense, is_quantized
from jaxft.trees import Tree, flatten, unflatten
from tests.forked_runs import devices
from tests.tiny_models import nonzero_adapter, packed_batch, tiny_model
from tests.tiny_runs import flags, losses_of, same_tensors, sums, write_base, write_rows

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
CONFIG = LoraConfig(r=4, lora_alpha=8)
RUN = flags(
    max_length=64, per_device_train_batch_size=4, learning_rate=0.01, lora_r=4, max_steps=6, save_steps=3,
    lr_scheduler_type="constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ in float32, four/ the same written in 4 bits, dense/ the values of those 4 bits in float32, and rows."""
    directory = tmp_path_factory.mktemp("qlora")
    write_base(directory / "base", **SIZES)
    model, params = load_model(directory / "base", quantization="nf4")
    save_model(directory / "four", model, params)
    plain, _ = load_model(directory / "base")
    save_model(directory / "dense", plain, dequantized(params))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        for copy in ("four", "dense"):
            (directory / copy / name).write_bytes((directory / "base" / name).read_bytes())
    write_rows(directory / "train.jsonl", sums(30))
    write_rows(directory / "held.jsonl", sums(8, 30))
    return directory


def dequantized(params: Tree) -> Tree:
    """The same tree with float32 arrays in the place of quantised leaves."""
    unstack = jax.jit(lambda leaf: jax.lax.map(lambda one: dense(one, jnp.float32), leaf))
    return unflatten({path: unstack(leaf) if is_quantized(leaf) else leaf for path, leaf in flatten(params)})


def run(place: Path, name: str, *argv: str, base: str = "base") -> Path:
    out = place / name
    model = flags(model_name_or_path=place / base, dataset=place / "train.jsonl", output_dir=out)
    assert train.main([*model, *RUN, *argv]) == 0
    return out


@pytest.fixture(scope="module")
def trained(place):
    """Six steps by --load_in_4bit."""
    return run(place, "trained", "--load_in_4bit", *flags(eval_dataset=place / "held.jsonl"))


@pytest.mark.parametrize(
    ("kind", "remat", "options"),
    [
        *(("nf4", "none", {}), ("nf4", "full", {}), ("int8", "full", {})),
        *(("nf4", "offload_v", {"kept_layers": 1}), ("int8", "offload_middle", {"kept_layers": 1})),
    ],
    ids=str,
)
def test_gradients_equal_those_of_lora_over_the_dense_values(kind, remat, options, place):
    batch = {name: array[0] for name, array in packed_batch().items()}

    def gradients(model, params):
        model, trainable, frozen = add_lora(model, params, CONFIG, jax.random.key(0))

        def loss(trainable):
            total, weight = sft_loss(
                model.bind(trainable, frozen), batch, None, gradient_checkpointing=remat, **options
            )
            return total / weight

        return jax.jit(jax.value_and_grad(loss))(nonzero_adapter(trainable))

    model, params = load_model(place / "base", quantization=kind)
    loss, found = gradients(model, params)
    exact_loss, exact = gradients(load_model(place / "base")[0], dequantized(params))
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-6)
    for (path, one), (_, two) in zip(flatten(found), flatten(exact), strict=True):
        assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two) > 0, path


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_dense_weight_is_kept_for_any_layer(remat):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}

    def temporary(layers: int) -> int:
        model, _ = tiny_model("llama2", num_hidden_layers=layers, **sizes)
        model = with_quantized(model, all_linears(model, "nf4", jnp.float32))
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        model, trainable, frozen = add_lora(model, shapes, LoraConfig(r=1), jax.random.key(0))
        batch = {name: array[:, :1, :8] for name, array in packed_batch().items()}
        optimizer = make_optimizer(1e-3)
        state = jax.eval_shape(optimizer.init, trainable)
        step = jax.jit(make_train_step(model, optimizer=optimizer, gradient_checkpointing=remat), donate_argnums=(0, 1))
        memory = step.lower(trainable, state, frozen, batch, jax.random.key(0)).compile().memory_analysis()
        return memory.temp_size_in_bytes

    layer = 4 * (4 * 256 * 256 + 3 * 256 * 512)  # bytes of one layer's linear weights in float32
    growth = (temporary(6) - temporary(2)) / 4
    assert growth < 0.1 * layer  # activations of eight tokens and gradients of rank 1


def test_four_bit_training_learns_and_resumes_bit_for_bit(trained, place):
    losses = losses_of(trained)
    assert len(losses) == 6 and losses[-1] < losses[0]
    part = run(place, "part", "--load_in_4bit", *flags(max_steps=3))
    resumed = run(place, "part", "--load_in_4bit", *flags(resume_from_checkpoint="auto"))
    assert losses_of(resumed) == losses
    assert same_tensors(trained / "adapter_model.safetensors", part / "adapter_model.safetensors")


def test_a_directory_that_is_in_four_bits_trains_as_the_flag_does(trained, place):
    assert losses_of(run(place, "stored", base="four")) == losses_of(trained)


def evaluated(place: Path, base: str, adapter: Path, *argv: str) -> dict:
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        found = flags(model_name_or_path=place / base, adapter=adapter, dataset=place / "held.jsonl", max_length=64)
        assert evaluate.main([*found, *argv]) == 0
    return json.loads(stdout.getvalue())


def test_evaluate_and_generate_read_the_base_in_four_bits(trained, place, capsys):
    four = evaluated(place, "base", trained, "--load_in_4bit")
    last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    assert four["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert four["loss"] == pytest.approx(evaluated(place, "dense", trained)["loss"], rel=1e-6)
    assert four["loss"] != pytest.approx(evaluated(place, "base", trained)["loss"], rel=1e-4)
    texts = []
    for base, argv in (("base", ["--load_in_4bit"]), ("dense", [])):
        capsys.readouterr()
        found = flags(model_name_or_path=place / base, adapter=trained, prompt="1 + 1", max_new_tokens=8)
        assert generate.main([*found, *argv]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0]


def test_the_adapter_loads_in_peft_over_the_dense_values(trained, place):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, trained)
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    from jaxft import load_adapter

    model, trainable, frozen, _ = load_adapter(trained, *load_model(place / "four"))
    decoder = model.bind(trainable, frozen)
    hidden = decoder(tokens, np.ones_like(tokens), np.arange(12, dtype=np.int32)[None])
    np.testing.assert_allclose(decoder.logits(hidden), expected, atol=1e-4)


@pytest.mark.long  # a process of its own on eight virtual devices
def test_a_mesh_gives_the_losses_of_one_device(place):
    program = (
        "import json, sys; from jaxft import LoraConfig; from tests.eight_devices import run\n"
        "lora = LoraConfig(r=4, lora_alpha=8)\n"
        "print(json.dumps([run(sys.argv[1], axes, 1, lora) for axes in (None, {'data': 2, 'fsdp': 4})]))"
    )
    environment = os.environ | devices(8) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(place / "four")], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] != one["losses"][0]


@pytest.mark.parametrize(
    "argv",
    [
        ["--load_in_4bit", "--full_finetuning"],
        ["--load_in_8bit", "--full_finetuning"],
        ["--load_in_4bit", "--load_in_8bit"],
    ],
)
def test_flags_that_contradict_a_quantised_base_are_refused(argv):
    with pytest.raises(InputError, match=f"{argv[0]} and {argv[1]} contradict"):
        parse("train", argv)


def test_full_fine_tuning_of_a_directory_in_four_bits_is_refused(place):
    with pytest.raises(InputError, match="quantised: its weights cannot be trained"):
        model = flags(model_name_or_path=place / "four", dataset=place / "train.jsonl", output_dir=place / "never")
        train.main([*model, *flags(max_length=64), "--full_finetuning"])
    assert not (place / "never").exists()
