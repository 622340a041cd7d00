"""A tokenizer described for GGUF from what it is: its tokenizers-library description, whatever model it belongs to."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxft.convert.gguf import pretokenizers
from jaxft.convert.gguf.vocabulary import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPM,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER,
    Vocabulary,
)  # fmt: skip
from jaxft.errors import InputError
from jaxft.stops import end_of_turn, stop_token_ids


class NoPreTokenizer(InputError):
    """A tokenizer could be written but for how it cuts text before merging."""


BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"


def describe(
    tokenizer: PreTrainedTokenizerBase, rows: int, directory: Path | None = None, pre: str | None = None
) -> Vocabulary:
    """The vocabulary of a tokenizer for a model whose embedding has `rows` rows.

    directory: of the model, whose generation_config.json and sentencepiece scores are read where they are there. pre:
    llama.cpp's pre-tokenizer to name where none cuts as this tokenizer does. Raises InputError for a tokenizer that
    GGUF cannot say.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"the tokenizer is a {type(tokenizer).__name__} without a tokenizers-library description")
    description = json.loads(backend.to_str())
    core = description["model"]
    added = {token["id"]: token for token in description["added_tokens"]}
    by_id = _tokens(core) | {number: token["content"] for number, token in added.items()}
    if max(by_id) >= rows:
        raise InputError(f"the tokenizer has token {max(by_id)}, the model's embedding {rows} rows")
    taken = set(by_id.values())
    tokens = [by_id[number] if number in by_id else _filler(number, taken) for number in range(rows)]
    if len(set(tokens)) < len(tokens) or not all(tokens):
        raise InputError("the tokenizer has a text with two ids, or an empty one; GGUF has one id for each text")
    ids = _special_ids(tokenizer, directory)
    types = [UNUSED if number not in by_id else NORMAL for number in range(rows)]
    for number, token in added.items():
        types[number] = CONTROL if token["special"] else USER
    if core["type"] == "Unigram" or core.get("byte_fallback"):
        unknown = ids.get("unk")
        if unknown is not None and unknown not in (ids.get("bos"), ids.get("eos")):
            types[unknown] = UNKNOWN
    before, after = _around(tokenizer)
    for put, name in ((before, "bos"), (after, "eos")):
        if put and put != [ids.get(name)]:
            raise InputError(f"the tokenizer puts {put} around a text; GGUF knows the one {name.upper()} token there")
    common: dict[str, Any] = {
        "tokens": tokens, "types": types, "ids": ids, "templates": _templates(tokenizer),
        "add_bos": bool(before), "add_eos": bool(after),
    }  # fmt: skip
    if core["type"] == "BPE" and not core.get("byte_fallback"):
        return _byte_level(description, common, pre)
    if core["type"] == "BPE":
        return _sentencepiece(description, common, directory)
    if core["type"] == "Unigram":
        return _unigram(description, common)
    raise InputError(
        f"the tokenizer is of the kind {core['type']}; byte-level BPE, sentencepiece's and Unigram are written"
    )


def _tokens(core: dict[str, Any]) -> dict[int, str]:
    vocab = core.get("vocab")
    if isinstance(vocab, dict):
        return {number: text for text, number in vocab.items()}
    if isinstance(vocab, list):
        return {number: text for number, (text, _) in enumerate(vocab)}
    raise InputError(f"the tokenizer is of the kind {core['type']}, which has no vocabulary that GGUF can hold")


def _filler(number: int, taken: set[str]) -> str:
    """A text for an id without token that no token has."""
    text = f"[PAD{number}]"
    while text in taken:
        text = f"[{text}]"
    return text


def _normalizers(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    if description is None:
        return []
    if description["type"] == "Sequence":
        return [one for part in description["normalizers"] for one in _normalizers(part)]
    return [description]


def _byte_level(description: dict[str, Any], common: dict[str, Any], pre: str | None) -> Vocabulary:
    core = description["model"]
    steps = [one["type"] for one in _normalizers(description["normalizer"])]
    if steps not in ([], ["NFC"]):
        raise InputError(f"the tokenizer normalises text by {', '.join(steps)}; for byte-level BPE only NFC is written")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if core.get(name):
            raise InputError(f"the tokenizer's BPE has {name} = {core[name]!r}, which GGUF cannot say")
    known = pretokenizers.recognise(description["pre_tokenizer"], bool(core.get("ignore_merges")))
    if known is None and not core["merges"] and not core.get("ignore_merges"):
        known = "gpt-2"  # what is never merged may be cut anywhere
    if known is None and pre is None:
        cut = pretokenizers.splits_of(description["pre_tokenizer"]) or description["pre_tokenizer"]
        raise NoPreTokenizer(
            f"no pre-tokenizer of llama.cpp cuts text as this tokenizer does ({json.dumps(cut, ensure_ascii=False)})"
        )
    if pre is not None:
        pretokenizers.named(pre)
    merges = [one if isinstance(one, str) else " ".join(one) for one in core["merges"]]
    return Vocabulary(BPE, pre or known or "", merges=merges, nfc=steps == ["NFC"], **common)


def _prefix(description: dict[str, Any]) -> tuple[bool, bool]:
    """(a text gets a space before it, also after each special token). Raises InputError for other steps."""
    prefix, anywhere = False, True
    for step in _normalizers(description["normalizer"]):
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE):
            raise InputError(f"the tokenizer normalises text by {step['type']}, which GGUF cannot say of its kind")
    cut = description["pre_tokenizer"]
    if cut is None:
        return prefix, anywhere
    if cut["type"] == "Metaspace" and cut["replacement"] == SPACE and not cut.get("split", True):
        scheme = cut.get("prepend_scheme", "always")
        return prefix or scheme != "never", scheme != "first"
    # a text in which each space is ▁ has none to be cut at
    if cut["type"] == "Split" and cut["pattern"] == {"String": " "} and description["normalizer"] is not None:
        return prefix, anywhere
    raise InputError(f"the tokenizer cuts text by {cut['type']} before it merges; sentencepiece does not")


def _sentencepiece(description: dict[str, Any], common: dict[str, Any], directory: Path | None) -> Vocabulary:
    core, tokens, types = description["model"], common["tokens"], common["types"]
    prefix, anywhere = _prefix(description)
    for number, text in enumerate(tokens):
        if types[number] in (NORMAL, USER) and BYTE_TOKEN.fullmatch(text):
            types[number] = BYTE
    if sum(kind == BYTE for kind in types) != 256:
        raise InputError("the tokenizer falls back to bytes and has not 256 of them; sentencepiece has")
    pairs = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in core["merges"]]
    scores = _scores(tokens, types, pairs, directory)
    return Vocabulary(SPM, "default", scores=scores, space_prefix=prefix, anywhere=anywhere, **common)


def _scores(tokens: list[str], types: list[int], pairs: list[tuple[str, ...]], directory: Path | None) -> list[float]:
    """A score for each token: sentencepiece's own where its model lies beside and agrees, else by which merge is first.

    llama.cpp merges the two neighbours whose union has the highest score, whatever the two are. Raises InputError where
    the merges do not say that.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    counts: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        made = left + right
        first.setdefault(made, rank)
        last[made], counts[made] = rank, counts.get(made, 0) + 1
    spans = sorted((first[text], last[text]) for text in first)
    if any(stop > start for (_, stop), (start, _) in pairwise(spans)):
        raise InputError("the tokenizer's merges of one token stand apart; sentencepiece's stand together")
    known = set(tokens)
    for text, count in counts.items():
        if sum(1 for left, right in halves(text) if left in known and right in known) > count:
            raise InputError(
                f"the tokenizer makes {text!r} of fewer pairs than sentencepiece would; GGUF cannot say it"
            )
    scores = [-float(first[text]) if text in first else 0.0 for text in tokens]
    found = {} if directory is None else _model_scores(directory / "tokenizer.model")
    normal = [number for number, kind in enumerate(types) if kind == NORMAL]
    ranked = [found.get(left + right, 0.0) for left, right in pairs]
    # what transformers makes of a sentencepiece model alone may merge in another order than its scores say
    if all(tokens[number] in found for number in normal) and all(one >= next for one, next in pairwise(ranked)):
        return [found.get(text, 0.0) for text in tokens]
    return scores


def halves(text: str) -> Iterator[tuple[str, str]]:
    """All ways to cut a text in two."""
    return ((text[:at], text[at:]) for at in range(1, len(text)))


def _model_scores(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path} is no sentencepiece model: {error}; copy it again, or take it away") from error
    return {model.id_to_piece(number): model.get_score(number) for number in range(model.get_piece_size())}


def _unigram(description: dict[str, Any], common: dict[str, Any]) -> Vocabulary:
    core, types = description["model"], common["types"]
    charsmap, extra_spaces = None, False
    for step in _normalizers(description["normalizer"]):
        if step["type"] == "Precompiled":
            import base64

            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            extra_spaces = True
        else:
            raise InputError(f"the tokenizer normalises text by {step['type']}, which GGUF cannot say of its kind")
    cut = description["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers", [cut])
    if [one.get("type") for one in steps] not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        raise InputError("the tokenizer is Unigram without ▁ for spaces; GGUF cannot say it")
    scheme = steps[-1].get("prepend_scheme", "always")
    scores = [score for _, score in core["vocab"]] + [0.0] * (len(types) - len(core["vocab"]))
    if core.get("unk_id") is not None:
        types[core["unk_id"]] = UNKNOWN
        common["ids"].setdefault("unk", core["unk_id"])
    return Vocabulary(
        UNIGRAM, "default", scores=scores, space_prefix=scheme != "never", anywhere=scheme != "first",
        charsmap=charsmap, extra_spaces=extra_spaces or len(steps) == 2, **common,
    )  # fmt: skip


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, as it does."""
    alone = tokenizer.encode("a", add_special_tokens=False)
    found = list(tokenizer.encode("a"))
    for start in range(len(found) - len(alone) + 1):
        if found[start : start + len(alone)] == alone:
            return found[:start], found[start + len(alone) :]
    raise InputError(f"the tokenizer makes {found} of a text that is {alone} without special tokens")


def _special_ids(tokenizer: PreTrainedTokenizerBase, directory: Path | None) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
    found = {name: getattr(tokenizer, field) for name, field in names.items()}
    ids = {name: int(number) for name, number in found.items() if number is not None}
    stops, turn = stop_token_ids(tokenizer, directory), end_of_turn(tokenizer)
    if "eos" not in ids and stops:
        ids["eos"] = stops[0] if turn is None else turn
    if turn not in (None, ids.get("eos")):
        ids["eot"] = turn
    for number in stops:  # GGUF has room for three; llama.cpp knows most others by their texts
        if number not in [ids.get(name) for name in ("eos", "eot", "eom")]:
            text = str(tokenizer.convert_ids_to_tokens(number))
            ids.setdefault("eom" if "eot" in ids or "eom" in text else "eot", number)
    return ids


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return {"default": template["default"]} | template if "default" in template else dict(template)
    return {"default": template} if template else {}
