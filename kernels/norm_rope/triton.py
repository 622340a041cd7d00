"""RMSNorm and rotation of heads by our own Triton kernels (`triton_kernels.py`): what they serve, launches, gradient.

Triton and jax-triton are imported when a kernel is launched and not before.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxft.kernels import launch
from jaxft.kernels.gpu import check_installed

ELEMENTS = 4096  # numbers a program holds, and its warps
WARPS = 4


def check(x: jax.Array, capability: int) -> None:
    """Raises NotImplementedError with the reason where these kernels cannot serve."""
    H = x.shape[-1]
    if H & (H - 1) or not 32 <= H <= 512:
        raise NotImplementedError(f"head size {H}: needs a power of two from 32 to 512")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {x.dtype}: needs bfloat16, float16 or float32")
    if capability < 75:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 7.5")
    check_installed()


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Whether weight is differentiated."""

    weight: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def norm_rope(x, weight, cos, sin, eps, capability):
    """As `reference.norm_rope`, without rounding in between; capability: of the device, 90 for 9.0."""
    return _launch("forward", (x, weight, cos, sin), x, eps, capability)


def _forward(x, weight, cos, sin, eps, capability):
    wanted = weight.perturbed
    x, weight, cos, sin = x.value, weight.value, cos.value, sin.value
    return norm_rope(x, weight, cos, sin, eps, capability), (x, weight, cos, sin, _Wanted(wanted))


def _backward(eps, capability, kept, dy):
    x, weight, cos, sin, wanted = kept
    dy = jnp.zeros(x.shape, x.dtype) if isinstance(dy, SymbolicZero) else dy
    dx, parts = _launch("backward", (x, weight, cos, sin, dy), x, eps, capability, wanted.weight)
    return dx, jnp.sum(parts, axis=0).astype(weight.dtype) if wanted.weight else None, None, None


norm_rope.defvjp(_forward, _backward, symbolic_zeros=True)


def _launch(name, arrays, x, eps, capability, wanted=None):

    from jaxft.kernels.norm_rope import triton_kernels

    H = x.shape[-1]
    rows, count = ELEMENTS // H, x.size // H
    programs = -(-count // rows)
    like: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)
    more = {}
    if wanted is not None:
        like = (like, jax.ShapeDtypeStruct((programs if wanted else 1, H), jnp.float32))
        more = {"DW": wanted}
    return launch.triton_call(
        *arrays, kernel=getattr(triton_kernels, name), out_shape=like, grid=(programs,), num_warps=WARPS, num_stages=1,
        compute_capability=capability, name=f"norm_rope_{name}", eps=float(eps), COUNT=count, N=x.shape[2], H=H,
        ROWS=rows, **more,
    )  # fmt: skip
