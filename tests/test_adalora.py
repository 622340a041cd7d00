"""AdaLoRA against PEFT's own: gradients, twenty steps with every decision about ranks, files both ways, whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference needs torch")
import peft
import torch
from transformers import AutoModelForCausalLM

from jaxft import (
    LoraConfig,
    add_lora,
    evaluate,
    load_adapter,
    load_model,
    make_optimizer,
    make_schedule,
    make_train_step,
    save_adapter,
    save_model,
    train,
)
from jaxft.adalora import adapter_ranks, regularizer, with_adalora
from jaxft.config import parse
from jaxft.convert import __main__ as convert
from jaxft.convert.peft import adapter_parts
from jaxft.errors import InputError, run_command
from jaxft.lora_config import AdaLora
from jaxft.trees import flatten, unflatten
from scripts.compare_with_hf import (
    LOGITS,
    LOSSES,
    Training,
    our_logits,
    reference_course,
    reference_logits,
    reference_model,
)
from tests.tiny_models import packed_batch
from tests.tiny_runs import flags, lines_of, losses_of, same_tensors, sums, write_base, write_rows

STEPS = 20
SCHEDULE = {"init_r": 6, "target_r": 3, "tinit": 3, "tfinal": 4, "deltaT": 2, "orth_reg_weight": 0.3}
TRAINING = Training(learning_rate=5e-3, weight_decay=0.1, max_grad_norm=0.5)
RUN = flags(
    max_length=64, per_device_train_batch_size=4, learning_rate=0.01, peft_type="adalora", init_r=4, target_r=2,
    tinit=1, tfinal=1, max_steps=6, save_steps=3, lr_scheduler_type="constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ with a tokenizer, and rows."""
    directory = tmp_path_factory.mktemp("adalora")
    write_base(directory / "base", hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)
    write_rows(directory / "train.jsonl", sums(20))
    write_rows(directory / "held.jsonl", sums(6, 20))
    return directory


def micro():
    return {name: array[0] for name, array in packed_batch().items()}


def tensors_of(model, tree) -> dict[str, np.ndarray]:
    leaves = dict(flatten(tree))
    return {name: np.asarray(leaves[path])[index] for name, (path, index) in adapter_parts(model).items()}


def theirs_of(reference) -> dict[str, np.ndarray]:
    return {
        name.removesuffix(".default"): p.detach().numpy().copy()
        for name, p in reference.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize(
    ("layers", "quantized"),
    [
        (None, False),
        pytest.param((0, 2), False, marks=pytest.mark.long),
        pytest.param(None, True, marks=pytest.mark.long),  # over bitsandbytes' own 4 bits
    ],
)
def test_twenty_steps_and_every_mask_are_those_of_peft(layers, quantized, hf_model, place, tmp_path):
    base = hf_model("llama2")
    if quantized:
        base = tmp_path / "four"
        save_model(base, *load_model(place / "base", quantization="nf4"))
    targets = ["q_proj", "up_proj", "down_proj"]
    reference = peft.get_peft_model(
        reference_model(base),
        peft.AdaLoraConfig(
            **SCHEDULE,
            total_step=STEPS,
            lora_alpha=12,
            target_modules=targets,
            task_type="CAUSAL_LM",
            layers_to_transform=layers and list(layers),
        ),
    ).train(quantized)  # fmt: skip  in evaluation bitsandbytes computes in bfloat16
    config = LoraConfig(
        r=6, lora_alpha=12, target_modules=tuple(targets), layers_to_transform=layers,
        adalora=AdaLora(**SCHEDULE, total_step=STEPS),
    )  # fmt: skip
    model, trainable, frozen = add_lora(*load_model(base), config, jax.random.key(0))
    # the same start on both sides
    own = tensors_of(model, trainable)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.tensor(own[name.removesuffix(".default")]))
    batches = [packed_batch(seed) for seed in range(STEPS)]
    masks, penalties = [], []

    def after_step(step):
        reference.base_model.update_and_allocate(step)
        masks.append({name: tensor[:, 0] != 0 for name, tensor in theirs_of(reference).items() if "lora_E" in name})

    theirs = reference_course(reference, batches, STEPS, TRAINING, after_step=after_step)
    schedule = make_schedule(TRAINING.lr_scheduler_type, TRAINING.learning_rate, TRAINING.warmup_steps, STEPS)
    inner = make_optimizer(schedule, weight_decay=TRAINING.weight_decay, max_grad_norm=0)
    tx = with_adalora(inner, model, config.adalora, max_grad_norm=TRAINING.max_grad_norm)
    step = jax.jit(make_train_step(model, optimizer=tx, gradient_checkpointing="none"))
    penalty = jax.jit(lambda tree: 0.3 * regularizer(tree, adapter_ranks(model)))
    state, losses = tx.init(trainable), []
    for number, batch in enumerate(batches):
        penalties.append(float(penalty(trainable)))
        trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.key(number))
        losses.append(float(metrics["loss"]))
        for name, kept in masks[number].items():
            np.testing.assert_array_equal(tensors_of(model, trainable)[name][:, 0] != 0, kept, f"{number + 1} {name}")
    np.testing.assert_allclose(np.add(losses, penalties), theirs.losses, rtol=1e-3 if quantized else LOSSES)
    assert max(penalties) > 0.1 and len({str(mask) for mask in masks}) > 4
    kept = np.concatenate(list(masks[-1].values()))
    assert kept.sum() == 3 * len(masks[-1]) < kept.size  # the budget is spent
    assert len({int(mask.sum()) for mask in masks[-1].values()}) > 1  # and not evenly
    for name, tensor in theirs_of(reference).items():
        ours = tensors_of(model, trainable)[name]
        assert np.linalg.norm(ours - tensor) <= 2e-3 * np.linalg.norm(tensor), name
    if quantized:
        return
    # what PEFT writes, here; and what is written here, in PEFT
    expected = our_logits(model, (trainable, frozen), micro())
    reference.save_pretrained(tmp_path / "theirs")
    loaded, tree, rest, read = load_adapter(tmp_path / "theirs", *load_model(base))
    np.testing.assert_allclose(
        our_logits(loaded, (tree, rest), micro()), reference_logits(reference, micro()), atol=LOGITS
    )
    save_adapter(tmp_path / "ours", model, trainable, config, str(base))
    for directory, source in (("ours", (model, trainable, config)), ("again", (loaded, tree, read))):
        if directory == "again":
            save_adapter(tmp_path / directory, *source, str(base))
        found = peft.PeftModel.from_pretrained(reference_model(base), tmp_path / directory)
        limit = LOGITS if directory == "ours" else 20 * LOGITS
        np.testing.assert_allclose(reference_logits(found.eval(), micro()), expected, atol=limit)
    assert sum(sum(own) for own in adapter_ranks(loaded).values()) == kept.sum()


def test_padding_has_no_part_in_ranks_and_stays_zero(hf_model):
    """Layers without a branch in a stack: their rows are neither counted, nor masked, nor drawn to the identity."""
    config = LoraConfig(
        r=4, target_modules=("q_proj",), layers_to_transform=(1,),
        adalora=AdaLora(init_r=4, target_r=2, total_step=4),
    )  # fmt: skip
    model, trainable, _ = add_lora(*load_model(hf_model("llama2")), config, jax.random.key(0))
    tx = with_adalora(make_optimizer(0.1, max_grad_norm=0), model, config.adalora, max_grad_norm=1.0)
    state, random = tx.init(trainable), np.random.default_rng(0)
    for _ in range(4):
        grads = {
            path: jnp.asarray(random.normal(0, 1, leaf.shape), jnp.float32) for path, leaf in flatten(trainable)
        }  # fmt: skip
        grads = unflatten({path: leaf.at[0].set(0).at[2].set(0) for path, leaf in grads.items()})
        updates, state = tx.update(grads, state, trainable)
        trainable = jax.tree.map(lambda leaf, update: leaf + update, trainable, updates)
    for path, leaf in flatten(trainable):
        assert np.isfinite(leaf).all() and not leaf[0].any() and not leaf[2].any() and leaf[1].any(), path
    e = trainable["layers"]["0"]["self_attn"]["q_proj"]["lora"]["e"]
    assert int((e[1] != 0).sum()) == 2


def test_a_run_resumes_bit_for_bit_evaluates_merges_loads_in_peft_and_goes_on(place, tmp_path, capsys):
    def run(name, *more):
        out = tmp_path / name
        given = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=out)
        assert train.main([*given, *RUN, f"--eval_dataset={place / 'held.jsonl'}", *more]) == 0
        return out

    whole = run("whole")
    stopped = run("part", "--optim=adamw", "--save_steps=3")
    for step in (stopped / "checkpoints").iterdir():
        if step.name == "6":
            for file in sorted(step.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            step.rmdir()
    for name in ("adapter_model.safetensors", "config.yaml"):
        (stopped / name).unlink()
    run("part", "--optim=adamw", "--resume_from_checkpoint=auto")
    assert losses_of(stopped) == losses_of(whole) and len(set(losses_of(whole))) == 6
    assert same_tensors(whole / "adapter_model.safetensors", stopped / "adapter_model.safetensors")
    written = json.loads((whole / "adapter_config.json").read_text())
    assert written["peft_type"] == "ADALORA" and written["total_step"] == 6
    assert sum(map(sum, written["rank_pattern"].values())) == 2 * 14
    capsys.readouterr()
    given = flags(model_name_or_path=place / "base", adapter=whole, dataset=place / "held.jsonl", max_length=64)
    assert evaluate.main(given) == 0
    last = [line for line in lines_of(whole) if "eval_loss" in line][-1]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    merging = ["merge", str(place / "base"), str(whole), str(tmp_path / "merged"), "--dtype=float32"]
    assert run_command(convert.main, merging) == 0
    merged = json.loads(capsys.readouterr().out)
    assert merged["largest_logit_difference"] < 1e-5 * merged["largest_logit"]
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32), whole
    )
    tokens = np.arange(3, 15, dtype=np.int64)[None]
    model, params = load_model(tmp_path / "merged")
    decoder = model.bind(params)
    hidden = decoder(tokens.astype(np.int32), np.ones_like(tokens, np.int32), np.arange(12, dtype=np.int32)[None])
    with torch.no_grad():
        np.testing.assert_allclose(decoder.logits(hidden), theirs(torch.from_numpy(tokens)).logits, atol=1e-3)
    # trained further, it keeps its ranks
    more = tmp_path / "more"
    given = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=more, adapter=whole)
    assert train.main([*given, *flags(max_length=64, learning_rate=0.003, max_steps=2)]) == 0
    again = json.loads((more / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {name: sum(kept) for name, kept in written["rank_pattern"].items() if sum(kept)}
    assert {name: sum(kept) for name, kept in again.items()} == ranks
    assert losses_of(more)[0] != losses_of(whole)[0]  # of the same batch


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--peft_type=adalora", "--use_dora"], "adalora and --use_dora contradict each other"),
        (["--peft_type=adalora", "--lora_r=8"], "adalora and --lora_r contradict each other"),
        (["--peft_type=adalora", "--init_lora_weights=pissa"], "adalora and --init_lora_weights contradict"),
        (["--peft_type=adalora", "--target_r=13"], "target_r 13 is more than init_r 12"),
        (["--peft_type=adalora", "--beta1=1"], r"beta1 is 1\.0; it must be above 0 and below 1"),
        (["--tinit=3"], "--tinit has a meaning with --peft_type adalora only"),
        (["--peft_type=adalora", "--tinit=3", "--adapter=x"], "an adapter keeps its ranks"),
        (["--peft_type=adalora", "--full_finetuning"], "has no meaning with --full_finetuning"),
    ],
)
def test_what_contradicts_adalora_is_refused(argv, words):
    with pytest.raises(InputError, match=words):
        parse("train", ["--model_name_or_path=x", "--dataset=y", *argv])


def test_a_schedule_without_a_reduction_is_refused():
    with pytest.raises(InputError, match="with 10 steps, tinit 5 and tfinal 5 leave none in which ranks are reduced"):
        AdaLora(tinit=5, tfinal=5, total_step=10).budgets(12, 1)
