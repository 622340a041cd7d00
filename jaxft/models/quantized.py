"""A model described with quantised weights: which layers they stand in, and how layers fall into runs of equal ones."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxft.convert.hf import places
from jaxft.errors import InputError
from jaxft.lora import linear_modules
from jaxft.models import Model, model_of
from jaxft.quant import Quantized, describe_leaf, leaf_axes, stacked
from jaxft.trees import flatten, unflatten


def linear_weights(model: Model) -> dict[str, tuple[int, int]]:
    """Hugging Face name -> shape (O, I) of the weights of all linear layers but the head, which is always kept."""
    paths = {f"{path}/weight" for path in linear_modules(model.bind(model.shapes)) if not path.startswith("lm_head")}
    leaves = dict(flatten(model.shapes))
    found = {}
    plain = {path: leaf for path, leaf in leaves.items() if "/lora/" not in path}
    for name, place in places(model.family.names, unflatten(plain)).items():
        if place.path in paths:
            rows, columns = leaves[place.path].shape[-2:]
            found[name] = (rows, columns)
    return found


def all_linears(model: Model, kind: str, dtype: Any) -> dict[str, Quantized]:
    """Leaves of `kind` for every linear layer but the head, as bitsandbytes chooses them; dtype: of the rest."""
    return {name: describe_leaf(kind, shape, None, jnp.dtype(dtype)) for name, shape in linear_weights(model).items()}


def with_quantized(model: Model, leaves: dict[str, Quantized], starts: tuple[int, ...] = ()) -> Model:
    """The model described with these weights quantised; leaves: Hugging Face name of a weight -> its leaf of shapes.

    Layers that differ in what is quantised how start a new run, and so do the layers `starts`. Raises InputError for a
    weight that is not one of `linear_weights`, or of another shape.
    """
    shapes = linear_weights(model)
    for name, leaf in leaves.items():
        if name not in shapes:
            raise InputError(f"{name} is quantised; only linear layers other than the head may be")
        if leaf.shape != shapes[name]:
            raise InputError(f"{name} is quantised as {leaf.shape}, this model needs {shapes[name]}")
    runs = tuple(sorted({*_runs(model, leaves), *starts}))
    config = model.config
    decoder = model.family.decoder(config, model.family.block, runs)
    unquantized = model_of(decoder, model.family, model.hf_config)
    linears = linear_modules(decoder)
    for name, place in places(model.family.names, unquantized.shapes).items():
        if name in leaves and place.row in (0, None):
            linear = linears[place.path.removesuffix("/weight")]
            lead, axes = linear.weight.shape[:-2], linear.weight.get_metadata()["axes"]
            leaf = stacked(leaves[name], lead[0]) if lead else leaves[name]
            linear.weight = nnx.Param(leaf, axes=leaf_axes(leaf, axes))
    return model_of(decoder, model.family, model.hf_config)


def _runs(model: Model, leaves: dict[str, Quantized]) -> tuple[int, ...]:
    """The first layer of each maximal run of layers whose weights are of the same kinds."""
    kinds: list[dict[str, Quantized | None]] = [{} for _ in range(model.config.num_layers)]
    for name, place in places(model.family.names, model.shapes).items():
        parts = place.path.split("/")
        if parts[0] == "layers" and place.row is not None:
            kinds[int(parts[1]) + place.row]["/".join(parts[2:])] = leaves.get(name)
    return tuple(i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1])
