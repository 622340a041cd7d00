"""`python -m jaxft.generate --chat` in a terminal: a conversation, with adapter and base side by side if wished."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from jaxft.decode import stream
from jaxft.errors import InputError
from jaxft.models.rope import DynamicRope
from jaxft.prepare import Prepared, model_of, prepare
from jaxft.prompts import Asked, prompt_tokens
from jaxft.settings import GenerateSettings
from jaxft.stops import cut_at_stop, stop_token_ids
from jaxft.trees import flatten, unflatten

HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C ends an answer"


@dataclass
class Voice:
    """One model with its own side of the conversation: answers differ, so what was said does."""

    name: str
    prepared: Prepared
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, settings: GenerateSettings) -> list[int]:
        """The tokens of the conversation up to the answer. Raises InputError where there are no positions for it."""
        tokens = prompt_tokens(Asked("the chat", {"messages": self.messages}), self.prepared.tokenizer, settings)
        config = self.prepared.model.config
        endless = any(isinstance(rope, DynamicRope) for rope in config.ropes)
        if len(tokens) + settings.max_new_tokens > config.max_position_embeddings and not endless:
            raise InputError(
                f"the conversation's {len(tokens)} tokens and --max_new_tokens {settings.max_new_tokens} are more than "
                f"the model's {config.max_position_embeddings} positions; /reset begins anew"
            )
        return tokens

    def answer(self, settings: GenerateSettings, key: jax.Array) -> Iterator[str]:
        """The answer's text so far, again and again."""
        prepared = self.prepared

        def decode(tokens: Sequence[int]) -> str:
            return str(prepared.tokenizer.decode(list(tokens), skip_special_tokens=True))

        for tokens in stream(
            prepared.model, (prepared.trainable, prepared.frozen), self.prompt(settings),
            stop_ids=stop_token_ids(prepared.tokenizer, prepared.directory, settings.stop),
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_k=settings.top_k,
            top_p=settings.top_p, repetition_penalty=settings.repetition_penalty, key=key, dtype=prepared.compute_dtype,
        ):  # fmt: skip
            text, count = cut_at_stop(tokens, settings.stop, decode)
            yield text.rstrip("\ufffd") if count is None else text  # half a character is not shown
            if count is not None:
                return


def base_of(prepared: Prepared, settings: GenerateSettings, model_name: str) -> Prepared:
    """The model without its adapter: the same arrays with B = 0; loaded anew where the adapter replaces some."""
    paths = [path for path, _ in flatten(prepared.trainable)]
    if prepared.new_tokens or not all("/lora/" in path for path in paths):
        return prepare(replace(settings, adapter=None), model_name)
    zeros = {path: jnp.zeros_like(leaf) for path, leaf in flatten(prepared.trainable)}
    return replace(prepared, trainable=unflatten(zeros))


def talk(settings: GenerateSettings) -> int:
    """Reads turns from the terminal and shows the answers while they come, until /exit or the end of the input."""
    model_name = model_of(settings)
    prepared = prepare(settings, model_name)
    voices = [Voice("adapter" if settings.adapter else "model", prepared)]
    if settings.compare_base:
        voices.insert(0, Voice("base", base_of(prepared, settings, model_name)))
    if not prepared.tokenizer.chat_template:
        raise InputError(
            "--chat: this tokenizer has no chat template; use --prompt without --chat, or an instruct model"
        )
    console = Console()
    named = f"{model_name} with {settings.adapter}" if settings.adapter else model_name
    console.print(f"{named}. {HELP}", style="dim", highlight=False, markup=False)
    key, turn = jax.random.key(settings.seed), 0
    with jax.set_mesh(prepared.mesh):
        while True:
            said = _read(console)
            if said is None or said == "/exit":
                return 0
            if said == "/reset":
                for voice in voices:
                    voice.messages.clear()
                console.print("a new conversation", style="dim")
            elif said.startswith("/"):
                console.print(f"there is no {said.split()[0]}; {HELP}", style="dim", highlight=False, markup=False)
            elif said:
                turn += 1
                _answer(console, voices, said, settings, jax.random.fold_in(key, turn))


def _read(console: Console) -> str | None:
    """A line that was typed; None at the end of the input."""
    import readline  # noqa: F401  # typing with a history; only here, for it takes hold of the terminal

    try:
        return console.input("[bold cyan]you[/] ").strip()
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        return ""


def _answer(console: Console, voices: Sequence[Voice], said: str, settings: GenerateSettings, key: jax.Array) -> None:
    """Each voice's answer, shown while it comes; one that is interrupted stays as far as it came."""
    for voice in voices:
        voice.messages.append({"role": "user", "content": said})
    texts = [""] * len(voices)
    try:
        with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
            for parts in zip_longest(*(voice.answer(settings, key) for voice in voices)):
                texts = [old if new is None else new for old, new in zip(texts, parts, strict=True)]
                live.update(_shown(voices, texts, console.width))
    except KeyboardInterrupt:
        console.print("interrupted", style="dim")
    except InputError as failure:
        for voice in voices:
            voice.messages.pop()
        console.print(f"error: {failure}", style="red", markup=False, highlight=False)
        return
    for voice, text in zip(voices, texts, strict=True):
        voice.messages.append({"role": "assistant", "content": text})


def _shown(voices: Sequence[Voice], texts: Sequence[str], width: int) -> Any:
    if len(voices) == 1:
        return Text.assemble((f"{voices[0].name} ", "bold green"), texts[0])
    each = max(20, width // len(voices) - 1)
    panels = [
        Panel(Text(text), title=voice.name, title_align="left", width=each, border_style="grey50")
        for voice, text in zip(voices, texts, strict=True)
    ]
    return Columns(panels, padding=(0, 1))
