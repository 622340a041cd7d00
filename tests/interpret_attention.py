"""Runs the Triton attention kernels by Triton's interpreter on the CPU and compares them with the reference.

Its own process, because of `tests/interpreted.py`: `python tests/interpret_attention.py` prints one line a case and
fails on the first one that is off.
"""

import functools

from tests import interpreted  # before triton  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.attention import key_range, reference, triton
from jaxft.kernels.attention.triton import Tile, Tiles


def compare(name, lengths, *, T, N, K, H, window=0, softcap=None, dtype=np.float32, tiles, tolerance):
    rng = np.random.default_rng(0)
    B = len(lengths)
    segments = np.zeros((B, T), np.int32)
    for row, parts in enumerate(lengths):
        for number, (start, end) in enumerate(zip(np.cumsum([0, *parts]), np.cumsum(parts), strict=False), 1):
            segments[row, start:end] = number
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    t = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    first = key_range(segments)
    if window:
        first = jnp.maximum(first, t - window + 1)

    @functools.partial(jax.jit, static_argnums=0)  # one compile, where each step on its own would take longer
    def with_gradients(op, *arrays):
        q, k, v, dout = arrays
        out, vjp = jax.vjp(op, q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *vjp(dout)), strict=True))

    wanted = with_gradients(
        lambda q, k, v: reference.attention(q, k, v, first, t, scale=H**-0.5, softcap=softcap),
        *(x.astype(np.float32) for x in (q, k, v, dout)),
    )
    got = with_gradients(
        lambda q, k, v: triton.attention(
            q, k, v, first, scale=H**-0.5, softcap=softcap, capability=90, sizes=Tiles(*tiles)
        ),
        q, k, v, dout,
    )  # fmt: skip
    interpreted.compare(name, got, wanted, tolerance)


if __name__ == "__main__":
    small = (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
    wide = (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
    exact = dict(H=16, tiles=small, tolerance=5e-6)
    compare("one document a row", [[64]], T=64, N=1, K=1, **exact)
    compare("ragged, odd T, padding", [[22, 1, 9, 15], [5, 30]], T=49, N=2, K=1, **exact)
    compare("wide tiles", [[37, 1, 12]], T=50, N=2, K=2, H=16, tiles=wide, tolerance=5e-6)
    compare("one token a document", [[1] * 20], T=20, N=1, K=1, **exact)
    compare("padding only", [[]], T=33, N=1, K=1, **exact)
    compare("window", [[44, 20]], T=64, N=1, K=1, window=11, **exact)
    compare("softcap, head size 24", [[30, 10]], T=40, N=1, K=1, H=24, softcap=2.0, tiles=small, tolerance=5e-6)
    # weights and dscores are rounded to the inputs' 11 or 8 bits before their products
    compare("float16", [[30, 18]], T=48, N=2, K=1, H=16, dtype=np.float16, tiles=small, tolerance=2e-3)
    rows, brain = [[22, 1, 9, 1], [1] * 41, []], dict(dtype=jnp.bfloat16, tiles=small, tolerance=1e-2)
    compare("bfloat16, ragged, one token a document, padding only", rows, T=41, N=2, K=1, H=16, **brain)
    compare("bfloat16, window and softcap", [[30, 1, 10]], T=41, N=1, K=1, H=16, window=11, softcap=2.0, **brain)
