"""Renders conversations through a tokenizer's chat template and finds the spans of text that are trained."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from jaxft.errors import InputError
from jaxft.messages import Message, arguments_as_text, checked_messages, content_as_text, parts_of
from jaxft.samples import Document, Sample, weighted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

TRAIN_ON = ("responses", "last", "all")


@dataclass(frozen=True)
class Rendered:
    """A text and its trained spans: (start, stop) in characters, in order, not overlapping."""

    text: str
    spans: list[Span]


def render_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    train_on: str = "responses",
    tools: list[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    first_trained: int = 0,
) -> list[Rendered]:
    """The texts that a conversation trains, one where the template allows it.

    With `train_on="responses"` the assistant's turns from message `first_trained` on are trained: each from what the
    model is prompted with (the messages before it and the generation prompt) to the end of the turn, whose
    end-of-turn token is trained and the template's white space after it is not. With "last" only the last of those
    turns is. With "all" every character is.

    The template is rendered turn by turn. As long as a turn's rendering begins with the one before, both share a
    text. Where it does not (a template that drops earlier thinking, moves the system message, or ends every
    rendering with EOS) the next turn is a text of its own, with the history as the template shows it at that turn;
    under "all" it trains from the first character that differs, so that no text is trained twice. Messages after the
    last assistant turn are left out but under "all", as nothing is trained in them or behind them.

    A turn of which the template shows nothing (tool calls that it does not know) is not trained.

    Raises InputError for messages of a wrong form and for what the template itself refuses.
    """
    check_train_on(train_on)
    template = _Template(tokenizer, tools, template_kwargs)
    checked = checked_messages(messages)
    turns = [number for number, message in enumerate(checked) if message["role"] == "assistant"]
    if train_on == "last":
        turns = turns[-1:]
    pieces = [template.turn(checked, number) for number in turns]
    if not turns or (train_on == "all" and turns[-1] != len(checked) - 1):
        text = template.render(checked)
        turns, pieces = [*turns, -1], [*pieces, (text, len(text), len(text))]
    samples: list[Rendered] = []
    done = 0  # where the last turn of samples[-1] ends
    for number, (text, start, stop) in zip(turns, pieces, strict=True):
        spans = [(start, stop)] if number >= first_trained and stop > start else []
        if samples and start >= done and text.startswith(samples[-1].text[:done]):
            samples[-1] = Rendered(text, samples[-1].spans + spans)
        else:
            samples.append(Rendered(text, spans))
        done = stop
    if train_on != "all":
        return [sample for sample in samples if sample.spans] or samples[-1:]
    texts = ["", *(sample.text for sample in samples)]
    return [Rendered(text, [(_common_prefix(before, text), len(text))]) for before, text in itertools.pairwise(texts)]


def check_train_on(train_on: str) -> None:
    """Raises InputError for anything but the names in TRAIN_ON."""
    if train_on not in TRAIN_ON:
        raise InputError(f"train_on is {train_on!r}; understood: {', '.join(TRAIN_ON)}")


def left_out(messages: Sequence[Message], rendered: Sequence[Rendered]) -> int:
    """How many messages have something that none of their rendered texts shows in full, white space aside.

    That is their content, their thinking, or the name of a function that they call.
    """
    texts = [sample.text for sample in rendered]
    return sum(not all(_shows(texts, part) for part in parts_of(message)) for message in checked_messages(messages))


def _shows(texts: Sequence[str], part: str) -> bool:
    """Whether one of the texts has the part in it, white space aside."""
    if any(part.strip() in text for text in texts):
        return True
    bare = "".join(part.split())
    return any(bare in "".join(text.split()) for text in texts)


def trained_tokens(
    tokenizer: "PreTrainedTokenizerBase", rendered: Sequence[Rendered], special_tokens: bool = False
) -> list[Document]:
    """(ids int32, trained bool) of each text; a token is trained where it overlaps a trained span.

    That is the rule of transformers' own `assistant_tokens_mask`. `special_tokens` adds what the tokenizer itself puts
    around a text (never trained); a rendered conversation has them already, so it is tokenised without.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot say which characters a token stands for, "
            "so the trained part of a row cannot be found; use a model with a tokenizer.json"
        )
    encoded = tokenizer(
        [sample.text for sample in rendered],
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        verbose=False,
    )
    found = []
    for sample, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        numbers = itertools.chain.from_iterable(offsets)  # half the time of an array of pairs
        begin, end = np.fromiter(numbers, np.int64, 2 * len(offsets)).reshape(-1, 2).T
        trained = np.zeros(len(begin), bool)
        for start, stop in sample.spans:
            trained |= (begin < stop) & (end > start)
        found.append((np.asarray(ids, np.int32), trained))
    return found


def encode(tokenizer: "PreTrainedTokenizerBase", rendered: Rendered) -> Sample:
    """One rendered conversation as a sample; tokens in trained spans weigh 1, all others and the first one 0."""
    [(ids, trained)] = trained_tokens(tokenizer, [rendered])
    if not len(ids):
        raise InputError("the conversation renders to no token at all")
    return weighted(ids, trained)


class _Template:
    """A chat template with its tools and settings bound."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tools: list[Any] | None, settings: Mapping[str, Any] | None
    ) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template, which messages need; choose one with --chat_template (chatml, "
                "llama-3, … or a file), use the instruct model's tokenizer, or give rows as prompt/completion or text"
            )
        self._tokenizer, self._tools, self._settings = tokenizer, tools, dict(settings or {})

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """The messages as text, with the opening of an assistant's turn behind them where `prompt` is true."""
        try:
            return self._call(messages, prompt)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as failure:
            # A turn of tool calls alone has no content, and its arguments are an object. Some templates ask whether the
            # content is none, others only read a string; some read arguments as JSON text. They mean the same.
            for form in (arguments_as_text, content_as_text):
                if (other := list(map(form, messages))) != messages:
                    try:
                        return self._call(other, prompt)
                    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
                        pass  # the first failure is the one about the row as it stands
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"the chat template refuses the conversation ({roles}): {failure}") from failure

    def turn(self, messages: list[dict[str, Any]], number: int) -> tuple[str, int, int]:
        """(text, start, stop) of the assistant's turn `number`: the text ends with it, start:stop is trained.

        A turn of which the template shows nothing is not: of calls that it does not know it makes an empty turn, from
        which a model would learn to say nothing.
        """
        before = messages[:number]
        text = self.render(messages[: number + 1])
        wordless = not messages[number]["content"] and parts_of(messages[number])
        if wordless and text == self.render([*before, {"role": "assistant", "content": ""}]):
            return text, len(text.rstrip()), len(text.rstrip())
        prompt = self.render(before, prompt=True) if before else ""
        if before and text.startswith(prompt):
            start = len(prompt)
        else:
            # The turn does not begin with the generation prompt: the prompt opens a thinking part that a finished
            # turn does not show, or the history itself looks different once it is answered.
            body = self._body(text, before)
            if not before:
                start = body
            elif text.startswith(history := self.render(before)):
                start = max(len(history), min(_common_prefix(prompt, text), body))
            else:
                # What the model will be prompted with is the truth about the history; else a system message that the
                # template shows only beside the newest question would be lost.
                text, start = prompt + text[body:], len(prompt)
        return text, start, len(text.rstrip())

    def _body(self, text: str, before: list[dict[str, Any]]) -> int:
        """Where the rendered turn at the end of `text` stops being the template's and becomes the message's own."""
        # A body of "0" and one of "1" differ at their first character, so at most one of them agrees with the turn.
        probes = [self.render([*before, {"role": "assistant", "content": probe}]) for probe in "01"]
        return min(_common_prefix(text, probe) for probe in probes)

    def _call(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        rendered = self._tokenizer.apply_chat_template(
            messages, tools=self._tools, tokenize=False, add_generation_prompt=prompt, **self._settings
        )
        return str(rendered)


def _common_prefix(a: str, b: str) -> int:
    """How many characters the beginnings of both texts share."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
