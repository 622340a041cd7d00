"""A run made of its settings: how many steps, the schedule, the optimizer, and what a resumed one must share."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxft.adalora import with_adalora
from jaxft.in_place import InPlace
from jaxft.loop import Run
from jaxft.optim import make_optimizer, with_loss_scale
from jaxft.optim_paged import check_device
from jaxft.packing import Batches, eval_batches
from jaxft.prepare import Prepared
from jaxft.run_data import RunData
from jaxft.schedules import Schedule, make_schedule
from jaxft.settings import TrainSettings
from jaxft.sharding import data_parallel_size
from jaxft.streaming import StreamBatches
from jaxft.tasks import make_task


def steps_of(settings: TrainSettings, batches: Batches | StreamBatches) -> int:
    """How many optimizer steps the run has."""
    if settings.max_steps >= 0:
        return settings.max_steps
    return math.ceil(settings.num_train_epochs * batches.steps_per_epoch)  # as transformers rounds it


def guessed(settings: TrainSettings, prepared: Prepared) -> Prepared:
    """`with_schedule` for the steps that the flags name, or else the fewest that AdaLoRA takes."""
    fewest = settings.tinit + settings.tfinal + 1
    return with_schedule(prepared, settings, settings.max_steps if settings.max_steps >= 0 else fewest)


def some_optimizer(settings: TrainSettings, prepared: Prepared) -> optax.GradientTransformation:
    """The run's optimizer for some number of steps, where theirs is not known yet: its program is that of any."""
    return optimizer_of(settings, prepared, schedule_of(settings, 1))


def with_schedule(prepared: Prepared, settings: TrainSettings, total: int) -> Prepared:
    """AdaLoRA's settings with the number of steps that its schedule needs; those of an adapter stay as they were."""
    if prepared.lora is None or prepared.lora.adalora is None or settings.adapter is not None:
        return prepared
    adalora = replace(prepared.lora.adalora, total_step=total)
    return replace(prepared, lora=replace(prepared.lora, adalora=adalora))


def make_run(settings: TrainSettings, prepared: Prepared, directory: Path, data: RunData) -> Run:
    """Everything the loop needs, computed from the settings once."""
    total = steps_of(settings, data.batches)
    schedule = schedule_of(settings, total)
    if settings.optim.startswith("paged") and not settings.device:
        check_device(prepared.mesh.devices.flat[0])
    optimizer = optimizer_of(settings, prepared, schedule)
    eval_rows = settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh)
    return Run(
        directory=directory,
        settings=settings,
        total_steps=total,
        batches=data.batches,
        heldout=eval_batches(
            data.heldout, max_length=settings.max_length, batch_size=eval_rows, packing=settings.packing
        )
        if data.heldout
        else None,
        optimizer=optimizer,
        schedule=schedule,
        fingerprint=fingerprint(settings, prepared, data),
        task=make_task(settings, prepared, data.heldout),
    )


def schedule_of(settings: TrainSettings, total: int) -> Schedule:
    """The learning rate of a run of `total` steps, by the number of the step."""
    warmup = settings.warmup_steps if settings.warmup_ratio is None else math.ceil(settings.warmup_ratio * total)
    return make_schedule(
        settings.lr_scheduler_type, settings.learning_rate, warmup, total, settings.lr_scheduler_kwargs
    )


def optimizer_of(
    settings: TrainSettings, prepared: Prepared, schedule: optax.Schedule
) -> optax.GradientTransformation | InPlace:
    """The optimizer that the flags ask for."""
    own_rate = settings.embedding_learning_rate
    adalora = None if prepared.lora is None else prepared.lora.adalora
    optimizer = make_optimizer(
        schedule, adam_beta1=settings.adam_beta1, adam_beta2=settings.adam_beta2, adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0 if adalora else settings.max_grad_norm,
        optim=settings.optim, embedding_factor=1.0 if own_rate is None else own_rate / settings.learning_rate,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
    )  # fmt: skip
    if adalora is not None:
        optimizer = with_adalora(
            optimizer, prepared.model, adalora, max_grad_norm=settings.max_grad_norm, allocate=settings.adapter is None
        )
    if prepared.compute_dtype == np.dtype("float16"):
        optimizer = with_loss_scale(optimizer)
    return optimizer


def fingerprint(settings: TrainSettings, prepared: Prepared, data: RunData) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on with, for its losses to be the same."""
    names = (
        "full_finetuning", "max_length", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
        "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
        "shuffle_dataset", "packing", "optim", "load_in_4bit", "load_in_8bit", "embedding_learning_rate", "add_tokens",
        "chat_template", "eval_split", "loraplus_lr_ratio",
    )  # fmt: skip
    found: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if prepared.lora is not None:
        own = {"r": "lora_r", "target_modules": "lora_target_modules"}
        found |= {own.get(name, name): value for name, value in asdict(prepared.lora).items()}
    held = {leaf.dtype.name for leaf in jax.tree.leaves((prepared.trainable, prepared.frozen))}
    found["dtype"] = f"{' and '.join(sorted(held))} weights, computed in {prepared.compute_dtype.name}"
    found |= {"rows_per_step": data.batches.rows_per_step, **data.shared}
    return json.loads(json.dumps(found))  # as it comes back from a checkpoint: lists, and no tuples
