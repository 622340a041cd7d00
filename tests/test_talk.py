"""The chat in a terminal: driven by typing into a pseudo-terminal; streamed tokens are those of `generate`."""

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxft import generate as command
from jaxft import train
from jaxft.config import parse
from jaxft.decode import generate, stream
from jaxft.errors import InputError
from jaxft.prepare import prepare
from jaxft.talk import base_of
from tests.tiny_models import tiny_model
from tests.tiny_runs import flags, write_base, write_rows

ROOT = Path(__file__).parent.parent
ROW = {"question": "What is it?", "answer": "a tiny model."}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ and adapter/, which has learned one answer."""
    directory = tmp_path_factory.mktemp("talk")
    write_base(directory / "base")
    data = write_rows(directory / "one.jsonl", [ROW] * 4)
    settings = flags(model_name_or_path=directory / "base", dataset=data, output_dir=directory / "adapter", lora_r=8)
    settings += flags(max_length=64, learning_rate=0.03, max_steps=30, per_device_train_batch_size=2)
    assert train.main(settings) == 0
    return directory


def test_streamed_tokens_are_those_of_generate_a_few_at_a_time():
    model, params = tiny_model("qwen3")
    prompt = [5, 9, 31, 7]
    (whole,) = generate(model, (params,), [prompt], max_new_tokens=14, stop_ids=[])
    parts = list(stream(model, (params,), prompt, max_new_tokens=14, stop_ids=[], look=4))
    assert parts == [whole[:count] for count in (4, 8, 12, 14)]
    stopped = list(stream(model, (params,), prompt, max_new_tokens=14, stop_ids=[whole[5]], look=4))
    assert stopped[-1] == whole[: whole.index(whole[5])]
    drawn = [generate(model, (params,), [prompt], max_new_tokens=9, stop_ids=[], temperature=1.5,
                      keys=jax.random.key(3)[None])[0]]  # fmt: skip
    drawn += [list(stream(model, (params,), prompt, max_new_tokens=9, stop_ids=[], temperature=1.5,
                          key=jax.random.key(3)))[-1]]  # fmt: skip
    assert drawn[0] == drawn[1]


def test_the_base_beside_an_adapter_is_the_base(place):
    named = flags(model_name_or_path=place / "base", adapter=place / "adapter")
    settings = parse("generate", ["--chat", *named])[0]
    prepared = prepare(settings, str(place / "base"))
    base = prepare(parse("generate", flags(model_name_or_path=place / "base"))[0], str(place / "base"))

    def answer(model):
        (found,) = generate(model.model, (model.trainable, model.frozen), [[70, 80]], max_new_tokens=20, stop_ids=[])
        return found

    assert answer(base_of(prepared, settings, str(place / "base"))) == answer(base) != answer(prepared)


def test_a_chat_without_a_terminal_and_a_comparison_without_an_adapter_are_refused(place, monkeypatch):
    named = flags(model_name_or_path=place / "base")
    for argv, words in (
        (["--chat", *named], "--chat alone needs a terminal to talk in"),
        (["--chat", "--compare_base", *named], "--compare_base needs --adapter"),
        (["--compare_base", *named, *flags(adapter=place / "adapter")], "is for --chat in a terminal"),
        (["--chat", "--compare_base", *named, *flags(adapter=place / "adapter", prompt="x")], "without --prompt"),
        (["--chat", "--compare_base", *named, *flags(adapter=place / "adapter")], "stdin is none"),
    ):
        with pytest.raises(InputError, match=words):
            command.main(argv)


class Typist:
    """A command in a pseudo-terminal: what it writes is read, what a person would type is written."""

    def __init__(self, argv: list[str]) -> None:
        self.terminal, inside = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "jaxft.generate", *argv], cwd=ROOT, start_new_session=True,
            stdin=inside, stdout=inside, stderr=inside,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "90", "LINES": "40"},
        )  # fmt: skip
        os.close(inside)
        self.text = ""

    def until(self, words: str, seconds: float = 120) -> str:
        """Reads up to and with `words`; returns what came before, without escapes."""
        end = time.monotonic() + seconds
        while words not in (plain_text := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)):
            left = end - time.monotonic()
            assert left > 0 and select.select([self.terminal], [], [], left)[0], f"no {words!r} in {plain_text!r}"
            self.text += os.read(self.terminal, 65536).decode("utf-8", "replace")
        self.text = plain_text[plain_text.index(words) + len(words) :]
        return plain_text[: plain_text.index(words)]

    def type(self, words: str) -> None:
        os.write(self.terminal, words.encode())

    def ends(self) -> int:
        """Its exit code; what it still writes is read, so that it can."""
        with contextlib.suppress(OSError):  # Linux: a terminal that nobody has open any more
            while os.read(self.terminal, 65536):
                pass
        return self.process.wait(60)


def test_a_chat_by_typing_answers_resets_and_exits(place):
    named = flags(model_name_or_path=place / "base", adapter=place / "adapter", max_new_tokens=16)
    chat = Typist(["--chat", "--compare_base", *named])
    assert "/reset begins anew, /exit or Ctrl-D ends" in " ".join(chat.until("you ").split())
    for again in range(2):
        chat.type(ROW["question"] + "\n")
        shown = chat.until("you ")
        boxes = [line.split("│") for line in shown.splitlines() if line.count("│") >= 4]
        base, adapter = ({box[at].strip() for box in boxes} for at in (1, -2))
        assert "base" in shown and "adapter" in shown and ROW["answer"] in adapter and ROW["answer"] not in base, shown
        chat.type("/reset\n" if again == 0 else "/what\n")
        assert ("a new conversation" if again == 0 else "there is no /what") in chat.until("you ")
    chat.type("x" * 260 + "\n")
    assert "are more than the model's 256 positions; /reset begins anew" in " ".join(chat.until("you ").split())
    chat.type("/exit\n")
    assert chat.ends() == 0
