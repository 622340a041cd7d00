"""LoRA+ and DoRA against PEFT's own: forward, gradients, twenty steps, files both ways, resuming and merging."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference needs torch")

import torch
from peft.optimizers import create_loraplus_optimizer

from jaxft import LoraConfig, add_lora, load_adapter, load_model, make_optimizer, train
from jaxft.errors import InputError
from scripts.compare_with_hf import LOSSES, Training, curve_error, our_course, reference_course, reference_model
from tests.tiny_adapters import make_adapter
from tests.tiny_models import packed_batch, tiny_model
from tests.tiny_runs import compile_cache, flags, losses_of, same_tensors, sums, write_base, write_rows

STEPS = 20
TRAINING = Training(learning_rate=2e-3, weight_decay=0.3)
RUN = flags(
    max_length=64, per_device_train_batch_size=4, learning_rate=0.01, lora_r=4, max_steps=4, save_steps=2,
    lr_scheduler_type="constant",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory):
    with compile_cache(tmp_path_factory.getbasetemp() / "xla"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ with a tokenizer, and rows."""
    directory = tmp_path_factory.mktemp("methods")
    write_base(directory / "base")
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
