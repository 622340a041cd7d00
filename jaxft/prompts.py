"""What is to be continued: one text, one conversation, or a JSONL file of them, read and rendered into tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jaxft.errors import InputError
from jaxft.messages import as_object, shown
from jaxft.settings import GenerateSettings

ANSWER_FIELDS = ("completion", "prompt_tokens", "completion_tokens", "finish_reason")  # what an answered row gains


@dataclass(frozen=True)
class Asked:
    """One row to answer, `{"prompt": text}` or `{"messages": […]}` and what else it holds, and where it stands."""

    where: str
    row: dict[str, Any]


def read_asked(settings: GenerateSettings) -> list[Asked]:
    """The rows that `--prompt`, `--messages` or `--prompts` ask for.

    Raises InputError, with file and line, for what cannot be read or holds neither a prompt nor messages.
    """
    if settings.prompts is not None:
        return _read_lines(Path(settings.prompts).expanduser())
    if settings.messages is not None:
        path = Path(settings.messages).expanduser()
        return [Asked(f"--messages {path}", {"messages": _read_messages(path)})]
    if settings.prompt is None:
        raise InputError(
            "nothing to continue: give --prompt TEXT, or --messages FILE, or --prompts FILE.jsonl; --chat alone "
            "needs a terminal to talk in"
        )
    return [Asked("--prompt", {"prompt": settings.prompt})]


def _read_messages(path: Path) -> list[dict[str, Any]]:
    """A conversation from a JSON file: a list of messages, or an object that has one as `messages`, as a data row."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as failure:
        raise InputError(f"--messages {path} cannot be read as JSON: {failure}; write a list of messages") from failure
    return _messages(found.get("messages") if isinstance(found, dict) else found, f"--messages {path}")


def _read_lines(path: Path) -> list[Asked]:
    """The rows of a JSONL file. A line without anything on it is no row."""
    try:
        content = path.read_bytes()
    except OSError as failure:
        raise InputError(f"--prompts {path} cannot be read: {failure.strerror}; name a JSONL file") from failure
    asked = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"--prompts {path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
            row = json.loads(text) if text else {}
        except UnicodeDecodeError as failure:
            raise InputError(f"{where}: not UTF-8 (byte {failure.start} of the line); save it as UTF-8") from failure
        except json.JSONDecodeError as failure:
            at = f"column {failure.colno}: malformed JSON: {failure.msg}"
            raise InputError(f"{where}, {at}: {shown(text)}; every line is one JSON object") from failure
        if text:
            _check_row(row, where)
            asked.append(Asked(where, row))
    if not asked:
        raise InputError(f'--prompts {path}: there is no line in it; a line is {{"prompt": …}} or {{"messages": …}}')
    return asked


def _check_row(row: Any, where: str) -> None:
    form = '{"prompt": "text"} or {"messages": [{"role": …, "content": …}]}'
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, this one is {shown(row)}; expected {form}")
    if ("prompt" in row) == ("messages" in row):
        seen = "both prompt and messages" if "prompt" in row else f"fields {', '.join(row) or '(none)'}"
        raise InputError(f"{where}: {seen} found; a row has one of {form}")
    if taken := [name for name in ANSWER_FIELDS if name in row]:
        raise InputError(f"{where}: the field {taken[0]} is one that the answer is written into; rename or remove it")
    if "prompt" in row and not isinstance(row["prompt"], str | list):
        raise InputError(f"{where}: prompt is {shown(row['prompt'])}; must be a string, or a list of messages")
    if not isinstance(row.get("prompt"), str):
        _messages(row.get("messages", row.get("prompt")), where)


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The conversation. Raises InputError where it is none, or is answered already."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise InputError(f"{where}: messages is {shown(messages)}; a list of objects with role and content is needed")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: the conversation ends with the assistant's turn; leave out what is to be generated")
    return messages


def prompt_tokens(asked: Asked, tokenizer: PreTrainedTokenizerBase, settings: GenerateSettings) -> list[int]:
    """The tokens to continue: a prompt as it is, with the tokenizer's own special tokens, or a rendered conversation.

    Raises InputError where there is no chat template or it refuses the conversation, or no token to continue.
    """
    raw = isinstance(asked.row.get("prompt"), str) and not settings.chat
    try:
        text = str(asked.row["prompt"]) if raw else _render(asked, tokenizer, settings.chat_template_kwargs)
        text.encode("utf-8")  # JSON and a terminal can hold half a surrogate pair, which is no character
    except UnicodeEncodeError as failure:
        raise InputError(f"{asked.where}: character {failure.start} is half a character; write it whole") from failure
    tokens = tokenizer.encode(text, add_special_tokens=raw)  # a rendered conversation has them already
    if not tokens:
        raise InputError(f"{asked.where}: the prompt has no token to continue; give some text")
    return tokens


def _render(asked: Asked, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> str:
    """The conversation up to the opening of the assistant's turn; of the template's settings the row's own win."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{asked.where}: this tokenizer has no chat template; choose one with --chat_template, or use --prompt "
            "without --chat, or an instruct model"
        )
    messages: Any = asked.row.get("messages", asked.row.get("prompt"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    own = as_object(asked.row.get("chat_template_kwargs") or {}, f"{asked.where}: chat_template_kwargs")
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=asked.row.get("tools"), tokenize=False, add_generation_prompt=True,
                **{**template_kwargs, **own},
            )
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as failure:
        raise InputError(
            f"{asked.where}: the chat template refuses the conversation: {failure}; change the messages"
        ) from failure
