"""The files of a Hugging Face tokenizer rebuilt from a GGUF file's vocabulary, by its kind."""

import base64
import json
from pathlib import Path
from typing import Any

from jaxft.convert.gguf import pretokenizers
from jaxft.convert.gguf.tokenizer_out import BYTE_TOKEN, SPACE, halves
from jaxft.convert.gguf.vocabulary import BPE, BYTE, CONTROL, SPM, UNKNOWN, UNUSED, USER, Vocabulary
from jaxft.errors import InputError

NAMES = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}


def write_tokenizer(vocabulary: Vocabulary, directory: Path, positions: int | None = None) -> None:
    """tokenizer.json, tokenizer_config.json and, with stop tokens, generation_config.json into a directory."""
    (directory / "tokenizer.json").write_text(json.dumps(description(vocabulary), ensure_ascii=False), encoding="utf-8")
    written: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        "clean_up_tokenization_spaces": False,
        **{NAMES[name]: vocabulary.tokens[number] for name, number in vocabulary.ids.items() if name in NAMES},
    }
    if positions is not None:
        written["model_max_length"] = positions
    templates = vocabulary.templates
    if set(templates) == {"default"}:
        written["chat_template"] = templates["default"]
    elif templates:
        written["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    _write(directory / "tokenizer_config.json", written)
    stops = [vocabulary.ids[name] for name in ("eos", "eot", "eom") if name in vocabulary.ids]
    if stops:
        generation: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(stops))}
        generation |= {f"{name}_token_id": vocabulary.ids[name] for name in ("bos", "pad") if name in vocabulary.ids}
        _write(directory / "generation_config.json", generation)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def description(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json. Raises InputError for a vocabulary that contradicts itself."""
    by_text: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == UNUSED and number not in vocabulary.ids.values():
            continue  # a row without token
        if text in by_text:
            raise InputError(f"its tokenizer has {text!r} under the ids {by_text[text]} and {number}")
        by_text[text] = number
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocabulary),
        "post_processor": _around(vocabulary),
    }
    if vocabulary.model == BPE:
        return whole | _byte_level(vocabulary, by_text)
    if vocabulary.model == SPM:
        return whole | _sentencepiece(vocabulary, by_text)
    return whole | _unigram(vocabulary)


def _added(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found before anything is cut or merged."""
    special = set(vocabulary.ids.values())
    return [
        {
            "id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind != USER,
        }
        for number, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (CONTROL, USER, UNKNOWN) or (number in special and kind == UNUSED)
    ]  # fmt: skip


def _around(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What is put around a text."""
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    tokens: dict[str, Any] = {}
    for name, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)):
        if not wanted:
            continue
        if name not in vocabulary.ids:
            raise InputError(f"its tokenizer adds a {name.upper()} token and names none")
        number = vocabulary.ids[name]
        text = vocabulary.tokens[number]
        tokens[text] = {"id": text, "ids": [number], "tokens": [text]}
        one = {"SpecialToken": {"id": text, "type_id": 0}}
        single = [one, *single] if name == "bos" else [*single, one]
    if not tokens:
        return None
    second = json.loads(json.dumps(single).replace('"A"', '"B"').replace('"type_id": 0', '"type_id": 1'))
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": tokens}


def _byte_level(vocabulary: Vocabulary, by_text: dict[str, int]) -> dict[str, Any]:
    pre = pretokenizers.named(vocabulary.pre)
    merges = []
    for merge in vocabulary.merges or []:
        pair = merge.split(" ") if isinstance(merge, str) else []
        if len(pair) != 2 or pair[0] not in by_text or pair[1] not in by_text or "".join(pair) not in by_text:
            raise InputError(f"its tokenizer has the merge {merge!r}, which is no pair of its tokens")
        merges.append(pair)
    return {
        "normalizer": {"type": "NFC"} if vocabulary.nfc else None,
        "pre_tokenizer": pretokenizers.build(pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(by_text, merges, None, byte_fallback=False, ignore_merges=pre.whole_words),
    }


def _bpe(
    by_text: dict[str, int], merges: list[Any], unknown: str | None, byte_fallback: bool, ignore_merges: bool
) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges, "vocab": by_text, "merges": merges,
    }  # fmt: skip


def _sentencepiece(vocabulary: Vocabulary, by_text: dict[str, int]) -> dict[str, Any]:
    """BPE whose merges are all pairs of tokens that make a token, that of the highest score first."""
    assert vocabulary.scores is not None
    bytes_of = [text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == BYTE]
    if len(bytes_of) != 256 or not all(BYTE_TOKEN.fullmatch(text) for text in bytes_of):
        raise InputError(f"its tokenizer has {len(bytes_of)} tokens for bytes; 256 are needed, <0x00> to <0xFF>")
    # only such tokens are made by merging: the others are found whole, or are bytes
    plain = {
        text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind not in (CONTROL, UNKNOWN, UNUSED, BYTE)
    }  # fmt: skip
    made = [
        (-vocabulary.scores[by_text[text]], by_text[text], left, right)
        for text in plain
        for left, right in halves(text)
        if left in plain and right in plain
    ]
    made.sort(key=lambda one: (one[0], one[1], by_text[one[2]], by_text[one[3]]))
    unknown = vocabulary.tokens[vocabulary.ids["unk"]] if "unk" in vocabulary.ids else None
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.space_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _spaces(vocabulary) | {
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(by_text, [[left, right] for _, _, left, right in made], unknown, True, False),
    }


def _spaces(vocabulary: Vocabulary) -> dict[str, Any]:
    """How spaces become ▁, and where one is put before a text."""
    if vocabulary.space_prefix and not vocabulary.anywhere:
        cut = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
        return {"normalizer": None, "pre_tokenizer": cut}
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if vocabulary.space_prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}


def _unigram(vocabulary: Vocabulary) -> dict[str, Any]:
    assert vocabulary.scores is not None
    count = len(vocabulary.tokens)
    while count and vocabulary.types[count - 1] == UNUSED:  # rows without token
        count -= 1
    steps: list[dict[str, Any]] = []
    if vocabulary.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(vocabulary.charsmap).decode()})
    if vocabulary.extra_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE})
    scheme = "never" if not vocabulary.space_prefix else "always" if vocabulary.anywhere else "first"
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    before = [{"type": "WhitespaceSplit"}, space] if vocabulary.extra_spaces else [space]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "decoder": space,
        "model": {
            "type": "Unigram", "unk_id": vocabulary.ids.get("unk"), "byte_fallback": BYTE in vocabulary.types,
            "vocab": [list(pair) for pair in zip(vocabulary.tokens[:count], vocabulary.scores[:count], strict=True)],
        },
    }  # fmt: skip
