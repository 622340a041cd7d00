"""Checkpoints of a run: written whole or not at all, checked before they are read, restored onto any sharding.

A checkpoint of step 500 is the folder `500/`: `arrays/` is an Orbax checkpoint, `checkpoint.json` names every array
with its shape and dtype, every file with its size and CRC-32, and holds the caller's `meta`.
It is written as `.saving-500` and renamed when all of it is on the disk, so a numbered folder is always a whole one.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.errors import InputError, RunError
from jaxft.processes import is_first, on_first

RECORD = "checkpoint.json"
SAVING, REPLACED, DELETING = ".saving-", ".replaced-", ".deleting-"


class Checkpoints:
    """The checkpoints in one directory, by step.

    Opening repairs what a killed run left: half-written folders go, a folder caught between two renames comes back.
    So only the run that writes a directory may open it like that; `repair=False` only reads.
    `save_total_limit` keeps the newest N (None keeps all).
    On several hosts every process calls every method, and the directory is shared between them.
    """

    def __init__(self, directory: str | Path, save_total_limit: int | None = None, *, repair: bool = True) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise InputError(f"save_total_limit is {save_total_limit}; it must be at least 1")
        self.directory = Path(directory).absolute()
        self.save_total_limit = save_total_limit
        if self.directory.exists() and not self.directory.is_dir():
            raise RunError(f"{self.directory} is a file; checkpoints need a directory there")
        if repair:
            on_first(self._repair)

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, smallest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdecimal())

    def latest(self) -> int | None:
        """The newest step, None where there is no checkpoint."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any], best: int | None = None) -> Path:
        """Writes `state` (pytrees of arrays, typed PRNG keys included) and `meta` (JSON) as `step`; returns the folder.

        Returns when everything is on the disk. A checkpoint of the same step is replaced. That of the step `best`
        stays beyond the limit.

        Raises:
          RunError: the directory cannot be written or is full. What was there before is still whole.
        """
        final, saving = self.directory / str(step), self.directory / f"{SAVING}{step}"
        leaves = _named_leaves(state)
        record = {"step": step, "leaves": {name: _kind(leaf) for name, leaf in leaves.items()}, "meta": meta}
        json.dumps(record)  # fails here on a meta that is not JSON, before anything is written
        try:
            on_first(lambda: _make_empty(saving))
            _write_arrays(saving / "arrays", {name: _raw(leaf) for name, leaf in leaves.items() if leaf.size})
            on_first(lambda: self._commit(saving, final, record))
        except OSError as failure:
            raise RunError(f"checkpoint {final} could not be written: {failure}. {self._intact()}") from failure
        finally:
            if is_first():  # nobody waits here: a process that fails must end, and the others with it
                shutil.rmtree(saving, ignore_errors=True)
        if self.save_total_limit is not None:
            limit = self.save_total_limit
            on_first(lambda: self._remove(*(old for old in self.steps()[:-limit] if old != best)))
        return final

    def adopt(self, other: "Checkpoints", step: int) -> None:
        """Copies the checkpoint of `step` from another directory, whole or not at all; one that is here stays."""

        def copy() -> None:
            saving, final = self.directory / f"{SAVING}{step}", self.directory / str(step)
            if final.exists():
                return
            try:
                shutil.rmtree(saving, ignore_errors=True)
                shutil.copytree(other.directory / str(step), saving)
                os.rename(saving, final)
            except OSError as failure:
                raise RunError(
                    f"checkpoint {other.directory / str(step)}, the best one so far, could not be copied to {final}: "
                    f"{failure}; make room and begin again"
                ) from failure

        on_first(copy)

    def delete(self, step: int) -> None:
        """Removes the checkpoint of `step`; killed half way, it is gone as well."""
        on_first(lambda: self._remove(step))

    def delete_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        # listed by the one process that removes: another could list when the first is already gone
        on_first(lambda: self._remove(*(later for later in self.steps() if later > step)))

    def _remove(self, *steps: int) -> None:
        for step in steps:
            deleting = self.directory / f"{DELETING}{step}"
            shutil.rmtree(deleting, ignore_errors=True)
            os.rename(self.directory / str(step), deleting)
            shutil.rmtree(deleting, ignore_errors=True)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` that was saved with `step` (None: the newest), without reading the arrays."""
        return self._record(self._folder(step))["meta"]

    def restore(self, step: int | None, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `step` (None: the newest) into the structure of `like`; returns `(state, meta)`.

        `like` is a tree of `jax.ShapeDtypeStruct` (or of arrays); each array is put onto the sharding found there,
        without one onto the first device. Dtypes are never converted: what comes back is bit for bit what was saved.

        Raises:
          InputError: no such checkpoint; a damaged one (the file is named); arrays that do not fit `like`.
        """
        folder = self._folder(step)
        record = self._record(folder)
        wanted = _named_leaves(like)
        _check_fit(folder, record["leaves"], {name: _kind(leaf) for name, leaf in wanted.items()})
        for name, problem in _damaged_files(folder, record["files"]):
            raise self._damage(folder, f"{folder / name} {problem}")
        raw = _read_arrays(folder / "arrays", {name: _abstract(leaf) for name, leaf in wanted.items() if leaf.size})
        restored = [_typed(raw.get(name), leaf, record["leaves"][name]) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), restored), record["meta"]

    def _folder(self, step: int | None) -> Path:
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.directory} holds no checkpoint; name the directory of a run that saved one")
        if step is not None and step not in steps:
            raise InputError(f"{self.directory} holds no checkpoint of step {step}; it has {_listed(steps)}")
        return self.directory / str(steps[-1] if step is None else step)

    def _record(self, folder: Path) -> dict[str, Any]:
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as failure:
            raise self._damage(folder, f"{folder / RECORD} cannot be read ({failure})") from failure
        if not isinstance(record, dict) or not {"leaves", "files", "meta"} <= record.keys():
            raise self._damage(folder, f"{folder / RECORD} was not written by jaxft")
        return record

    def _damage(self, folder: Path, what: str) -> InputError:
        others = [step for step in self.steps() if str(step) != folder.name]
        advice = f"Move {folder} away to resume from step {others[-1]}." if others else "There is no other checkpoint."
        return InputError(f"checkpoint {folder} is damaged: {what}. {advice}")

    def _intact(self) -> str:
        latest = self.latest()
        if latest is None:
            return "No checkpoint was there before. Make room, then start again"
        return f"The checkpoint of step {latest} is intact. Make room, then go on by --resume_from_checkpoint auto"

    def _commit(self, saving: Path, final: Path, record: dict[str, Any]) -> None:
        """Adds the record to a finished `saving` folder and makes it `final` in one rename."""
        files = sorted(path for path in saving.rglob("*") if path.is_file())
        with ThreadPoolExecutor(8) as pool:
            record["files"] = {
                path.relative_to(saving).as_posix(): summary
                for path, summary in zip(files, pool.map(_summary, files), strict=True)
            }
        with open(saving / RECORD, "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        replaced = self.directory / f"{REPLACED}{final.name}"
        if final.exists():
            os.rename(final, replaced)
        os.rename(saving, final)
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the rename itself must outlive a power cut
        finally:
            os.close(descriptor)
        shutil.rmtree(replaced, ignore_errors=True)

    def _repair(self) -> None:
        for entry in list(self.directory.iterdir()) if self.directory.is_dir() else []:
            if entry.name.startswith(REPLACED) and not (final := entry.with_name(entry.name[len(REPLACED) :])).exists():
                os.rename(entry, final)
            elif entry.name.startswith((SAVING, REPLACED, DELETING)):
                shutil.rmtree(entry, ignore_errors=True)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` in its own order, named by their path: 'opt_state/0/mu/layers/q_proj'."""
    names: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}; a checkpoint's state holds arrays, meta holds numbers"
            )
        if name in names:
            raise ValueError(f"two arrays are called {name}; a '/' inside a key makes paths ambiguous")
        names[name] = leaf
    return names


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(leaf: Any) -> dict[str, Any]:
    kind = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        kind["key"] = str(jax.random.key_impl(leaf))
    return kind


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What Orbax is to read for `leaf`: a key is its uint32 words, and a sharding is always named."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _typed(raw: Any, leaf: Any, kind: dict[str, Any]) -> jax.Array:
    if raw is None:  # Orbax refuses arrays of size 0, so they were never written
        sharding = getattr(leaf, "sharding", None)
        if _is_key(leaf):
            return jax.random.split(jax.random.key(0, impl=kind["key"]), leaf.shape)
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding)
    return jax.random.wrap_key_data(raw, impl=kind["key"]) if _is_key(leaf) else raw


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp  # imported here because it takes about a second

    try:
        with _quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            writer.save(folder, args=ocp.args.StandardSave(arrays))
    except ValueError as failure:
        # Orbax passes on the disk's own errors (disk full, file too large, no permission) as a ValueError.
        if code := re.search(r"os_error_code='(\d+)'", str(failure)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from failure
        raise OSError(" ".join(str(failure).split())) from failure


def _read_arrays(folder: Path, arrays: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    with _quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.StandardRestore(arrays))


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's log out of the terminal: 30 lines a save, and a traceback for what is raised anyway."""

    def is_not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(is_not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(is_not_orbax)


def _check_fit(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = [f"{name} is only in the checkpoint" for name in saved.keys() - wanted.keys()]
    differences += [f"{name} is only in this run" for name in wanted.keys() - saved.keys()]
    for name in saved.keys() & wanted.keys():
        for what in ("shape", "dtype"):
            if saved[name][what] != wanted[name][what]:
                here, there = saved[name][what], wanted[name][what]
                differences.append(f"{name} has {what} {here} in the checkpoint and {there} in this run")
    if differences:
        raise InputError(
            f"checkpoint {folder} does not fit this run: {_listed(sorted(differences))}. "
            "Was it saved with another model, lora_r, set of target modules or optimizer?"
        )


def _listed(items: list[Any], most: int = 5) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def _summary(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return [size, checksum]


def _damaged_files(folder: Path, files: dict[str, list[int]]) -> list[tuple[str, str]]:
    """Every file that is not what was written, with what is wrong with it."""

    def problem(name: str) -> str:
        path, (size, checksum) = folder / name, files[name]
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes, {size} were written"
        return "" if _summary(path)[1] == checksum else "has other content than was written (CRC-32)"

    with ThreadPoolExecutor(8) as pool:
        return [(name, text) for name, text in zip(files, pool.map(problem, files), strict=True) if text]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
