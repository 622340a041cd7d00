"""Tokenised samples: one document each, a set of them as flat arrays that may lie on disk, a choice out of sets."""

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

Document = tuple[np.ndarray, np.ndarray]  # ids int32 (n,), trained bool (n,)

ARRAYS = {"ids": np.int32, "trained": np.bool_, "bounds": np.int64}  # of a set, by the name of their file


@dataclass(frozen=True, eq=False)
class Sample:
    """One document: `input_ids` int32 (n,) and `loss_weights` float32 (n,).

    `loss_weights[t]` weighs predicting `input_ids[t]` from what stands before it, so `loss_weights[0]` is 0.
    """

    input_ids: np.ndarray
    loss_weights: np.ndarray

    def __post_init__(self) -> None:
        ids, weights = self.input_ids, self.loss_weights
        if ids.ndim != 1 or weights.shape != ids.shape or not len(ids):
            raise ValueError(f"input_ids has shape {ids.shape}, loss_weights {weights.shape}; both must be (n,), n > 0")
        if ids.dtype != np.int32 or weights.dtype != np.float32:
            raise ValueError(f"input_ids is {ids.dtype}, loss_weights {weights.dtype}; must be int32 and float32")
        if weights[0] != 0:
            raise ValueError(f"loss_weights[0] is {weights[0]}: nothing stands before a document's first token")

    def __len__(self) -> int:
        return len(self.input_ids)


def weighted(ids: np.ndarray, trained: np.ndarray) -> Sample:
    """A sample whose trained tokens weigh 1; the first token has nothing before it and weighs 0."""
    weights = trained.astype(np.float32)
    weights[0] = 0
    return Sample(ids.astype(np.int32), weights)


class Numbered(Sequence[Sample]):
    """Samples by their number: what indexing is, for every kind of set."""

    def one(self, number: int) -> Sample:
        """Sample `number`, from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        return self.one(range(len(self))[at])  # counts a negative one from the end, raises IndexError beyond it


class Samples(Numbered):
    """A set of samples in three flat arrays: `ids` int32 (N,), `trained` bool (N,), and `bounds` int64 (n + 1,).

    Sample i is `ids[bounds[i]:bounds[i + 1]]`. The arrays may be memory-mapped; a sample is a copy.
    """

    def __init__(self, ids: np.ndarray, trained: np.ndarray, bounds: np.ndarray) -> None:
        if not (ids.ndim == trained.ndim == bounds.ndim == 1 and len(ids) == len(trained) == bounds[-1]):
            raise ValueError(f"ids {ids.shape}, trained {trained.shape} and bounds up to {bounds[-1]} must agree")
        self._ids, self._trained, self._bounds = ids, trained, bounds

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64 (n,)."""
        return np.diff(self._bounds)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def one(self, number: int) -> Sample:
        start, stop = self._bounds[number : number + 2]
        return weighted(self._ids[start:stop], self._trained[start:stop])

    def checksum(self) -> int:
        """CRC-32 of everything that is trained on."""
        found = 0
        for array in (self._bounds, self._ids, self._trained):
            found = zlib.crc32(array.data, found)
        return found


class Selection(Numbered):
    """Samples chosen from several sets: number i is sample `numbers[i]` of set `sets[i]`; one may be chosen twice."""

    def __init__(self, parts: Sequence[Samples], sets: np.ndarray, numbers: np.ndarray) -> None:
        self._parts, self._sets, self._numbers = parts, sets, numbers

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64 (n,)."""
        found = np.zeros(len(self), np.int64)
        for at, part in enumerate(self._parts):
            found[self._sets == at] = part.lengths[self._numbers[self._sets == at]]
        return found

    def __len__(self) -> int:
        return len(self._sets)

    def one(self, number: int) -> Sample:
        return self._parts[self._sets[number]].one(int(self._numbers[number]))

    def checksum(self) -> int:
        """CRC-32 of everything that is trained on."""
        parts = np.asarray([part.checksum() for part in self._parts], np.int64)
        return zlib.crc32(self._numbers.tobytes(), zlib.crc32(self._sets.tobytes(), zlib.crc32(parts.tobytes())))


def lengths_of(samples: Sequence[Sample]) -> np.ndarray:
    """Tokens of every sample, int64 (n,), without reading the samples of a set."""
    if isinstance(samples, Samples | Selection):
        return samples.lengths
    return np.asarray([len(sample) for sample in samples], np.int64)


def write(documents: Iterable[Document], streams: Mapping[str, IO[bytes]]) -> tuple[int, int, int]:
    """Writes documents as the arrays of a set, one after the other; returns how many, their tokens and their targets.

    A target is a trained token that is not the first of its document.
    """
    count = tokens = targets = 0
    streams["bounds"].write(np.int64(0).tobytes())
    for ids, trained in documents:
        count, tokens, targets = count + 1, tokens + len(ids), targets + int(np.count_nonzero(trained[1:]))
        streams["ids"].write(ids.astype(ARRAYS["ids"]).tobytes())
        streams["trained"].write(trained.astype(ARRAYS["trained"]).tobytes())
        streams["bounds"].write(np.int64(tokens).tobytes())
    return count, tokens, targets


def in_memory() -> dict[str, Any]:
    """Streams for `write` that keep what is written in memory."""
    return {name: io.BytesIO() for name in ARRAYS}


def from_memory(streams: Mapping[str, io.BytesIO]) -> Samples:
    """The set that was written to `in_memory()` streams."""
    return Samples(*(np.frombuffer(streams[name].getbuffer(), dtype) for name, dtype in ARRAYS.items()))


def from_directory(directory: Path) -> Samples:
    """The set whose arrays were written to the files ids, trained and bounds of a directory, memory-mapped."""
    return Samples(*(np.memmap(directory / name, dtype, "r") for name, dtype in ARRAYS.items()))
