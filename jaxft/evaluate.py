"""`python -m jaxft.evaluate`: the loss of a model, with or without an adapter, on a data set."""

import json
import math
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.config import describe, parse
from jaxft.data import load_rows, tokenize_dataset
from jaxft.errors import InputError, run_command
from jaxft.load import EMBEDDED
from jaxft.packing import Batch, eval_batches
from jaxft.prepare import prepare
from jaxft.sharding import batch_sharding, data_parallel_size
from jaxft.step import EvalStep, make_eval_step
from jaxft.trees import Tree


def evaluate(step: EvalStep, trainable: Tree, frozen: Tree, batches: Iterable[Batch], mesh: Mesh) -> dict[str, Any]:
    """loss (nats a target token, weighted), perplexity and target_tokens over batches of shape (1, B, T).

    step: a jitted `make_eval_step`.
    """
    sums = [step(trainable, frozen, jax.device_put(batch, batch_sharding(mesh))) for batch in batches]
    totals = {name: float(np.sum([np.float64(one[name]) for one in sums])) for name in sums[0]}
    loss = totals["loss_sum"] / totals["weight"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp overflows a float there
        "target_tokens": int(totals["target_tokens"]),
    }


def main(argv: list[str] | None = None) -> int:
    settings, provenance = parse("evaluate", argv)
    if (settings.model_name_or_path is None) != (settings.dataset is None):
        raise InputError("--model_name_or_path and --dataset go together; without both the embedded ones are used")
    for line in describe(settings, provenance):
        print(line, file=sys.stderr)
    model_name = settings.model_name_or_path or str(EMBEDDED / "base")
    rows = load_rows(
        settings.dataset or str(EMBEDDED / "problems_heldout.jsonl"),
        settings.dataset_test_split if "dataset_test_split" in settings.settings_given else None,
        settings.dataset_config,
    )
    prepared = prepare(settings, model_name)
    samples, report = tokenize_dataset(
        rows, prepared.tokenizer, max_length=settings.max_length, vocab_size=prepared.model.config.vocab_size,
        train_on=settings.train_on,
    )  # fmt: skip
    for line in report.lines():
        print(line, file=sys.stderr)
    batches = eval_batches(
        samples, max_length=settings.max_length, packing=settings.packing,
        batch_size=settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh),
    )  # fmt: skip
    with jax.set_mesh(prepared.mesh):
        step = jax.jit(make_eval_step(prepared.model, dtype=prepared.compute_dtype))
        print(json.dumps(evaluate(step, prepared.trainable, prepared.frozen, batches, prepared.mesh)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
