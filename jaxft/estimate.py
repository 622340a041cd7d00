"""How long a planned run would take: its work, at a rate that is measured here or assumed of a card that is not."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.cards import is_absent, peak_flops
from jaxft.kernels.linear import Weights
from jaxft.kernels.mlp import mlp
from jaxft.models import Model
from jaxft.models.layers import KEPT_MLP, REMAT
from jaxft.packing import Batch, Batches
from jaxft.streaming import StreamBatches
from jaxft.trees import flatten

ASSUMED = 0.4  # of the peak in a card's data sheet, where nothing can be measured; it is said with the estimate
SAMPLED = 4  # steps of an epoch whose batches are counted; they stand for the others
# work of the measured block: what is timed should be neither over at once nor waited for
MEASURED_WORK = {"cpu": 1e10, "gpu": 2e13}
# policies under which the backward pass computes the layers' products again, and those under which attention too
AGAIN = tuple(policy for policy in REMAT if policy not in KEPT_MLP)
ATTENTION_AGAIN = ("full", "offload")


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one device, and in words where the number is from."""

    flops: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """The time of a run: `steps` steps of `work` FLOPs on `devices` devices at a rate each.

    tokens: of a step, padding not counted.
    """

    steps: int
    work: float
    tokens: float
    devices: int
    rate: Rate

    @property
    def step_seconds(self) -> float:
        return self.work / (self.devices * self.rate.flops)

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds

    def lines(self) -> list[str]:
        """The estimate, and what it takes for granted."""
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        return [
            f"time: about {spoken(self.seconds)} for {self.steps} steps, {spoken(self.step_seconds)} each, "
            f"{self.tokens / self.step_seconds:,.0f} tokens a second: an estimate",
            f"  from {scaled(self.work)}FLOP a step (padding and what is computed again included) at "
            f"{scaled(self.rate.flops)}FLOP/s{each}, {self.rate.source}, taken for all of a step; loading, "
            "compilation, evaluations and checkpoints are not in it, and the step_seconds of a started run know better",
        ]


def estimate(
    model: Model, batches: Batches | StreamBatches, *, steps: int, device: jax.Device, devices: int,
    gradient_checkpointing: str, kept_layers: int = 0, full_finetuning: bool, dtype: Any, rank: int | None,
) -> Estimate | str:  # fmt: skip
    """The estimate of a run of `steps` steps; a sentence saying why there is none where no rate is known.

    device: of the kind that is planned for; `devices` of them share each step, as if they lost nothing by it. On a
    device that is here one MLP of the model is timed, forward and backward; rank: of its LoRA, None for none.
    """
    if is_absent(device):
        peak = peak_flops(device, dtype)
        if peak is None:
            return f"time: not estimated, as no peak of {device.device_kind} in {jnp.dtype(dtype).name} is known"
        rate = Rate(
            ASSUMED * peak,
            f"assumed: {ASSUMED:.0%} of the {scaled(peak)}FLOP/s in the data sheet of {device.device_kind}",
        )
    else:
        per_device = max(1, batches.rows_per_step // devices) * batches.max_length
        rate = measured_rate(
            model, tokens=per_device, dtype=dtype, device=device, full_finetuning=full_finetuning, rank=rank
        )
    some = sampled(batches)
    work = [step_work(model, batch, gradient_checkpointing, full_finetuning, kept_layers) for batch in some]
    tokens = [np.count_nonzero(batch["segment_ids"]) for batch in some]
    return Estimate(steps, statistics.fmean(work), float(np.mean(tokens)), devices, rate)


def sampled(batches: Batches | StreamBatches) -> Sequence[Batch]:
    """Some batches of an epoch, evenly spread; the first of a stream."""
    if isinstance(batches, StreamBatches):
        return [batches.batch(0)]
    count = min(SAMPLED, batches.steps_per_epoch)
    return [batches.batch(at * batches.steps_per_epoch // count) for at in range(count)]


def step_work(
    model: Model, batch: Batch, gradient_checkpointing: str, full_finetuning: bool, kept_layers: int = 0
) -> float:
    """FLOPs that a step computes: products with weights, of padding too, and attention's pairs of query and key.

    2 · M · tokens forward and for dX each, once more where weights are trained, once more for the layers where they
    are computed again; 4 · N · H · pairs for attention forward, twice that backward. LoRA's branches and what passes
    over memory alone are not counted.
    """
    c = model.config
    layers = sum(leaf.size for path, leaf in flatten(model.shapes) if leaf.ndim == 3 and "/lora/" not in path)
    passes = 3 if full_finetuning else 2
    again = max(0.0, 1 - kept_layers / c.num_layers)  # of the layers
    products = passes * (layers + c.vocab_size * c.hidden_size)
    products += again * layers if gradient_checkpointing in AGAIN else 0
    seen = batch["positions"].astype(np.float64) + 1  # keys of each query, where no window hides the first ones
    pairs = {window: float(np.sum(np.minimum(seen, window or math.inf))) for window in set(c.layer_window)}
    attention = 4 * c.num_heads * c.head_dim * sum(pairs[window] for window in c.layer_window)
    times = 3 + (again if gradient_checkpointing in ATTENTION_AGAIN else 0)
    return 2.0 * products * batch["tokens"].size + attention * times


def measured_rate(
    model: Model, *, tokens: int, dtype: Any, device: jax.Device, full_finetuning: bool, rank: int | None
) -> Rate:
    """FLOP/s of one MLP of the model's sizes, forward and backward, timed now: the median of three after a first."""
    c = model.config
    D, F = c.hidden_size, c.intermediate_size
    passes = 3 if full_finetuning else 2
    budget = MEASURED_WORK.get(device.platform, MEASURED_WORK["gpu"])
    M = max(1, min(tokens, int(budget / (2 * 3 * D * F * passes))))
    with jax.default_device(device):
        keys = jax.random.split(jax.random.key(0), 2)
        wide = jax.jit(lambda key: (jax.random.uniform(key, (F, D)) - 0.5).astype(dtype))(keys[0])
        x = jax.jit(lambda key: jax.random.uniform(key, (1, M, D)).astype(dtype))(keys[1])
        weights = [wide, wide, wide.reshape(D, F)]
        loras = None
        if rank is not None and not full_finetuning:
            small = [(jnp.full((rank, w.shape[1]), 0.01), jnp.full((w.shape[0], rank), 0.01)) for w in weights]
            loras = [(a, b, jnp.float32(1)) for a, b in small]

        @jax.jit
        def both(x, weights, loras):
            def loss(x, weights, loras):
                layers = [Weights(w, None, None if loras is None else loras[n]) for n, w in enumerate(weights)]
                return jnp.sum(mlp(x, *layers, activation=c.hidden_act).astype(jnp.float32))

            of = (0, 1) if full_finetuning else (0,) if loras is None else (0, 2)
            return jax.grad(loss, argnums=of)(x, weights, loras)

        jax.block_until_ready(both(x, weights, loras))
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready(both(x, weights, loras))
            seconds.append(time.perf_counter() - began)
    work = 2.0 * 3 * D * F * M * passes
    return Rate(
        work / statistics.median(seconds),
        f"measured now on one MLP of the model ({M:,} tokens, {D} to {F}, {jnp.dtype(dtype).name}, forward and "
        f"backward) on {device.device_kind}",
    )


def spoken(seconds: float) -> str:
    """A time to read: 0.25 s, 42 s, 5 min, 3.1 h, 2.4 days."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, size, up_to in (("min", 60, 90), ("h", 3600, 48)):
        if seconds / size < up_to:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def scaled(number: float) -> str:
    """A number with the letter of its thousands: 3.25e12 is '3.25 T'."""
    for letter, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:.3g} "
