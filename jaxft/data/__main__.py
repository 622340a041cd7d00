"""`python -m jaxft.data FILE --model_name_or_path M`: what a training run will see of a data set, before it is run.

It takes every flag of `jaxft.train`, so that a command can be looked at by changing one word; those that are not about
data have no effect.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from jaxft.config import parse
from jaxft.data import Report, split_known, tokenize_dataset
from jaxft.errors import InputError, run_command
from jaxft.evaluate import held_out_split, read_from
from jaxft.files import open_rows
from jaxft.inspection import (
    histogram_lines,
    length_facts,
    packing_facts,
    pieces,
    rendered,
    report_facts,
    shared_samples,
)
from jaxft.load import EMBEDDED, adapter_tokenizer, find_directory, load_tokenizer
from jaxft.mixture import mix
from jaxft.models import describe_model, read_hf_config
from jaxft.prepare import choose_template
from jaxft.samples import Sample, Samples
from jaxft.settings import DataSettings
from jaxft.vocabulary import add_tokens, read_tokens


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(sys.argv[1:] if argv is None else argv)
    assert settings.model_name_or_path is not None
    if settings.streaming:
        raise InputError("--streaming reads no set whole, and here one is looked at whole; leave it out")
    tokenizer, vocab_size = tokenizer_of(settings, settings.model_name_or_path)
    sources = settings.sources
    named = settings.dataset_train_split if "dataset_train_split" in settings.settings_given else None
    tables = [open_rows(s.path, s.split or named, s.config or settings.dataset_config) for s in sources]
    held_out = []
    if settings.eval_split is not None:
        tables, held_out = map(
            list, zip(*(split_known(rows, settings.eval_split, settings.seed) for rows in tables), strict=True)
        )
    elif settings.eval_dataset:
        split = held_out_split(settings.eval_dataset, settings)
        held_out = [open_rows(settings.eval_dataset, split, settings.dataset_config)]

    def tokenize(rows: Any) -> tuple[Samples, Report]:
        return tokenize_dataset(
            rows, tokenizer, max_length=settings.max_length, vocab_size=vocab_size, train_on=settings.train_on,
            template_kwargs=settings.chat_template_kwargs, columns=settings.columns, cache=settings.cache_directory,
        )  # fmt: skip

    read = [tokenize(rows) for rows in tables]
    found: dict[str, Any] = {"model": settings.model_name_or_path, "sets": []}
    for source, (_, report) in zip(sources, read, strict=True):
        found["sets"].append({"source": read_from(source.path, source.split or named), **report_facts(report)})
    samples: Sequence[Sample] = read[0][0]
    if len(sources) > 1:
        weights = [source.weight for source in sources if source.weight is not None]
        samples, found["samples_per_epoch"] = mix([part for part, _ in read], weights or None, settings.seed)
    found["lengths"] = length_facts(samples)
    found["plan"] = packing_facts(
        samples, max_length=settings.max_length, packing=settings.packing, shuffle=settings.shuffle_dataset,
        seed=settings.seed,
        rows_per_step=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
    )  # fmt: skip
    kept = [tokenize(rows) for rows in held_out]
    if kept:
        facts = [report_facts(report) for _, report in kept]
        found["held_out"] = {
            "rows": sum(one["rows"] for one in facts), "samples": sum(one["samples"] for one in facts),
            "target_tokens": sum(one["target_tokens"] for one in facts),
            "also_trained": sum(shared_samples(part, samples) for part, _ in kept),
        }  # fmt: skip
    first = [pieces(tokenizer, samples[number]) for number in range(min(settings.show_samples, len(samples)))]
    if settings.json:
        found["first_samples"] = [[{"text": text, "trained": trained} for text, trained in one] for one in first]
        print(json.dumps(found, ensure_ascii=False))
    else:
        show(found, [report for _, report in read], first, settings)
    return 0


def read_settings(argv: list[str]) -> DataSettings:
    """The settings; words before the first flag are data sets. The embedded set and model where neither is named."""
    words = argv[: next((at for at, word in enumerate(argv) if word.startswith("-")), len(argv))]
    settings, _ = parse("data", [*(["--dataset", *words] if words else []), *argv[len(words) :]])
    if words and any(word.split("=")[0] == "--dataset" for word in argv):
        raise InputError(f"{words[0]} and --dataset both name data; leave one of them out")
    if settings.model_name_or_path is None and settings.dataset is None:
        embedded = ["--dataset", str(EMBEDDED / "problems_train.jsonl"), "--model_name_or_path", str(EMBEDDED / "base")]
        settings, _ = parse("data", [*argv, *embedded])
    if settings.dataset is None:
        raise InputError("no data set is named: python -m jaxft.data FILE --model_name_or_path M")
    if settings.model_name_or_path is None:
        raise InputError("--model_name_or_path is missing: tokens and chat template are a model's")
    return settings


def tokenizer_of(settings: DataSettings, name: str) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer that a run would use, and how many rows its embedding would have; no weight is read."""
    directory = find_directory(name)
    model, tokenizer = describe_model(read_hf_config(directory)), load_tokenizer(directory)
    known, vocab_size = tokenizer.chat_template, model.config.vocab_size
    new: tuple[str, ...] = ()
    if settings.adapter is not None:
        tokenizer, new = adapter_tokenizer(settings.adapter, model, tokenizer)
    if settings.add_tokens:
        new = tuple(add_tokens(tokenizer, read_tokens(settings.add_tokens)))
    choose_template(settings, tokenizer, known)
    return tokenizer, len(tokenizer) if new else vocab_size


def show(
    found: dict[str, Any], reports: Sequence[Report], first: list[list[tuple[str, bool]]], settings: DataSettings
) -> None:
    """Everything as text on stdout, with colours where that is a terminal."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for one, report in zip(found["sets"], reports, strict=True):
        console.print(f"{one['source']}", style="bold")
        console.print("\n".join(report.lines()))
        console.print(f"{one['trained_share']:.1%} of the tokens are trained")
    if len(reports) > 1:
        console.print(f"an epoch takes {', '.join(map(str, found['samples_per_epoch']))} samples of them")
    facts, plan = found["lengths"], found["plan"]
    console.print("\ntokens a sample", style="bold")
    console.print("\n".join(histogram_lines(facts, min(60, console.width - 30))))
    console.print(
        f"from {facts['min']} to {facts['max']}, mean {facts['mean']:.1f}, half of them up to {facts['median']}, "
        f"95% up to {facts['p95']}; --max_length is {settings.max_length}"
    )
    console.print("\npacking" if plan["packing"] else "\nrows, without packing", style="bold")
    console.print(
        f"{plan['rows']} rows of {plan['max_length']} tokens, {plan['efficiency']:.1%} filled, "
        f"{plan['documents_per_row']:.1f} samples a row and {plan['most_documents']} at most"
    )
    if plan["packing"]:
        alone = plan["unpacked"]
        console.print(f"without packing: {alone['rows']} rows, {alone['efficiency']:.1%} filled")
    console.print(f"{plan['steps_per_epoch']} steps an epoch of {plan['rows_per_step']} rows, on one device")
    if "held_out" in found:
        held = found["held_out"]
        console.print("\nheld out", style="bold")
        console.print(f"{held['rows']} rows, {held['samples']} samples, {held['target_tokens']} targets")
        console.print(f"{held['also_trained']} of these samples are trained on too, token for token")
    for number, parts in enumerate(first, 1):
        marks = "in colour" if console.is_terminal else "between ⟦ and ⟧"
        console.print(f"\nsample {number} (what is trained stands {marks})", style="bold")
        console.print(rendered(parts, console.is_terminal))


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: a card in use by a run is left alone
    sys.exit(run_command(main))
