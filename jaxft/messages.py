"""Messages as templates take them: their form checked, what tables add to them removed, other spellings made one."""

import json
from collections.abc import Mapping
from typing import Any

from jaxft.errors import InputError

Message = Mapping[str, Any]

THINKING = ("reasoning_content", "reasoning", "thinking")  # a turn's thought beside its content, as templates call it


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with a role and a content of text or, beside tool calls, None; keys without a value go."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages is {shown(messages)}; must be a list of objects with role and content, not empty")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} is {shown(message)}; must be an object with a role (a string)")
        content = message.get("content")
        if isinstance(content, list) and all(
            isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InputError(f"message {number} ({message['role']}) has content {shown(content)}; must be a string")
        # A table has the same columns in every row, so a key that some messages lack arrives here as None or [].
        kept = {key: without_none(value) for key, value in message.items() if value is not None and value != []}
        if "tool_calls" in kept:
            kept["tool_calls"] = _calls(number, kept["tool_calls"])
        checked.append({**kept, "content": content})
    return checked


def _calls(number: int, calls: Any) -> list[Any]:
    """Tool calls as templates expect them: arguments an object, also where the row has them as JSON text.

    A template writes text as one more string, with its quotes escaped; servers parse it before they render, too.
    """
    if not isinstance(calls, list) or not all(isinstance(function_of(call).get("name"), str) for call in calls):
        raise InputError(f"message {number} has tool_calls {shown(calls)}; must be a list of objects with a name")
    parsed = []
    for call in calls:
        function = dict(function_of(call))
        try:
            given = json.loads(function["arguments"])
            function["arguments"] = given if isinstance(given, dict) else function["arguments"]
        except (KeyError, TypeError, ValueError):
            pass  # none, an object already, or a text that is no JSON and is shown as it stands
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def parts_of(message: Message) -> list[str]:
    """What a message says: content, thinking, the names of the functions it calls."""
    calls = message.get("tool_calls") or []
    said = [
        message["content"],
        *(message.get(key) for key in THINKING),
        *(function_of(call).get("name") for call in calls),
    ]
    return [part for part in said if isinstance(part, str) and part]


def content_as_text(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": message["content"] or ""}


def arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(function_of(call))
        if isinstance(function.get("arguments"), dict):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def function_of(tool: Any) -> Mapping[str, Any]:
    """The inner object of a tool or of a call, which may be wrapped as {"type": "function", "function": {…}}."""
    found = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def parse_json(value: Any, name: str) -> Any:
    """JSON where a value is text that begins as a list or object does, as in a CSV cell; else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as failure:
        raise InputError(f"{name} is no JSON: {failure.msg}: {shown(value)}") from failure


def as_object(value: Any, name: str) -> Mapping[str, Any]:
    """The value, where it is a JSON object. Raises InputError for anything else."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {shown(value)}; must be an object")
    return value


def without_none(value: Any) -> Any:
    """The value without the keys that hold None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value for an error message: short, and never a whole document."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
