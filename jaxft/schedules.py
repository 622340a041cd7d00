"""Learning-rate schedules by the names that users of transformers type; how long a run is they read as data.

What the number of steps decides is a few scalars, `Numbers`. An optimizer has them in its state, so that its program
is the same for every number of steps: compiled once, and before the steps are counted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.errors import InputError

State = TypeVar("State")


class Numbers(NamedTuple):
    """What the length of a run decides in its schedule, () float32 each.

    rise, fall: the share that one step is of the warmup, and of what comes after it. They are divided on the host,
    once: of constants XLA makes these reciprocals itself, and a division on a card is not always the nearest float32.
    """

    warmup: Any
    total: Any
    rise: Any
    fall: Any

    @classmethod
    def of(cls, warmup: int, total: int) -> "Numbers":
        """Those of so many steps."""
        one = np.float32(1)
        rise, fall = one / np.float32(max(1, warmup)), one / np.float32(max(1, total - warmup))
        return cls(np.float32(warmup), np.float32(total), rise, fall)


def _linear(step, own):
    return jnp.maximum(0.0, (own.total - step) * own.fall)


# the constants of an angle meet the share of a step first: that is how XLA joins two constants
def _cosine(step, own, *, num_cycles=0.5):
    return jnp.maximum(0.0, 0.5 * (1 + jnp.cos((step - own.warmup) * (math.pi * num_cycles * 2 * own.fall))))


def _cosine_with_restarts(step, own, *, num_cycles=1):
    wave = 0.5 * (1 + jnp.cos(math.pi * (((step - own.warmup) * (num_cycles * own.fall)) % 1.0)))
    return jnp.where((step - own.warmup) * own.fall >= 1, 0.0, jnp.maximum(0.0, wave))


def _cosine_with_min_lr(step, own, *, min_lr_rate, num_cycles=0.5):
    wave = 0.5 * (1 + jnp.cos((step - own.warmup) * (math.pi * num_cycles * 2 * own.fall)))
    return jnp.maximum(0.0, wave * (1 - min_lr_rate) + min_lr_rate)


def _polynomial(step, own, *, lr_end_rate, power=1.0):
    remaining = jnp.maximum(0.0, 1 - (step - own.warmup) * own.fall)
    return (1 - lr_end_rate) * remaining**power + lr_end_rate


def _inverse_sqrt(step, own, *, timescale=None):
    if timescale:
        return 1 / jnp.sqrt((step + (timescale - own.warmup)) / timescale)
    scale, share = jnp.where(own.warmup > 0, own.warmup, 10_000), jnp.where(own.warmup > 0, own.rise, 1 / 10_000)
    return 1 / jnp.sqrt((step + (scale - own.warmup)) * share)


def _warmup_stable_decay(step, own, *, num_decay_steps, min_lr_ratio=0.0, num_cycles=0.5):
    start = own.total - num_decay_steps
    wave = 0.5 * (1 + jnp.cos(math.pi * num_cycles * 2 * (step - start) / max(1, num_decay_steps)))
    falling = jnp.maximum(0.0, wave * (1 - min_lr_ratio) + min_lr_ratio)
    return jnp.where(step < start, 1.0, jnp.where(step < own.total, falling, min_lr_ratio))


# (step, numbers) -> factor of learning_rate after the warmup
SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "constant": lambda step, own: jnp.float32(1.0),
    "constant_with_warmup": lambda step, own: jnp.float32(1.0),
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """An `optax.Schedule`: step (from 0) to learning rate, float32. options: those that `SCHEDULES[name]` takes."""

    name: str
    learning_rate: float
    numbers: Numbers
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, step: Any) -> jax.Array:
        return self.rate(step, self.numbers)

    def rate(self, step: Any, numbers: Numbers) -> jax.Array:
        """The learning rate of a step by the numbers of any run: arrays, where one program is to serve them all."""
        step = jnp.asarray(step, jnp.float32)
        floor = self.options.get("min_lr_ratio", 0.0)  # warmup_stable_decay rises from where it will end
        rising = floor + step * ((1 - floor) * numbers.rise)
        after = SCHEDULES[self.name](step, numbers, **self.options)
        return self.learning_rate * jnp.where(step < numbers.warmup, rising, after)


def make_schedule(
    name: str, learning_rate: float, warmup_steps: int, total_steps: int, options: dict[str, Any] | None = None
) -> Schedule:
    """transformers' schedule `name`: step (from 0) to learning rate, float32.

    The first warmup_steps rise linearly from 0, or from `min_lr_ratio` (`constant` has none). options:
    `lr_scheduler_kwargs` as transformers spells them. Raises InputError for an unknown name or option.
    """
    if name not in SCHEDULES:
        raise InputError(f"lr_scheduler_type {name!r} is unknown; known: {', '.join(SCHEDULES)}")
    options = dict(options or {})
    if name == "polynomial":
        options["lr_end_rate"] = options.pop("lr_end", 1e-7) / learning_rate if learning_rate else 0.0
    if name == "cosine_with_min_lr" and "min_lr" in options:
        options["min_lr_rate"] = options.pop("min_lr") / learning_rate if learning_rate else 0.0
    numbers = Numbers.of(0 if name == "constant" else warmup_steps, total_steps)
    found = Schedule(name, learning_rate, numbers, options)
    try:
        jax.eval_shape(found, 0)  # computes nothing
    except TypeError as error:
        raise InputError(f"lr_scheduler_type {name}: lr_scheduler_kwargs {options} do not fit: {error}") from error
    return found


class ScheduleState(NamedTuple):
    """count: () int32, the updates that were made. numbers: `Numbers` of the run's schedule, None in a checkpoint."""

    count: jax.Array  # type: ignore[assignment]  # a tuple's own method has the name, which is optax's for it
    numbers: Any


def scale_by_rate(schedule: optax.Schedule | float) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`; a `Schedule` has its numbers in the state, where others are constants."""
    if not isinstance(schedule, Schedule):
        return optax.scale_by_learning_rate(schedule)

    def init(params):
        del params
        return ScheduleState(jnp.zeros((), jnp.int32), schedule.numbers)  # as arrays each would be a program of its own

    def update(updates, state, params=None):
        del params
        rate = -schedule.rate(state.count, state.numbers)
        updates = jax.tree.map(lambda leaf: rate.astype(leaf.dtype) * leaf, updates)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def is_scheduled(node: Any) -> bool:
    """For `jax.tree.map(…, is_leaf=is_scheduled)` too."""
    return isinstance(node, ScheduleState)


def scheduled(state: optax.OptState) -> ScheduleState:
    """The part of an optimizer's state that its `Schedule` has."""
    return next(filter(is_scheduled, jax.tree.leaves(state, is_leaf=is_scheduled)))


def with_numbers(state: State, numbers: Numbers | None) -> State:
    """An optimizer's state with these numbers of its `Schedule`; None takes them out.

    They are in no checkpoint, and no constants of the program that makes a first state: both are the same whatever was
    planned.
    """
    return jax.tree.map(
        lambda node: node._replace(numbers=numbers) if is_scheduled(node) else node, state, is_leaf=is_scheduled
    )
