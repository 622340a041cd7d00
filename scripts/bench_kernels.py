"""Measures each op's ways on the GPU at named shapes: right against a float32 reference, then fast.

    python scripts/bench_kernels.py attention --shapes A1 A9 --json kernels.jsonl
    python scripts/bench_kernels.py attention --shapes A1 --sweep        # tile sizes of the Triton kernels

Each way is checked (output and gradients, relative L2 distance to the reference on the same rounded inputs) and then
timed, forward and forward + backward: wall clock over --repeats calls that rotate over --inputs sets of arrays, ended
by `jax.block_until_ready`. A way that fails is printed with its error and the next one runs. TFLOP/s count the pairs
of query and key that exist, 2 products forward and 5 backward; the bound is the card's best known causal attention.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.attention import attention, chunked, documents, key_range, triton
from jaxft.kernels.attention.triton import Tile, Tiles

BOUNDS = {"H200": {"forward": 561.0, "forward+backward": 555.0}}  # TFLOP/s, cuDNN causal, 16k tokens, 32/8 heads, 128
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, N query heads on K kv heads of size H; mean_document None is one document a row."""

    B: int
    T: int
    N: int
    K: int
    H: int
    mean_document: int | None = None
    window: int | None = None
    softcap: float | None = None


SHAPES = {
    "A1": Shape(8, 2048, 32, 8, 128),
    "A9": Shape(8, 2048, 32, 8, 128, mean_document=200),
    "A7": Shape(1, 32768, 32, 8, 128),
    "llama-8b": Shape(4, 4096, 32, 8, 128),
    "llama-1b": Shape(8, 2048, 32, 8, 64),
    "gemma": Shape(4, 4096, 16, 8, 256, window=1024, softcap=50.0),
    "docs-1024": Shape(8, 2048, 32, 8, 128, mean_document=1024),
    "odd": Shape(2, 1537, 16, 4, 96, mean_document=150),
}


def segments(shape: Shape, seed: int = 0) -> np.ndarray:
    """Segment ids (B, T): documents of exponential length around the mean, the last one cut off by the row's end."""
    rng = np.random.default_rng(seed)
    ids = np.ones((shape.B, shape.T), np.int32)
    for row in ids if shape.mean_document else ():
        start = number = 0
        while start < shape.T:
            number += 1
            end = start + max(8, int(rng.exponential(shape.mean_document)))
            row[start:end] = number
            start = end
    return ids


def attention_ways(shape: Shape, first_key: jax.Array) -> dict[str, Callable]:
    """Every way as a function of q, k, v."""
    fixed = dict(first_key=first_key, window=shape.window, scale=shape.H**-0.5, softcap=shape.softcap)
    most = int(np.max(np.sum(np.asarray(first_key) == np.arange(shape.T), axis=1)))

    def way(name: str, **more) -> Callable:
        return lambda q, k, v: attention(q, k, v, implementation=name, **fixed, **more)

    ways = {"triton": way("triton"), f"cudnn(M={most})": way("cudnn", documents=documents(first_key, most))}
    if most == 1 and shape.softcap is None and shape.window is None:
        ways["jax.nn cudnn causal"] = lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    elif most > 1:
        ways[f"cudnn(M={2 * most})"] = way("cudnn", documents=documents(first_key, 2 * most))
    ways["chunked"] = way("chunked")
    return ways


def folded(shape: Shape, first_key: jax.Array) -> jax.Array:
    """first_key with the window in it, as the kernels take it."""
    t = jnp.arange(shape.T, dtype=jnp.int32)[None, :]
    return first_key if shape.window is None else jnp.maximum(first_key, t - shape.window + 1)


def attention_reference(shape: Shape, first_key: jax.Array, q, k, v, dout) -> tuple[jax.Array, ...]:
    """out, dq, dk, dv in float32, row by row so that it fits (`chunked` is held to reference.py by the tests)."""
    block = max(1, 2**28 // (shape.N * shape.T))
    last = jnp.arange(shape.T, dtype=jnp.int32)[None, :]

    def row(inputs):
        first, q, k, v, dout = (x[None] for x in inputs)
        out, vjp = jax.vjp(
            lambda q, k, v: chunked.attention(
                q, k, v, first, last, scale=shape.H**-0.5, softcap=shape.softcap, block=block
            ),
            *(x.astype(jnp.float32) for x in (q, k, v)),
        )
        return out[0], *(x[0] for x in vjp(dout.astype(jnp.float32)))

    return jax.jit(lambda *inputs: jax.lax.map(row, inputs))(folded(shape, first_key), q, k, v, dout)


def inputs(shape: Shape, dtype: jnp.dtype, seed: int) -> tuple[jax.Array, ...]:
    """q, k, v, dout, normal."""
    q, kv = (shape.B, shape.T, shape.N, shape.H), (shape.B, shape.T, shape.K, shape.H)
    keys = jax.random.split(jax.random.key(seed), 4)
    return tuple(jax.random.normal(key, s, dtype) for key, s in zip(keys, (q, kv, kv, q), strict=True))


def failures() -> tuple[type[Exception], ...]:
    """What a way may fail with: refused, wrong shapes, not compiled by XLA or Triton, out of memory."""
    if find_spec("triton") is None:
        return RuntimeError, ValueError, TypeError
    from triton.errors import TritonError

    return RuntimeError, ValueError, TypeError, TritonError


def distance(got: jax.Array, want: jax.Array) -> float:
    """‖got − want‖ / ‖want‖."""
    got = got.astype(jnp.float32)
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))


def seconds(function: Callable, sets: list[tuple], repeats: int) -> tuple[float, float]:
    """Median over three rounds of the seconds a call takes, and the seconds that the first call took."""
    start = time.perf_counter()
    jax.block_until_ready(function(*sets[0]))
    first = time.perf_counter() - start
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for number in range(repeats):
            result = function(*sets[number % len(sets)])
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / repeats)
    return sorted(rounds)[1], first


def bench_attention(name: str, shape: Shape, arguments: argparse.Namespace) -> Iterator[dict]:
    """One record a way: distances to the reference, milliseconds and TFLOP/s."""
    dtype = jnp.dtype(arguments.dtype)
    first_key = key_range(jnp.asarray(segments(shape)))
    pairs = float(np.sum(np.arange(shape.T) - np.asarray(folded(shape, first_key)) + 1, dtype=np.float64))
    flops = 4 * pairs * shape.N * shape.H
    sets = [inputs(shape, dtype, seed) for seed in range(arguments.inputs)]
    want = attention_reference(shape, first_key, *sets[0])
    for way, function in attention_ways(shape, first_key).items():
        if arguments.ways and not any(way.startswith(asked) for asked in arguments.ways):
            continue
        record = {"op": "attention", "way": way, "shape": name, **asdict(shape), "dtype": arguments.dtype}

        def both(q, k, v, dout, function=function):
            out, vjp = jax.vjp(function, q, k, v)
            return out, *vjp(dout)

        forward, both = jax.jit(lambda q, k, v, _, function=function: function(q, k, v)), jax.jit(both)
        try:
            got = both(*sets[0])
            record["distance"] = {
                label: distance(a, b) for label, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)
            }
            record["right"] = all(x < TOLERANCE[arguments.dtype] for x in record["distance"].values())
            for label, timed, work in (("forward", forward, flops), ("forward+backward", both, 3.5 * flops)):
                spent, first = seconds(timed, sets, arguments.repeats)
                rate = work / spent / 1e12
                record[label] = {"ms": 1e3 * spent, "TFLOP/s": rate, "first call s": first}
                bound = next((x[label] for card, x in BOUNDS.items() if card in jax.devices()[0].device_kind), None)
                if bound is not None:
                    record[label]["share of bound"] = rate / bound
        except failures() as error:
            record["error"] = f"{type(error).__name__}: {error}"
            if arguments.debug:
                traceback.print_exc()
        yield record


CANDIDATES = {
    "forward": [
        Tile(q, k, w, s)
        for q, k, w in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 32, 4))
        for s in (2, 3, 4)
    ],
    "queries_backward": [
        Tile(q, k, w, s)
        for q, k, w in ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 8), (64, 128, 4), (128, 32, 8))
        for s in (1, 2, 3)
    ],
    "keys_backward": [
        Tile(q, k, w, s)
        for q, k, w in ((64, 128, 8), (128, 128, 8), (128, 64, 8), (64, 64, 4), (32, 128, 8), (32, 128, 4), (32, 64, 4))
        for s in (1, 2, 3)
    ],
}


def sweep_attention(name: str, shape: Shape, arguments: argparse.Namespace) -> Iterator[dict]:
    """One record a kernel and tile: milliseconds of that kernel alone."""
    dtype = jnp.dtype(arguments.dtype)
    first_key = folded(shape, key_range(jnp.asarray(segments(shape))))
    fixed = dict(scale=shape.H**-0.5, softcap=shape.softcap, capability=triton.device_capability())
    table = triton.tiles(fixed["capability"], shape.H, dtype)
    q, k, v, dout = inputs(shape, dtype, 0)
    out, lse = jax.jit(lambda *x: triton.run_forward(*x, sizes=table, **fixed))(q, k, v, first_key)
    run_queries = jax.jit(lambda *x: triton.run_queries_backward(*x, sizes=table, **fixed))
    _, delta = run_queries(q, k, v, first_key, out, lse, dout)
    launches = {
        "forward": (triton.run_forward, (q, k, v, first_key)),
        "queries_backward": (triton.run_queries_backward, (q, k, v, first_key, out, lse, dout)),
        "keys_backward": (triton.run_keys_backward, (q, k, v, first_key, lse, dout, delta)),
    }
    for kernel, (launch, arrays) in launches.items():
        if arguments.kernels and kernel not in arguments.kernels:
            continue
        for tile in CANDIDATES[kernel]:
            sizes = Tiles(**{**{field: getattr(table, field) for field in launches}, kernel: tile})
            record = {"op": "attention", "shape": name, "kernel": kernel, "tile": [*asdict(tile).values()]}
            run = jax.jit(lambda *x, launch=launch, sizes=sizes: launch(*x, sizes=sizes, **fixed))
            try:
                spent, first = seconds(run, [arrays], arguments.repeats)
                record |= {"ms": 1e3 * spent, "first call s": first}
            except failures() as error:
                record["error"] = f"{type(error).__name__}: {error}"
            yield record


def line(record: dict) -> str:
    """A record as one line of the table."""
    head = f"{record['shape']:10} {record.get('way', record.get('kernel')):24} {record.get('tile', '')!s:20}"
    if "error" in record:
        return f"{head} {' '.join(record['error'].split())[:200]}"
    if "ms" in record:
        return f"{head} {record['ms']:8.3f} ms   (first call {record['first call s']:.1f} s)"
    worst = max(record["distance"].values())
    parts = [f"{head} {'right' if record['right'] else 'WRONG'} {worst:.1e}"]
    for label in ("forward", "forward+backward"):
        x = record[label]
        share = f" {x['share of bound']:4.0%}" if "share of bound" in x else ""
        parts.append(f"{label} {x['ms']:8.3f} ms {x['TFLOP/s']:6.1f} TFLOP/s{share}")
    return "   ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["attention"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ways", nargs="+", help="only ways that begin with one of these")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="time the Triton kernels alone over tile sizes")
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, help="with --sweep: only these")
    parser.add_argument("--json", help="append each record to this file")
    parser.add_argument("--debug", action="store_true", help="a way's whole traceback, not its first line")
    arguments = parser.parse_args(argv)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.dtype}", flush=True)
    wrong = 0
    for name in arguments.shapes:
        best: dict[str, dict] = {}
        for record in (sweep_attention if arguments.sweep else bench_attention)(name, SHAPES[name], arguments):
            wrong += "error" in record or not record.get("right", True)
            print(line(record), flush=True)
            if arguments.json:
                with open(arguments.json, "a") as file:
                    file.write(json.dumps(record) + "\n")
            if record.get("ms", math.inf) < best.get(record.get("kernel", ""), {}).get("ms", math.inf):
                best[record["kernel"]] = record
        for record in best.values():
            print(f"best  {line(record)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
