"""Which linear layers of a quantised model stay in 16 bits: what quantising each of them costs, and the best choice.

A layer is scored by itself, all others as the files have them. W is its weight, Ŵ what its 4 or 8 bits stand for, x the
inputs that it has on calibration text, p and p̂ the model's predictions with W and with Ŵ there:

    weight error       ‖Ŵ − W‖² / ‖W‖²
    output error       E‖x (Ŵ − W)ᵀ‖² / E‖x Wᵀ‖²
    divergence         E KL(p ‖ p̂), in nats a token

Errors of single layers nearly add up, because they are independent of each other and small. So the choice is a
knapsack: the layers with the largest sum of scores whose 16 bits take no more bytes than the budget.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.activations import Activations
from jaxft.convert import hf
from jaxft.convert.quantize import Source
from jaxft.errors import RunError
from jaxft.kernels.linear_cross_entropy import logits
from jaxft.models import Model
from jaxft.packing import Batch
from jaxft.quant import dense, kind_of
from jaxft.trees import Tree, flatten, unflatten
from jaxft.typed import parse_bytes

SCORES = ("weight", "output", "divergence")
Rows = dict[str, jax.Array]  # of one batch, (B, T) each
UNITS = 20_000  # in how many parts the knapsack counts a budget
TILE = 1 << 26  # logits that exist at a time


@dataclass(frozen=True)
class Score:
    """What quantising one linear layer costs: errors as above (None where not measured), bytes that 16 bits take more.

    name: of its weight in the files.
    """

    name: str
    weight: float
    output: float | None
    divergence: float | None
    bytes: int

    def by(self, score: str) -> float:
        found = getattr(self, score)
        assert found is not None
        return found


def parse_budget(text: str, plain: int) -> int:
    """Bytes beyond those of `plain` quantisation: '+10%', '10%' of them, or '+64MiB'. Raises InputError otherwise."""
    found = re.fullmatch(r"\+?(\d+(?:\.\d+)?)\s*%", text.strip())
    if found:
        return int(plain * float(found[1]) / 100)
    return parse_bytes(text.strip().removeprefix("+"), "--budget {}: expected a share such as +10%, or")


def choose(scores: list[Score], budget: int, by: str) -> tuple[str, ...]:
    """The names of the layers to keep: the largest sum of a score within `budget` bytes (exact up to its rounding).

    Costs are rounded up to a `UNITS`-th of the budget, so that it is never passed.
    """
    unit = max(1, -(-budget // UNITS))
    room = budget // unit
    best = np.zeros(room + 1)
    taken = np.zeros((len(scores), room + 1), bool)
    for number, score in enumerate(scores):
        cost = -(-score.bytes // unit)
        if cost > room or not score.by(by) > 0:
            continue
        with_it = best[: room + 1 - cost] + score.by(by)
        taken[number, cost:] = with_it > best[cost:]
        best[cost:] = np.where(taken[number, cost:], with_it, best[cost:])
    kept: list[str] = []
    left = room
    for number in range(len(scores) - 1, -1, -1):
        if taken[number, left]:
            kept.append(scores[number].name)
            left -= -(-scores[number].bytes // unit)
    return tuple(sorted(kept))


def bytes_of(scores: list[Score], kept: Iterable[str]) -> int:
    """Bytes that the layers `kept` take more than quantised."""
    more = {score.name: score.bytes for score in scores}
    return sum(more[name] for name in kept)


def measure(
    source: Source, params: Tree | None, batches: list[Batch], read: Activations | None, say: Callable[[str], None]
) -> list[Score]:
    """The scores of all linear layers, in the order of the files.

    params, batches: the model as the files have it, in 16 bits, and calibration text, for the divergence; None, []
    where it is not wanted. read: what the layers read on that text, for the output error; None where it is not wanted.
    On the device are, beside params, two tensors: one layer's weight as it is stored, and what it becomes.
    """
    predictions = None if params is None else Predictions(source.model, params, batches)
    found = []
    for number, (name, like) in enumerate(source.linears.items()):
        weight = source.matrix(name)
        leaf = hf.quantize_matrix(weight, kind_of(like))
        weight_error, output_error = float(_weight_error(weight, leaf)), None
        if read is not None:
            rows = jnp.asarray(read.rows[name.removesuffix(".weight")])
            output_error = float(_output_error(weight, leaf, rows))
        del weight
        divergence = None
        if predictions is not None:
            divergence = predictions.divergence(name, _dense(leaf, source.dtype))
        for what, value in (("weight", weight_error), ("output", output_error), ("divergence", divergence)):
            if value is not None and not math.isfinite(value):
                raise RunError(f"{name}: its {what} error in {kind_of(like)} is {value}: are its values finite?")
        more = source.size(name, False) - source.size(name, True)
        found.append(Score(name, weight_error, output_error, divergence, more))
        if (number + 1) % 20 == 0:
            say(f"scored {number + 1} of {len(source.linears)} linear layers")
    return found


@partial(jax.jit, static_argnums=1)
def _dense(leaf: Any, dtype: jnp.dtype) -> jax.Array:
    return dense(leaf, dtype)


@jax.jit
def _weight_error(weight: jax.Array, leaf: Any) -> jax.Array:
    W = weight.astype(jnp.float32)
    return _ratio(jnp.sum(jnp.square(dense(leaf, jnp.float32) - W)), jnp.sum(jnp.square(W)))


@jax.jit
def _output_error(weight: jax.Array, leaf: Any, rows: jax.Array) -> jax.Array:
    """The output error over rows of inputs (n, I)."""
    W = weight.astype(jnp.float32)

    def power(matrix: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.einsum("nI,OI->nO", rows, matrix, precision=jax.lax.Precision.HIGHEST)))

    return _ratio(power(dense(leaf, jnp.float32) - W), power(W))


def _ratio(wrong: jax.Array, whole: jax.Array) -> jax.Array:
    """wrong / whole; a weight of zeros has no error."""
    return jnp.where(whole == 0, 0.0, wrong / jnp.where(whole == 0, 1.0, whole))


class Predictions:
    """A model's predictions on calibration text, and how far those with another weight are from them.

    Activations are float32: what rounding to 16 bits does to them would drown the smaller divergences. What is kept of
    the predictions is the last hidden states. params are used up: their arrays are changed in place.
    """

    def __init__(self, model: Model, params: Tree, batches: list[Batch]):
        self._leaves = dict(flatten(params))
        self._places = hf.places(model.family.names, model.shapes)
        self._batches = [{name: jnp.asarray(array[0]) for name, array in batch.items()} for batch in batches]
        self._tokens = sum(int(np.count_nonzero(batch["segment_ids"])) for batch in batches)

        @jax.jit
        def hidden(params: Tree, batch: Rows) -> jax.Array:
            return model.bind(params)(
                batch["tokens"], batch["segment_ids"], batch["positions"], dtype=jnp.dtype("float32")
            )

        @jax.jit
        def divergence(params: Tree, batch: Rows, expected: jax.Array) -> jax.Array:
            decoder, found = model.bind(params), hidden(params, batch)
            D = found.shape[-1]
            parts = [x.reshape(-1, D) for x in (expected, found)]
            counts = (batch["segment_ids"] > 0).reshape(-1)
            rows = max(1, min(len(counts), TILE // model.config.vocab_size))
            tiles = -(-len(counts) // rows)
            pad = tiles * rows - len(counts)
            cut = [jnp.pad(x, ((0, pad), (0, 0))).reshape(tiles, rows, D) for x in parts]

            def tile(inputs: tuple[jax.Array, ...]) -> jax.Array:
                p, q, count = inputs
                p, q = (
                    jax.nn.log_softmax(logits(x, decoder.head(), softcap=model.config.final_softcap)) for x in (p, q)
                )
                return jnp.sum(jnp.where(count, jnp.sum(jnp.exp(p) * (p - q), axis=1), 0.0))

            return jnp.sum(jax.lax.map(tile, (*cut, jnp.pad(counts, (0, pad)).reshape(tiles, rows))))

        self._divergence = divergence
        self._expected = [hidden(params, batch) for batch in self._batches]

    def divergence(self, name: str, weight: jax.Array) -> float:
        """E KL(p ‖ p̂) with `weight` in the place of the weight `name`, which comes back after it; nats a token."""
        place = self._places[name]
        assert place.row is not None  # every quantised layer stands in a stack
        at, own = np.array([place.row, 0, 0], np.int32), self._leaves[place.path][place.row]
        # in place: the stack is donated
        self._leaves[place.path] = hf.write_rows(self._leaves[place.path], weight, at)
        params = unflatten(self._leaves)
        pairs = zip(self._batches, self._expected, strict=True)
        total = sum(float(self._divergence(params, batch, expected)) for batch, expected in pairs)
        del params
        self._leaves[place.path] = hf.write_rows(self._leaves[place.path], own, at)
        return total / self._tokens
