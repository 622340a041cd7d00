"""How good the choice of `quantize --dynamic` is: beside every other subset of linear layers that fits the budget.

    python scripts/dynamic_vs_exhaustive.py                      # the embedded base, budgets of 10 and 20 %
    python scripts/dynamic_vs_exhaustive.py --budget +10% --json found.json

The criterion is E KL(p ‖ p̂) on held-out text, in nats a token: p are the predictions of the model in 16 bits, p̂ those
of the quantised one. What a choice is worth is how much of plain NF4's divergence it takes away. The held-out loss
itself is shown beside it; on a model as small as the embedded one plain NF4 changes it by less than its own chance, so
that a choice by it would be one by luck. Every subset is tried to which no layer could be added within the budget.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import load_model, load_tokenizer
from jaxft.activations import collect_activations
from jaxft.convert import dynamic, hf
from jaxft.convert.calibration import read_calibration
from jaxft.convert.quantize import Source, open_source
from jaxft.errors import run_command
from jaxft.kernels.linear_cross_entropy import logits
from jaxft.load import EMBEDDED
from jaxft.quant import dense
from jaxft.trees import Tree, flatten, unflatten

AT_ONCE = 8  # subsets that one call evaluates
HELD_TOKENS = 1 << 20  # all of the file


class Subsets:
    """A model whose linear layers are in 4 bits but for a subset, on held-out text."""

    def __init__(self, source: Source, held_out: str):
        self.model, params = load_model(source.directory, dtype=source.dtype)
        self._places = hf.places(self.model.family.names, self.model.shapes)
        self._names = list(source.linears)
        leaves = dict(flatten(params))
        quantized = {path: leaf for path, leaf in leaves.items()}
        for name in self._names:
            place, leaf = self._places[name], hf.quantize_matrix(source.matrix(name), "nf4")
            quantized[place.path] = quantized[place.path].at[place.row].set(dense(leaf, source.dtype))
        self._plain, self._quantized = leaves, quantized
        config = self.model.config
        batches, self.tokens = read_calibration(
            held_out, load_tokenizer(source.directory), positions=config.max_position_embeddings,
            vocab_size=config.vocab_size, most=HELD_TOKENS,
        )  # fmt: skip
        self._batches = [{name: jnp.asarray(array[0]) for name, array in batch.items()} for batch in batches]
        self._expected = [self._predictions(jnp.ones(len(self._names), bool), batch) for batch in self._batches]

    def _params(self, kept: jax.Array) -> Tree:
        """The parameters with the layers of a mask (n,) as they are, the others as their 4 bits say."""
        rows = {path: np.full(leaf.shape[0], -1) for path, leaf in self._plain.items() if leaf.ndim == 3}
        for number, name in enumerate(self._names):
            rows[self._places[name].path][self._places[name].row] = number
        chosen = dict(self._plain)
        for path, numbers in rows.items():
            mask = (kept[numbers] | (numbers < 0))[:, None, None]
            chosen[path] = jnp.where(mask, self._plain[path], self._quantized[path])
        return unflatten(chosen)

    @partial(jax.jit, static_argnums=0)
    def _predictions(self, kept, batch):
        decoder = self.model.bind(self._params(kept))
        hidden = decoder(batch["tokens"], batch["segment_ids"], batch["positions"], dtype=jnp.dtype("float32"))
        scores = logits(hidden, decoder.head(), softcap=self.model.config.final_softcap)
        return jax.nn.log_softmax(scores)

    @partial(jax.jit, static_argnums=0)
    def _sums(self, masks, batch, expected):
        """Σ KL and Σ weighted loss of each mask (n, layers)."""

        def one(kept):
            found = self._predictions(kept, batch)
            apart = jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)
            losses = -jnp.take_along_axis(found[:, :-1], batch["tokens"][:, 1:, None], axis=2)[..., 0]
            return jnp.sum(jnp.where(batch["segment_ids"] > 0, apart, 0.0)), jnp.sum(
                losses * batch["loss_weights"][:, 1:]
            )

        return jax.lax.map(one, masks)

    def measure(self, subsets: list[tuple[str, ...]]) -> Iterator[tuple[float, float]]:
        """(divergence, loss), nats a token, of each subset that is kept in 16 bits."""
        weight = sum(float(jnp.sum(batch["loss_weights"][:, 1:])) for batch in self._batches)
        for start in range(0, len(subsets), AT_ONCE):
            part = subsets[start : start + AT_ONCE]
            masks = np.zeros((AT_ONCE, len(self._names)), bool)
            for row, kept in enumerate(part):
                masks[row] = [name in kept for name in self._names]
            pairs = zip(self._batches, self._expected, strict=True)
            found = [self._sums(masks, batch, expected) for batch, expected in pairs]
            apart, losses = (np.sum([np.asarray(one[i]) for one in found], axis=0) for i in (0, 1))
            yield from zip(
                (apart / self.tokens).tolist()[: len(part)], (losses / weight).tolist()[: len(part)], strict=True
            )


def subsets_within(scores: list[dynamic.Score], budget: int) -> list[tuple[str, ...]]:
    """Every subset within a budget to which none of the other layers could be added."""
    found = []
    for size in range(len(scores) + 1):
        for part in itertools.combinations(scores, size):
            left = budget - sum(score.bytes for score in part)
            if left >= 0 and not any(score.bytes <= left and score not in part for score in scores):
                found.append(tuple(score.name for score in part))
    return found


def compare(subsets: Subsets, scores: list[dynamic.Score], budget: int) -> dict:
    """The best subset, and those that each score chooses, by what they leave of plain NF4's divergence."""
    every = subsets_within(scores, budget)
    everything = tuple(score.name for score in scores)
    plain, full, *found = subsets.measure([(), everything, *every])
    by_subset = {frozenset(kept): result for kept, result in zip(every, found, strict=True)}
    best = min(by_subset, key=lambda kept: by_subset[kept][0])
    chosen = {by: frozenset(dynamic.choose(scores, budget, by)) for by in dynamic.SCORES}
    rows = {"best of all": best} | {f"by {by}": kept for by, kept in chosen.items()}
    taken_away = plain[0] - by_subset[best][0]
    return {
        "budget": budget, "subsets": len(every), "plain": plain, "sixteen_bits": full,
        "rows": {
            name: {"kept": sorted(kept), "divergence": by_subset[kept][0], "loss": by_subset[kept][1],
                   "share_of_best": (plain[0] - by_subset[kept][0]) / taken_away}
            for name, kept in rows.items()
        },
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED / "base"), help="with few linear layers")
    parser.add_argument("--calibration", default=str(EMBEDDED / "problems_train.jsonl"))
    parser.add_argument("--held_out", default=str(EMBEDDED / "problems_heldout.jsonl"))
    parser.add_argument("--budget", nargs="+", default=["+10%", "+20%"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    source = open_source(options.model, 4, None)
    config = source.model.config
    batches, _ = read_calibration(
        options.calibration, load_tokenizer(options.model), positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )  # fmt: skip
    model, params = load_model(options.model, dtype=source.dtype)
    read = collect_activations(model, (params,), batches, rows=512, dtype=jnp.dtype("float32"))
    scores = dynamic.measure(source, params, batches, read, print)
    subsets = Subsets(source, options.held_out)
    found = [compare(subsets, scores, dynamic.parse_budget(text, source.total(()))) for text in options.budget]
    for text, one in zip(options.budget, found, strict=True):
        print(f"\n{text}: {one['budget']:,} bytes, {one['subsets']} subsets that cannot grow, {subsets.tokens} tokens")
        print(f"{'plain NF4':16} divergence {one['plain'][0]:.6f}  loss {one['plain'][1]:.5f}")
        print(f"{'16 bits':16} divergence {one['sixteen_bits'][0]:.6f}  loss {one['sixteen_bits'][1]:.5f}")
        for name, row in one["rows"].items():
            kept = ", ".join(name.removeprefix("model.layers.").removesuffix(".weight") for name in row["kept"])
            print(f"{name:16} divergence {row['divergence']:.6f}  loss {row['loss']:.5f}  "
                  f"{row['share_of_best']:.1%} of what the best takes away: {kept}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
