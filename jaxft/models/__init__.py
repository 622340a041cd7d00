"""The registry: which architecture a config.json asks for, and the `Model` that describes it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import AutoConfig, PretrainedConfig

from jaxft.convert import gemma as gemma_names
from jaxft.convert import gemma2 as gemma2_names
from jaxft.convert import gemma3 as gemma3_names
from jaxft.convert import granite as granite_names
from jaxft.convert import llama as llama_names
from jaxft.convert import mistral as mistral_names
from jaxft.convert import qwen2 as qwen2_names
from jaxft.convert import qwen3 as qwen3_names
from jaxft.convert.table import Name
from jaxft.errors import InputError
from jaxft.models import gemma, gemma2, gemma3, granite, llama, mistral, qwen2, qwen3
from jaxft.models.decoder import Decoder, ModelConfig
from jaxft.quant import is_quantized, kind_of, quantize

Tree = dict[str, Any]  # nested dicts of arrays


@dataclass(frozen=True)
class Family:
    """One architecture: how its config is read, its block, its table of names, its decoder around the blocks.

    older: (prefix, new prefix) of tensors that older files name otherwise. passed_over: prefixes of tensors that belong
    to parts which are not loaded. written_as: the model_type of a saved model, where those parts are then missing.
    """

    read_config: Callable[[PretrainedConfig], ModelConfig]
    block: Callable[[Any], nnx.Module]  # of what read_config gives
    names: tuple[Name, ...]
    decoder: type[Decoder] = Decoder
    older: tuple[tuple[str, str], ...] = ()
    passed_over: tuple[str, ...] = ()
    written_as: str | None = None


FAMILIES: dict[str, Family] = {
    "gemma": Family(gemma.read_config, gemma.Block, gemma_names.NAMES, gemma.Decoder),
    "gemma2": Family(gemma2.read_config, gemma2.Block, gemma2_names.NAMES, gemma.Decoder),
    "gemma3_text": Family(gemma3.read_config, gemma3.Block, gemma3_names.NAMES, gemma.Decoder),
    "gemma3": Family(
        gemma3.read_config,
        gemma3.Block,
        gemma3_names.MULTIMODAL,
        gemma.Decoder,
        gemma3_names.OLDER,
        gemma3_names.VISION,
        written_as="gemma3_text",
    ),
    "granite": Family(granite.read_config, granite.Block, granite_names.NAMES, granite.Decoder),
    "llama": Family(llama.read_config, llama.Block, llama_names.NAMES),
    "mistral": Family(mistral.read_config, mistral.Block, mistral_names.NAMES),
    "qwen2": Family(qwen2.read_config, qwen2.Block, qwen2_names.NAMES),
    "qwen3": Family(qwen3.read_config, qwen3.Block, qwen3_names.NAMES),
}


@dataclass(frozen=True, eq=False)
class Model:
    """A model without its arrays: what to compute, and the shape and axis names of every parameter.

    `shapes` and `axes` are trees like the parameters', of `jax.ShapeDtypeStruct` and of tuples of names.
    """

    config: ModelConfig
    family: Family
    hf_config: PretrainedConfig
    graphdef: nnx.GraphDef
    shapes: Tree
    axes: Tree

    def bind(self, *trees: Tree) -> Decoder:
        """The callable model over these parameters (trainable and frozen trees, in any order)."""
        return nnx.merge(self.graphdef, *trees)


def describe_model(hf_config: PretrainedConfig) -> Model:
    """The `Model` of a Hugging Face configuration. Raises InputError for a model_type that is not supported."""
    if hf_config.model_type not in FAMILIES:
        raise InputError(f"model_type {hf_config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[hf_config.model_type]
    config = family.read_config(hf_config)
    return model_of(family.decoder(config, family.block, (0,)), family, hf_config)


def model_of(decoder: Decoder, family: Family, hf_config: PretrainedConfig) -> Model:
    """Splits a decoder that holds shapes into what is static and what is a tree."""
    graphdef, state = nnx.split(decoder)
    variables = dict(nnx.to_flat_state(state))
    axes = nnx.to_pure_dict(nnx.from_flat_state({path: v.get_metadata()["axes"] for path, v in variables.items()}))
    return Model(decoder.config, family, hf_config, graphdef, nnx.to_pure_dict(state), axes)


def read_hf_config(directory: Path) -> PretrainedConfig:
    """config.json of a model directory. Raises InputError where it is missing, not JSON, or of an unknown type."""
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} has no config.json; a Hugging Face model directory is needed")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object: {error}") from error
    if model_type not in FAMILIES:
        raise InputError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return AutoConfig.from_pretrained(directory, local_files_only=True)


LARGE = 1 << 26  # numbers in a matrix from which on it is not made at once


def init_params(model: Model, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Tree:
    """Random parameters: matrices normal with the config's initializer_range, norms 1 (Gemma 0), biases 0, in `dtype`.

    Each leaf is made on the device, a stacked one layer by layer, so that no temporary is larger than one layer. A
    quantised leaf holds such a matrix, quantised from `dtype`.
    """
    leaves, treedef = jax.tree.flatten_with_path(model.shapes, is_leaf=is_quantized)
    deviation = model.hf_config.initializer_range

    def normal(key, shape):
        return (deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    def one(path, leaf, key):
        name, module = path[-1].key, path[-2].key
        if name == "bias":
            return jnp.zeros(leaf.shape, dtype)
        if "norm" in module:
            return jnp.full(leaf.shape, model.family.decoder.first_norm, dtype)
        if leaf.ndim < 3 and leaf.size < LARGE:
            return jax.jit(normal, static_argnums=1)(key, leaf.shape)
        if leaf.ndim < 3:  # an embedding: row by row, for its float32 copy would be larger than a layer
            row_keys = jax.random.split(key, leaf.shape[0])
            rows = partial(jax.lax.map, lambda k: normal(k, leaf.shape[1:]), batch_size=1024)
            return jax.jit(rows)(row_keys)
        layer_keys = jax.random.split(key, leaf.shape[0])
        if is_quantized(leaf):
            made = jax.jit(
                lambda keys: jax.lax.map(lambda k: quantize(normal(k, leaf.weight_shape), kind_of(leaf)), keys)
            )(layer_keys)
            return jax.tree.unflatten(jax.tree.structure(leaf), jax.tree.leaves(made))
        return jax.jit(lambda keys: jax.lax.map(lambda k: normal(k, leaf.shape[1:]), keys))(layer_keys)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [one(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)])
