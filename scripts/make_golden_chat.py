"""Writes tests/data/chat_spans.json: which parts of one conversation are trained under real chat templates.

    python scripts/make_golden_chat.py TEMPLATE.jinja …

The file is read by a person before it is committed: it is what tests/test_chat_tools.py holds the code to.
"""

import json
import sys
import zlib
from pathlib import Path

from jaxft.chat import left_out, render_conversation
from jaxft.errors import InputError

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "chat_spans.json"
CALLS = [{"id": "123456789", "type": "function", "function": {"name": "add_up", "arguments": {"x": 1, "y": 2}}}]
NUMBER = {"type": "integer", "description": "a number"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_up",
            "description": "adds",
            "parameters": {"type": "object", "properties": {"x": NUMBER, "y": NUMBER}, "required": ["x", "y"]},
        },
    }
]
CONVERSATION = [  # two questions; the first is answered with the help of a tool, all is thought about
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": None, "reasoning_content": "first thought", "tool_calls": CALLS},
    {"role": "tool", "name": "add_up", "tool_call_id": "123456789", "content": "three"},
    {"role": "assistant", "content": "first answer", "reasoning_content": "second thought"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer", "reasoning_content": "third thought"},
]
PLAIN = [message for message in CONVERSATION if message["role"] != "tool" and "tool_calls" not in message]
CASES = {
    "tools": (CONVERSATION, TOOLS, {}, "responses"),
    "tools, last": (CONVERSATION, TOOLS, {}, "last"),
    "no thinking": (PLAIN, None, {"enable_thinking": False}, "responses"),
}


def trained_parts(tokenizer, case: str) -> dict:
    """What is trained in the samples of a case, and a checksum of their whole texts; or what the template refuses."""
    messages, tools, settings, train_on = CASES[case]
    try:
        rendered = render_conversation(tokenizer, messages, train_on, tools, {"date_string": "D"} | settings)
    except InputError as failure:
        return {"refused": str(failure)}
    return {
        "trained": [[sample.text[start:stop] for start, stop in sample.spans] for sample in rendered],
        "texts": [f"{len(sample.text)} {zlib.crc32(sample.text.encode()):08x}" for sample in rendered],
        "left_out": left_out(messages, rendered),
    }


def main(paths: list[Path]) -> None:
    from tests.tiny_runs import make_tokenizer

    tokenizer = make_tokenizer()
    found = {}
    for path in paths:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        found[path.stem] = {case: trained_parts(tokenizer, case) for case in CASES}
    lines = [f"{json.dumps(name)}: {json.dumps(cases, ensure_ascii=False)}" for name, cases in found.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
