"""Optimizers by the names that users of transformers type."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import InputError
from jaxft.in_place import InPlace, adamw_8bit_in_place
from jaxft.kernels.adamw_8bit import to_bfloat16
from jaxft.lora_config import SAVABLE
from jaxft.optim_8bit import Moment8, moment_shapes, scale_by_adam_8bit
from jaxft.optim_paged import on_host, paged
from jaxft.schedules import scale_by_rate
from jaxft.trees import Tree, flatten, unflatten

OPTIMS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")


def decays(params: Tree) -> Tree:
    """Which leaves weight decay touches: all but norms and biases."""
    return jax.tree.map_with_path(
        lambda path, _: path[-1].key != "bias" and not any("norm" in str(part.key) for part in path), params
    )


def make_optimizer(
    schedule: optax.Schedule | float,
    *,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    optim: str = "adamw",
    embedding_factor: float = 1.0,
    loraplus_lr_ratio: float | None = None,
) -> optax.GradientTransformation | InPlace:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) after clipping by the global norm.

    Moments are float32 whatever the parameters' dtype; with optim "adamw_8bit" they are held in 8 bits
    (`jaxft.optim_8bit`), with "paged_adamw" and "paged_adamw_8bit" on the host (`jaxft.optim_paged`), where
    `state_shapes` says so. max_grad_norm 0 does not clip. embedding_factor: how many times the schedule's learning rate
    embedding and head have. loraplus_lr_ratio: how many times it LoRA's B has, and DoRA's magnitudes (LoRA+, Hayou et
    al. 2024, https://arxiv.org/abs/2402.12354). schedule: any of optax's; one of `make_schedule` has what depends on
    the number of steps in the optimizer's state, and `update` is the same program for all of them. Raises InputError
    for an unknown optim.
    """
    ratio = 1.0 if loraplus_lr_ratio is None else loraplus_lr_ratio
    factor = functools.partial(_rate_factor, embedding_factor=embedding_factor, loraplus_lr_ratio=ratio)
    scaled = [] if embedding_factor == ratio == 1 else [_scale_rates(factor)]
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    end = (optax.add_decayed_weights(weight_decay, decays), scale_by_rate(schedule))
    decay = _in_float32(optax.chain(*end))
    if optim == "adamw_8bit":
        adam = scale_by_adam_8bit(adam_beta1, adam_beta2, adam_epsilon)
        return adamw_8bit_in_place(
            optax.chain(clip, adam, decay, *scaled), schedule,
            adam_beta1=adam_beta1, adam_beta2=adam_beta2, adam_epsilon=adam_epsilon, max_grad_norm=max_grad_norm,
            weight_decay=lambda params: jax.tree.map(lambda own: weight_decay if own else 0.0, decays(params)),
            rate_factor=factor,
        )  # fmt: skip
    if optim.startswith("paged_") and optim in OPTIMS:
        wide = _in_float32(optax.scale_by_adam(adam_beta1, adam_beta2, adam_epsilon))
        adam = scale_by_adam_8bit(adam_beta1, adam_beta2, adam_epsilon) if optim.endswith("8bit") else wide
        return optax.chain(clip, paged(adam), decay, *scaled)
    if optim != "adamw":
        raise InputError(f"optim {optim!r} is unknown; known: {', '.join(OPTIMS)}")
    adamw = optax.chain(optax.scale_by_adam(adam_beta1, adam_beta2, adam_epsilon), *end)
    return optax.chain(clip, _in_float32(adamw), *scaled)


def _rate_factor(path: str, *, embedding_factor: float, loraplus_lr_ratio: float) -> float:
    """What the learning rate is multiplied by for the leaf at a path."""
    if path.split("/")[0] in SAVABLE:
        return embedding_factor
    # as PEFT's create_loraplus_optimizer: B, and vectors
    return loraplus_lr_ratio if path.endswith(("lora/b", "lora/magnitude")) else 1.0


def _scale_rates(factor: Callable[[str], float]) -> optax.GradientTransformation:
    """Multiplies the updates of leaves that have a learning rate of their own."""
    return optax.stateless(
        lambda updates, params: unflatten({path: leaf * factor(path) for path, leaf in flatten(updates)})
    )


def state_shapes(optimizer: optax.GradientTransformation, trainable: Tree) -> optax.OptState:
    """The optimizer's first state as `jax.ShapeDtypeStruct`s, each moment where its parameter lies, or on the host.

    trainable: arrays or shapes whose shardings are all of one mesh.
    """
    mesh = jax.tree.leaves(trainable)[0].sharding.mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = optax.tree.map_params(
        optimizer,
        lambda moment, parameter: moment_shapes(moment, parameter.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        is_leaf=lambda node: isinstance(node, Moment8),
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), found, on_host(found)
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transformation on float32 copies: its states and its updates are float32."""

    def raised(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its integer step count
            return inner.update(raised(updates), state, raised(params))

    return optax.GradientTransformation(lambda params: inner.init(raised(params)), update)


class LossScale(NamedTuple):
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

    scale doubles after `GROWTH` finite steps in a row and halves at a step whose gradients are not finite; that step
    is left out. inner is the optimizer's own state.
    """

    scale: jax.Array
    finite_steps: jax.Array
    inner: optax.OptState


GROWTH = 2000


def with_loss_scale(inner: optax.GradientTransformation, first: float = 2.0**16) -> optax.GradientTransformation:
    """The optimizer with a `LossScale` state, which the train step reads: float16 needs it, the others do not."""
    return optax.GradientTransformation(
        lambda params: LossScale(jnp.float32(first), jnp.int32(0), inner.init(params)), inner.update
    )


def next_loss_scale(state: LossScale, finite: jax.Array, inner: optax.OptState) -> LossScale:
    """The state after a step whose gradients were finite, or were not."""
    count = jnp.where(finite, state.finite_steps + 1, 0)
    grown = count >= GROWTH
    scale = jnp.where(finite, jnp.where(grown, state.scale * 2, state.scale), state.scale / 2)
    return LossScale(jnp.maximum(scale, 1.0), jnp.where(grown, 0, count).astype(jnp.int32), inner)


def stochastic_round(value: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the probability that keeps the expectation.

    Sixteen random bits are added below bfloat16's last bit and the lower half is cut off. An update smaller than
    half a unit in the last place is then lost only most of the time, not always. Non-finite values stay as they are.
    """
    return to_bfloat16(value, jax.random.bits(key, value.shape, jnp.uint16))


def apply_updates(params: Tree, updates: Tree, key: jax.Array) -> Tree:
    """params + updates in float32, returned in the parameters' dtypes; bfloat16 leaves are rounded stochastically."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def one(param, update, leaf_key):
        value = param.astype(jnp.float32) + update
        return stochastic_round(value, leaf_key) if param.dtype == jnp.bfloat16 else value.astype(param.dtype)

    new = [one(p, u, k) for p, u, k in zip(leaves, jax.tree.leaves(updates), keys, strict=True)]
    return jax.tree.unflatten(treedef, new)
