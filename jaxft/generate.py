"""`python -m jaxft.generate`: continues a prompt, a conversation, or a file of them, greedily or by sampling."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from jaxft.config import describe, parse
from jaxft.decode import generate
from jaxft.errors import InputError, RunError, run_command
from jaxft.models.rope import DynamicRope
from jaxft.prepare import Prepared, model_of, prepare
from jaxft.processes import say
from jaxft.prompts import ANSWER_FIELDS, Asked, prompt_tokens, read_asked
from jaxft.sampling import prompt_keys
from jaxft.settings import GenerateSettings
from jaxft.sharding import data_parallel_size
from jaxft.stops import cut_at_stop, stop_token_ids
from jaxft.talk import talk

WINDOW = 16  # batches whose prompts are sorted by length together and whose answers are then written


@dataclass(frozen=True)
class Completion:
    """An answer: its text, the count of new tokens (those of a stop string too, an end token not), how it ended."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]

    def fields(self, prompt_tokens: int) -> dict[str, Any]:
        """What an answered row gains: `prompts.ANSWER_FIELDS`."""
        values = (self.text, prompt_tokens, self.tokens, self.finish_reason)
        return dict(zip(ANSWER_FIELDS, values, strict=True))


def complete(
    prepared: Prepared, settings: GenerateSettings, prompts: Sequence[Sequence[int]], keys: jax.Array
) -> list[Completion]:
    """The answers to tokenised prompts, each with its key (n,). Must be called under `jax.set_mesh`."""
    tokenizer = prepared.tokenizer

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stopped(tokens: Sequence[int]) -> bool:
        return cut_at_stop(tokens, settings.stop, decode)[1] is not None

    found = generate(
        prepared.model,
        (prepared.trainable, prepared.frozen),
        prompts,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_token_ids(tokenizer, prepared.directory, settings.stop),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        keys=keys,
        batch_size=settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh),
        stopped=stopped if settings.stop else None,
        dtype=prepared.compute_dtype,
    )
    completions = []
    for tokens in found:
        text, count = cut_at_stop(tokens, settings.stop, decode)
        reason: Literal["stop", "length"] = (
            "length" if count is None and len(tokens) == settings.max_new_tokens else "stop"
        )
        completions.append(Completion(text, len(tokens) if count is None else count, reason))
    return completions


def main(argv: list[str] | None = None) -> int:
    settings, provenance = parse("generate", argv)
    for line in describe(settings, provenance):
        say(line)
    drawn = sorted({"top_k", "top_p", "seed"} & settings.settings_given)
    if settings.temperature == 0 and drawn:
        say(f"temperature 0 is greedy: {', '.join(drawn)} {'have' if len(drawn) > 1 else 'has'} no effect")
    output = None if settings.output is None else Path(settings.output).expanduser()
    if output is not None and output.exists():
        raise InputError(f"--output {output} exists already; name a new file")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no directory {output.parent}; make it first")
    talks = settings.chat and settings.prompt is None and settings.messages is None and settings.prompts is None
    if talks and sys.stdin.isatty():
        return talk(settings)
    if settings.compare_base:
        raise InputError("--compare_base is for a --chat in a terminal, and stdin is none")
    asked = read_asked(settings)
    prepared = prepare(settings, model_of(settings))
    prompts = [_tokens(one, prepared, settings) for one in asked]
    with jax.set_mesh(prepared.mesh):
        keys = prompt_keys(jax.random.key(settings.seed), prompts)
        if settings.prompts is None:
            (completion,) = complete(prepared, settings, prompts, keys)
            # exactly the new text: a line's end would belong to it, so only a terminal gets one
            print(completion.text, end="\n" if sys.stdout.isatty() else "", flush=True)
        else:
            size = WINDOW * settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh)
            windows = [slice(at, at + size) for at in range(0, len(asked), size)]
            answers = (complete(prepared, settings, prompts[window], keys[window]) for window in windows)
            write_answers(output, asked, prompts, answers)
    return 0


def _tokens(asked: Asked, prepared: Prepared, settings: GenerateSettings) -> list[int]:
    """The prompt's tokens. Raises InputError where the model cannot read them or has no positions for the answer."""
    tokens, config = prompt_tokens(asked, prepared.tokenizer, settings), prepared.model.config
    endless = any(isinstance(rope, DynamicRope) for rope in config.ropes)  # it scales itself beyond them
    if len(tokens) + settings.max_new_tokens > config.max_position_embeddings and not endless:
        raise InputError(
            f"{asked.where}: the prompt's {len(tokens)} tokens and --max_new_tokens {settings.max_new_tokens} are more "
            f"than the model's {config.max_position_embeddings} positions; shorten the one or lower the other"
        )
    if max(tokens) >= config.vocab_size:
        raise InputError(
            f"{asked.where}: token {max(tokens)} is outside the model's vocabulary of {config.vocab_size}; is the "
            "tokenizer this model's?"
        )
    return tokens


def write_answers(
    output: Path | None, asked: Sequence[Asked], prompts: Sequence[Sequence[int]], answers: Iterable[list[Completion]]
) -> None:
    """Writes all rows with their answers in order, a line of JSON each, to a new file or (None) to stdout.

    answers: lists of completions, each written when it comes. Raises RunError where the file cannot be written; what
    stands in it then are whole lines.
    """
    reasons: list[str] = []
    whole = 0  # bytes of whole lines
    try:
        with nullcontext(sys.stdout) if output is None else output.open("x", encoding="utf-8") as file:
            for completions in answers:
                lines = []
                for number, completion in enumerate(completions, len(reasons)):
                    row = asked[number].row | completion.fields(len(prompts[number]))
                    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
                text = "".join(lines)
                file.write(text)
                file.flush()
                whole += len(text.encode("utf-8"))
                reasons += [completion.finish_reason for completion in completions]
                say(f"answered {len(reasons)} of {len(asked)} prompts")
    except OSError as failure:
        if output is not None and output.exists():
            os.truncate(output, whole)
        raise RunError(
            f"{output or 'stdout'} cannot be written after {len(reasons)} of {len(asked)} answers: {failure}. Make "
            "room, or name an --output on another disk"
        ) from failure
    if cut := reasons.count("length"):
        say(f"{cut} of {len(reasons)} answers were cut at --max_new_tokens")


if __name__ == "__main__":
    sys.exit(run_command(main))
