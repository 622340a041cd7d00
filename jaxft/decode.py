"""Continues token lists in batches with a key/value cache: few compiled programs, and no answer depends on another."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import InputError
from jaxft.models import Model
from jaxft.sampling import Sampling, prompt_keys, sample
from jaxft.sharding import constrain, data_parallel_size
from jaxft.trees import Tree

SMALLEST = 64  # slots of the shortest prompts
LOOK = 32  # tokens between two looks of `stopped` at what was generated
State = dict[str, Any]


@functools.partial(jax.jit, static_argnames=("model", "steps", "sampling", "dtype"))
def _prefill(model, trees, tokens, first_key, keys, *, steps, sampling, dtype) -> State:
    """Reads left-padded prompts (B, P); first_key (B,) is each one's first slot, P for a row of padding alone."""
    decoder = model.bind(*trees)
    B, P = tokens.shape
    tokens = constrain(tokens, ("batch", "length"))
    slots = jnp.arange(P, dtype=jnp.int32)[None]
    positions = jnp.maximum(slots - first_key[:, None], 0)
    hidden, cache = decoder.with_cache(
        tokens, positions, first_key, jnp.int32(0), decoder.empty_cache(B, P + steps, dtype), dtype=dtype
    )
    seen = None
    if sampling.repetition_penalty != 1:
        seen = jnp.zeros((B, model.config.vocab_size), bool)
        seen = seen.at[jnp.arange(B)[:, None], tokens].max(slots >= first_key[:, None])
    state = {"step": jnp.int32(0), "out": jnp.full((B, steps), -1, jnp.int32), "done": first_key == P, "seen": seen}
    return state | {"cache": cache, "token": _pick(decoder, hidden, keys, jnp.int32(0), sampling, seen)}


@functools.partial(
    jax.jit, static_argnames=("model", "prompt_slots", "stop_ids", "sampling", "dtype"), donate_argnames="state"
)
def _decode(model, trees, state, first_key, keys, until, *, prompt_slots, stop_ids, sampling, dtype) -> State:
    """Goes on up to `until` new tokens, or until every row is done; out (B, steps) holds −1 after a stop token."""
    decoder = model.bind(*trees)
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)[None]

    def unfinished(state):
        return (state["step"] < until) & ~jnp.all(state["done"])

    def one(state):
        step, token, done, seen = state["step"], state["token"], state["done"], state["seen"]
        out = state["out"].at[:, step].set(jnp.where(done, -1, token))
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        slot = prompt_slots + step
        hidden, cache = decoder.with_cache(
            token[:, None], (slot - first_key)[:, None], first_key, slot, state["cache"], dtype=dtype
        )
        return {
            "step": step + 1, "out": out, "done": done | jnp.any(token[:, None] == stops, axis=1), "seen": seen,
            "cache": cache, "token": _pick(decoder, hidden, keys, step + 1, sampling, seen),
        }  # fmt: skip

    state = jax.lax.while_loop(unfinished, one, state)
    # what the host reads lies whole on every device
    return state | {"out": constrain(state["out"], (None, None)), "done": constrain(state["done"], (None,))}


def _pick(decoder, hidden, keys, step, sampling, seen):
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return sample(decoder.logits(hidden[:, -1]), step_keys, sampling, seen)


def generate(
    model: Model,
    trees: tuple[Tree, ...],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    keys: jax.Array | None = None,
    batch_size: int | None = None,
    stopped: Callable[[list[int]], bool] | None = None,
    dtype: jnp.dtype | None = None,
) -> list[list[int]]:
    """Continues token lists: for each prompt the new tokens, up to and without the first stop token.

    trees: the model's parameters, e.g. (trainable, frozen). temperature … repetition_penalty: see `sampling.warp`.
    keys: (n,), what each prompt draws with, `sampling.prompt_keys` of seed 0 where None. batch_size: prompts in one
    batch, all where None; prompts of similar length share one. stopped: asked every LOOK tokens about a prompt's new
    tokens; true ends it. dtype: of activations and cache, the embedding's own where None.

    Raises InputError for an empty prompt.
    """
    if not all(len(prompt) for prompt in prompts):
        raise InputError("the prompt has no token to continue; give some text")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    keys = prompt_keys(jax.random.key(0), prompts) if keys is None else keys
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))  # what needs the most memory first
    most = batch_size or len(prompts)
    static = {"sampling": sampling, "dtype": None if dtype is None else jnp.dtype(dtype)}
    found: dict[int, list[int]] = {}
    for batch in (order[at : at + most] for at in range(0, len(order), most)):
        tokens, first_key = _left_padded([prompts[number] for number in batch])
        B, P = tokens.shape
        row_keys = keys[np.resize(batch, B)]
        state = _prefill(model, trees, tokens, first_key, row_keys, steps=max_new_tokens, **static)
        for until in range(LOOK if stopped else max_new_tokens, max_new_tokens + LOOK, LOOK):
            state = _decode(
                model, trees, state, first_key, row_keys, np.int32(min(until, max_new_tokens)), prompt_slots=P,
                stop_ids=tuple(stop_ids), **static,
            )  # fmt: skip
            out, done = np.asarray(state["out"]), np.array(state["done"])
            new = [[int(token) for token in row if token >= 0 and token not in stop_ids] for row in out[: len(batch)]]
            if stopped:
                done[: len(batch)] |= [stopped(tokens) for tokens in new]
                state["done"] = done
            if done.all() or until >= max_new_tokens:
                break
        found |= dict(zip(batch, new, strict=True))
    return [found[number] for number in range(len(prompts))]


def stream(
    model: Model,
    trees: tuple[Tree, ...],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    look: int = 4,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    key: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
) -> Iterator[list[int]]:
    """Continues one token list as `generate` does, and yields its new tokens so far, `look` more each time.

    The last list is the answer. What is not asked for any more is not computed.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    keys = prompt_keys(jax.random.key(0), [prompt]) if key is None else key[None]
    static = {"sampling": sampling, "dtype": None if dtype is None else jnp.dtype(dtype)}
    tokens, first_key = _left_padded([prompt])
    row_keys = keys[np.zeros(len(tokens), np.int32)]
    state = _prefill(model, trees, tokens, first_key, row_keys, steps=max_new_tokens, **static)
    until = 0
    while until < max_new_tokens:
        until = min(until + look, max_new_tokens)
        state = _decode(
            model, trees, state, first_key, row_keys, np.int32(until), prompt_slots=tokens.shape[1],
            stop_ids=tuple(stop_ids), **static,
        )  # fmt: skip
        out, done = np.asarray(state["out"])[0], bool(np.asarray(state["done"])[0])
        yield [int(token) for token in out if token >= 0 and token not in stop_ids]
        if done:
            return


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 (B, P), the first the longest, and each one's first slot (B,), P for a row of padding alone."""
    B, P = _rows(len(prompts)), _slots(len(prompts[0]))
    tokens, first_key = np.zeros((B, P), np.int32), np.full(B, P, np.int32)
    for row, prompt in enumerate(prompts):
        first_key[row] = P - len(prompt)
        tokens[row, first_key[row] :] = prompt
    return tokens, first_key


def _slots(length: int) -> int:
    """The slots of a prompt of `length` tokens: 64, 96, 128, 192, 256, …, so that few lengths are compiled."""
    slots = SMALLEST
    while slots < length:
        slots = slots * 3 // 2 if slots & (slots - 1) == 0 else slots * 4 // 3
    return slots


def _rows(count: int) -> int:
    """The rows of a batch of `count` prompts: the next power of two, and as many on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else data_parallel_size(mesh)
    return parts << (-(-count // parts) - 1).bit_length()
