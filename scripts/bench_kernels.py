"""Measures each op's ways on the GPU at named shapes: right against a float32 reference, then fast.

    python scripts/bench_kernels.py all --shapes A1 --json kernels.jsonl
    python scripts/bench_kernels.py attention --shapes A1 A9
    python scripts/bench_kernels.py mlp --shapes A1 --rank 64 --sweep    # tile sizes of the Triton kernels

Each way is checked (output and gradients, relative L2 distance to the definition in float32 on the same rounded inputs)
and then timed, forward and forward + backward: wall clock over --repeats calls that rotate over --inputs sets of
arrays, ended by `jax.block_until_ready`. Where that is less than a host may need to send a call, the kernels' own time
counts, from a trace of as many calls. A way that refuses the case says so, one that fails is printed with its error,
and the next one runs. Attention's TFLOP/s count the pairs of query and key that exist. The bounds are a card's best
known: causal attention, large products, and copies.
"overhead" compares layers with LoRA with the large products of their frozen weights alone, and with the same layers
without LoRA, activations, norms and rotations included.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
from kernel_cases import BASELINES, OPS, Case
from kernel_shapes import SHAPES
from kernel_sweeps import SWEEPS

from jaxft.profile import device_time

SENDING = 150e-6  # seconds: what a host needs to send a call, twice over and more
BOUNDS = {"H200": {"TFLOP/s": 745.0, "TB/s": 4.0}}  # large bfloat16 products; a copy, bytes read and written
# cuDNN causal, 16k tokens, 32/8 heads of 128
ATTENTION_BOUNDS = {"H200": {"forward": 561.0, "forward+backward": 555.0}}
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


def failures() -> tuple[type[Exception], ...]:
    """What a way may fail with: wrong shapes, not compiled by XLA or Triton, out of memory."""
    if find_spec("triton") is None:
        return RuntimeError, ValueError, TypeError
    from triton.errors import TritonError

    return RuntimeError, ValueError, TypeError, TritonError


@jax.jit  # one program for all leaves
def distances(got, want) -> list[jax.Array]:
    """‖got − want‖ / ‖want‖ of each leaf."""

    def one(got, want):
        got, want = got.astype(jnp.float32).ravel(), want.astype(jnp.float32).ravel()
        return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)

    return [one(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]


def seconds(function: Callable, sets: list[tuple], repeats: int) -> tuple[float, float]:
    """The seconds a call takes, median over three rounds or, if short on a GPU, from a trace; those of the first."""
    start = time.perf_counter()
    jax.block_until_ready(function(*sets[0]))
    first = time.perf_counter() - start

    def one_round() -> float:
        start = time.perf_counter()
        for number in range(repeats):
            result = function(*sets[number % len(sets)])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats

    spent = statistics.median(one_round() for _ in range(3))
    if spent < SENDING and jax.default_backend() == "gpu":
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                one_round()
            spent = device_time(Path(directory))[0].total() / repeats * 1e-6
    return spent, first


def with_gradients(function: Callable, of: tuple[int, ...]) -> Callable:
    """(arguments, upstream) to the function's output and the gradients of the arguments `of`."""

    def both(arguments, upstream):
        def some(*chosen):
            every = list(arguments)
            for index, value in zip(of, chosen, strict=True):
                every[index] = value
            return function(*every)

        out, pull = jax.vjp(some, *(arguments[index] for index in of))
        return out, pull(upstream)

    return both


def upstream(function: Callable, arguments: tuple, key: jax.Array):
    """Random arrays of the shapes and dtypes that a function returns."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(function, *arguments))
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def raised(tree):
    """16-bit floats as float32, the same numbers."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype in (jnp.bfloat16, jnp.float16) else a, tree)


def wanted(case: Case, arguments: tuple, dy):
    """What the definition gives in float32: the output, with the gradients where there are any."""
    if case.own_gradients:
        return jax.jit(case.definition)(arguments, dy)
    if not case.of:
        return jax.jit(lambda arguments: case.definition(*raised(arguments)))(arguments)
    both = with_gradients(case.definition, case.of)
    return jax.jit(lambda arguments, dy: both(raised(arguments), raised(dy)))(arguments, dy)


def bound_of(case: Case, label: str) -> float | None:
    """The card's best known rate, None where it is not known."""
    for card, known in BOUNDS.items():
        if card in jax.devices()[0].device_kind:
            return ATTENTION_BOUNDS[card][label] if case.name == "attention" else known[case.unit]
    return None


def bench(name: str, case: Case, options: argparse.Namespace, known: dict[str, dict]) -> Iterator[dict]:
    """One record a way: distances to the definition, milliseconds and rates. known: earlier records, by way."""
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), options.inputs)  # quick to compile
    sets = list(map(jax.jit(case.arguments), keys))
    like = case.ways["chunked"] if case.own_gradients else case.definition
    draw = jax.jit(lambda arguments, key: upstream(like, arguments, key) if case.of else None)
    dys = list(map(draw, sets, keys))
    want = wanted(case, sets[0], dys[0])
    for way, function in case.ways.items():
        if options.ways and not way.endswith(BASELINES) and not any(map(way.startswith, options.ways)):
            continue
        record = {"op": case.name, "way": way, "shape": name, **asdict(SHAPES[name]), "dtype": options.dtype}
        forward = jax.jit(function)
        both = jax.jit(with_gradients(function, case.of))
        try:
            got = both(sets[0], dys[0]) if case.of else case.view(forward(*sets[0]))
            labels = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(got)]
            record["distance"] = dict(zip(labels, map(float, distances(got, want)), strict=True))
            record["right"] = all(
                x <= next((most for part, most in case.tolerance.items() if part in label), TOLERANCE[options.dtype])
                for label, x in record["distance"].items()
            )
            timed = [("forward", forward, sets, case.work[0])]
            if case.of:
                timed.append(("forward+backward", both, list(zip(sets, dys, strict=True)), case.work[1]))
            for label, run, inputs, work in timed:
                spent, first = seconds(run, inputs, options.repeats)
                record[label] = {"ms": 1e3 * spent, case.unit: work / spent, "first call s": first}
                bound = bound_of(case, label)
                if bound is not None:
                    record[label]["share of bound"] = work / spent / bound
                bases = {base: known[base][label]["ms"] for base in case.baselines if label in known.get(base, {})}
                if bases:
                    record[label]["overhead"] = {base: 1e3 * spent / ms - 1 for base, ms in bases.items()}
        except NotImplementedError as refusal:
            record["refused"] = str(refusal)
        except failures() as error:
            record["error"] = f"{type(error).__name__}: {error}"
            if options.debug:
                traceback.print_exc()
        known[way] = record
        yield record


def sweep(op: str, name: str, options: argparse.Namespace) -> Iterator[dict]:
    """One record a kernel and tile: milliseconds of that kernel alone."""
    for kernel, tile, function, arrays in SWEEPS[op](SHAPES[name], jnp.dtype(options.dtype), options.rank):
        if options.kernels and kernel not in options.kernels:
            continue
        record = {"op": op, "shape": name, "kernel": kernel, "tile": list(tile)}
        try:
            spent, first = seconds(jax.jit(function), [arrays], options.repeats)
            record |= {"ms": 1e3 * spent, "first call s": first}
        except failures() as error:
            record["error"] = f"{type(error).__name__}: {error}"
        yield record


def line(record: dict) -> str:
    """A record as one line of the table."""
    head = f"{record['shape']:9} {record['op']:20} {record.get('way', record.get('kernel')):30}"
    if "tile" in record:
        head = f"{head} {record['tile']!s:20}"
    for kind in ("refused", "error"):
        if kind in record:
            return f"{head} {kind}: {' '.join(record[kind].split())[:200]}"
    if "ms" in record:
        return f"{head} {record['ms']:8.3f} ms   (first call {record['first call s']:.1f} s)"
    parts = [f"{head} {'right' if record['right'] else 'WRONG'} {max(record['distance'].values()):.1e}"]
    for label in ("forward", "forward+backward"):
        x = record.get(label)
        if x:
            unit = next(key for key in x if key.endswith("/s"))
            share = f" {x['share of bound']:4.0%}" if "share of bound" in x else ""
            over = ", ".join(f"{y:+.1%} over {base.split(': ')[-1]}" for base, y in x.get("overhead", {}).items())
            parts.append(f"{label} {x['ms']:8.3f} ms {x[unit]:6.2f} {unit}{share} {over}".rstrip())
    return "   ".join(parts)


def measured(op: str, name: str, options: argparse.Namespace) -> Iterator[dict]:
    known: dict[str, dict] = {}
    for case in OPS[op](SHAPES[name], jnp.dtype(options.dtype), options.rank):
        yield from bench(name, case, options, known)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=[*OPS, "all"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["A1"])
    parser.add_argument(
        "--tiny", action="store_true", help="one tiny shape, one call: does it run at all, on any device"
    )
    parser.add_argument("--ways", nargs="+", help="only ways that begin with one of these, and baselines")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="time the Triton kernels alone over tile sizes")
    parser.add_argument("--kernels", nargs="+", help="with --sweep: only these")
    parser.add_argument("--json", help="append each record to this file")
    parser.add_argument("--debug", action="store_true", help="a way's whole traceback, not its first line")
    options = parser.parse_args(argv)
    if options.tiny:
        options.shapes, options.repeats, options.inputs = ["tiny"], 1, 1
    chosen = OPS if options.op == "all" else [options.op]
    if options.sweep:
        chosen = [op for op in chosen if op in SWEEPS]
        if not chosen:
            parser.error(f"--sweep: {options.op} has no tiles to try; {', '.join(SWEEPS)} have")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.dtype}", flush=True)
    wrong = 0
    for op, name in ((op, name) for op in chosen for name in options.shapes):
        best: dict[str, dict] = {}
        for record in (sweep if options.sweep else measured)(op, name, options):
            wrong += "error" in record or not record.get("right", True)
            print(line(record), flush=True)
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(record) + "\n")
            if record.get("ms", math.inf) < best.get(record.get("kernel", ""), {}).get("ms", math.inf):
                best[record["kernel"]] = record
        for record in best.values():
            print(f"best  {line(record)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
