"""Several data sets as one: how they are named, and which samples of each an epoch takes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from jaxft.errors import InputError
from jaxft.packing import permutation
from jaxft.samples import Samples, Selection

_MIXTURE_STREAM = 3


@dataclass(frozen=True)
class Source:
    """One data set of a run: a path or hub name, and what else it needs to be read."""

    path: str
    config: str | None = None
    split: str | None = None
    weight: float | None = None


def parse_sources(dataset: str, weights: str | None = None) -> tuple[Source, ...]:
    """The data sets that `--dataset` names: one name, or a JSON list of names and of objects like `Source`.

    weights: as many numbers, separated by commas, where they do not stand in the objects. All sets have one or none
    has; they are above 0 and add up to 1. Raises InputError otherwise.
    """
    try:
        entries = json.loads(dataset) if dataset.startswith("[") else [dataset]
    except json.JSONDecodeError as failure:
        raise InputError(f"{dataset} begins as a JSON list and is none: {failure}") from failure
    known = [field.name for field in fields(Source)]
    sources = []
    for entry in entries:
        named: dict[str, Any] = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(named, dict) or not isinstance(named.get("path"), str) or not named.keys() <= set(known):
            raise InputError(f"{entry!r} is neither a name nor an object of path and maybe {', '.join(known[1:])}")
        for key, value in named.items():
            kind, wanted = ((int, float), "a number") if key == "weight" else ((str,), "text")
            if type(value) not in kind:
                raise InputError(f"{named['path']}: {key} is {value!r}; expected {wanted}")
        sources.append(Source(**named))
    if not sources:
        raise InputError("the list is empty; name at least one data set")
    if weights is not None:
        try:
            numbers = [float(word) for word in weights.split(",")]
        except ValueError:
            raise InputError(f"dataset_weights is {weights!r}; expected a number for each data set") from None
        if len(numbers) != len(sources):
            raise InputError(f"dataset_weights has {len(numbers)} numbers for {len(sources)} data sets")
        if any(source.weight is not None for source in sources):
            raise InputError("dataset_weights and a weight in the dataset list contradict each other; choose one")
        sources = [Source(s.path, s.config, s.split, w) for s, w in zip(sources, numbers, strict=True)]
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) < len(sources):
        raise InputError(f"{len(given)} of {len(sources)} data sets have a weight; give one to all of them, or to none")
    if not all(0 < weight < math.inf for weight in given):
        raise InputError(f"the weights of the data sets are {given}; each must be above 0")
    if given and abs(sum(given) - 1) > 1e-6:
        shares = [round(weight / sum(given), 6) for weight in given]
        raise InputError(f"the weights of the data sets add up to {sum(given):g}, not to 1; is {shares} meant?")
    return tuple(sources)


def mix(parts: Sequence[Samples], weights: Sequence[float] | None, seed: int) -> tuple[Selection, list[int]]:
    """All sets as one, and how many samples of each an epoch takes.

    Without weights every sample of every set is taken once. With weights an epoch has as many samples as all sets
    together, and a set's weight is its share of them, to the nearest whole number: a set with fewer samples is taken
    several times over, and what remains of its share, like the share of a set with more, is drawn from it by `seed`.
    The choice is the same in every epoch.
    """
    sizes = [len(part) for part in parts]
    shares = sizes if weights is None else _shares(sum(sizes), weights)
    chosen = []
    for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if not share:
            raise InputError(f"weight {weights[number] if weights else 0:g} leaves no sample of data set {number + 1}")
        whole, rest = divmod(share, size)
        drawn = np.sort(permutation(size, seed, _MIXTURE_STREAM, number)[:rest])
        chosen.append(np.concatenate([np.tile(np.arange(size), whole), drawn]))
    sets = np.repeat(np.arange(len(parts)), shares)
    return Selection(parts, sets, np.concatenate(chosen)), shares


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, adding up to `total`: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return shares
