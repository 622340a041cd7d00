"""How text is cut before byte-level BPE merges it: llama.cpp's names for it, by structure.

Each entry is what the model's own tokenizer.json and llama.cpp agree on: regular expressions that cut one after the
other, each match a piece of its own.
"""

from typing import Any, NamedTuple

from jaxft.errors import InputError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDINGS_SPELT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
NO_LETTER = r"[^\r\n\p{L}\p{N}]?"
PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
MARKED = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Pre(NamedTuple):
    """splits: regular expressions. whole_words: a word that is a token is taken without merging (ignore_merges)."""

    splits: tuple[str, ...]
    whole_words: bool = False
    also: tuple[str, ...] = ()  # other names of llama.cpp's for the same


PRES = {
    "llama-bpe": Pre(
        (rf"{ENDINGS}|{NO_LETTER}\p{{L}}+|\p{{N}}{{1,3}}|{REST}",), True,
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "glm4", "glm5"),
    ),
    "smaug-bpe": Pre((rf"{ENDINGS}|{NO_LETTER}\p{{L}}+|\p{{N}}{{1,3}}|{REST}",), False, ("dbrx", "chatglm-bpe")),
    "qwen2": Pre(
        (rf"{ENDINGS}|{NO_LETTER}\p{{L}}+|\p{{N}}|{REST}",), False,
        ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "laguna"),
    ),
    "qwen35": Pre((rf"{ENDINGS}|{NO_LETTER}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
                   r"|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    "tekken": Pre((rf"{NO_LETTER}{UPPER}*{LOWER}+|{NO_LETTER}{UPPER}+{LOWER}*|\p{{N}}|{REST_SLASH}",), True),
    "gpt-4o": Pre((rf"{NO_LETTER}{UPPER}*{LOWER}+{ENDINGS}?|{NO_LETTER}{UPPER}+{LOWER}*{ENDINGS}?|\p{{N}}{{1,3}}"
                   rf"|{REST_SLASH}",), False, ("llama4", "kanana2", "talkie", "minimax-m2")),
    "gpt-2": Pre((GPT2,), False, (
        "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert",
        "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
    )),
    "smollm": Pre((r"\p{N}", GPT2), False, (
        "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    )),
    "deepseek-v3": Pre(
        (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", rf"{PUNCTUATION}[A-Za-z]+|{MARKED}"), False,
        ("hunyuan-dense", "joyai-llm"),
    ),
    "seed-coder": Pre((rf"{ENDINGS}|{NO_LETTER}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+"
                       r"|\s+(?!\S)|\s+",)),
    "bailingmoe": Pre((rf"'(?i:[sdmt]|ll|ve|re)|{NO_LETTER}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]"
                       r"|\s+(?!\S)|\s+",), False, ("bailingmoe2", "llada-moe")),
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}  # fmt: skip
NFC = ("qwen2", "qwen35", "deepseek-r1-qwen")  # whose models' tokenizers bring text into Unicode's form NFC


def named(name: str) -> Pre:
    """What llama.cpp means by a name. Raises InputError for one that is not known here."""
    for known, pre in PRES.items():
        if name == known or name in pre.also:
            return pre
    raise InputError(f"its pre-tokenizer is {name!r}; these are read: {', '.join(PRES)}")


def splits_of(description: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions of a tokenizer.json's pre_tokenizer, or None for one that does something else."""
    if description is None:
        return None
    parts = description["pretokenizers"] if description["type"] == "Sequence" else [description]
    found: list[str] = []
    byte_level = False
    for part in parts:
        if part["type"] == "ByteLevel":
            if part.get("add_prefix_space") or byte_level:
                return None
            byte_level = True
            found += [GPT2] if part.get("use_regex", True) else []
        elif part["type"] == "Digits":
            found.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif part["type"] == "Split" and "Regex" in part["pattern"]:
            # what is removed with invert is all that does not match: of an expression that matches all, nothing
            if part["behavior"] not in ("Isolated", "Removed") or (part["behavior"] == "Removed") != part["invert"]:
                return None
            found.append(_canonical(part["pattern"]["Regex"]))
        else:
            return None
    return tuple(found) if byte_level else None


def _canonical(expression: str) -> str:
    """An expression with contractions in the one spelling."""
    return expression.replace(ENDINGS_SPELT, ENDINGS)


def recognise(description: dict[str, Any] | None, whole_words: bool) -> str | None:
    """llama.cpp's name for a pre_tokenizer of tokenizer.json, or None where it has none."""
    splits = splits_of(description)
    for name, pre in PRES.items():
        if splits == tuple(_canonical(one) for one in pre.splits) and pre.whole_words == whole_words:
            return name
    return None


def build(pre: Pre) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json that cuts so."""
    splits = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in pre.splits
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, level]}
