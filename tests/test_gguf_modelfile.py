"""The Ollama Modelfile beside a GGUF file: the chat template in Go's words, the tokens that end an answer."""

import json
import re

import pytest

from jaxft.convert.gguf.modelfile import take_apart, write_modelfile
from jaxft.convert.gguf.tokenizer_out import describe
from tests.conftest import need_shared
from tests.tiny_runs import CHATML, make_tokenizer

TURNS = [
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
]  # fmt: skip
SYSTEM = {"role": "system", "content": "be brief"}
JOINED = (  # the system's message stands in the first user's turn
    "{% for m in messages %}{% if m.role == 'system' %}{{ '[U]' + m.content + '\n\n' }}{% elif m.role == 'user' %}"
    "{{ ('' if loop.previtem is defined and loop.previtem.role == 'system' else '[U]') + m.content + '[/U]' }}"
    "{% else %}{{ '[A]' + m.content + '[/A]' }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
REVERSED = "{% for m in messages | reverse %}{{ m.role + m.content }}{% endfor %}"


def go_renders(template: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of the templates that are written here: if, else if, range, one variable."""
    tokens = [part for part in re.split(r"(\{\{.*?\}\})", template) if part]

    def block(at: int) -> tuple[list, int, str]:
        nodes: list = []
        while at < len(tokens):
            word = tokens[at]
            command = word[2:-2].strip() if word.startswith("{{") else None
            if command is None:
                nodes.append(("text", word))
            elif command.startswith(("if ", "range ")):
                arms, command_now = [], command
                while True:
                    body, at, ended = block(at + 1)
                    arms.append((command_now, body))
                    if ended == "end":
                        break
                    command_now = ended.removeprefix("else ").strip()
                nodes.append(("branch", arms))
            elif command == "end" or command.startswith("else"):
                return nodes, at, command
            else:
                nodes.append(("do", command))
            at += 1
        return nodes, at, "end"

    def holds(condition: str, state: dict) -> bool:
        condition = condition.removeprefix("if ")
        if condition == "not $joined":
            return not state["$joined"]
        if condition == 'ne (index .Messages 0).Role "system"':
            return messages[0]["role"] != "system"
        if condition == "and $last $.System":
            return state["last"] and messages[0]["role"] == "system"
        return state["message"]["role"] == re.fullmatch(r'eq \.Role "(\w+)"', condition).group(1)

    def run(nodes: list, state: dict) -> str:
        text = ""
        for kind, value in nodes:
            if kind == "text":
                text += value
            elif kind == "branch" and value[0][0].startswith("range"):
                for number, message in enumerate(messages):
                    state |= {"message": message, "last": number == len(messages) - 1}
                    text += run(value[0][1], state)
            elif kind == "branch":
                text += next((run(body, state) for condition, body in value if holds(condition, state)), "")
            elif value == ".Content":
                text += state["message"]["content"]
            elif value == "$.System":
                text += messages[0]["content"]
            elif value.startswith("$joined"):
                state["$joined"] = value.endswith("true")
        return text

    return run(block(0)[0], {"$joined": False})


def holds_for(tokenizer, bos: str = "") -> None:
    pieces = take_apart(tokenizer, bos)
    conversations = [TURNS[:1], TURNS, TURNS + TURNS[1:]]
    if pieces.system is not None:
        conversations += [[SYSTEM, *turns] for turns in conversations]
    for messages in conversations:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go_renders(pieces.go(), messages) == expected.removeprefix(bos)


@pytest.mark.parametrize("template", [CHATML, JOINED, NO_SYSTEM])
def test_the_go_template_renders_what_the_chat_template_does(template):
    holds_for(make_tokenizer(template))


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct",
        "mistralai-Mistral-Nemo-Instruct-2407", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    ],
)  # fmt: skip
def test_released_templates_are_said_in_go(name):
    template = need_shared(f"tokenizers/chat_templates/{name}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    holds_for(tokenizer, tokenizer.bos_token if "bos_token" in template or "begin_of_text" in template else "")


def test_a_template_that_is_no_sequence_of_turns_is_left_to_the_file(tmp_path):
    tokenizer = make_tokenizer(REVERSED)
    assert take_apart(tokenizer, "") is None
    file = tmp_path / "m.gguf"
    assert not write_modelfile(tmp_path / "Modelfile", file, tokenizer, describe(tokenizer, 264), tmp_path)
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()


def test_a_modelfile_names_file_template_stops_and_parameters(tmp_path):
    tokenizer = make_tokenizer()
    settings = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [257, 259]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    file = tmp_path / "m-q8_0.gguf"
    assert write_modelfile(tmp_path / "Modelfile", file, tokenizer, describe(tokenizer, 264, tmp_path), tmp_path)
    assert (tmp_path / "Modelfile").read_text() == (
        "FROM ./m-q8_0.gguf\n\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<eos>"\n'
        "PARAMETER temperature 0.7\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.05\n"
    )
