"""What a model answers at each evaluation: held-out prompts, the answers it should give, and what counts on them."""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.decode import generate
from jaxft.errors import InputError, RunError
from jaxft.models.rope import DynamicRope
from jaxft.prepare import Prepared
from jaxft.samples import Sample
from jaxft.settings import EvaluateSettings, TrainSettings
from jaxft.sharding import data_parallel_size
from jaxft.stops import stop_token_ids
from jaxft.trees import Tree

Metric = Callable[[list[str], list[str]], Any]  # (answers, references) -> a number, or a dict of numbers

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> str | None:
    """The number that an answer ends with: behind the last '####' where GSM8K's mark is, else the last one in it.

    Commas and zeros behind the point do not count: '1,200.50' is '1200.5'. None where there is none.
    """
    found = NUMBER.findall(text.rpartition("####")[2]) if "####" in text else NUMBER.findall(text)
    if not found:
        return None
    number = (found[0] if "####" in text else found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def gsm8k(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers whose final number is the reference's (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168)."""
    right = [
        (number := final_number(reference)) is not None and final_number(answer) == number
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(right) / len(right)


METRICS: dict[str, Metric] = {"gsm8k": gsm8k}


def find_metric(name: str) -> Metric:
    """A metric of `METRICS`, or the function of 'MODULE:FUNCTION', imported. Raises InputError where it is none."""
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"--eval_metric {name!r}: expected {', '.join(METRICS)} or MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as failure:
        raise InputError(
            f"--eval_metric {name}: {failure}; is the module in the working directory or installed?"
        ) from failure
    if not callable(found):
        raise InputError(
            f"--eval_metric {name} is a {type(found).__name__}; a function (answers, references) is needed"
        )
    return found


@dataclass(frozen=True)
class Task:
    """Prompts with their references; the first `shown` are samples for people, the first `scored` go to the metric."""

    prompts: list[list[int]]
    references: list[str]
    shown: int
    scored: int
    name: str
    metric: Metric | None
    max_new_tokens: int
    batch_size: int

    def answers(self, prepared: Prepared, trainable: Tree, stopped: Callable[[], bool]) -> list[str]:
        """The model's greedy answers; fewer where `stopped`, which is asked before each batch, says so.

        Must be called under `jax.set_mesh`.
        """
        stop_ids = stop_token_ids(prepared.tokenizer, prepared.directory)
        found: list[str] = []
        while len(found) < len(self.prompts) and not stopped():
            new = generate(
                prepared.model, (trainable, prepared.frozen), self.prompts[len(found) : len(found) + self.batch_size],
                max_new_tokens=self.max_new_tokens, stop_ids=stop_ids, dtype=prepared.compute_dtype,
            )  # fmt: skip
            found += [str(prepared.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in new]
        return found

    def samples(self, tokenizer: Any, answers: list[str]) -> list[dict[str, str]]:
        """Prompt, reference and answer of what is shown."""
        texts = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in self.prompts[: self.shown]]
        triples = zip(texts, self.references, answers, strict=False)
        return [{"prompt": prompt, "reference": wanted, "answer": answer} for prompt, wanted, answer in triples]

    def score(self, answers: list[str]) -> dict[str, float]:
        """What the metric says: eval_NAME, or eval_KEY for each of a dict. {} without a metric.

        Raises RunError where the metric fails or says no number. In several processes each of them asks it, so the
        same answers must always give the same.
        """
        if self.metric is None:
            return {}
        try:
            said = self.metric(answers[: self.scored], self.references[: self.scored])
            found = said if isinstance(said, dict) else {self.name: said}
            return {f"eval_{name}": float(value) for name, value in found.items()}
        except Exception as failure:  # whatever somebody else's function raises
            text = " ".join(f"{type(failure).__name__}: {failure}".split())
            raise RunError(
                f"--eval_metric {self.name} failed on {self.scored} answers: {text}; it must take (answers, references)"
                ", two lists of texts, and return a number or a dict of numbers"
            ) from failure


def make_task(settings: TrainSettings | EvaluateSettings, prepared: Prepared, heldout: Sequence[Sample]) -> Task | None:
    """What the settings want answered at each evaluation; None where nothing is.

    Raises InputError where the model has no positions for the answers that were asked for.
    """
    shown = min(settings.sample_prompts, len(heldout)) if isinstance(settings, TrainSettings) else 0
    scored = 0
    if settings.eval_metric is not None:
        scored = min(settings.eval_metric_samples or len(heldout), len(heldout))
    pairs = [pair for sample in heldout[: max(shown, scored)] if (pair := asked(sample)) is not None]
    if not pairs:
        return None
    longest = max(len(prompt) for prompt, _ in pairs)
    new = settings.eval_max_new_tokens or (256 if scored else 64)
    room = prepared.model.config.max_position_embeddings - longest
    if not any(isinstance(rope, DynamicRope) for rope in prepared.model.config.ropes):
        if settings.eval_max_new_tokens and new > room:
            raise InputError(
                f"--eval_max_new_tokens {new}: the longest prompt has {longest} tokens, and the model positions for "
                f"{max(room, 0)} more; ask for less"
            )
        new = max(1, min(new, room))
    tokenizer = prepared.tokenizer
    return Task(
        prompts=[prompt for prompt, _ in pairs],
        references=[str(tokenizer.decode(wanted, skip_special_tokens=True)) for _, wanted in pairs],
        shown=min(shown, len(pairs)),
        scored=min(scored, len(pairs)),
        name=(settings.eval_metric or "").rpartition(":")[2],
        metric=None if settings.eval_metric is None else find_metric(settings.eval_metric),
        max_new_tokens=new,
        batch_size=settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh),
    )


def asked(sample: Sample) -> tuple[list[int], list[int]] | None:
    """A sample as what is asked and what is to be answered: its last trained span, and all before it."""
    trained = sample.loss_weights != 0
    if not trained.any():
        return None
    stop = len(trained) - int(np.argmax(trained[::-1]))
    before = np.flatnonzero(~trained[:stop])
    start = int(before[-1]) + 1  # the first token is never trained
    return sample.input_ids[:start].tolist(), sample.input_ids[start:stop].tolist()
