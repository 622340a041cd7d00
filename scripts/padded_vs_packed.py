"""Tokens of real text a second: packed rows and padded rows, of jaxft and of transformers with PEFT.

    python scripts/padded_vs_packed.py MODEL_DIR DATASET [--batch_size 8] [--json FILE]

The same documents in the same order, LoRA r = 16 on all linear layers, AdamW, the layers computed again in the backward
pass. Padding is not counted as tokens. packed: rows of --max_length. padded: one document a row, of the longest
document's length (rounded up to a multiple of 64), as one compiled shape needs it. hf: the same documents a batch,
padded to the longest of the batch, `attn_implementation="sdpa"`, torch's AdamW. hf_packed: our packed rows, whose
documents transformers keeps apart by their positions. bfloat16 on a card, float32 on a CPU.
Each way is a process of its own, and runs its batches once before they are timed. MODEL_DIR may have random weights
(scripts/random_model.py).
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxft
from jaxft.cards import step_options
from jaxft.data import load_rows, tokenize_dataset
from jaxft.devices import use_compile_cache
from jaxft.errors import RunError, run_command
from jaxft.packing import Batch, Batches, make_plan
from jaxft.samples import Samples

WAYS = ("packed", "padded", "hf", "hf_packed")
ROUNDED = 64  # a padded row's length is a multiple of it
LEARNING_RATE = 2e-4


def samples_of(options: argparse.Namespace) -> Samples:
    """The tokenised documents, with the loss on the responses."""
    tokenizer, rows = jaxft.load_tokenizer(options.model_dir), load_rows(options.dataset)
    return tokenize_dataset(rows, tokenizer, max_length=options.max_length, vocab_size=len(tokenizer))[0]


def batches_of(options: argparse.Namespace, samples: Samples, packing: bool) -> Batches:
    """The run's batches: rows of --max_length filled with documents, or one document a row of the longest's length."""
    longest = -(-int(samples.lengths.max()) // ROUNDED) * ROUNDED
    length = options.max_length if packing else min(longest, options.max_length)
    plan = make_plan(samples.lengths, length, packing=packing, shuffle=True, seed=0)
    return Batches(samples, plan, max_length=length, batch_size=options.batch_size)


def timed(options: argparse.Namespace, batches: Batches, step: Callable[[Batch], float]) -> dict[str, Any]:
    """Runs step(batch) -> loss for the first batches in turn, twice: each width is new to torch once. The second time
    counts."""
    losses, seconds, tokens, places = [], 0.0, 0, 0
    for turn, number in itertools.product(range(2), range(options.steps)):
        batch = batches.batch(number)
        began = time.perf_counter()
        losses.append(step(batch))
        if turn:
            seconds += time.perf_counter() - began
            tokens += int(np.count_nonzero(batch["segment_ids"]))
            places += batch["tokens"].size
    return {
        "tokens_per_second": tokens / seconds, "step_seconds": seconds / options.steps, "filled": tokens / places,
        "shape": [options.batch_size, batches.max_length], "loss": losses,
    }  # fmt: skip


def ours(options: argparse.Namespace, packing: bool) -> dict[str, Any]:
    use_compile_cache()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    batches = batches_of(options, samples_of(options), packing)
    model, params = jaxft.load_model(options.model_dir, dtype=dtype)
    model, trainable, frozen = jaxft.add_lora(model, params, jaxft.LoraConfig(), jax.random.key(0))
    del params
    optimizer = jaxft.make_optimizer(LEARNING_RATE)
    state = jax.jit(optimizer.init)(trainable)
    train_step = jax.jit(
        jaxft.make_train_step(model, optimizer=optimizer, dtype=dtype, max_documents=batches.max_documents),
        donate_argnums=(0, 1), compiler_options=step_options(jax.default_backend(), "full"),
    )  # fmt: skip
    key = jax.random.key(1)

    def step(batch: Batch) -> float:
        nonlocal trainable, state
        trainable, state, metrics = train_step(trainable, state, frozen, batch, key)
        return float(metrics["loss"])  # waits for the step

    found = timed(options, batches, step)
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return found | {"peak_bytes": peak, "device": device.device_kind, "versions": {"jax": jax.__version__}}


def unpadded(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, attention mask, labels), each (B, longest), of a batch (1, B, T) with one document a row."""
    longest = int(batch["segment_ids"][0].sum(axis=1).max())
    ids, mask, weights = (batch[name][0][:, :longest] for name in ("tokens", "segment_ids", "loss_weights"))
    return ids, mask, np.where(weights != 0, ids, -100)


def joined(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, positions, labels), each (B, T), of a packed batch (1, B, T); positions begin anew with each document."""
    ids, positions, weights = (batch[name][0] for name in ("tokens", "positions", "loss_weights"))
    return ids, positions, np.where(weights != 0, ids, -100)


def hf(options: argparse.Namespace, packing: bool) -> dict[str, Any]:
    # torch and PEFT are needed for this way alone, and beside a jax that measures they would take of its card
    import peft
    import torch
    import transformers

    card = torch.cuda.is_available()
    place, dtype = ("cuda", torch.bfloat16) if card else ("cpu", torch.float32)
    batches = batches_of(options, samples_of(options), packing)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model_dir, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    ).to(place)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)

    def step(batch: Batch) -> float:
        ids, where, labels = (
            torch.from_numpy(array).long().to(place) for array in (joined if packing else unpadded)(batch)
        )
        told = {"position_ids" if packing else "attention_mask": where}
        with torch.autocast(place, dtype=torch.bfloat16, enabled=card):
            loss = model(input_ids=ids, labels=labels, **told).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return loss.item()

    found = timed(options, batches, step)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    found |= {"device": torch.cuda.get_device_name() if card else "cpu", "versions": versions}
    found |= {} if packing else {"filled": None}  # each batch is as wide as its longest document
    return found | {"peak_bytes": torch.cuda.max_memory_allocated() if card else None}


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one way."""
    measured, packing = hf if way.startswith("hf") else ours, way.endswith("packed")
    return {"way": way} | measured(options, packing)


def table(found: Iterable[dict[str, Any]]) -> str:
    rows = ["| way | rows | filled | tokens of text a second | GiB | first loss |", "|---|---|---|---|---|---|"]
    for one in found:
        shape = f"{one['shape'][0]} × {'≤ ' if one['way'] == 'hf' else ''}{one['shape'][1]}"
        filled = "" if one["filled"] is None else f"{one['filled']:.0%}"
        peak = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**30:.2f}"
        speed = f"{one['tokens_per_second']:,.0f}"
        rows.append(f"| {one['way']} | {shape} | {filled} | {speed} | {peak} | {one['loss'][0]:.3f} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--way", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(argv)
    if len(options.way) == 1:
        print(json.dumps(measure(options.way[0], options)), flush=True)
        return 0
    flags = [[f"--{name}", str(getattr(options, name))] for name in ("batch_size", "max_length", "steps")]
    found = []
    for way in options.way:
        command = [sys.executable, __file__, str(options.model_dir), options.dataset, "--way", way]
        ended = subprocess.run([*command, *itertools.chain(*flags)], stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            raise RunError(f"{way} ended with {ended.returncode}; what it said stands above")
        found.append(json.loads(ended.stdout.splitlines()[-1]))
        print(f"{way}: {found[-1]['tokens_per_second']:,.0f} tokens a second", file=sys.stderr, flush=True)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
