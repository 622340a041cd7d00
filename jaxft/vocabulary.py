"""The vocabulary of a model: tokens added to it, rows for them, and a head parted from the embedding."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from jaxft.errors import InputError
from jaxft.models import Model, model_of
from jaxft.models.layers import Linear, describe
from jaxft.trees import Tree


def part_head(model: Model) -> Model:
    """The model described with a head of its own instead of the embedding."""
    decoder = model.bind(model.shapes)
    V, D = decoder.embed_tokens.weight.shape
    decoder.config = replace(decoder.config, tie_word_embeddings=False)
    decoder.lm_head = nnx.data(Linear(D, V, bias=False, axes=("vocab", "embed")))
    return model_of(decoder, model.family, with_fields(model.hf_config, tie_word_embeddings=False))


def resized(model: Model, size: int) -> Model:
    """The model described with `size` rows in its embedding and its head."""
    decoder = model.bind(model.shapes)
    decoder.config = replace(decoder.config, vocab_size=size)
    for module in (decoder.embed_tokens, decoder.lm_head):
        if module is not None:
            weight = module.weight
            module.weight = describe((size, weight.shape[1]), weight.get_metadata()["axes"], type(weight))
    if decoder.lm_head is not None:
        decoder.lm_head.out_features = size
    return model_of(decoder, model.family, with_fields(model.hf_config, vocab_size=size))


def resized_params(params: Tree, size: int, known: int) -> Tree:
    """The parameters with `size` rows in embedding and head: those from `known` on are the mean of those before it.

    The mean is taken in float32; rows beyond `size` are left out.
    """

    @jax.jit
    def rows(weight: jax.Array) -> jax.Array:
        mean = jnp.mean(weight[:known], axis=0, dtype=jnp.float32).astype(weight.dtype)
        return jnp.concatenate([weight[:known], jnp.tile(mean[None], (size - known, 1))])

    names = [name for name in ("embed_tokens", "lm_head") if name in params]
    return params | {name: params[name] | {"weight": rows(params[name]["weight"])} for name in names}


def with_fields(config: PretrainedConfig, **fields: Any) -> PretrainedConfig:
    """A copy of a Hugging Face configuration with fields changed, in the part that describes the text model too."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for name, value in fields.items():
            if part is config.get_text_config() or hasattr(part, name):
                setattr(part, name, value)
    return config


def read_tokens(value: str) -> list[str]:
    """The tokens that `--add_tokens` names: 'a,b', or a text file with one token a line.

    What exists as a file, or starts with '/', './', '../' or '~', is one. Raises InputError where no token is named, or
    the file cannot be read.
    """
    path = Path(value).expanduser()
    if value.startswith(("/", "./", "../", "~")) or path.is_file():
        try:
            words = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--add_tokens {value} cannot be read: {error}") from error
    else:
        words = value.split(",")
    tokens = [word for word in dict.fromkeys(words) if word]
    if not tokens:
        raise InputError(f"--add_tokens {value!r} names no token")
    return tokens


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[str]:
    """Adds tokens to the tokenizer, which is changed; returns those that it did not have."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens(new)
    return new
