"""Compares jaxft with transformers, PEFT and torch's AdamW on any model directory, in float32: does it train the same?

    python scripts/compare_with_hf.py MODEL_DIR [--adapter DIR] [--dataset FILE] [--steps 20] [--full_finetuning]

Logits, the gradients of the first step tensor by tensor, the loss curves of N optimizer steps, and greedy tokens. jaxft
gets packed rows in two micro-batches; the reference gets the same documents one by one. Prints both curves side by
side and a verdict; exit 1 where a difference is outside its tolerance.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from jaxft import (
    LoraConfig,
    Model,
    add_lora,
    load_adapter,
    load_model,
    load_tokenizer,
    make_optimizer,
    make_schedule,
    make_train_step,
    save_adapter,
)
from jaxft.convert import hf, peft
from jaxft.data import load_rows, tokenize_dataset
from jaxft.errors import InputError, RunError, run_command
from jaxft.generate import generate
from jaxft.load import base_changes
from jaxft.lora import with_lora
from jaxft.models.extension import with_changes
from jaxft.packing import Batches, Sample, plan_packing
from jaxft.trees import Tree, flatten, unflatten

Batch = dict[str, np.ndarray]  # (A, B, T)
LOGITS, GRADIENTS, LOSSES = 1e-4, 1e-4, 1e-4  # tolerances: absolute, ‖Δ‖/‖ref‖, relative


@dataclass(frozen=True)
class Training:
    """The settings that both sides train with."""

    learning_rate: float = 1e-3
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 3
    weight_decay: float = 0.1
    max_grad_norm: float = 0.5
    embedding_learning_rate: float | None = None


@dataclass(frozen=True)
class Course:
    """What one side did: a loss and a gradient norm a step, and the first step's gradients by transformers' names."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, np.ndarray]


# the reference's side


def reference_model(directory: Path, adapter: Path | None = None) -> torch.nn.Module:
    """The model, or the adapter on the frozen model as it was trained, in float32 and without dropout."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=with_changes(config, base_changes(adapter) if adapter else {}),
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    return model.eval()


def separated(micro: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents of packed rows (B, T) one by one: ids and labels (documents, longest), padded on the right.

    What stands to the right of a document cannot change it in a causal model, so no attention mask is needed.
    """
    found = []
    for row in range(len(micro["tokens"])):
        for segment in range(1, micro["segment_ids"][row].max() + 1):
            at = micro["segment_ids"][row] == segment
            found.append((micro["tokens"][row][at], micro["loss_weights"][row][at]))
    longest = max(len(ids) for ids, _ in found)
    tokens = torch.zeros((len(found), longest), dtype=torch.long)
    labels = torch.full((len(found), longest), -100)
    for number, (ids, weights) in enumerate(found):
        tokens[number, : len(ids)] = torch.from_numpy(ids).long()
        labels[number, : len(ids)] = torch.from_numpy(np.where(weights != 0, ids, -100)).long()
    return tokens, labels


def micro_batches(batch: Batch) -> list[Batch]:
    return [{name: array[a] for name, array in batch.items()} for a in range(len(batch["tokens"]))]


def scales_by_length(model: torch.nn.Module) -> bool:
    """Whether the rope depends on how long a document is: then each must be run alone, without padding."""
    config = model.config.get_text_config()
    flat = [config.rope_parameters, *config.rope_parameters.values()]
    return any(isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope") for rope in flat)


def forget_lengths(model: torch.nn.Module) -> None:
    """Puts "dynamic" ropes back to where they start: transformers keeps the longest length that they have met."""
    for module in model.modules():
        if hasattr(module, "original_max_seq_len") and isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.register_buffer("inv_freq", module.original_inv_freq.clone(), persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len


def reference_runs(model: torch.nn.Module, micro: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the reference takes at a time, as `separated`: all documents together, or each alone where it must."""
    tokens, labels = separated(micro)
    if not scales_by_length(model):
        yield tokens, labels
        return
    for number, length in enumerate(document_sizes(micro)):
        forget_lengths(model)
        yield tokens[number : number + 1, :length], labels[number : number + 1, :length]


def document_sizes(micro: Batch) -> list[int]:
    return [int((row == segment).sum()) for row in micro["segment_ids"] for segment in range(1, row.max() + 1)]


def reference_logits(model: torch.nn.Module, micro: Batch) -> np.ndarray:
    """Logits (tokens, V) of all documents of packed rows, padding left out."""
    with torch.no_grad():
        found = [row for tokens, _ in reference_runs(model, micro) for row in model(tokens).logits.float().numpy()]
    return np.concatenate([row[:length] for row, length in zip(found, document_sizes(micro), strict=True)])


def reference_course(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    steps: int,
    training: Training,
    *,
    adam: torch.optim.Optimizer | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> Course:
    """Trains with transformers' loss and schedule and torch's AdamW; norms and biases do not decay.

    adam: an optimizer in its place. after_step: called with the number of each step, from 1, before gradients go.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    no_decay = {name for name in named if "norm" in name or name.endswith("bias")}
    own_rate = {name for name in named if training.embedding_learning_rate and re.search("embed_tokens|lm_head", name)}
    groups = [
        {"params": [p for name, p in named.items() if (name in own_rate, name in no_decay) == kind],
         "lr": (kind[0] and training.embedding_learning_rate) or training.learning_rate,
         "weight_decay": 0.0 if kind[1] else training.weight_decay}
        for kind in ((False, False), (False, True), (True, False))
    ]  # fmt: skip
    adam = adam or torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    schedule = get_scheduler(training.lr_scheduler_type, adam, training.warmup_steps, steps)
    losses, norms, gradients = [], [], {}
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        count = sum(int((separated(micro)[1] != -100).sum()) for micro in micro_batches(batch))
        total = 0.0
        for tokens, labels in (part for micro in micro_batches(batch) for part in reference_runs(model, micro)):
            loss = model(tokens, labels=labels, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients = gradients or {
            name.replace(".modules_to_save", "")
            .replace("vector.default.weight", "vector")  # as PEFT writes DoRA's magnitudes
            .replace(".default", ""): p.grad.numpy().copy()
            for name, p in named.items()
            if p.grad is not None
        }
        limit = training.max_grad_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(list(named.values()), limit).item())
        adam.step()
        schedule.step()
        after_step(step)
        adam.zero_grad()
    return Course(losses, norms, gradients)


# jaxft's side


def our_logits(model: Model, params: tuple[Tree, ...], micro: Batch) -> np.ndarray:
    """Logits (tokens, V) of packed rows, padding left out."""

    @jax.jit
    def run(params, tokens, segment_ids, positions):
        decoder = model.bind(*params)
        return decoder.logits(decoder(tokens, segment_ids, positions))

    logits = run(params, micro["tokens"], micro["segment_ids"], micro["positions"])
    return np.asarray(logits)[micro["segment_ids"] > 0]


def last_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the gradients that it saw last."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params: (updates, updates)
    )


def by_reference_names(model: Model, tree: Tree, *, lora: bool) -> dict[str, np.ndarray]:
    """A tree like the trained one as transformers and PEFT name its tensors."""
    leaves = dict(flatten(tree))
    if lora:
        return {name: np.asarray(leaves[path])[index] for name, (path, index) in peft.adapter_parts(model).items()}
    where = hf.places(model.family.names, tree)
    return {name: np.asarray(leaves[path] if row is None else leaves[path][row]) for name, (path, row) in where.items()}


def our_course(
    model: Model,
    trainable: Tree,
    frozen: Tree,
    batches: Iterable[Batch],
    steps: int,
    training: Training,
    *,
    optimizer: Callable[..., optax.GradientTransformation] = make_optimizer,
) -> Course:
    """Trains with jaxft's own step, schedule and optimizer."""
    schedule = make_schedule(training.lr_scheduler_type, training.learning_rate, training.warmup_steps, steps)
    factor = (training.embedding_learning_rate or training.learning_rate) / training.learning_rate
    adam = optimizer(
        schedule, weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm, embedding_factor=factor
    )
    tx = optax.chain(last_gradients(), adam)
    step = jax.jit(make_train_step(model, optimizer=tx, gradient_checkpointing="none"))
    state = tx.init(trainable)
    losses, norms, gradients = [], [], {}
    for number, batch in zip(range(steps), batches, strict=False):
        trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.key(number))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        gradients = gradients or by_reference_names(model, state[0], lora=bool(frozen))
    return Course(losses, norms, gradients)


# the comparison


def gradient_errors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """‖Δ‖/‖ref‖ of each tensor. Raises RunError where one side has a tensor that the other has not."""
    if set(ours) != set(theirs):
        raise RunError(f"gradients of one side only: {sorted(set(ours) ^ set(theirs))[:4]}")
    return {
        name: float(np.linalg.norm(ours[name] - ref) / max(np.linalg.norm(ref), np.finfo(np.float32).tiny))
        for name, ref in theirs.items()
    }


def curve_error(ours: Course, theirs: Course) -> float:
    """The largest relative difference of the losses."""
    reference = np.array(theirs.losses)
    return float(np.max(np.abs(np.array(ours.losses) - reference) / np.abs(reference)))


def random_samples(vocab_size: int, count: int, max_length: int, seed: int, avoid: int | None) -> list[Sample]:
    """Documents of random tokens but `avoid`; the first third of each is a prompt of weight 0."""
    random = np.random.default_rng(seed)
    samples = []
    for length in random.integers(max_length // 4, max_length + 1, count):
        weights = np.ones(length, np.float32)
        weights[: max(1, length // 3)] = 0
        ids = random.integers(0, vocab_size, length)
        samples.append(Sample(np.where(ids == avoid, (ids + 1) % vocab_size, ids).astype(np.int32), weights))
    return samples


def fresh_adapter(directory: Path, model: Model, params: Tree, base: Path) -> Path:
    """An adapter whose B is not zero, so that every gradient of the first step is something to compare."""
    config = LoraConfig()
    model, trainable, _ = add_lora(model, params, config, jax.random.key(0))
    random = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(random.normal(0, 0.02, leaf.shape), jnp.float32) if path.endswith("/b") else leaf
        for path, leaf in flatten(trainable)
    }
    save_adapter(directory, model, unflatten(leaves), config, str(base))
    return directory


def greedy_tokens(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The reference's greedy continuation with its key/value cache, stopped by nothing."""
    forget_lengths(model)
    new, step, cache = [], torch.tensor([prompt]), None
    with torch.no_grad():
        for _ in range(count):
            out = model(step, past_key_values=cache, use_cache=True)
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            new.append(step.item())
    return new


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares jaxft with transformers + PEFT + torch AdamW in float32.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter; without it a fresh one with r 16 on all layers")
    parser.add_argument("--dataset", help="rows in any format that training reads; without it random tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--full_finetuning", action="store_true")
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=2, help="rows of each of the two micro-batches")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--greedy_tokens", type=int, default=16)
    parser.add_argument("--debug", action="store_true", help="a traceback where something fails")
    args = parser.parse_args(argv)
    if args.full_finetuning and args.adapter:
        raise InputError("--adapter and --full_finetuning contradict each other")
    if not args.model_dir.is_dir():
        raise InputError(f"{args.model_dir} is no directory")
    training = Training(learning_rate=args.learning_rate or (1e-4 if args.full_finetuning else 1e-3))

    model, params = load_model(args.model_dir, changes=base_changes(args.adapter) if args.adapter else {})
    if args.dataset:
        samples, report = tokenize_dataset(
            load_rows(args.dataset), load_tokenizer(args.model_dir), max_length=args.max_length,
            vocab_size=model.config.vocab_size,
        )  # fmt: skip
        print("\n".join(report.lines()))
    else:
        # torch gives the padding token's row of the embedding no gradient, wherever it stands
        padding = model.hf_config.get_text_config().pad_token_id
        samples = random_samples(model.config.vocab_size, 8 * args.steps, args.max_length, seed=0, avoid=padding)
    plan = plan_packing([len(sample) for sample in samples], args.max_length, 0)
    rows = Batches(samples, plan, max_length=args.max_length, batch_size=args.batch_size, accumulation=2)
    batches = [rows.batch(step) for step in range(args.steps)]

    with tempfile.TemporaryDirectory() as temporary:
        adapter = args.adapter
        trainable, frozen = params, {}
        if not args.full_finetuning:
            adapter = adapter or fresh_adapter(Path(temporary) / "adapter", model, params, args.model_dir)
            plain = model
            _, trainable, frozen, config = load_adapter(adapter, plain, params)
            model = with_lora(plain, replace(config, lora_dropout=0.0))  # two dropouts never draw the same
        reference = reference_model(args.model_dir, adapter)

    micro = micro_batches(batches[0])[0]
    theirs, ours = reference_logits(reference, micro), our_logits(model, (trainable, frozen), micro)
    prompt = separated(micro)[0][0, :8].tolist()
    (new,) = generate(model, (trainable, frozen), [prompt], max_new_tokens=args.greedy_tokens, stop_ids=[])
    tokens = greedy_tokens(reference, prompt, args.greedy_tokens)
    their_course = reference_course(reference, batches, args.steps, training)
    our_own = our_course(model, trainable, frozen, batches, args.steps, training)
    errors = gradient_errors(our_own.gradients, their_course.gradients)
    worst = max(errors, key=lambda name: errors[name])

    table = Table(
        "step", "loss, transformers", "loss, jaxft", "relative difference", "norm, transformers", "norm, jaxft"
    )
    for number, (a, b) in enumerate(zip(their_course.losses, our_own.losses, strict=True)):
        norms = f"{their_course.grad_norms[number]:.6f}", f"{our_own.grad_norms[number]:.6f}"
        table.add_row(str(number + 1), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b) / abs(a):.1e}", *norms)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    # float32's own error grows with the size of the logits, which in a trained model is not 1
    checks = [
        (
            "logits, largest difference",
            float(np.abs(ours - theirs).max()),
            LOGITS * max(1.0, float(np.abs(theirs).max())),
        ),
        (f"gradients, worst of {len(errors)}: {worst}", errors[worst], GRADIENTS),
        (f"losses of {args.steps} steps, largest relative difference", curve_error(our_own, their_course), LOSSES),
        (
            f"greedy tokens that differ, of {len(tokens)}",
            float(sum(a != b for a, b in zip(new, tokens, strict=True))),
            0,
        ),
    ]
    for what, error, tolerance in checks:
        print(f"{'ok  ' if error <= tolerance else 'FAIL'} {what}: {error:.1e} (tolerance {tolerance:.1e})")
    failed = [what for what, error, tolerance in checks if not error <= tolerance]
    print(f"verdict: {'outside tolerance: ' + '; '.join(failed) if failed else 'equal within tolerance'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
