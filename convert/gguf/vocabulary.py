"""A tokenizer as GGUF says it: tokens with their kinds, merges or scores, special ids, chat templates."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gguf import TokenType
from jaxft.errors import InputError

NORMAL, UNKNOWN, CONTROL = int(TokenType.NORMAL), int(TokenType.UNKNOWN), int(TokenType.CONTROL)
USER, UNUSED, BYTE = int(TokenType.USER_DEFINED), int(TokenType.UNUSED), int(TokenType.BYTE)
BPE, SPM, UNIGRAM = "gpt2", "llama", "t5"  # tokenizer.ggml.model
PREFIX = "tokenizer.ggml."
OWN = "jaxft.tokenizer."  # keys that llama.cpp passes over: what it does not tell apart
IDS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
    "unk": "unknown_token_id", "pad": "padding_token_id",
}  # fmt: skip
NO_MERGES = [" "]  # llama.cpp needs the key, and the gguf package writes no empty list
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types: a text and a `TokenType` for each id. scores: of "llama" and "t5"; merges: of "gpt2".

    pre: llama.cpp's name for how text is cut before merging. ids: of special tokens by the names of `IDS`. add_bos,
    add_eos: what is put around a text. space_prefix: a text gets a space before it; anywhere: also after each special
    token, as llama.cpp does. nfc: text is normalised so. charsmap: sentencepiece's normalisation; extra_spaces: it
    removes them. templates: by name, "default" first.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool = False
    anywhere: bool = True
    nfc: bool = False
    charsmap: bytes | None = None
    extra_spaces: bool = False
    templates: dict[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """Key -> value of everything, as llama.cpp reads it."""
        keys: dict[str, Any] = {
            f"{PREFIX}model": self.model,
            f"{PREFIX}pre": self.pre,
            f"{PREFIX}tokens": self.tokens,
            f"{PREFIX}token_type": self.types,
            f"{PREFIX}add_bos_token": self.add_bos,
            f"{PREFIX}add_eos_token": self.add_eos,
            f"{PREFIX}add_space_prefix": self.space_prefix,
        }
        if self.scores is not None:
            keys[f"{PREFIX}scores"] = self.scores
        if self.merges is not None:
            keys[f"{PREFIX}merges"] = self.merges or NO_MERGES
        keys |= {PREFIX + IDS[name]: number for name, number in self.ids.items()}
        if self.model == BPE:
            keys[f"{OWN}nfc"] = self.nfc
        if not self.anywhere:
            keys[f"{OWN}prefix_at_start_only"] = True
        if self.model == UNIGRAM:
            keys[f"{PREFIX}remove_extra_whitespaces"] = self.extra_spaces
            if self.charsmap:
                keys[f"{PREFIX}precompiled_charsmap"] = np.frombuffer(self.charsmap, np.uint8)
        for name, template in self.templates.items():
            keys[TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"] = template
        if others := [name for name in self.templates if name != "default"]:
            keys[TEMPLATES] = others
        return keys


def from_metadata(metadata: dict[str, Any], default_nfc: tuple[str, ...] = ()) -> Vocabulary:
    """What `Vocabulary.metadata` wrote, or another program. Raises InputError where it contradicts itself.

    default_nfc: the `pre`s that normalise where the file does not say it.
    """

    def get(key: str, default: Any) -> Any:
        return metadata.get(PREFIX + key, default)

    model, tokens = get("model", None), get("tokens", None)
    if model not in (BPE, SPM, UNIGRAM):
        raise InputError(f"its tokenizer is {model!r}; {BPE}, {SPM} and {UNIGRAM} are read")
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"it has no {PREFIX}tokens")
    types = _numbers(get("token_type", None), len(tokens), NORMAL, "token_type")
    scores = None if model == BPE else _numbers(get("scores", None), len(tokens), 0.0, "scores")
    merges = get("merges", None)
    if model == BPE and not isinstance(merges, list):
        raise InputError(f"it has no {PREFIX}merges, which a {BPE} tokenizer needs")
    ids = {}
    for name, key in IDS.items():
        found = get(key, None)
        if type(found) is int and 0 <= found < len(tokens):
            ids[name] = found
    if model == SPM and "unk" not in ids and UNKNOWN in types:
        ids["unk"] = types.index(UNKNOWN)
    pre = str(get("pre", "default"))
    charsmap = get("precompiled_charsmap", None)
    return Vocabulary(
        model, pre, tokens, [int(one) for one in types], scores,
        (merges if merges != NO_MERGES else []) if model == BPE else None, ids,
        add_bos=_flag(get("add_bos_token", model == SPM or pre in BOS_BY_PRE)),
        add_eos=_flag(get("add_eos_token", model == UNIGRAM)),
        space_prefix=_flag(get("add_space_prefix", model != BPE)),
        anywhere=not _flag(metadata.get(f"{OWN}prefix_at_start_only", False)),
        nfc=_flag(metadata.get(f"{OWN}nfc", pre in default_nfc)),
        charsmap=None if charsmap is None else np.asarray(charsmap).astype(np.uint8).tobytes(),
        extra_spaces=_flag(get("remove_extra_whitespaces", False)),
        templates=_templates(metadata),
    )  # fmt: skip


BOS_BY_PRE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken", "chameleon")  # unless a file says it


def _numbers(found: Any, count: int, default: float, what: str) -> Any:
    if found is None:
        return [default] * count
    if not isinstance(found, np.ndarray) or len(found) < count or not np.isfinite(found).all():
        raise InputError(f"its {PREFIX}{what} has not one number for each of {count} tokens")
    return found[:count].tolist()


def _flag(found: Any) -> bool:
    if type(found) is not bool:
        raise InputError(f"a switch of its tokenizer is {found!r}; true or false is needed")
    return found


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
    found = {}
    if isinstance(metadata.get(TEMPLATE), str):
        found["default"] = metadata[TEMPLATE]
    prefix = f"{TEMPLATE}."
    return found | {
        key.removeprefix(prefix): text
        for key, text in metadata.items()
        if key.startswith(prefix) and isinstance(text, str)
    }
