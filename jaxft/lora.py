"""LoRA as parameter trees: the low-rank branches of a model, their shapes, their first values.

y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ with A (R, I), B (O, R), s = alpha / r, or alpha / √r with rank stabilisation
(Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.convert.hf import Place, places
from jaxft.errors import InputError
from jaxft.initial import Factors
from jaxft.kernels.linear.reference import row_norms
from jaxft.lora_config import LoraConfig, check_patterns, check_targets, layer_of, reaches, saved_modules
from jaxft.models import Model, model_of
from jaxft.models.layers import Linear, Lora, LoRAParam, LoRAScale, SavedParam, stack
from jaxft.quant import Weight
from jaxft.trees import Tree, flatten, join, unflatten
from jaxft.vocabulary import part_head

__all__ = ["LoraConfig", "add_lora", "branches", "draw", "frozen_params", "lora_shapes", "with_lora"]


ADALORA_DEVIATION = 0.02  # of its first A and B, as PEFT's


class Branch(NamedTuple):
    """The branch on one linear layer: where the layer stands in the tree, and the branch's rank and scale."""

    place: Place
    rank: int
    scale: float


def linear_modules(decoder: nnx.Module) -> dict[str, Linear]:
    """The linear layers of a model, or of a part of it, by their path, e.g. 'layers/0/self_attn/q_proj'.

    The number is that of the run's first layer.
    """
    return {"/".join(map(str, path)): m for path, m in nnx.iter_graph(decoder) if isinstance(m, Linear)}


def linear_places(model: Model) -> dict[str, Place]:
    """Transformers' name of every linear layer, e.g. 'model.layers.0.self_attn.q_proj' -> its path and row."""
    paths = {f"{path}/weight" for path in linear_modules(model.bind(model.shapes))}
    weights = unflatten({path: leaf for path, leaf in flatten(model.shapes) if path in paths})
    return {
        name.removesuffix(".weight"): Place(place.path.removesuffix("/weight"), place.row)
        for name, place in places(model.family.names, weights).items()
    }


def wanted_branches(model: Model, config: LoraConfig) -> dict[str, Branch]:
    """Module name -> branch of every linear layer that the settings reach.

    Raises InputError where they name what the model has not, or the head.
    """
    modules = linear_places(model)
    check_targets(config, list(modules), model.config.model_type)
    reached = {name: place for name, place in modules.items() if reaches(config, name)}
    if any(place.path == "lm_head" for place in reached.values()):
        # the loss reads the head as one matrix, without a branch
        raise InputError("lora_target_modules: a branch on lm_head is not supported yet; leave lm_head out")
    return {  # AdaLoRA may leave a layer without a rank
        name: Branch(place, config.rank(name), config.scale(name))
        for name, place in reached.items()
        if config.rank(name)
    }


def first_layer(model: Model, config: LoraConfig) -> int:
    """The first layer that trains anything: no backward pass goes below it."""
    found = wanted_branches(model, config)
    if "embed_tokens" in saved_modules(config, model.config.tie_word_embeddings):
        return 0
    return min((layer for name in found if (layer := layer_of(name)) is not None), default=0)


def with_lora(model: Model, config: LoraConfig) -> Model:
    """The model described with LoRA branches and with what it trains whole.

    A layer without a branch in a stack where others have one gets one of rank 0. A head that is the embedding becomes
    one of its own where one of the two is saved alone. Raises InputError as `wanted_branches`, and for a module to save
    that is unknown.
    """
    tied = model.config.tie_word_embeddings
    saved = saved_modules(config, tied)
    if saved and tied and not config.ensure_weight_tying:
        model = part_head(model)
    by_path: dict[str, dict[int, Branch]] = {}
    for branch in wanted_branches(model, config).values():
        by_path.setdefault(branch.place.path, {})[branch.place.row or 0] = branch
    decoder = model.bind(model.shapes)
    linears = linear_modules(decoder)
    for path, rows in by_path.items():
        linear = linears[path]
        stacked = linear.weight.ndim == 3
        count = linear.weight.shape[0] if stacked else 1
        ranks = tuple(rows[i].rank if i in rows else 0 for i in range(count))
        scales = tuple(rows[i].scale if i in rows else 0.0 for i in range(count))
        sizes = linear.in_features, linear.out_features
        lora = Lora(
            *sizes, ranks, scales, linear.axes, config.lora_dropout, config.use_dora, config.adalora is not None
        )
        linear.lora = nnx.data(stack(lora, count) if stacked else lora)
    for name in saved:
        module = getattr(decoder, name)
        module.weight = SavedParam(module.weight.get_value(), axes=module.weight.get_metadata()["axes"])
    return model_of(decoder, model.family, model.hf_config)


def branches(model: Model) -> dict[str, Branch]:
    """Module name -> branch of every linear layer of a model `with_lora` that has one."""
    linears = linear_modules(model.bind(model.shapes))
    found = {}
    for name, place in linear_places(model).items():
        lora, row = linears[place.path].lora, place.row or 0
        if lora is not None and lora.ranks[row]:
            found[name] = Branch(place, lora.ranks[row], lora.scales[row])
    return found


def padding(model: Model) -> int:
    """How many numbers of the trained leaves only fill a stack of layers whose ranks differ."""
    total = 0
    for linear in linear_modules(model.bind(model.shapes)).values():
        ranks = () if linear.lora is None else linear.lora.ranks
        total += sum(max(ranks) - rank for rank in ranks) * (
            linear.in_features + linear.out_features + (linear.lora is not None and linear.lora.e is not None)
        )
        if linear.lora is not None and linear.lora.magnitude is not None:
            total += ranks.count(0) * linear.out_features
    return total


def lora_shapes(model: Model) -> tuple[Tree, Tree]:
    """The trained leaves (A, B, magnitudes, modules to save) and the frozen scales of a model with LoRA, as shapes."""
    _, state = nnx.split(model.bind(model.shapes))
    trained, scales, _ = nnx.split_state(state, nnx.Any(LoRAParam, SavedParam), LoRAScale, ...)
    return nnx.to_pure_dict(trained), nnx.to_pure_dict(scales)


def _ranks(model: Model) -> dict[str, tuple[int, ...]]:
    """The layers' ranks of each A, by its path."""
    return {f"{path}/lora/a": m.lora.ranks for path, m in linear_modules(model.bind(model.shapes)).items() if m.lora}


def draw(model: Model, config: LoraConfig, key: jax.Array) -> dict[str, jax.Array]:
    """The first A and B of a model `with_lora` by path, float32, as `add_lora` draws them: no weight is needed."""
    leaves = dict(flatten(lora_shapes(model)[0]))
    ranks = _ranks(model)
    low_rank = [path for path in leaves if path.endswith(("/lora/a", "/lora/b"))]
    how = config.init_lora_weights if config.adalora is None else "adalora"
    return _drawn(key, tuple((path, leaves[path].shape, ranks[f"{path[:-2]}/a"]) for path in low_rank), how)


def add_lora(
    model: Model, params: Tree, config: LoraConfig, key: jax.Array, *, first: dict[str, Factors] | None = None,
    drawn: dict[str, jax.Array] | None = None,
) -> tuple[Model, Tree, Tree]:  # fmt: skip
    """Puts LoRA on a loaded model: returns (model, trainable, frozen).

    trainable: float32 A, uniform in ±1/√I (PEFT's default, Kaiming with a = √5), B, zero, DoRA's magnitudes, the norms
    of W + s B A's rows, and float32 copies of the modules to save (activations are then float32 unless a dtype is given
    to the step). frozen: the other params and the scales. first: module -> A and B to start with, as
    `jaxft.initial.Parting` took them from the weights. drawn: what `draw` gave for this key, where that is there.
    Raises InputError for settings that name what the model has not, and where they ask for values from the weights and
    `first` is not there.
    """
    if config.from_weights and first is None:
        raise InputError(
            f"init_lora_weights {config.init_lora_weights} starts from the weights as they are loaded: give "
            "load_model a jaxft.initial.Parting, and its `first` to add_lora"
        )
    model = with_lora(model, config)
    check_patterns(config, list(branches(model)))
    frozen = frozen_params(model, params)
    trained, _ = lora_shapes(model)
    leaves = dict(flatten(trained))
    base = whole_params(model, params)
    ranks = _ranks(model)
    made = dict(draw(model, config, key) if drawn is None else drawn)
    for path, leaf in leaves.items():
        if path.endswith("/lora/e"):
            made[path] = jnp.zeros(leaf.shape, jnp.float32)
        elif "/lora/" not in path:
            made[path] = jnp.array(base[path], jnp.float32, copy=True)  # its own: the step donates it
    lengths = [path for path in leaves if path.endswith("/lora/magnitude")]
    made |= _filled(model, made, first or {})
    weights, scales = dict(flatten(params)), dict(flatten(frozen))
    for path in lengths:
        place = path.removesuffix("/magnitude")
        lora = made[f"{place}/a"], made[f"{place}/b"], scales[f"{place}/scale"]
        made[path] = first_magnitudes(weights[f"{place.removesuffix('/lora')}/weight"], lora, ranks[f"{place}/a"])
    return model, unflatten({path: made[path] for path in leaves}), frozen


@partial(jax.jit, static_argnums=(1, 2))  # one program, where each operation on each leaf would be one
def _drawn(
    key: jax.Array, leaves: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...], how: str
) -> dict[str, jax.Array]:
    """The first A and B of these paths, shapes and ranks of the layers; how: `init_lora_weights`, or "adalora"."""
    keys = jax.random.split(key, len(leaves))
    alike: dict[tuple[int, ...], list[int]] = {}  # what draws leaves of one shape is compiled once
    for at, (path, shape, _) in enumerate(leaves):
        if how == "adalora" or path.endswith("/a"):
            alike.setdefault(shape, []).append(at)
    drawn: dict[int, jax.Array] = {}
    for shape, numbers in alike.items():
        bound = 1 / math.sqrt(shape[-1])
        if how in ("adalora", "gaussian"):
            draw = partial(jax.random.normal, shape=shape, dtype=jnp.float32)
        else:
            draw = partial(jax.random.uniform, shape=shape, dtype=jnp.float32, minval=-bound, maxval=bound)
        # without a barrier XLA may multiply a deviation into a constant of the distribution, and round otherwise
        values = jax.lax.optimization_barrier(jax.lax.map(draw, keys[np.array(numbers)]))
        drawn |= zip(numbers, values, strict=True)

    def start(at: int, path: str, shape: tuple[int, ...], ranks: tuple[int, ...]) -> jax.Array:
        if at not in drawn:
            return jnp.zeros(shape, jnp.float32)
        own, rows = np.array(ranks)[:, None], -2 if path.endswith("/a") else -1
        inside = np.arange(shape[rows])[None] < own  # (L, R)
        inside = inside.reshape(*shape[:-2], *((-1, 1) if path.endswith("/a") else (1, -1)))
        if how == "gaussian":
            deviation = (1 / np.maximum(own, 1)).astype(np.float32).reshape(*shape[:-2], 1, 1)
            return jnp.where(inside, drawn[at] * deviation, 0.0)
        return jnp.where(inside, drawn[at] * ADALORA_DEVIATION if how == "adalora" else drawn[at], 0.0)

    return {leaf[0]: start(at, *leaf) for at, leaf in enumerate(leaves)}


def _filled(model: Model, leaves: dict[str, jax.Array], first: dict[str, Factors]) -> dict[str, jax.Array]:
    """The leaves A and B of the modules in `first`, with these values."""
    found: dict[str, np.ndarray] = {}
    for module, (place, rank, _) in branches(model).items() if first else ():
        row = () if place.row is None else (place.row,)
        for name, array in zip(("a", "b"), first[module], strict=True):
            path = f"{place.path}/lora/{name}"
            whole = found.setdefault(path, np.zeros(leaves[path].shape, np.float32))
            whole[(*row, slice(rank)) if name == "a" else (*row, slice(None), slice(rank))] = array
    return {path: jnp.asarray(array) for path, array in found.items()}


def first_magnitudes(weight: Weight, lora: tuple[jax.Array, jax.Array, jax.Array], ranks: tuple[int, ...]) -> jax.Array:
    """The norms of the rows of W + s B A, (O,) float32, or (L, O) of a stack; 0, which is none, without a branch."""
    if weight.ndim == 2:
        return jax.jit(row_norms)(weight, lora)
    present = jnp.array(ranks)[:, None] > 0
    found = jax.jit(lambda weight, lora: jax.lax.map(lambda one: row_norms(*one), (weight, lora)))(weight, lora)
    return jnp.where(present, found, 0.0)


def whole_params(model: Model, params: Tree) -> dict[str, jax.Array]:
    """The leaves of a loaded model by path; a head that was parted from the embedding starts as it."""
    leaves = dict(flatten(params))
    if not model.config.tie_word_embeddings and "lm_head/weight" not in leaves:
        leaves["lm_head/weight"] = leaves["embed_tokens/weight"]
    return leaves


def frozen_params(model: Model, params: Tree) -> Tree:
    """What a model with LoRA does not train: params without the modules to save, and one scale s a layer."""
    _, scales = lora_shapes(model)
    linears = linear_modules(model.bind(model.shapes))

    def scale(path: str, shape: tuple[int, ...]) -> jax.Array:
        lora = linears[path.removesuffix("/lora/scale")].lora
        assert lora is not None
        return jnp.asarray(np.array(lora.scales, np.float32).reshape(shape))

    own = unflatten({path: scale(path, leaf.shape) for path, leaf in flatten(scales)})
    return join(kept_params(model, params), own)


def kept_params(model: Model, params: Tree) -> Tree:
    """The leaves of params, arrays or shapes, that a model with LoRA does not train."""
    taken = dict(flatten(lora_shapes(model)[0]))
    return unflatten({path: leaf for path, leaf in whole_params(model, params).items() if path not in taken})
