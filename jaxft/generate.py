"""`python -m jaxft.generate`: continues prompts with a key/value cache, greedily or by sampling."""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jaxft.config import describe, parse
from jaxft.errors import InputError, run_command
from jaxft.load import EMBEDDED
from jaxft.models import Model
from jaxft.models.rope import DynamicRope
from jaxft.prepare import prepare
from jaxft.settings import GenerateSettings
from jaxft.trees import Tree

BUCKET = 64  # prompts are padded to a multiple of this many slots, so that few lengths are compiled


def sample(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """The next token (B,) int32 of logits (B, V): the likeliest at temperature 0, else drawn.

    top_p keeps the likeliest tokens that together reach that probability (Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751), at least one. Row b draws from the b-th split of key.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # what the likelier tokens have already
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    keys = jax.random.split(key, logits.shape[0])
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "steps", "stop_ids", "temperature", "top_p", "dtype"))
def _generate(model, trees, tokens, first_key, key, *, steps, stop_ids, temperature, top_p, dtype):
    """New tokens (B, steps) int32, −1 after a stop token; tokens (B, P) left-padded, first_key (B,)."""
    decoder = model.bind(*trees)
    B, P = tokens.shape
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)[None]
    cache = decoder.empty_cache(B, P + steps, dtype)
    positions = jnp.maximum(jnp.arange(P, dtype=jnp.int32)[None] - first_key[:, None], 0)
    hidden, cache = decoder.with_cache(tokens, positions, first_key, jnp.int32(0), cache, dtype=dtype)

    def pick(hidden, step):
        return sample(decoder.logits(hidden[:, -1]), jax.random.fold_in(key, step), temperature, top_p)

    def unfinished(carry):
        step, _, _, done, _ = carry
        return (step < steps) & ~jnp.all(done)

    def one(carry):
        step, token, out, done, cache = carry
        out = out.at[:, step].set(jnp.where(done, -1, token))
        done = done | jnp.any(token[:, None] == stops, axis=1)
        slot = P + step
        hidden, cache = decoder.with_cache(
            token[:, None], (slot - first_key)[:, None], first_key, slot, cache, dtype=dtype
        )
        return step + 1, pick(hidden, step + 1), out, done, cache

    start = (jnp.int32(0), pick(hidden, 0), jnp.full((B, steps), -1, jnp.int32), jnp.zeros(B, bool), cache)
    return jax.lax.while_loop(unfinished, one, start)[2]


def generate(
    model: Model,
    trees: tuple[Tree, ...],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
) -> list[list[int]]:
    """Continues token lists: for each prompt the new tokens, up to and without the first stop token.

    trees: the model's parameters, e.g. (trainable, frozen). dtype: of activations and cache, the embedding's own
    where None. Raises InputError for an empty prompt.
    """
    if not all(len(prompt) for prompt in prompts):
        raise InputError("the prompt has no token to continue")
    P = -(-max(map(len, prompts)) // BUCKET) * BUCKET
    tokens = np.zeros((len(prompts), P), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, P - len(prompt) :] = prompt
    first_key = np.array([P - len(prompt) for prompt in prompts], np.int32)
    new = _generate(
        model, trees, tokens, first_key, jax.random.key(0) if key is None else key, steps=max_new_tokens,
        stop_ids=tuple(stop_ids), temperature=temperature, top_p=top_p,
        dtype=None if dtype is None else jnp.dtype(dtype),
    )  # fmt: skip
    return [[int(token) for token in row if token >= 0 and token not in stop_ids] for row in np.asarray(new)]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[int]:
    """Where generation ends: the tokenizer's EOS, generation_config.json's, and the chat template's end of turn."""
    found = {tokenizer.eos_token_id}
    path = directory / "generation_config.json"
    if path.is_file():
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(listed if isinstance(listed, list) else [listed])
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        after = tokenizer.encode(text[text.rindex("1") + 1 :], add_special_tokens=False)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        found.update([token for token in after if token in special][:1])
    return sorted(token for token in found if token is not None)


def main(argv: list[str] | None = None) -> int:
    settings, provenance = parse("generate", argv)
    for line in describe(settings, provenance):
        print(line, file=sys.stderr)
    prepared = prepare(settings, settings.model_name_or_path or str(EMBEDDED / "base"))
    tokenizer = prepared.tokenizer
    prompt = tokenizer.encode(_prompt(settings, tokenizer), add_special_tokens=not (settings.chat or settings.messages))
    positions, ropes = prepared.model.config.max_position_embeddings, prepared.model.config.ropes
    endless = any(isinstance(rope, DynamicRope) for rope in ropes)  # it scales itself beyond them
    if len(prompt) + settings.max_new_tokens > positions and not endless:
        raise InputError(
            f"the prompt's {len(prompt)} tokens and --max_new_tokens {settings.max_new_tokens} are more than the "
            f"model's {positions} positions"
        )
    with jax.set_mesh(prepared.mesh):
        (new,) = generate(
            prepared.model,
            (prepared.trainable, prepared.frozen),
            [prompt],
            max_new_tokens=settings.max_new_tokens,
            stop_ids=stop_token_ids(tokenizer, prepared.directory),
            temperature=settings.temperature,
            top_p=settings.top_p,
            key=jax.random.key(settings.seed),
            dtype=prepared.compute_dtype,
        )
    # exactly the new text: a line's end would belong to it, so only a terminal gets one
    print(tokenizer.decode(new, skip_special_tokens=True), end="\n" if sys.stdout.isatty() else "", flush=True)
    return 0


def _prompt(settings: GenerateSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text to continue: --prompt as it is, or a conversation rendered up to the assistant's turn."""
    messages: Any = [{"role": "user", "content": settings.prompt}]
    if settings.messages is not None:
        messages = _read_messages(Path(settings.messages))
    elif settings.prompt is None:
        raise InputError("nothing to continue: give --prompt TEXT, or --messages FILE")
    elif not settings.chat:
        return settings.prompt
    if not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template; use --prompt without --chat")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as failure:
        raise InputError(f"the chat template refuses the conversation: {failure}") from failure


def _read_messages(path: Path) -> list[dict[str, Any]]:
    """A conversation from a JSON file: a list of messages, or an object that has one as `messages`, as a data row."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--messages {path} cannot be read as JSON: {error}") from error
    found = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(isinstance(turn, dict) and "role" in turn for turn in found):
        raise InputError(f"--messages {path}: a list of objects with role and content is needed")
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
