"""An Ollama Modelfile beside a GGUF file: the chat template as Go writes it, stop tokens, sampling parameters.

A chat template is taken apart by what it renders: what stands before and after each role's message. That is then put
together again by the rules that the Go template will follow, and held against the chat template's own renderings.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jaxft.cache import writes_date
from jaxft.convert.gguf.vocabulary import Vocabulary

Messages = list[dict[str, str]]
S, U, A, LAST = "Sys0tem", "Us0er", "As0sistant", "La0st"  # words that no template writes itself
PARAMETERS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """What stands around messages. without: what a text begins with where no system message does.

    system: around its message, None where the template refuses one. joined: a user's message that follows the system's
    has nothing before it, as both are one turn. late: the system's message stands within the last user's turn.
    """

    without: str
    system: tuple[str, str] | None
    joined: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    late: bool = False

    def render(self, messages: Messages) -> str:
        """What the Go template gives for a conversation that ends with a user's message."""
        text, after_system = "" if messages[0]["role"] == "system" else self.without, False
        if self.late and self.system and messages[0]["role"] == "system":
            system, *messages, last = messages
            content = system["content"] + self.system[1] + last["content"]
            messages = [*messages, {"role": "user", "content": content}]
        for message in messages:
            before, after = {"system": self.system or ("", ""), "user": self.user}.get(message["role"], self.assistant)
            before = "" if after_system and self.joined and message["role"] == "user" else before
            text += before + message["content"] + after
            after_system = message["role"] == "system"
        return text + self.prompt

    def go(self) -> str:
        """The Go template."""
        user, loop = self.user[0], "range .Messages"
        start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.without}{{{{ end }}}}' if self.without else ""
        known = "{{ $joined := false }}" if self.joined and self.system else ""
        system = ""
        if self.late and self.system:
            known = ""
            loop = "range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1"
            user += f"{{{{ if and $last $.System }}}}{{{{ $.System }}}}{self.system[1]}{{{{ end }}}}"
        elif self.system:
            mark = "{{ $joined = true }}" if known else ""
            system = f'if eq .Role "system" }}}}{self.system[0]}{{{{ .Content }}}}{self.system[1]}{mark}{{{{ else '
        if known:
            user = f"{{{{ if not $joined }}}}{user}{{{{ end }}}}{{{{ $joined = false }}}}"
        return (
            f"{start}{known}{{{{ {loop} }}}}{{{{ {system}"
            f'if eq .Role "user" }}}}{user}{{{{ .Content }}}}{self.user[1]}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}'
            f"{{{{ end }}}}{{{{ end }}}}{self.prompt}"
        )


def take_apart(tokenizer: PreTrainedTokenizerBase, bos: str) -> Pieces | None:
    """The pieces of a chat template, or None where it is made otherwise. bos: what is put before every text anyway."""

    def render(messages: Messages, prompt: bool = True) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return str(text).removeprefix(bos)

    conversations = [_messages(U), _messages(U, A, LAST)]
    try:
        user_alone, answered = render(_messages(U), prompt=False), render(_messages(U, A), prompt=False)
        cases = [(messages, render(messages)) for messages in conversations]
    except TemplateError:
        return None
    try:
        first = [{"role": "system", "content": S}]
        cases += [(first + messages, render(first + messages)) for messages in conversations]
    except TemplateError:  # there is no place for a system message
        pass
    for messages, text in cases:
        words = [one["content"] for one in messages]
        if [text.count(word) for word in words] != [1] * len(words):
            return None
    if not cases[1][1].index(U) < cases[1][1].index(A) < cases[1][1].index(LAST):
        return None
    user_end, answer_end = user_alone.split(U)[-1], answered.split(A)[-1]
    start, rest = cases[1][1].split(U)
    to_assistant, rest = rest.split(A)
    to_user, _ = rest.split(LAST)
    prompt = cases[0][1].split(U)[1]
    user = (to_user.removeprefix(answer_end), user_end)
    assistant = (to_assistant.removeprefix(user_end), answer_end)
    pieces = Pieces(start.removesuffix(user[0]), None, False, user, assistant, prompt.removeprefix(user_end))
    if len(cases) > 2:
        if cases[2][1].index(S) > cases[2][1].index(U):
            return None
        head, middle = cases[2][1].split(U)[0].split(S)
        joined = not middle.endswith(user[0])
        pieces = replace(pieces, system=(head, middle if joined else middle.removesuffix(user[0])), joined=joined)
    if pieces.joined and pieces.system and pieces.render(cases[-1][0]) != cases[-1][1]:
        pieces = replace(pieces, late=pieces.system[0] == user[0])
    if any(pieces.render(messages) != text for messages, text in cases):
        return None
    said = "".join([pieces.without, *(pieces.system or ()), *user, *assistant, pieces.prompt])
    return None if "{{" in said or '"""' in said else pieces


def _messages(*texts: str) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_modelfile(
    path: Path, file: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, directory: Path
) -> bool:
    """Writes a Modelfile for a GGUF file in the same directory; returns whether the template could be said in it."""
    bos = vocabulary.tokens[vocabulary.ids["bos"]] if vocabulary.add_bos else ""
    lines = [f"FROM ./{file.name}", ""]
    pieces = take_apart(tokenizer, bos) if tokenizer.chat_template else None
    if pieces is not None:
        if pieces.system is None:
            lines.append("# the model's chat template has no place for a system message")
        if writes_date(tokenizer):
            lines.append("# the chat template writes the day's date; here stands that of the export")
        lines += [f'TEMPLATE """{pieces.go()}"""', ""]
    elif tokenizer.chat_template:
        lines += ["# the model's chat template is no sequence of turns; the one in the file is used", ""]
    stops = dict.fromkeys(vocabulary.tokens[vocabulary.ids[n]] for n in ("eot", "eos", "eom") if n in vocabulary.ids)
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(directory).items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return pieces is not None or not tokenizer.chat_template


def _parameters(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if written.get("do_sample") is False:
        return {"temperature": 0}
    return {
        short: written[name] for name, short in PARAMETERS.items() if type(written.get(name)) in (int, float)
    }  # fmt: skip
