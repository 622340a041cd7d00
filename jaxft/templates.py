"""Chat templates for tokenizers without one: the registry behind `--chat_template`, and how one is put on and saved."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from jaxft.errors import InputError

DIRECTORY = Path(__file__).parent / "chat_templates"
FILE = "chat_template.jinja"  # as transformers saves it
BOS = "{{- bos_token }}\n"


@dataclass(frozen=True)
class Form:
    """What a template needs of a tokenizer.

    tokens: that must be one token each. end: the token that ends an assistant's turn, None for the tokenizer's EOS.
    own_bos: False where the BOS token belongs to the form; True where it stands there only if the tokenizer itself puts
    one before a text, so that a base sees what it was pretrained with.
    """

    tokens: tuple[str, ...] = ()
    end: str | None = None
    own_bos: bool = False


_CHATML, _HEADERS = ("<|im_start|>", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FORMS = {
    "chatml": Form(_CHATML, "<|im_end|>", own_bos=True),
    "llama-3": Form(_HEADERS, "<|eot_id|>"),
    "llama-3.1": Form(_HEADERS, "<|eot_id|>"),
    "qwen-2.5": Form(_CHATML, "<|im_end|>"),
    "qwen-3": Form(_CHATML, "<|im_end|>"),
    "gemma": Form(("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": Form(("[INST]", "[/INST]")),
    "phi-3": Form(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "phi-4": Form(("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>"),
    "alpaca": Form(own_bos=True),
    "vicuna": Form(own_bos=True),
    "zephyr": Form(own_bos=True),
}


def read_template(name: str) -> tuple[str, Form]:
    """The template that `--chat_template` names, one of `FORMS` or a .jinja file, and what it needs of a tokenizer.

    Raises InputError where there is none of that name, the file cannot be read, or is no Jinja.
    """
    if name in FORMS:
        return (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8"), FORMS[name]
    path = Path(name).expanduser()
    if path.suffix not in (".jinja", ".jinja2", ".j2") and not path.is_file():
        raise InputError(f"--chat_template {name!r}: there are {', '.join(FORMS)}, or a FILE.jinja")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat_template {name} cannot be read: {error}") from error
    try:
        # transformers' tag `generation` is none of Jinja's own
        Environment(extensions=[loopcontrols]).parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
    except TemplateSyntaxError as error:
        raise InputError(f"--chat_template {name}, line {error.lineno}: no Jinja: {error.message}") from error
    return text, Form()


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Puts a template on the tokenizer, which is changed; returns what ends an assistant's turn under it.

    Raises InputError where the tokenizer lacks a token that the template is made of: it would be cut into pieces that
    the model never saw, and its turns would have no token to end with.
    """
    text, form = read_template(name)
    lacking = [token for token in form.tokens if not _is_token(tokenizer, token)]
    if lacking:
        free = ", ".join(other for other, needs in FORMS.items() if not needs.tokens)
        raise InputError(
            f"--chat_template {name} is made of tokens that the tokenizer has not: {' '.join(lacking)}; add them by "
            f"--add_tokens '{','.join(lacking)}', which trains embedding and head too, or take one that needs none: "
            f"{free}"
        )
    if name in FORMS and form.end is None and tokenizer.eos_token is None:
        raise InputError(f"--chat_template {name} ends turns with the EOS token, and the tokenizer has none")
    if form.own_bos and not _puts_bos(tokenizer):
        text = text.removeprefix(BOS)
    tokenizer.chat_template = text
    return form.end or str(tokenizer.eos_token)


def _is_token(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    return token in tokenizer.get_vocab() and len(tokenizer.encode(token, add_special_tokens=False)) == 1


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text that it tokenises begins with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("0")["input_ids"][:1] == [tokenizer.bos_token_id]


def saved_template(directory: Path) -> str | None:
    """The chat template that was saved with a tokenizer or an adapter; None where there is none.

    Raises InputError where the files cannot be read.
    """
    try:
        if (directory / FILE).is_file():
            return (directory / FILE).read_text(encoding="utf-8")
        config = directory / "tokenizer_config.json"
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: its tokenizer's files cannot be read: {error}; copy them again") from error
    return found if isinstance(found, str) else None


def write_template(directory: Path, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
    """Makes the tokenizer files of a directory carry the tokenizer's template, in place of any that they have.

    ends: the ids that end a turn, which generation_config.json then lists, so that whatever generates stops there.
    """
    (directory / FILE).write_text(str(tokenizer.chat_template), encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    _change(directory / "tokenizer_config.json", lambda found: found.pop("chat_template", None))
    if not (directory / "generation_config.json").is_file():
        (directory / "generation_config.json").write_text("{}\n", encoding="utf-8")
    only = ends[0] if len(ends) == 1 else list(ends)
    _change(directory / "generation_config.json", lambda found: found.update(eos_token_id=only))


def _change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the object of a JSON file, where there is one."""
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        change(found)
        path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
