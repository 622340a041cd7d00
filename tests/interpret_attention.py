"""Runs the Triton attention kernels by Triton's interpreter on the CPU and compares them with the reference.

Its own process, because TRITON_INTERPRET has to be set before triton is imported: `python tests/interpret_attention.py`
prints one line a case and fails on the first one that is off.
"""

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

from jaxft.kernels.attention import key_range, reference, triton, triton_kernels
from jaxft.kernels.attention.triton import Tile

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope):
    """numpy 2.5 makes no int of an array of one element; the interpreter of triton 3.6 still asks it to."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_index


class HostArray:
    """What the interpreter asks of a torch tensor, over a numpy array that stays where it is."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array)
        self.dtype = str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    cpu = untyped_storage

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def storage_offset(self):
        return 0

    size = stride = storage_offset

    def copy_(self, other):
        assert other is self


def run(kernel, grid, arrays, outputs, tile, scale, softcap, q, k):
    """Launches `kernel` as `triton._launch` does; outputs are (shape, dtype) pairs, filled with NaN before."""
    results = [HostArray(np.full(shape, np.nan, dtype)) for shape, dtype in outputs]
    T, N, H = q.shape[1:]
    kernel[grid](
        *[HostArray(np.asarray(x)) for x in arrays], *results, scale, softcap, T, N, k.shape[2], H,
        max(16, 1 << (H - 1).bit_length()), tile.queries, tile.keys, T % max(tile.queries, tile.keys) != 0, "ieee",
    )  # fmt: skip
    return [x.array for x in results]


def kernels(q, k, v, first_key, dout, scale, softcap, tiles):
    """out, lse, dq, dk, dv by the three kernels."""
    B, T, N, _ = q.shape
    K = k.shape[2]
    forward, queries, keys = tiles
    out, lse = run(
        triton_kernels.forward, (N, -(-T // forward.queries), B), (q, k, v, first_key),
        [(q.shape, q.dtype), ((B, N, T), np.float32)], forward, scale, softcap, q, k,
    )  # fmt: skip
    dq, delta = run(
        triton_kernels.queries_backward, (N, -(-T // queries.queries), B), (q, k, v, first_key, out, lse, dout),
        [(q.shape, q.dtype), ((B, N, T), np.float32)], queries, scale, softcap, q, k,
    )  # fmt: skip
    full_end, last_end = jax.jit(triton.reach, static_argnums=1)(first_key, keys.keys)
    dk, dv = run(
        triton_kernels.keys_backward, (K, -(-T // keys.keys), B),
        (q, k, v, first_key, lse, dout, delta, full_end, last_end),
        [(k.shape, k.dtype), (v.shape, v.dtype)], keys, scale, softcap, q, k,
    )  # fmt: skip
    return out, lse, dq, dk, dv


def compare(name, lengths, *, T, N, K, H, window=0, softcap=None, dtype=np.float32, tiles, tolerance):
    rng = np.random.default_rng(0)
    B = len(lengths)
    segments = np.zeros((B, T), np.int32)
    for row, parts in enumerate(lengths):
        for number, (start, end) in enumerate(zip(np.cumsum([0, *parts]), np.cumsum(parts), strict=False), 1):
            segments[row, start:end] = number
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for shape in shapes)

    @jax.jit  # one compile, where each step on its own would take longer than the interpreter
    def expected(q, k, v, dout):
        t = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        first = key_range(segments)
        if window:
            first = jnp.maximum(first, t - window + 1)
        op = functools.partial(reference.attention, scale=H**-0.5, softcap=softcap)
        out, vjp = jax.vjp(lambda q, k, v: op(q, k, v, first, t), q, k, v)
        return first, (out, *vjp(dout))

    first, wanted = expected(*(x.astype(np.float32) for x in (q, k, v, dout)))
    got = kernels(q, k, v, first, dout, H**-0.5, softcap, tiles)
    for label, x, want in zip(("out", "dq", "dk", "dv"), (got[0], *got[2:]), wanted, strict=True):
        error = np.linalg.norm(np.float32(x) - want) / max(np.linalg.norm(want), 1.0)  # dq may be all zeros
        assert error < tolerance, f"{name}: {label} is off by {error:.2e} (tolerance {tolerance:.0e})"
    print(f"{name}: ok")


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
    # weights and dscores are rounded to the inputs' 11 bits before their products
    compare("float16", [[30, 18]], T=48, N=2, K=1, H=16, dtype=np.float16, tiles=small, tolerance=2e-3)
