"""How the next token is chosen: greedily, or drawn by transformers' rules, each prompt by a key of its own."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def warp(logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
    """Logits (B, V) float32 of the distribution to draw from; what cannot be drawn is −inf.

    In the order of transformers' `generate`: the repetition penalty (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858) on the tokens that are `seen` (B, V) bool, the temperature, top_k, top_p (Holtzman
    et al. 2020, https://arxiv.org/abs/1904.09751), which keeps the fewest likeliest tokens that together reach it.
    Of tokens with the same logit at the edge of top_k or top_p all are kept.
    """
    if sampling.repetition_penalty != 1:
        assert seen is not None
        punished = jnp.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = jnp.where(seen, punished, logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        smallest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # what the likelier tokens have already
        smallest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return logits


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
    """The next token (B,) int32 of logits (B, V) float32; row b draws with keys[b] and depends on no other row."""
    logits = warp(logits, sampling, seen)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def prompt_keys(key: jax.Array, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """One key a prompt, (n,), from `key`, the prompt's tokens and how often the same prompt came before it.

    So an answer depends on no other prompt, and a prompt that is asked several times is answered differently.
    """
    words, counted = np.zeros((len(prompts), 3), np.uint32), Counter[bytes]()
    for number, prompt in enumerate(prompts):
        digest = hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()
        words[number] = (*np.frombuffer(digest[:8], "<u4"), counted[digest])
        counted[digest] += 1

    def one(row: jax.Array) -> jax.Array:
        folded = key
        for word in row:
            folded = jax.random.fold_in(folded, word)
        return folded

    return jax.vmap(one)(jnp.asarray(words))
