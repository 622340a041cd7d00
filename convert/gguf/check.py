"""What an export prints at its end: whether the file gives the source's tokens, and how far its logits are from it."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxft.convert.gguf.directory import read_vocabulary
from jaxft.convert.gguf.pretokenizers import PRES
from jaxft.convert.gguf.read import read_header
from jaxft.convert.gguf.tokenizer_in import write_tokenizer
from jaxft.convert.gguf.tokenizer_out import NoPreTokenizer, describe
from jaxft.convert.gguf.vocabulary import Vocabulary
from jaxft.errors import InputError, RunError
from jaxft.load import base_changes, find_directory, load_adapter, load_model, parameter_count
from jaxft.models import describe_model, read_hf_config
from jaxft.models.extension import with_changes
from jaxft.trees import Tree

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "A train leaves at 9:40 and arrives at 12:15. How long did it take? 2 hours and 35 minutes.",
    "火车九点四十分出发，十二点十五分到达。走了多久？",
    "I've been told he's there, you'LL see; it isn't   far\tfrom here.\n\n\nTwo  spaces, then a line's end. \n",
    "1 12 123 1234 12345 3.14159 -7e10 0xFF ½ ² ٣ 四",
    "110 115 365",
    "2024 15838 7 42",
    "1000003",
    "def f(x):\n    return [x**2 for x in range(10) if x % 3 == 0]  # squares\n",
    "Äpfel, naïve café, смех, γειά σου, नमस्ते, สวัสดี, 안녕하세요, こんにちは",
    "🚀 (normal) 😶\u200d🌫️ (several joined) ✅ 👩‍👩‍👧",
    "e\u0301 is not \u00e9 before it is normalised",
    "!!!???...---===(({[<|>]}))``''\"\"//\\\\ @#$%^&*_+~",
    " leading and trailing ",
    "",
    " ",
    "\n",
    "https://example.org/a_b-c?d=1&e=%20#f",
)
LONG = 512  # tokens of the text that logits are compared on
FLOAT32_BYTES = 8 << 30  # up to which models are compared in float32


def tokenizer_of(vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """The tokenizer that a vocabulary describes."""
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(vocabulary, Path(place))
        return AutoTokenizer.from_pretrained(place, local_files_only=True)


def probes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """`TEXTS`, and conversations as the tokenizer's own template writes them."""
    if not tokenizer.chat_template:
        return TEXTS
    turns = [{"role": "user", "content": text} for text in TEXTS[:3]]
    answer = [{"role": "assistant", "content": "Yes: 2 + 2 = 4."}]
    rendered = [tokenizer.apply_chat_template([turn, *answer], tokenize=False) for turn in turns]
    return (*TEXTS, *map(str, rendered))


def differing(source: PreTrainedTokenizerBase, found: PreTrainedTokenizerBase) -> list[str]:
    """The texts of `probes` of which the two make other tokens, with or without those around a text."""
    return [
        text
        for text in probes(source)
        if any(
            source.encode(text, add_special_tokens=s) != found.encode(text, add_special_tokens=s) for s in (False, True)
        )
    ]


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase | None, rows: int, directory: Path, pre: str | None
) -> Vocabulary | None:
    """`tokenizer_out.describe`, held against the tokenizer unless `pre` is given; None where there is none.

    Raises InputError where GGUF cannot say what the tokenizer does.
    """
    if tokenizer is None:
        return None
    try:
        vocabulary = describe(tokenizer, rows, directory, pre)
    except NoPreTokenizer as error:
        wrong = {name: _wrong(tokenizer, describe(tokenizer, rows, directory, name)) for name in PRES}
        name = min(wrong, key=lambda one: len(wrong[one]))
        raise InputError(
            f"{error}; the nearest is {name}, by which {len(wrong[name])} of {len(probes(tokenizer))} texts have other "
            f"tokens: to take it all the same say --pre_tokenizer {name}"
        ) from error
    if pre is None and (differ := _wrong(tokenizer, vocabulary)):
        raise InputError(
            f"GGUF cannot say what this tokenizer does: {len(differ)} of {len(probes(tokenizer))} texts would have "
            f"other tokens, e.g. {json.dumps(differ[0], ensure_ascii=False)}; no file was written"
        )
    return vocabulary


def _wrong(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> list[str]:
    return differing(tokenizer, tokenizer_of(vocabulary))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> dict[str, int]:
    """How many texts were tokenised by the source and by the file read back, and of how many the tokens differ."""
    wrong = _wrong(tokenizer, read_vocabulary(read_header(file)))
    return {"texts": len(probes(tokenizer)), "texts_that_differ": len(wrong)}


def sample_tokens(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, positions: int) -> list[int]:
    """The tokens of `TEXTS`, as many as are compared; without a tokenizer numbers that go through the vocabulary."""
    if tokenizer is None:
        return [token * 7919 % vocabulary for token in range(min(64, positions))]
    return tokenizer.encode("\n".join(TEXTS))[: min(LONG, positions)]


def log_probabilities(name: str, adapter: str | None, tokens: list[int]) -> np.ndarray:
    """The log-probabilities (T, V) float32 of a model, with an adapter on it or none, computed in float32.

    Weights are held in float32 up to `FLOAT32_BYTES` of them, and beyond in bfloat16.
    """
    changes = {} if adapter is None else base_changes(adapter)
    described = describe_model(with_changes(read_hf_config(find_directory(name)), changes))
    large = 4 * parameter_count(described.shapes) > FLOAT32_BYTES
    model, params = load_model(name, dtype=jnp.bfloat16 if large else jnp.float32, changes=changes)
    trees: tuple[Tree, ...] = (params,)
    if adapter is not None:
        model, *parts, _ = load_adapter(adapter, model, params)
        trees = tuple(parts)

    @jax.jit
    def run(trees: tuple[Tree, ...], tokens: jax.Array) -> jax.Array:
        decoder = model.bind(*trees)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        hidden = decoder(tokens, jnp.ones_like(tokens), positions, dtype=jnp.dtype("float32"))
        return jax.nn.log_softmax(decoder.logits(hidden), axis=-1)

    return np.asarray(run(trees, jnp.asarray([tokens], jnp.int32)))[0]


def check_weights(expected: np.ndarray, file: Path, tokens: list[int]) -> dict[str, float]:
    """Mean and largest KL divergence (nats a token) of what was written, read back, from its source; top-1 agreement.

    expected: the source's `log_probabilities`; file: a GGUF file or a model directory.
    """
    found = log_probabilities(str(file), None, tokens)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise RunError(f"{file} is written, but its logits or those of its source are not finite")
    exact = expected.astype(np.float64)
    divergence = np.maximum(np.sum(np.exp(exact) * (exact - found), axis=-1), 0.0)
    same = np.argmax(expected, axis=-1) == np.argmax(found, axis=-1)
    return {
        "kl_divergence": _short(divergence.mean()),
        "largest_kl_divergence": _short(divergence.max()),
        "same_top_token": _short(same.mean()),
        "tokens": len(tokens),
    }


def _short(value: Any) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else float(value)
