"""`python -m jaxft.evaluate`: the loss of a model, with or without an adapter, on a data set."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxft.config import describe, parse
from jaxft.data import tokenize_dataset
from jaxft.errors import InputError, RunError, run_command
from jaxft.files import find_files, has_split, open_rows
from jaxft.load import EMBEDDED
from jaxft.mixture import Source
from jaxft.packing import Batch, eval_batches
from jaxft.prepare import model_of, prepare
from jaxft.settings import EvaluateSettings, TrainSettings
from jaxft.sharding import data_parallel_size, put_batch
from jaxft.step import EvalStep, make_eval_step
from jaxft.tasks import find_metric, make_task
from jaxft.trees import Tree


def evaluate(
    step: EvalStep,
    trainable: Tree,
    frozen: Tree,
    batches: Iterable[Batch],
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """loss (nats a target token, weighted), perplexity and target_tokens over batches of shape (1, B, T).

    step: a jitted `make_eval_step`. stopped: asked after every batch; the figures are of the batches before it is true.
    """
    totals: dict[str, float] = {}
    running: dict[str, jax.Array] = {}  # the batch that the device works on while the next one is put together
    for batch in batches:
        found = step(trainable, frozen, put_batch(batch, mesh))
        totals = {name: totals.get(name, 0.0) + float(value) for name, value in running.items()}
        running = found
        if stopped():
            break
    totals = {name: totals.get(name, 0.0) + float(value) for name, value in running.items()}
    loss = totals["loss_sum"] / totals["weight"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp overflows a float there
        "target_tokens": int(totals["target_tokens"]),
    }


def held_out_split(name: str, settings: TrainSettings | EvaluateSettings) -> str | None:
    """The split to evaluate on: `--dataset_test_split`, or None for all of a file or of a directory without splits.

    A directory with training files and no test files has splits: to read it raises InputError.
    """
    split, path = settings.dataset_test_split, Path(name).expanduser()
    if "dataset_test_split" in settings.settings_given or not path.exists():
        return split
    if path.is_file():
        return None
    return split if has_split(path, split) or has_split(path, "train") else None


def read_from(name: str, split: str | None) -> str:
    """In words what `open_rows(name, split)` reads."""
    path = Path(name).expanduser()
    if not path.exists():
        return f"split {split or 'train'} of {name}"
    return ", ".join(str(file) for file in find_files(path, split))


def main(argv: list[str] | None = None) -> int:
    settings, provenance = parse("evaluate", argv)
    based = settings.model_name_or_path is None and settings.adapter is not None  # on the base of the adapter
    if (settings.model_name_or_path is None) != (settings.dataset is None) and not based:
        raise InputError("--model_name_or_path and --dataset go together; name both, or neither for the embedded ones")
    for line in describe(settings, provenance):
        print(line, file=sys.stderr)
    if settings.eval_metric is not None:
        find_metric(settings.eval_metric)  # raises now what it would raise after the model is loaded
    model_name = model_of(settings)
    if settings.dataset is None and model_name != str(EMBEDDED / "base"):
        raise InputError(f"--dataset is missing: the base of {settings.adapter} is not the embedded one")
    sources = settings.sources or (Source(str(EMBEDDED / "problems_heldout.jsonl")),)
    if len(sources) > 1:
        raise InputError(f"--dataset names {len(sources)} data sets; evaluate them one by one")
    name, split = sources[0].path, sources[0].split or held_out_split(sources[0].path, settings)
    rows = open_rows(name, split, sources[0].config or settings.dataset_config)
    print(f"read {read_from(name, split)}", file=sys.stderr)
    prepared = prepare(settings, model_name)
    samples, report = tokenize_dataset(
        rows, prepared.tokenizer, max_length=settings.max_length, vocab_size=prepared.model.config.vocab_size,
        train_on=settings.train_on, template_kwargs=settings.chat_template_kwargs, cache=settings.cache_directory,
        columns=settings.columns,
    )  # fmt: skip
    for line in report.lines():
        print(line, file=sys.stderr)
    batches = eval_batches(
        samples, max_length=settings.max_length, packing=settings.packing,
        batch_size=settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh),
    )  # fmt: skip
    with jax.set_mesh(prepared.mesh):
        step = jax.jit(make_eval_step(prepared.model, dtype=prepared.compute_dtype))
        found = evaluate(step, prepared.trainable, prepared.frozen, batches, prepared.mesh)
        if (task := make_task(settings, prepared, samples)) is not None:
            print(f"answering {task.scored} prompts", file=sys.stderr)
            scores = task.score(task.answers(prepared, prepared.trainable, lambda: False))
            found |= {name.removeprefix("eval_"): value for name, value in scores.items()}
    if not math.isfinite(found["loss"]):
        raise RunError(f"the loss is {found['loss']}: weights or activations overflow; is --dtype float32 finite?")
    if math.isinf(found["perplexity"]):
        found["perplexity"] = None  # JSON has no infinity
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
