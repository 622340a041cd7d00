"""Importance matrices: mean squares of what every linear layer reads, computed here, in llama.cpp's file format.

Its format of today is a GGUF file without a model: for each weight `NAME.in_sum2` (matrices, columns) float32, sums of
squares, and `NAME.counts` (matrices, 1) float32, over how many tokens. Its older one, .dat, is read too: int32 count;
for each weight int32 length, name, int32 calls, int32 columns, float32 values (mean · calls); and what may follow.
"""

import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxft.activations import Activations, collect_activations
from jaxft.config import describe, parse
from jaxft.convert.gguf.read import MAGIC, Header, read_header
from jaxft.data import tokenize_dataset
from jaxft.errors import InputError
from jaxft.evaluate import read_from
from jaxft.files import is_hub_name, open_rows
from jaxft.mixture import Source
from jaxft.models import Model
from jaxft.packing import Batches, make_plan, permutation
from jaxft.prepare import prepare
from jaxft.rows import Rows
from jaxft.samples import lengths_of
from jaxft.settings import EvaluateSettings
from jaxft.sharding import data_parallel_size

if TYPE_CHECKING:
    import datasets

TEXT_FILES = (".txt", ".raw")  # one long text, as calibration data for llama.cpp mostly are
SUMS, COUNTS = ".in_sum2", ".counts"
HEAD = "output.weight"


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """GGUF name of a weight -> (columns,) float32, the mean square of what it reads in each column.

    Both of llama.cpp's formats are read. Experts' matrices stand one after the other in one array, as llama.cpp takes
    them; one that no token reached is 1 everywhere. Raises InputError for a file that is damaged or holds no matrix.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        found = _from_gguf(read_header(path)) if magic == MAGIC else _from_dat(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}; name a file that `jaxft.convert imatrix` writes") from error
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise InputError(f"{path}: {name} has values that are no mean squares (negative, or not finite)")
    return found


def _from_gguf(header: Header) -> dict[str, np.ndarray]:
    path = header.path
    if header.metadata.get("general.type") != "imatrix":
        kind = header.metadata.get("general.type", "without a type")
        raise InputError(f"{path} is a GGUF file, but no importance matrix: its general.type is {kind!r}")
    data = np.memmap(path, np.uint8, "r")

    def values(name: str) -> np.ndarray:
        info = header.tensors.get(name)
        if info is None or info.type != "f32":
            raise InputError(f"{path}: {name} is {'missing' if info is None else info.type + ', not f32'}")
        return data[info.offset : info.offset + info.size].view("<f4").reshape(info.shape).astype(np.float32)

    found = {}
    for name in sorted(header.tensors):
        if not name.endswith((SUMS, COUNTS)):
            raise InputError(f"{path}: the tensor {name} belongs to no importance matrix")
        if not name.endswith(SUMS):
            values(name.removesuffix(COUNTS) + SUMS)  # each has its other half
            continue
        weight = name.removesuffix(SUMS)
        sums, counts = np.atleast_2d(values(name)), values(weight + COUNTS).reshape(-1, 1)
        if len(sums) != len(counts):
            raise InputError(f"{path}: {weight} has sums of {len(sums)} matrices and counts of {len(counts)}")
        reached = np.round(counts) > 0
        found[weight] = np.where(reached, sums / np.where(reached, np.round(counts), 1), np.float32(1)).ravel()
    if not found:
        raise InputError(f"{path}: there is no matrix in it")
    return found


def _from_dat(data: bytes, path: Path) -> dict[str, np.ndarray]:
    at, found = 0, {}

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise InputError(
                f"{path} is no importance matrix, or not a whole one: at byte {at} of {len(data)} there should be "
                f"{count} more; llama.cpp's .gguf and .dat files are read"
            )
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    entries = number()
    if entries < 1:
        raise InputError(f"{path} is no importance matrix: it is said to hold {entries} entries")
    for _ in range(entries):
        try:
            name = take(number()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is no importance matrix: a name before byte {at} is not UTF-8") from error
        calls, columns = number(), number()
        if name in found or columns < 1:
            raise InputError(f"{path}: {name!r} {'stands twice' if name in found else f'has {columns} columns'}")
        found[name] = np.frombuffer(take(4 * columns), "<f4").astype(np.float32) / np.float32(max(calls, 1))
    return found


def write_imatrix(
    path: Path, means: Mapping[str, np.ndarray], tokens: int, *, datasets: list[str], chunks: int, chunk_size: int
) -> None:
    """Writes mean squares (columns,) over `tokens` tokens by GGUF name, whole or not at all; the rest is told in it."""
    import gguf  # it takes a while to import, and reading needs none of it

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """There is no model, and so no architecture."""

    partial = path.with_name(path.name + ".partial")
    try:
        writer = Writer(partial, "")
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", datasets)
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name in sorted(means):
            writer.add_tensor(name + SUMS, (means[name] * np.float32(tokens)).reshape(1, -1))
            writer.add_tensor(name + COUNTS, np.full((1, 1), tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def gguf_means(model: Model, found: Activations, head: bool) -> dict[str, np.ndarray]:
    """Mean squares by GGUF name. head: also those of the head, where it is not the embedding."""
    layers = range(model.config.num_layers)
    names = {name.hf.format(i=i): name.gguf.format(i=i) for name in model.family.names for i in layers}
    means = {names[f"{module}.weight"]: mean for module, mean in found.mean_squares.items()}
    return {name: mean for name, mean in means.items() if head or name != HEAD}


def calibration_rows(source: Source, settings: EvaluateSettings) -> "datasets.Dataset | Rows":
    """The rows of a data set as training reads it, or a text file as one document. Says what was read."""
    path = Path(source.path).expanduser()
    if is_hub_name(source.path) or path.suffix not in TEXT_FILES:
        asked = [split for split in ("dataset_train_split", "dataset_test_split") if split in settings.settings_given]
        split = source.split or (getattr(settings, asked[0]) if asked else None)
        print(f"read {read_from(source.path, split)}", file=sys.stderr)
        return open_rows(source.path, split, source.config or settings.dataset_config)
    from datasets import Dataset

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: there is no text in it")
    print(f"read {path} as one text", file=sys.stderr)
    return Dataset.from_dict({"text": [text]})


def add_imatrix_command(commands: Any) -> None:
    """The subcommand of `python -m jaxft.convert`."""
    own = commands.add_parser(
        "imatrix", allow_abbrev=False, help="the importance matrix of a model, for quantising it",
        description="Runs a model over calibration data and writes the mean squares of what its linear layers read, in "
        "llama.cpp's file format. Behind OUT the flags of jaxft.evaluate are understood: --adapter, --dtype, "
        "--max_length, --load_in_4bit, --mesh, those of the data, …. The last line on stdout is JSON.",
    )  # fmt: skip
    own.add_argument("model", metavar="MODEL", help="a model directory, or a name on the hub")
    own.add_argument("data", metavar="DATA", help="a data set of any format that is trained on, or a .txt or .raw file")
    own.add_argument("out", metavar="OUT", type=Path, help="the file to write, such as model.imatrix.gguf")
    own.add_argument("--chunks", type=int, help="use at most so many rows of --max_length tokens")
    own.add_argument("--process_output", action="store_true", help="also of the head, which llama.cpp leaves out")
    own.set_defaults(
        run=lambda options: imatrix(
            options.model, options.data, options.out.expanduser().resolve(), options.flags, options.chunks,
            options.process_output,
        )
    )  # fmt: skip


def imatrix(
    model: str, data: str, out: Path, flags: list[str], chunks: int | None, process_output: bool
) -> dict[str, Any]:
    """Computes the importance matrix of a model on calibration data, writes it to `out`, and returns what is in it.

    flags: of `jaxft.evaluate`: adapter, dtype, quantisation, mesh, data. All tokens count, those that are not trained
    too, unless --train_on says otherwise about which rows are used. chunks: at most so many rows of --max_length.
    """
    if any(flag.partition("=")[0] in ("--model_name_or_path", "--dataset") for flag in flags):
        raise InputError("model and data set are named without a flag: jaxft.convert imatrix MODEL DATA OUT")
    settings, provenance = parse("evaluate", ["--model_name_or_path", model, "--dataset", data, *flags])
    if out.exists() or not out.parent.is_dir():
        raise InputError(f"{out} exists already; name a new file" if out.exists() else f"{out.parent} does not exist")
    if chunks is not None and chunks < 1:
        raise InputError(f"--chunks {chunks}: it must be 1 or more")
    if "train_on" not in settings.settings_given:
        settings = replace(settings, train_on="all")
    for line in describe(settings, provenance):
        print(line, file=sys.stderr)
    if len(settings.sources) > 1:
        raise InputError(f"DATA names {len(settings.sources)} data sets; put what is to calibrate into one")
    rows = calibration_rows(settings.sources[0], settings)
    prepared = prepare(settings, model)
    samples, report = tokenize_dataset(
        rows, prepared.tokenizer, max_length=settings.max_length, vocab_size=prepared.model.config.vocab_size,
        train_on=settings.train_on, template_kwargs=settings.chat_template_kwargs, cache=settings.cache_directory,
        columns=settings.columns,
    )  # fmt: skip
    for line in report.lines():
        print(line, file=sys.stderr)
    plan = make_plan(lengths_of(samples), settings.max_length, packing=settings.packing, shuffle=True, seed=0)
    plan = [plan[row] for row in permutation(len(plan), 0)[:chunks]]
    batches = Batches(
        samples, plan, max_length=settings.max_length, shuffle=False,
        batch_size=settings.per_device_eval_batch_size * data_parallel_size(prepared.mesh),
    )  # fmt: skip
    with jax.set_mesh(prepared.mesh):
        found = collect_activations(
            prepared.model, (prepared.trainable, prepared.frozen), batches, dtype=prepared.compute_dtype,
            mesh=prepared.mesh,
        )  # fmt: skip
    means = gguf_means(prepared.model, found, process_output)
    write_imatrix(
        out, means, found.tokens, datasets=[settings.sources[0].path], chunks=len(plan), chunk_size=settings.max_length
    )
    return {"out": str(out), "entries": len(means), "tokens": found.tokens, "chunks": len(plan)}
