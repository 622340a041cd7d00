"""Runs the Triton kernel of NF4 dequantisation by Triton's interpreter on the CPU and compares it with the reference.

Its own process, because TRITON_INTERPRET has to be set before triton is imported:
`python tests/interpret_dequantize.py` prints one line a case and fails on the first value that differs.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.dequantize import dequantize_nf4, triton, triton_kernels
from jaxft.kernels.dequantize.tables import dynamic_map, nf4_levels
from jaxft.quant import quantize_nf4
from tests.interpret_attention import HostArray


def compare(shape: tuple[int, int], dtype: str, block: int = 64, double: bool = True) -> None:
    n = shape[0] * shape[1]
    weight = jnp.asarray(np.random.default_rng(n).normal(size=shape), jnp.float32)
    leaf = jax.jit(lambda w: quantize_nf4(w, block=block, double=double))(weight)
    wanted = dequantize_nf4(
        leaf.codes, leaf.scales, leaf.nested, leaf.offset, shape=shape, block=block, implementation="reference",
        dtype=jnp.dtype("float32" if dtype == "bfloat16" else dtype),
    )  # fmt: skip
    out = HostArray(np.full(n, np.nan, jnp.dtype(dtype)))
    second = (leaf.nested, leaf.offset[None]) if double else (leaf.scales, leaf.scales)
    arrays = (leaf.codes, leaf.scales, *second, nf4_levels(), dynamic_map())
    constants = triton.constants(n, block, double)
    grid = (-(-n // (constants["UNROLL"] * constants["THREADS"] * 8)),)
    triton_kernels.nf4[grid](*[HostArray(np.asarray(x)) for x in arrays], out, *constants.values())
    wanted = np.asarray(wanted).reshape(-1)
    if dtype == "bfloat16":  # the interpreter cuts off where the compiled kernel rounds
        wanted = (wanted.view(np.uint32) >> 16).astype(np.uint16).view(jnp.bfloat16)
    np.testing.assert_array_equal(out.array, wanted)
    print(f"{shape} {dtype} block {block} {'double' if double else 'single'}: ok")


if __name__ == "__main__":
    compare((64, 256), "bfloat16")
    compare((33, 35), "bfloat16")
    compare((5, 7), "float32")
    compare((96, 64), "float16", block=128)
    compare((48, 100), "float32", block=32, double=False)
