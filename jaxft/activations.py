"""What the linear layers of a model read on calibration data: mean squares of their input columns, and sample rows."""

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxft.errors import RunError
from jaxft.lora import linear_modules, linear_places
from jaxft.models import Model
from jaxft.models.layers import Context, LayerData, Linear, Seen
from jaxft.packing import Batch, permutation
from jaxft.sharding import constrain, put_batch
from jaxft.trees import Tree

Layers = tuple[str, ...]  # paths of layers that read the same x
Seens = dict[Layers, tuple[jax.Array, jax.Array]]  # sums of squares ([L,] I) and inputs of chosen tokens ([L,] n, I)
DRAW_STREAM = 3  # of random numbers, beside those of `packing`


class Activations(NamedTuple):
    """What linear layers read, by Hugging Face's module name, e.g. 'model.layers.0.self_attn.q_proj'.

    mean_squares: (I,) float32, the mean of x² over all tokens, padding left out. rows: (n, I) float32, inputs of n of
    these tokens, the same tokens for every layer. tokens: how many there were. Layers that read the same x (q, k and v)
    share their memory.
    """

    mean_squares: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    tokens: int


def collect_activations(
    model: Model,
    trees: tuple[Tree, ...],
    batches: Collection[Batch],
    *,
    rows: int = 0,
    seed: int = 0,
    dtype: jnp.dtype | None = None,
    mesh: Mesh | None = None,
) -> Activations:
    """Runs the model over batches of arrays (A, B, T), such as `packing.eval_batches` makes, one micro-batch at a time.

    trees: its parameters, as `Model.bind` takes them; LoRA's branches take part. rows: of how many tokens to keep the
    inputs (all where the data are shorter), drawn by `seed` from all tokens alike. dtype: of the activations, the
    embedding's own where None. Squares are summed in float32 over a micro-batch and in float64 over all of them. The
    head is among the layers where it is not the embedding. Raises RunError for activations that are not finite.
    """
    observe = jax.jit(partial(_observe, model, dtype))
    sums: dict[Layers, np.ndarray] = {}
    kept: dict[Layers, list[np.ndarray]] = {}
    picks, tokens = _draw(batches, rows, seed)
    for batch, batch_picks in zip(batches, picks, strict=True):
        placed = batch if mesh is None else put_batch(batch, mesh)
        for index, chosen in enumerate(batch_picks):
            # few widths, few programs
            padded = np.zeros((1 << (len(chosen) - 1).bit_length() if len(chosen) else 0, 2), np.int32)
            padded[: len(chosen)] = chosen
            found = observe(trees, {name: array[index] for name, array in placed.items()}, padded)
            for layers, (squares, inputs) in found.items():
                sums[layers] = sums.get(layers, 0.0) + np.asarray(squares, np.float64)
                kept.setdefault(layers, []).append(np.asarray(inputs)[..., : len(chosen), :])
    means = {layers: (total / max(tokens, 1)).astype(np.float32) for layers, total in sums.items()}
    samples = {layers: np.concatenate(parts, axis=-2) for layers, parts in kept.items()}
    _check_finite(means)
    return Activations(_by_name(model, means), _by_name(model, samples), tokens)


def _observe(
    model: Model, dtype: jnp.dtype | None, trees: tuple[Tree, ...], micro: dict[str, jax.Array], picks: jax.Array
) -> Seens:
    """Σ x² over the tokens of a micro-batch (B, T), and x of the tokens `picks` (n, 2), their row and column."""
    decoder = model.bind(*trees)
    real = (micro["segment_ids"] != 0).astype(jnp.float32)
    context = decoder.context(micro["segment_ids"], micro["positions"])
    x = decoder.embed(micro["tokens"], dtype or decoder.embed_tokens.weight[...].dtype)

    def seen(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)  # squares of float16 overflow
        squares = jnp.einsum("BT,BTI->I", real, x * x, precision=jax.lax.Precision.HIGHEST)
        return squares, x[picks[:, 0], picks[:, 1]]

    found: Seens = {}
    for start, count in decoder.run_lengths().items():
        graphdef, parameters = nnx.split(decoder.layers[start])

        def step(x, inputs, context, graphdef=graphdef):
            parameters, layer = inputs
            x, kept = _watch(nnx.merge(graphdef, parameters), x, layer, context)
            return constrain(x, ("batch", "length", "embed_activation")), {p: seen(x) for p, x in kept.items()}

        x, stacks = jax.lax.scan(partial(step, context=context), x, (parameters, decoder.layer_data(start, count)))
        found |= {tuple(f"layers/{start}/{path}" for path in paths): stack for paths, stack in stacks.items()}
    if decoder.lm_head is not None:
        found["lm_head",] = seen(decoder.finish(x))
    return found


def _watch(
    block: nnx.Module, x: jax.Array, layer: LayerData, context: Context
) -> tuple[jax.Array, dict[Layers, jax.Array]]:
    """What a block gives, and what its linear layers read."""
    linears: dict[str, Linear] = linear_modules(block)
    for linear in linears.values():
        linear.seen = Seen(None)
    x, _ = block(x, layer, context, None)
    inputs = {path: linear.seen.get_value() for path, linear in linears.items() if linear.seen is not None}
    alike: dict[int, list[str]] = {}
    for path, read in inputs.items():
        alike.setdefault(id(read), []).append(path)
    return x, {tuple(paths): inputs[paths[0]] for paths in alike.values()}


def _draw(batches: Collection[Batch], rows: int, seed: int) -> tuple[list[list[np.ndarray]], int]:
    """For each micro-batch of each batch which tokens to keep, (n, 2) row and column, and how many tokens there are."""
    real = [[np.argwhere(micro != 0) for micro in batch["segment_ids"]] for batch in batches]
    total = sum(len(places) for batch in real for places in batch)
    wanted = np.zeros(total, bool)
    wanted[permutation(total, seed, DRAW_STREAM)[:rows]] = True
    start = 0
    picks: list[list[np.ndarray]] = []
    for batch in real:
        picks.append([])
        for places in batch:
            picks[-1].append(places[wanted[start : start + len(places)]])
            start += len(places)
    return picks, total


def _by_name(model: Model, found: dict[Layers, np.ndarray]) -> dict[str, np.ndarray]:
    """One array a layer out of one a stack of layers."""
    by_path = {path: stack for layers, stack in found.items() for path in layers}
    return {
        name: by_path[place.path] if place.row is None else by_path[place.path][place.row]
        for name, place in linear_places(model).items()
    }


def _check_finite(means: dict[Layers, np.ndarray]) -> None:
    for layers, mean in means.items():
        if not np.isfinite(mean).all():
            raise RunError(
                f"what {layers[0]} reads is not finite: weights or activations overflow; try --dtype float32"
            )
