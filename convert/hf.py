"""Hugging Face model directories: weights read in row chunks onto the device, and written back one shard at a time."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxft.convert import bnb
from jaxft.convert.table import Name
from jaxft.errors import InputError
from jaxft.quant import Quantized, is_quantized, kind_of, quantize
from jaxft.trees import Tree, flatten, unflatten

CHUNK_BYTES = 64 << 20  # host memory that a load holds beside what stays
SHARD_BYTES = 2 << 30
Change = Callable[[str, jax.Array, str | None], Any]  # (name, weight (O, I), how it is quantised) -> what is held
INDEX = "model.safetensors.index.json"
# buffers that older checkpoints carry and that the configuration determines
COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


class Place(NamedTuple):
    """Where one Hugging Face tensor lives in our tree: the leaf's path and, in a stacked leaf, its row."""

    path: str
    row: int | None


def places(names: tuple[Name, ...], shapes: Tree) -> dict[str, Place]:
    """Hugging Face name -> place, for every leaf of a tree of shapes, in the order of the leaves.

    A stacked leaf `layers/<first>/rest` of length L holds layers first … first + L − 1. Raises KeyError for a leaf
    that the table does not know.
    """
    by_path = {name.path: name.hf for name in names}
    found = {}
    for path, leaf in flatten(shapes):
        parts = path.split("/")
        if parts[0] != "layers":
            found[by_path[path]] = Place(path, None)
            continue
        hf = by_path["/".join(["layers", *parts[2:]])]
        for row in range(leaf.shape[0]):
            found[hf.format(i=int(parts[1]) + row)] = Place(path, row)
    return found


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: one file, or the shards that its index names."""
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is no index of shards: {error!r}") from error
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise InputError(f"{index} names {len(missing)} files that are not there: {', '.join(missing[:3])}")
        return [directory / shard for shard in shards]
    if single.is_file():
        return [single]
    raise InputError(f"{directory} has no weights: neither model.safetensors nor {INDEX} is there")


def open_weights(files: list[Path]) -> dict[str, Any]:
    """Tensor name -> the open file that holds it. Raises InputError for a file that is not whole."""
    where: dict[str, Any] = {}
    for path in files:
        try:
            handle = safe_open(path, framework="np")
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}; download or copy it again") from error
        for name in handle.keys():  # noqa: SIM118  not a dict
            if name in where:
                raise InputError(f"{path}: tensor {name} stands in another file too")
            where[name] = handle
    return where


def files_of(directory: Path) -> list[Path]:
    """The files that hold a model directory's weights: those of `weight_files`, or the GGUF file that it stands for."""
    pointer = directory / "gguf.json"
    if pointer.is_file():
        return [Path(json.loads(pointer.read_text(encoding="utf-8"))["file"])]
    return weight_files(directory)


class Renamed(NamedTuple):
    """An open file that answers to another name of one of its tensors."""

    handle: Any
    name: str

    def get_slice(self, _: str) -> Any:
        return self.handle.get_slice(self.name)

    def get_tensor(self, _: str) -> Any:
        return self.handle.get_tensor(self.name)


def open_model(
    directory: Path, older: tuple[tuple[str, str], ...] = (), passed_over: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`open_weights` of a model directory under the names of today; what belongs to `passed_over` parts is counted.

    older: (prefix, prefix of today). passed_over: prefixes. Raises InputError for a file that is not whole or missing.
    """
    if (directory / "gguf.json").is_file():  # a GGUF file as `jaxft.convert.gguf.directory` stands it in
        from jaxft.convert.gguf.directory import open_model as open_gguf

        return open_gguf(directory, directory / "gguf.json")
    found: dict[str, Any] = {}
    skipped: dict[str, int] = {}
    for name, handle in open_weights(weight_files(directory)).items():
        part = next((prefix for prefix in passed_over if name.startswith(prefix)), None)
        if part is not None:
            skipped[part] = skipped.get(part, 0) + 1
            continue
        old, new = next((pair for pair in older if name.startswith(pair[0])), ("", ""))
        today = new + name.removeprefix(old)
        if today in found:
            raise InputError(f"{directory}: tensor {today} is there twice, once as {name}")
        found[today] = handle if today == name else Renamed(handle, name)
    if skipped:
        parts = ", ".join(f"{count} of {prefix.rstrip('.')}" for prefix, count in sorted(skipped.items()))
        print(f"{directory}: only the text model is loaded; passed over tensors: {parts}", file=sys.stderr)
    return found


def chunks(handle: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a tensor, at most CHUNK_BYTES at a time, in the file's dtype."""
    view = handle.get_slice(name)
    shape = view.get_shape()
    if len(shape) < 2:
        yield 0, handle.get_tensor(name)
        return
    rows = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield start, view[start : min(start + rows, shape[0])]


@partial(jax.jit, donate_argnums=0)
def write_rows(whole: jax.Array, chunk: jax.Array, at: jax.Array) -> jax.Array:
    """`whole` with `chunk` cast and put at index `at`; in place, because whole is donated."""
    chunk = chunk.astype(whole.dtype).reshape((1,) * (whole.ndim - chunk.ndim) + chunk.shape)
    return jax.lax.dynamic_update_slice(whole, chunk, tuple(at))


def _empty(shapes: Any, shardings: Any = None) -> Any:
    """Zeros in place of a tree of shapes, made by one program."""
    leaves, treedef = jax.tree.flatten(shapes)
    places = None if shardings is None else tuple(jax.tree.leaves(shardings))
    return jax.tree.unflatten(treedef, _zeros(tuple(leaves), places)())


@cache  # jit compiles a function that it has not seen anew
def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...], places: tuple[Any, ...] | None) -> Callable[[], Any]:
    def zeros():
        return tuple(jnp.zeros(one.shape, one.dtype) for one in shapes)

    return jax.jit(zeros, out_shardings=places)


@partial(jax.jit, static_argnums=1)
def quantize_matrix(weight: jax.Array, kind: str) -> Quantized:
    """`quantize`, compiled."""
    return quantize(weight, kind)


@partial(jax.jit, donate_argnums=0)
def _write_leaf(stack: Quantized, leaf: Quantized, row: jax.Array) -> Quantized:
    """`stack` with one weight's arrays put at `row`; in place, because stack is donated."""

    def write(whole: jax.Array, one: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, one.astype(whole.dtype), row, 0)

    arrays = map(write, jax.tree.leaves(stack), jax.tree.leaves(leaf))
    return jax.tree.unflatten(jax.tree.structure(stack), list(arrays))


def read_matrix(where: dict[str, Any], name: str, dtype: Any = None) -> jax.Array:
    """One matrix on the default device, in `dtype` or in that of its file, read in chunks."""
    weight = None
    for start, chunk in chunks(where[name], name):
        if weight is None:
            shape = tuple(where[name].get_slice(name).get_shape())
            weight = _empty(jax.ShapeDtypeStruct(shape, chunk.dtype if dtype is None else dtype))
        weight = write_rows(weight, chunk, np.array([start, 0], np.int32))
        weight.block_until_ready()
    assert weight is not None  # a matrix has at least one row
    return weight


def load_leaf(
    where: dict[str, Any], name: str, leaf: Quantized, stored: Quantized | None, change: Change | None = None
) -> Quantized:
    """One weight (O, I) as the leaf describes it: as it is stored, or quantised from the stored values."""
    if stored is not None:
        return bnb.read_leaf(where, name, stored)
    weight = read_matrix(where, name)
    return quantize_matrix(weight, kind_of(leaf)) if change is None else change(name, weight, kind_of(leaf))


def check_names(expected: dict[str, tuple[int, ...]], where: dict[str, Any], source: Path | str) -> None:
    """Raises InputError where a tensor is missing, left over, of the wrong shape or not floating point."""
    missing = sorted(set(expected) - set(where))
    extra = sorted(name for name in set(where) - set(expected) if not name.endswith(COMPUTED))
    if missing:
        raise InputError(f"{source}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}")
    if extra:
        raise InputError(f"{source}: {len(extra)} tensors belong to no part of this model, e.g. {', '.join(extra[:3])}")
    for name, shape in expected.items():
        view = where[name].get_slice(name)
        if tuple(view.get_shape()) != shape:
            raise InputError(f"{source}: {name} has shape {tuple(view.get_shape())}, config.json says {shape}")
        if view.get_dtype() not in ("F32", "F16", "BF16"):
            raise InputError(f"{source}: {name} is {view.get_dtype()}; only F32, F16 and BF16 weights are read")


def expected_tensors(names: tuple[Name, ...], shapes: Tree) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of a model."""
    leaves = dict(flatten(shapes))
    return {
        hf: leaves[place.path].shape if place.row is None else leaves[place.path].shape[1:]
        for hf, place in places(names, shapes).items()
    }


def check_model(
    directory: Path, where: dict[str, Any], names: tuple[Name, ...], shapes: Tree
) -> tuple[dict[str, Quantized], dict[str, tuple[int, ...]]]:
    """What is quantised among the tensors that `open_model` found, and the shape of every tensor of the model.

    Raises InputError for tensors that are missing, left over, damaged or of another shape than `shapes` says.
    """
    stored = bnb.stored_leaves(where, directory)
    expected = expected_tensors(names, shapes)
    plain = dict(where)
    for name, leaf in stored.items():
        for tensor in (name, *bnb.companions(name, leaf)):
            plain.pop(tensor, None)
    if "lm_head.weight" not in expected:  # a tied head may have been written all the same; it is the embedding
        plain.pop("lm_head.weight", None)
    check_names({name: shape for name, shape in expected.items() if name not in stored}, plain, directory)
    return stored, expected


def load_params(
    directory: Path,
    names: tuple[Name, ...],
    shapes: Tree,
    dtype: Any,
    shardings: Tree | None = None,
    where: dict[str, Any] | None = None,
    changes: dict[str, Change] | None = None,
) -> Tree:
    """The parameters of a model directory as a tree of arrays of `dtype`, each made on its devices and filled in place.

    Host memory beside the result stays below two chunks of CHUNK_BYTES. shapes: the model's tree; shardings: a tree
    like it, or None for the default device. where: what `open_model` found in the directory. changes: by name of a
    weight, what takes its place: change(name, weight, kind) of the whole (O, I) in the dtype that it will have, or of
    the stored values if it will be quantised as `kind` says. A weight whose leaf in shapes is quantised is taken as it
    is where the files hold it so, and quantised from the stored values, before any cast, where they do not: device
    memory beside the result then stays below two tensors. Raises InputError for files or tensors that are missing, left
    over, damaged or of the wrong shape.
    """
    where = open_model(directory) if where is None else where
    stored, _ = check_model(directory, where, names, shapes)
    leaves = dict(flatten(shapes))
    held = {p: leaf if is_quantized(leaf) else jax.ShapeDtypeStruct(leaf.shape, dtype) for p, leaf in leaves.items()}
    arrays = _empty(held, None if shardings is None else dict(flatten(shardings)))
    for hf, place in places(names, shapes).items():
        target = leaves[place.path]
        if is_quantized(target):
            leaf = load_leaf(where, hf, target, stored.get(hf), (changes or {}).get(hf))
            arrays[place.path] = jax.block_until_ready(_write_leaf(arrays[place.path], leaf, np.int32(place.row or 0)))
            continue
        shape = target.shape
        if changes and hf in changes:
            matrix = changes[hf](hf, read_matrix(where, hf, dtype), None)
            at = [0] * len(shape) if place.row is None else [place.row, 0, 0]
            arrays[place.path] = write_rows(arrays[place.path], matrix, np.array(at, np.int32)).block_until_ready()
            continue
        for start, chunk in chunks(where[hf], hf):
            at = [0] * len(shape) if place.row is None else [place.row, *[0] * (len(shape) - 1)]
            at[0 if place.row is None else 1] += start
            arrays[place.path] = write_rows(arrays[place.path], chunk, np.array(at, np.int32))
            # the host buffer may be read until the copy is done; without waiting, chunks would pile up
            arrays[place.path].block_until_ready()
    return unflatten({path: arrays[path] for path, _ in flatten(shapes)})


def save_params(directory: Path, names: tuple[Name, ...], params: Tree, dtype: Any) -> None:
    """Writes the weights of a model by `save_shards`, cast to dtype; quantised ones as bitsandbytes has them."""
    leaves = dict(flatten(params))
    where = places(names, params)

    def size(place: Place) -> int:
        leaf = leaves[place.path]
        return leaf.size // (1 if place.row is None else leaf.shape[0]) * np.dtype(dtype).itemsize

    def read(name: str) -> dict[str, np.ndarray]:
        leaf = leaves[where[name].path]
        one = leaf if where[name].row is None else leaf[where[name].row]
        return bnb.leaf_tensors(name, one) if is_quantized(one) else {name: np.asarray(one.astype(dtype))}

    save_shards(directory, {name: size(place) for name, place in where.items()}, read)


def save_shards(directory: Path, sizes: dict[str, int], read: Callable[[str], dict[str, np.ndarray]]) -> None:
    """Writes model.safetensors, or shards of at most SHARD_BYTES with an index, into an existing directory.

    sizes: bytes by name of what is to be written, in order; read(name): its tensors, one or more. One shard's tensors
    are on the host at a time. Raises OSError where the disk does.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, own in sizes.items():
        if size + own > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    total = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for name in shard:
            tensors |= read(name)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(array.nbytes for array in tensors.values())
        write_tensors(directory / file, tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file as transformers and PEFT write it, with the rights that its directory gives."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes files that only their owner can read


class whole_directory:
    """Context: a temporary directory beside `target`, renamed to it at the end, removed on any error.

    Nothing half made is ever at `target`, which appears in one rename. An existing `target` directory receives the
    files instead, each moved whole.
    """

    def __init__(self, target: Path):
        self.target = target
        self.temporary = target.with_name(f".{target.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, value, traceback):
        if kind is None and not self.target.exists():
            self.temporary.replace(self.target)
        elif kind is None:
            for file in self.temporary.iterdir():
                file.replace(self.target / file.name)
        shutil.rmtree(self.temporary, ignore_errors=True)
