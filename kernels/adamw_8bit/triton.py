"""The 8-bit AdamW step by our own Triton kernel (`triton_kernels.py`): what it serves, its tables, and its launch.

Triton and jax-triton are imported when the kernel is launched and not before.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels import launch
from jaxft.kernels.dequantize.tables import dynamic_map
from jaxft.kernels.gpu import check_installed
from jaxft.optim_8bit import BLOCK, Moment8

ROWS = 8  # blocks of 256 numbers a program holds
WARPS = 8
LOWEST = 103 << 7  # the bucket of 2^-24, below every middle between two levels but the first


def check(param: jax.Array, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot serve."""
    if param.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"dtype {param.dtype}: needs bfloat16 or float32")
    if capability < 80:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 8.0 (bfloat16)")
    check_installed()


@functools.cache
def tables(signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels (256,) and the middles around each (257,), float32, and a first guess at codes, (buckets,) uint8.

    A number's bucket is its float32 exponent and 7 bits of its mantissa: 128 buckets an octave, where levels are at
    most 71. The guess is the code of the bucket's middle, and right but for a neighbour.
    """
    levels = dynamic_map(signed)
    middles = ((levels[:-1].astype(np.float64) + levels[1:]) / 2).astype(np.float32)
    bounds = np.concatenate([[-np.inf], middles, [np.inf]]).astype(np.float32)
    buckets = np.arange((127 << 7) - LOWEST + 1, dtype=np.uint32) + LOWEST
    inside = ((buckets << 16) | 0x8000).view(np.float32)
    return levels, bounds, np.searchsorted(middles, inside, side="left").astype(np.uint8)


def adamw_8bit(
    param: jax.Array, grad: jax.Array, mu: Moment8, nu: Moment8, scalars: jax.Array, seed: jax.Array,
    b1: float, b2: float, eps: float, decay: float, capability: int,
) -> tuple[jax.Array, Moment8, Moment8]:  # fmt: skip
    """See `__init__`; seed: (1,) uint32. The arrays that come back take the place of those that came."""
    from jaxft.kernels.adamw_8bit import triton_kernels

    layers, blocks = mu.largest.shape
    written = (param, mu.codes, mu.largest, nu.codes, nu.largest)
    known = [jnp.asarray(table) for signed in (True, False) for table in tables(signed)]
    after, *moments = launch.triton_call(
        param, grad, *written[1:], scalars, seed, *known,
        kernel=triton_kernels.step, out_shape=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in written),
        input_output_aliases=((0, 0), (2, 1), (3, 2), (4, 3), (5, 4)), grid=(-(-blocks // ROWS), layers),
        num_warps=WARPS, num_stages=1, compute_capability=capability, name="adamw_8bit",
        **constants(param.size // layers, blocks, b1, b2, eps, decay, param.dtype == jnp.bfloat16),
    )  # fmt: skip
    return after, Moment8(*moments[:2]), Moment8(*moments[2:])


def constants(
    size: int, blocks: int, b1: float, b2: float, eps: float, decay: float, rounded: bool
) -> dict[str, int | float | bool]:
    """The kernel's compile-time arguments, in its order."""
    return dict(
        SIZE=size, BLOCKS=blocks, ROWS=ROWS, BLOCK=BLOCK, LOWEST=LOWEST, LAST=(127 << 7) - LOWEST,
        b1=float(b1), b2=float(b2), eps=float(eps), decay=float(decay), ROUND=rounded,
    )  # fmt: skip
