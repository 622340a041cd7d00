"""Runs the Triton kernel of the 8-bit AdamW step by Triton's interpreter on the CPU and compares it with the reference.

Its own process, because of `tests/interpreted.py`: `python tests/interpret_adamw.py` prints one line a case.
"""

from tests import interpreted  # before triton  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.adamw_8bit import reference, triton
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


def compare(name: str, layers: int, size: int, dtype: str, finite: bool = True) -> None:
    param, grad, mu, nu, scalars = case(layers, size, dtype, finite)
    exact = param.astype(jnp.float32)  # what is rounded at random is compared before it is
    wanted = reference.adamw_8bit(exact, grad, mu, nu, scalars, jax.random.key(0), *CONSTANTS)
    got = triton.adamw_8bit(param, grad, mu, nu, scalars, jnp.asarray([7], jnp.uint32), *CONSTANTS, 90)
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


if __name__ == "__main__":
    compare("float32", 1, 4096, "float32")
    compare("float32, three layers, no whole block", 3, 16 * 300, "float32")
    compare("bfloat16", 2, 5120, "bfloat16")
    compare("not finite", 1, 4096, "bfloat16", finite=False)
    print("done: ok", flush=True)
