"""Measures NF4 dequantisation on the GPU: equal to the definition, then how fast, for the shapes of real layers.

    python scripts/bench_dequantize.py                     # triton and plain XLA
    python scripts/bench_dequantize.py --sweep             # threads and rows a program of the kernel

Milliseconds a call are wall clock over 50 calls on weights that rotate, so that none is found in the cache; GB/s count
0.5 + 2 + 1/64 bytes a value.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp

from jaxft.kernels.dequantize import triton
from jaxft.quant import NF4, dense, quantize_nf4

SHAPES = {
    "qwen3-4b q": (4096, 2560),
    "qwen3-4b k": (1024, 2560),
    "qwen3-4b gate": (9728, 2560),
    "llama-3-8b q": (4096, 4096),
    "llama-3-8b gate": (14336, 4096),
}


def milliseconds(function, leaves: list[NF4], repeats: int = 50) -> float:
    """Median of three rounds."""
    jax.block_until_ready(function(leaves[0]))
    rounds = []
    for _ in range(3):
        began = time.perf_counter()
        for number in range(repeats):
            made = function(leaves[number % len(leaves)])
        jax.block_until_ready(made)
        rounds.append((time.perf_counter() - began) / repeats * 1e3)
    return sorted(rounds)[1]


def measure(name: str, implementation: str, note: str = "") -> None:
    """One printed line: whether every bit is the definition's, milliseconds, GB/s."""
    shape = SHAPES[name]
    quantize = jax.jit(quantize_nf4)
    leaves = [quantize(jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)) for seed in range(4)]
    function = jax.jit(lambda leaf: dense(leaf, jnp.bfloat16, implementation=implementation))
    wanted = jax.jit(lambda leaf: dense(leaf, jnp.bfloat16, implementation="reference"))(leaves[0])
    same = bool(jnp.all(function(leaves[0]) == wanted))
    spent = milliseconds(function, leaves)
    rate = shape[0] * shape[1] * (2.5 + 1 / 64) / spent / 1e6
    print(f"{name:16} {implementation:10} {note:24} {'equal' if same else 'WRONG'} {spent:8.4f} ms {rate:7.0f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sweep", action="store_true", help="threads and rows a program of the kernel")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for name in arguments.shapes:
        if not arguments.sweep:
            measure(name, "triton")
            measure(name, "reference")
            continue
        for triton.THREADS, triton.UNROLL in itertools.product((64, 128, 256), (1, 2, 4, 8)):
            measure(name, "triton", f"threads {triton.THREADS} rows {triton.UNROLL}")


if __name__ == "__main__":
    main()
