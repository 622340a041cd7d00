"""AdaLoRA: ranks that move to where they matter (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

y = x Wᵀ + s · drop(x) (E ∘ A)ᵀ Bᵀ with A (R, I), E (R, 1), B (O, R) and s = alpha / (init_r + 1e-5), as PEFT has it. A
and the rows of E and B that belong to one of its rows are a triplet. Beside the loss, A Aᵀ and Bᵀ B are drawn to the
identity. After each step the triplets of least importance, as many as a cubic schedule says, have their E set to 0:

    s = β1 s + (1 − β1) |w ∂w|      u = β2 u + (1 − β2) | |w ∂w| − s |      importance of a number: s u
    of a triplet: E's own, and the means over its row of A and its column of B

Until the last such step a triplet may come back; from then on what is 0 stays 0. All of it is one gradient
transformation: the train step and its checkpoints know nothing of it. Steps are counted from 1, so that the budget has
come down to target_r with the last step even where tfinal is 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.lora import linear_modules
from jaxft.lora_config import AdaLora
from jaxft.models import Model
from jaxft.trees import Tree, flatten


class AdaLoraState(NamedTuple):
    """steps: () int32, how many were taken. sensitivity, uncertainty: s and u, trees like the parameters'."""

    steps: jax.Array
    sensitivity: Any
    uncertainty: Any
    inner: optax.OptState


def with_adalora(
    inner: optax.GradientTransformation,
    model: Model,
    settings: AdaLora,
    *,
    max_grad_norm: float = 0.0,
    allocate: bool = True,
) -> optax.GradientTransformation:
    """`inner`, which must not clip, on gradients with the regulariser's in them, clipped; and the allocation after it.

    model: with the adapter. allocate: False leaves the ranks as they are, for an adapter whose schedule is over. The
    regulariser is not in the loss that a step reports, nor in its grad_norm. Raises InputError as `AdaLora.budgets`.
    """
    ranks = adapter_ranks(model)
    modules = sum(int(np.count_nonzero(own)) for own in ranks.values())
    counts = settings.budgets(sum(map(sum, ranks.values())), modules) if allocate else np.zeros(1, np.int32)
    last = settings.total_step - settings.tfinal if allocate and settings.total_step else 0
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()

    def init(params: Tree) -> AdaLoraState:
        def zeros(leaf: jax.Array) -> jax.Array:
            return jnp.zeros(leaf.shape if allocate else (0,) * leaf.ndim, jnp.float32)

        return AdaLoraState(jnp.int32(0), jax.tree.map(zeros, params), jax.tree.map(zeros, params), inner.init(params))

    def update(grads: Tree, state: AdaLoraState, params: Tree) -> tuple[Tree, AdaLoraState]:
        pull = jax.grad(lambda params: settings.orth_reg_weight * regularizer(params, ranks))(params)
        grads = jax.tree.map(lambda grad, own: grad + own.astype(grad.dtype), grads, pull)
        grads, _ = clip.update(grads, clip.init(params))
        updates, inner_state = inner.update(grads, state.inner, params)
        step = state.steps + 1
        if not allocate:
            return updates, AdaLoraState(step, state.sensitivity, state.uncertainty, inner_state)

        def importance(param, update, grad, s, u):
            size = jnp.abs((param + update) * grad)
            new_s = settings.beta1 * s + (1 - settings.beta1) * size
            new_u = settings.beta2 * u + (1 - settings.beta2) * jnp.abs(size - new_s)
            return jnp.where(step < last, new_s, s), jnp.where(step < last, new_u, u)

        both = jax.tree.map(importance, params, updates, grads, state.sensitivity, state.uncertainty)
        s, u = (jax.tree.map(lambda _, pair, i=i: pair[i], params, both) for i in range(2))
        masked = least_important(s, u, ranks, jnp.asarray(counts)[jnp.minimum(state.steps, len(counts) - 1)])

        def mask(path, update, param):
            place = "/".join(part.key for part in path).removesuffix("/lora/e")
            if path[-1].key != "e":
                return update
            gone = jnp.where(step > last, param == 0, masked[place])
            return jnp.where(gone, -param, update)  # the sum is 0, exactly

        return jax.tree.map_with_path(mask, updates, params), AdaLoraState(step, s, u, inner_state)

    return optax.GradientTransformation(init, update)


def adapter_ranks(model: Model) -> dict[str, tuple[int, ...]]:
    """Path of every linear layer with an adapter -> the rank of each layer of its stack."""
    found = linear_modules(model.bind(model.shapes))
    return {path: linear.lora.ranks for path, linear in found.items() if linear.lora is not None}


def _inside(ranks: tuple[int, ...], width: int) -> np.ndarray:
    """Which of (L, R) rows are no padding."""
    return np.arange(width)[None] < np.array(ranks)[:, None]


def regularizer(params: Tree, ranks: dict[str, tuple[int, ...]]) -> jax.Array:
    """The mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius) over all adapters; rows that pad have no part in it."""
    leaves, total, count = dict(flatten(params)), jnp.float32(0), 0
    for path, own in ranks.items():
        a, b = leaves[f"{path}/lora/a"], leaves[f"{path}/lora/b"]
        a, b = a.reshape(len(own), *a.shape[-2:]), b.reshape(len(own), *b.shape[-2:])
        identity = jnp.asarray(_inside(own, a.shape[1])[:, None] * np.eye(a.shape[1]), jnp.float32)
        for product in ("LRI,LSI->LRS", a), ("LOR,LOS->LRS", b):
            gram = jnp.einsum(product[0], product[1], product[1], precision=jax.lax.Precision.HIGHEST)
            squares = jnp.sum(jnp.square(gram - identity), axis=(1, 2))
            total += jnp.sum(jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0))
        count += 2 * int(np.count_nonzero(own))
    return total / count


def least_important(s: Tree, u: Tree, ranks: dict[str, tuple[int, ...]], count: jax.Array) -> dict[str, jax.Array]:
    """Path -> which triplets are among the `count` least important ones, in E's shape; none where count is 0."""
    sensitivity, uncertainty = dict(flatten(s)), dict(flatten(u))
    scores: dict[str, jax.Array] = {}
    for path, own in ranks.items():
        a, b, e = (
            sensitivity[f"{path}/lora/{name}"] * uncertainty[f"{path}/lora/{name}"] for name in ("a", "b", "e")
        )  # fmt: skip
        score = e[..., 0] + (jnp.mean(a, axis=-1) + jnp.mean(b, axis=-2))
        inside = _inside(own, score.shape[-1]).reshape(score.shape)
        scores[path] = jnp.where(jnp.asarray(inside), score, jnp.inf)
    everything = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    threshold = jnp.where(count > 0, everything[jnp.maximum(count - 1, 0)], -jnp.inf)
    return {path: (score <= threshold)[..., None] for path, score in scores.items()}
