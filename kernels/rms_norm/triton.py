"""RMSNorm of a residual stream by our own Triton kernels (`triton_kernels.py`): what they serve, launches, gradient.

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

ROWS = 8  # that a program of the backward kernel walks over
FEW = 2  # the same of fewer than MANY rows, whose programs would not fill a card
MANY = 8192
LARGEST = 16384


def check(x: jax.Array, capability: int) -> None:
    """Raises NotImplementedError with the reason where these kernels cannot serve."""
    if not 128 <= x.shape[-1] <= LARGEST:
        raise NotImplementedError(f"width {x.shape[-1]}: needs 128 to {LARGEST}")
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def residual_rms_norm(x: jax.Array, weight: jax.Array, eps: float, capability: int) -> tuple[jax.Array, jax.Array]:
    """x and its norm, as `residual_rms_norm` of this folder; capability: of the device, 90 for 9.0."""
    return x, _launch("forward", (x, weight), x, eps, capability)


def _forward(x, weight, eps, capability):
    wanted = _Wanted(weight.perturbed)
    x, weight = x.value, weight.value
    return residual_rms_norm(x, weight, eps, capability), (x, weight, wanted)


def _backward(eps, capability, kept, upstream):
    x, weight, wanted = kept
    more, dy = (jnp.zeros(x.shape, x.dtype) if isinstance(part, SymbolicZero) else part for part in upstream)
    dx, parts = _launch("backward", (x, weight, more, dy), x, eps, capability, wanted.weight)
    return dx, jnp.sum(parts, axis=0).astype(weight.dtype) if wanted.weight else None


residual_rms_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def _launch(name, arrays, x, eps, capability, wanted=None):

    from jaxft.kernels.rms_norm import triton_kernels

    D = x.shape[-1]
    count, programs = x.size // D, x.size // D
    like: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)
    more = {}
    if wanted is not None:
        rows = ROWS if wanted or count >= MANY else FEW
        programs = -(-count // rows)
        like = (like, jax.ShapeDtypeStruct((programs if wanted else 1, D), jnp.float32))
        more = {"ROWS": rows, "DW": wanted}
    wide = 1 << (D - 1).bit_length()
    return launch.triton_call(
        *arrays, kernel=getattr(triton_kernels, name), out_shape=like, grid=(programs,),
        num_warps=min(16, max(4, wide // 1024)), num_stages=1, compute_capability=capability,
        name=f"rms_norm_{name}", eps=float(eps), COUNT=count, D=D, WIDE=wide, **more,
    )  # fmt: skip
