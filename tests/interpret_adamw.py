"""Runs the Triton kernel of the 8-bit AdamW step by Triton's interpreter on the CPU and compares it with the reference.

Its own process, because of `tests/interpreted.py`: `python tests/interpret_adamw.py` prints one line a case.
"""

from tests import interpreted  # before triton  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import triton as language
import triton.language as tl

from jaxft.kernels.adamw_8bit import reference, triton, triton_kernels
from jaxft.kernels.dequantize.tables import dynamic_map
from jaxft.optim_8bit import Moment8, dequantize, quantize

CONSTANTS = 0.9, 0.999, 1e-8, 0.1


def case(layers: int, size: int, dtype: str, finite: bool = True):
    random = np.random.default_rng(size)
    blocks = -(-size // 256)
    padded = random.normal(0, 1, (2, layers, blocks * 256)) * np.exp(random.normal(0, 3, (2, layers, blocks * 256)))
    padded[:, :, size:] = 0
    m, v = (jnp.asarray(a.reshape(layers, blocks, 256), jnp.float32) for a in (padded[0], padded[1] ** 2))
    param, grad = (jnp.asarray(random.normal(0, s, (layers, size)), dtype) for s in (1, 3))
    scalars = jnp.asarray([0.5, 0.01, 0.19, 0.002, finite], jnp.float32)
    return param, grad, quantize(m, True), quantize(v, False), scalars


def compare(name: str, layers: int, size: int, dtype: str, finite: bool = True, tile=triton.TILE) -> None:
    param, grad, mu, nu, scalars = case(layers, size, dtype, finite)
    exact = param.astype(jnp.float32)  # what is rounded at random is compared before it is
    wanted = reference.adamw_8bit(exact, grad, mu, nu, scalars, jax.random.key(0), *CONSTANTS)
    got = triton.adamw_8bit(param, grad, mu, nu, scalars, jnp.asarray([7], jnp.uint32), *CONSTANTS, 90, tile)
    if dtype == "bfloat16":
        below = (np.asarray(wanted[0]).view(np.uint32) & 0xFFFF0000).view(np.float32)
        step = np.where(below == np.asarray(wanted[0]), 0, 2.0 ** (np.floor(np.log2(np.abs(below))) - 7))
        off = np.abs(np.asarray(got[0], np.float32) - below)
        assert np.all((off == 0) | np.isclose(off, step)), f"{name}: no neighbour"
        if finite:
            up = np.sum(off != 0) / off.size
            share = np.mean(np.abs(np.asarray(wanted[0]) - below) / np.where(step == 0, 1, step))
            assert abs(up - share) < 4 * (0.25 / off.size) ** 0.5, f"{name}: {up:.3f} up, {share:.3f} expected"
    else:
        interpreted.compare(f"{name}, param", got[0], wanted[0], 1e-6)
    for moment, exact_moment, signed in ((got[1], wanted[1], True), (got[2], wanted[2], False)):
        assert isinstance(moment, Moment8)
        interpreted.compare(f"{name}, largest", moment.largest, exact_moment.largest, 1e-6)
        differing = np.asarray(moment.codes).astype(int) - np.asarray(exact_moment.codes)
        assert np.abs(differing).max() <= 1 and np.mean(differing != 0) < 1e-3, f"{name}: {np.mean(differing != 0)}"
        interpreted.compare(f"{name}, moment", dequantize(moment, signed), dequantize(exact_moment, signed), 1e-3)


@language.jit
def coded(
    value, top, entries, share_out, code_out, ROWS: tl.constexpr, LOWEST: tl.constexpr, LAST: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """The kernel's own two functions on ROWS blocks: value / top, and its code."""
    at = tl.arange(0, ROWS * 256)
    x = triton_kernels._share(tl.load(value + at), tl.load(top + tl.arange(0, ROWS)), 256)
    tl.store(share_out + at, x)
    tl.store(code_out + at, triton_kernels._code(x, entries, LOWEST, LAST, SIGNED))


def neighbours(values: np.ndarray, ulps: int) -> np.ndarray:
    """float32 numbers above 0 and all up to `ulps` away from each."""
    bits = values.astype(np.float32).view(np.int32)
    return np.concatenate([bits + step for step in range(-ulps, ulps + 1)]).clip(0).view(np.float32)


def compare_codes(signed: bool) -> None:
    """Every code by its definition: of quotients by 1 at and around all that the table knows, and of quotients that lie
    on middles or beside them, by rows' largest from subnormal to the last octave."""
    levels = dynamic_map(signed).astype(np.float64)
    middles = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    random = np.random.default_rng(0)
    buckets = (np.arange(triton.LAST + 1, dtype=np.uint32) + triton.LOWEST << 16).view(np.float32)
    positive = middles[middles > 0]
    drawn = [2.0 ** random.uniform(-149, 0, 20_000), random.uniform(0, 1, 20_000)]
    known = [neighbours(values, 2) for values in (buckets, positive, levels[levels > 0])]
    tiny = np.array([0.0, 1.0, 1e-45, 1e-40, 1e-38], np.float32)
    by_one = np.concatenate([*known, *drawn, tiny]).astype(np.float32)
    by_one = by_one[by_one <= 1]
    by_one = np.pad(by_one, (0, (1 << 16) - by_one.size))
    tops = np.exp2(random.uniform(-149, 128, 256)).astype(np.float32)
    tops[:6] = 1e-45, 1e-38, np.finfo(np.float32).tiny, np.finfo(np.float32).max, 2.0**127, 2 - 2.0**-23
    near = np.stack([np.resize(random.permutation(positive), 256) for _ in tops]) * tops[:, None].astype(np.float64)
    near = near.astype(np.float32).view(np.int32) + random.integers(-2, 3, near.shape, np.int32)
    near = np.minimum(near.clip(0).view(np.float32), tops[:, None])
    ones = np.ones(by_one.size // 256, np.float32)
    for name, value, top in (("by 1", by_one.reshape(-1, 256), ones), ("by any", near, tops)):
        for sign in (1, -1) if signed else (1,):
            x = sign * value / top[:, None]
            share, code = np.full(x.shape, np.nan, np.float32), np.zeros(x.shape, np.uint8)
            entries = triton.tables(signed)[1]
            handed = (interpreted.HostArray(a) for a in (sign * value, top, entries, share, code))
            coded[(1,)](*handed, len(top), triton.LOWEST, triton.LAST, signed)
            exact = np.abs(x) >= 2.0**-24
            np.testing.assert_array_equal(share[exact], x[exact])
            assert np.all(np.abs(share[~exact]) < 2.0**-23)
            np.testing.assert_array_equal(code, np.searchsorted(middles, x, side="left"))
            print(f"codes {name}, {sign}, {'signed' if signed else 'unsigned'}: ok, {x.size} numbers", flush=True)


if __name__ == "__main__":
    compare("float32", 1, 4096, "float32")
    compare("float32, three layers, no whole block", 3, 16 * 300, "float32")
    compare("bfloat16", 2, 5120, "bfloat16")
    compare("not finite", 1, 4096, "bfloat16", finite=False)
    compare("four blocks, two warps each", 1, 4096, "float32", tile=triton.Tile(4, 8))
    compare_codes(True)
    compare_codes(False)
    print("done: ok", flush=True)
