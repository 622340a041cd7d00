"""PiSSA, LoftQ and the other first values of an adapter, against PEFT's own on the same weights."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference needs torch")
import peft
import torch
from transformers import AutoModelForCausalLM

from jaxft import LoraConfig, add_lora, evaluate, load_adapter, load_model, save_adapter, save_model, train
from jaxft.config import parse
from jaxft.convert import __main__ as convert
from jaxft.convert.peft import save_factors
from jaxft.errors import InputError, run_command
from jaxft.initial import Parting
from jaxft.load import QUANTIZED_BASE
from jaxft.prepare import SUBTRACTED
from jaxft.quant import dense, quantize_nf4
from scripts.compare_with_hf import (
    GRADIENTS,
    LOGITS,
    LOSSES,
    Training,
    curve_error,
    gradient_errors,
    our_course,
    our_logits,
    reference_course,
    reference_logits,
    reference_model,
)
from tests.tiny_models import packed_batch, tiny_model
from tests.tiny_runs import flags, lines_of, losses_of, same_tensors, sums, write_base, write_rows

STEPS = 20
TRAINING = Training(learning_rate=2e-3)
RUN = flags(
    max_length=64, per_device_train_batch_size=4, learning_rate=0.003, lora_r=4, lora_alpha=8, max_steps=4,
    save_steps=2, lr_scheduler_type="constant", lora_target_modules="q_proj,down_proj",
)  # fmt: skip
SETTINGS = {"lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ with a tokenizer, and rows."""
    directory = tmp_path_factory.mktemp("initial")
    write_base(directory / "base", hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)
    write_rows(directory / "train.jsonl", sums(20))
    write_rows(directory / "held.jsonl", sums(6, 20))
    return directory


def micro():
    return {name: array[0] for name, array in packed_batch().items()}


def parted(base: Path, config: LoraConfig, **options):
    parting = Parting(config, 0)
    model, params = load_model(base, lora=config, parting=parting, **options)
    return parting, *add_lora(model, params, config, jax.random.key(0), first=parting.first)


@pytest.mark.parametrize("kind", ["pissa", pytest.param("pissa_niter_16", marks=pytest.mark.long)])
def test_pissa_computes_and_trains_as_peft_s(kind, hf_model, tmp_path):
    base = hf_model("qwen3")
    theirs = peft.get_peft_model(
        reference_model(base), peft.LoraConfig(r=5, task_type="CAUSAL_LM", init_lora_weights=kind, **SETTINGS)
    )
    settings = SETTINGS | {"target_modules": tuple(SETTINGS["target_modules"])}
    config = LoraConfig(r=5, init_lora_weights=kind, **settings)
    parting, model, trainable, frozen = parted(base, config)
    plain = load_model(base)
    expected = reference_logits(reference_model(base), micro())
    assert np.abs(our_logits(model, (trainable, frozen), micro()) - expected).max() <= LOGITS  # nothing has changed yet
    state = dict(theirs.named_parameters())
    random = np.random.default_rng(0)
    exact = parting.first if kind == "pissa" else parted(base, replace(config, init_lora_weights="pissa"))[0].first
    for module, (a, b) in parting.first.items():
        name = f"base_model.model.{module}"
        found = (state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]).detach().numpy()
        best = exact[module].b @ exact[module].a
        assert np.linalg.norm(b @ a - best) <= 1e-3 * np.linalg.norm(best), module
        if kind == "pissa":  # their sketch has no spare columns, and is further from the best
            assert np.linalg.norm(b @ a - found) <= 1e-4 * np.linalg.norm(found), module
    if kind != "pissa":
        return
    # the same A and B on both sides, moved: then the residual weights must be the same
    with torch.no_grad():
        for module, (a, b) in parting.first.items():
            for part, array in (("A", a), ("B", b)):
                state[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(torch.tensor(array))
    batches = [packed_batch(seed, accumulation=2) for seed in range(STEPS)]
    ours = our_course(model, trainable, frozen, batches, STEPS, TRAINING)
    torchs = reference_course(theirs.eval(), batches, STEPS, TRAINING)
    errors = gradient_errors(ours.gradients, torchs.gradients)
    assert max(errors.values()) <= GRADIENTS and curve_error(ours, torchs) <= LOSSES
    # what is written is right over the base as it was, here and there
    trainable = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(random.normal(0, 0.05, leaf.shape), jnp.float32), trainable
    )
    save_adapter(tmp_path / "ours", model, trainable, config, str(base), parting.subtracted)
    expected = our_logits(model, (trainable, frozen), micro())
    again = reference_logits(reference_model(base, tmp_path / "ours"), micro())
    np.testing.assert_allclose(again, expected, atol=LOGITS)
    loaded, tree, rest, read = load_adapter(tmp_path / "ours", *plain)
    assert (read.r, read.lora_alpha, read.rank_pattern) == (10, 16, {"up_proj": 6})
    np.testing.assert_allclose(our_logits(loaded, (tree, rest), micro()), expected, atol=LOGITS)
    # and is what PEFT converts: its own initial adapter, its own trained one
    (tmp_path / "initial").mkdir()
    save_factors(tmp_path / "initial", model, parting.subtracted, config, str(base))
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    own = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert own[field] == written[field], field


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_is_peft_s_where_its_scales_are_not_quantised(rounds, monkeypatch):
    """PEFT's own function, whose accelerator is the CPU here; it knows no double quantisation and no scale."""
    bnb = pytest.importorskip("bitsandbytes", reason="PEFT quantises with it")
    from peft.utils import loftq_utils

    for kind in (torch.Tensor, bnb.nn.Params4bit):
        to = kind.to
        monkeypatch.setattr(
            kind, "to",
            lambda self, *args, to=to, **named: to(
                self, *("cpu" if arg == "cuda" else arg for arg in args),
                **{name: "cpu" if value == "cuda" else value for name, value in named.items()},
            ),
        )  # fmt: skip
    monkeypatch.setattr("jaxft.initial.quantize", lambda weight, kind: quantize_nf4(weight, double=False))
    jax.clear_caches()
    weight = np.random.default_rng(0).normal(0, 0.3, (64, 128)).astype(np.float32)
    base, theirs_a, theirs_b = loftq_utils.loftq_init(torch.tensor(weight), 4, 6, rounds)
    parting = Parting(LoraConfig(r=6, lora_alpha=6, init_lora_weights="loftq", loftq_iter=rounds), 0)
    leaf = parting.part("a.module", jnp.asarray(weight), "nf4")
    a, b = parting.first["a.module"]
    jax.clear_caches()
    assert np.linalg.norm(dense(leaf, jnp.float32) - base.numpy()) <= 1e-3 * np.linalg.norm(weight)
    assert np.linalg.norm(b @ a - (theirs_b @ theirs_a).numpy()) <= 1e-3 * np.linalg.norm(b @ a)
    assert bool(parting.subtracted) == (rounds > 1)


@pytest.mark.parametrize(("alpha", "rounds"), [(4, 1), (16, 4)])
def test_loftq_starts_nearer_to_the_weights_than_what_it_makes_up_for(alpha, rounds, hf_model):
    base, batch = hf_model("llama2"), micro()
    config = LoraConfig(r=4, lora_alpha=alpha, init_lora_weights="loftq", loftq_iter=rounds)
    _, model, trainable, frozen = parted(base, config, quantization="nf4")
    full, weights = load_model(base)
    exact = our_logits(full, (weights,), batch)
    plain, params = load_model(base, quantization="nf4")
    distance = np.linalg.norm(our_logits(model, (trainable, frozen), batch) - exact)
    assert distance < 0.95 * np.linalg.norm(our_logits(plain, (params,), batch) - exact)


def test_gaussian_starts_as_peft_s_does():
    config = LoraConfig(r=8, init_lora_weights="gaussian", rank_pattern={"q_proj": 4})
    _, trainable, _ = add_lora(*tiny_model("qwen3"), config, jax.random.key(0))
    layers = trainable["layers"]["0"]
    for module, rank in ((layers["self_attn"]["q_proj"], 4), (layers["mlp"]["up_proj"], 8)):
        assert not module["lora"]["b"].any()
        assert np.std(module["lora"]["a"]) == pytest.approx(1 / rank, rel=0.1)
    # whole stacks of three layers, of 4 and 8 rows of 32 numbers


METHODS = {
    "pissa": ["--init_lora_weights=pissa"],
    "pissa over 4 bits": ["--init_lora_weights=pissa_niter_4", "--load_in_4bit"],
    "loftq": ["--init_lora_weights=loftq", "--load_in_4bit"],
    "loftq in three rounds": ["--init_lora_weights=loftq", "--loftq_iter=3", "--load_in_4bit"],
}


@pytest.mark.parametrize(
    "method", [name if name == "pissa over 4 bits" else pytest.param(name, marks=pytest.mark.long) for name in METHODS]
)  # whole runs
def test_a_run_resumes_bit_for_bit_evaluates_merges_and_loads_in_peft(method, place, tmp_path, capsys):
    argv, own_base = METHODS[method], method in ("pissa over 4 bits", "loftq in three rounds")

    def run(name, *more):
        out = tmp_path / name
        given = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=out)
        assert train.main([*given, *RUN, *argv, f"--eval_dataset={place / 'held.jsonl'}", *more]) == 0
        return out

    whole, part = run("whole"), run("part", "--max_steps=2")
    run("part", "--resume_from_checkpoint=auto")
    assert losses_of(part) == losses_of(whole) and len(set(losses_of(whole))) == 4
    assert same_tensors(whole / "adapter_model.safetensors", part / "adapter_model.safetensors")
    assert (whole / SUBTRACTED).is_dir() == (own_base or method == "pissa")
    assert (whole / QUANTIZED_BASE).is_dir() == own_base
    base, held = (whole / QUANTIZED_BASE, []) if own_base else (place / "base", argv[1:])
    stdout = io.StringIO()
    given = flags(model_name_or_path=base, adapter=whole, dataset=place / "held.jsonl", max_length=64)
    with redirect_stdout(stdout):
        assert evaluate.main([*given, *held]) == 0
    last = [line for line in lines_of(whole) if "eval_loss" in line][-1]
    # float32 rounding of a residual and of its parts apart, in PiSSA alone
    assert json.loads(stdout.getvalue())["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    if own_base:
        with pytest.raises(InputError, match=f"was trained over .*{QUANTIZED_BASE}, which is not"):
            evaluate.main([*given, f"--model_name_or_path={place / 'base'}", "--load_in_4bit"])
    if held:
        base = tmp_path / "four"
        save_model(base, *load_model(place / "base", quantization="nf4"))
    capsys.readouterr()
    assert run_command(convert.main, ["merge", str(base), str(whole), str(tmp_path / "merged")]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert merged["largest_logit_difference"] < 1e-5 * merged["largest_logit"]
    tokens = np.arange(3, 15, dtype=np.int64)[None]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), whole)
    model, params = load_model(tmp_path / "merged")
    decoder = model.bind(params)
    hidden = decoder(tokens.astype(np.int32), np.ones_like(tokens, np.int32), np.arange(12, dtype=np.int32)[None])
    with torch.no_grad():
        expected = theirs.train()(torch.from_numpy(tokens)).logits.numpy()  # else bitsandbytes computes in bfloat16
    np.testing.assert_allclose(decoder.logits(hidden), expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--init_lora_weights=eva"], "is 'eva'; it must be true, gaussian, pissa, pissa_niter_N or loftq"),
        (["--init_lora_weights=loftq"], "makes up for quantisation; add --load_in_4bit"),
        (["--loftq_iter=2"], "--loftq_iter has a meaning with --init_lora_weights loftq only"),
        (["--init_lora_weights=pissa", "--adapter=x"], "an adapter has its values"),
        (["--init_lora_weights=pissa", "--full_finetuning"], "has no meaning with --full_finetuning"),
    ],
)
def test_first_values_that_contradict_other_flags_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        parse("train", ["--model_name_or_path=x", "--dataset=y", *argv])


def test_first_values_that_the_weights_do_not_have_are_refused(place, tmp_path):
    config = LoraConfig(r=4, init_lora_weights="pissa")
    save_model(tmp_path / "four", *load_model(place / "base", quantization="nf4"))
    with pytest.raises(InputError, match=r"pissa needs the 16-bit weights that .* was quantised from"):
        load_model(tmp_path / "four", lora=config, parting=Parting(config, 0))
    large = LoraConfig(r=65, init_lora_weights="pissa")
    with pytest.raises(InputError, match=r"rank 65 is larger than .* of shape \(64, 128\) has"):
        load_model(place / "base", lora=large, parting=Parting(large, 0))
    with pytest.raises(InputError, match=r"give load_model a jaxft\.initial\.Parting"):
        add_lora(*load_model(place / "base"), config, jax.random.key(0))
