"""The train step and the eval step: pure functions from state and batch to state and metrics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxft.in_place import InPlace
from jaxft.kernels.gpu import one_device
from jaxft.loss import Batch, sft_loss
from jaxft.models import Model
from jaxft.optim import LossScale, apply_updates, next_loss_scale
from jaxft.optim_paged import holds_paged, is_paged
from jaxft.trees import Tree

TrainStep = Callable[[Tree, optax.OptState, Tree, Batch, jax.Array], tuple[Tree, optax.OptState, dict[str, jax.Array]]]
EvalStep = Callable[[Tree, Tree, Batch], dict[str, jax.Array]]


def make_train_step(
    model: Model,
    *,
    loss: Callable[..., tuple[jax.Array, jax.Array]] = sft_loss,
    optimizer: optax.GradientTransformation | InPlace,
    gradient_checkpointing: str = "full",
    dtype: jnp.dtype | None = None,
    mlp_tiles: int = 1,
    kept_layers: int = 0,
    max_documents: int | None = None,
) -> TrainStep:
    """The step (trainable, opt_state, frozen, batch, key) -> (trainable, opt_state, metrics), ready for `jax.jit`.

    batch: arrays (A, B, T); the A micro-batches are scanned. The loss is Σ weight · loss / Σ weight over all of them,
    so no split into micro-batches or devices changes it. trainable and frozen are any two trees whose leaves together
    are the model's; only trainable is differentiated (LoRA: the adapter; full fine-tuning: everything, frozen {}).
    metrics, all scalars: loss (before the update), weight (Σ weight), grad_norm (before clipping), target_tokens,
    finite. Where loss or a gradient is not finite, trainable and opt_state come back unchanged and finite is False.
    loss(model, micro_batch, key, **options) returns (Σ weight · loss, Σ weight); options are the five that follow,
    kept_layers where it is not 0. gradient_checkpointing: what is kept for the backward pass, a name of
    `models.layers.REMAT`. dtype: of the activations, the parameters' own where None. mlp_tiles, kept_layers,
    max_documents: see `Decoder.__call__`.
    """

    options = dict(
        gradient_checkpointing=gradient_checkpointing, dtype=dtype, mlp_tiles=mlp_tiles, max_documents=max_documents
    )
    if kept_layers:
        options["kept_layers"] = kept_layers

    def train_step(trainable, opt_state, frozen, batch, key):
        scaled = isinstance(opt_state, LossScale)
        loss_scale = opt_state.scale if scaled else jnp.float32(1)
        dropout_key, rounding_key = jax.random.split(key)

        def micro_loss(trainable, micro, micro_key):
            total, weight = loss(model.bind(trainable, frozen), micro, micro_key, **options)
            return total * loss_scale, (total, weight)

        grad = jax.grad(micro_loss, has_aux=True)

        def accumulate(carry, inputs):
            grads, (total, weight) = grad(trainable, *inputs)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (grads, total, weight)), None

        A = batch["tokens"].shape[0]
        micro_keys = jax.random.split(dropout_key, A)
        if A == 1:  # no accumulator: the gradients stay in the parameters' dtype and exist once
            grads, (total, weight) = grad(trainable, jax.tree.map(lambda leaf: leaf[0], batch), micro_keys[0])
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
            start = (zeros, jnp.float32(0), jnp.float32(0))
            (grads, total, weight), _ = jax.lax.scan(accumulate, start, (batch, micro_keys))

        # a batch of padding alone has weight 0: its loss and gradients are 0, not 0/0
        divisor = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        factor = 1 / (divisor * loss_scale)
        mean, norm = total / divisor, factor * optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        if isinstance(optimizer, InPlace) and one_device():
            factor = factor * optimizer.clipping(norm)
            trainable, opt_state = optimizer.apply(grads, opt_state, trainable, rounding_key, factor, finite)
        else:
            grads = jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), grads)
            old = opt_state.inner if scaled else opt_state
            extra = {"finite": finite} if holds_paged(old) else {}
            updates, new = optimizer.update(grads, old, trainable, **extra)
            updated = apply_updates(trainable, updates, rounding_key)
            keep = lambda new, old: new if is_paged(new) else jnp.where(finite, new, old)  # noqa: E731
            trainable, inner = jax.tree.map(keep, (updated, new), (trainable, old), is_leaf=is_paged)
            opt_state = next_loss_scale(opt_state, finite, inner) if scaled else inner
        metrics = {
            "loss": mean,
            "weight": weight,
            "grad_norm": norm,
            "target_tokens": jnp.sum((batch["loss_weights"] != 0).astype(jnp.int32)),
            "finite": finite,
        }
        if scaled:
            metrics["loss_scale"] = loss_scale
        return trainable, opt_state, metrics

    return train_step


def make_eval_step(
    model: Model, *, loss: Callable[..., tuple[jax.Array, jax.Array]] = sft_loss, dtype: jnp.dtype | None = None
) -> EvalStep:
    """The step (trainable, frozen, batch (A, B, T)) -> {loss_sum, weight, target_tokens}: sums, to be added over
    batches and divided at the end. Dropout is off."""

    def eval_step(trainable, frozen, batch):
        bound = model.bind(trainable, frozen)

        def add(carry, micro):
            return jax.tree.map(jnp.add, carry, loss(bound, micro, None, dtype=dtype)), None

        (total, weight), _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), batch)
        tokens = jnp.sum((batch["loss_weights"] != 0).astype(jnp.int32))
        return {"loss_sum": total, "weight": weight, "target_tokens": tokens}

    return eval_step
