"""RMSNorm and rotation of heads by our own Triton kernels (`triton_kernels.py`): what they serve, launches, gradient.

Triton and jax-triton are imported when a kernel is launched and not before.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxft.kernels import launch
from jaxft.kernels.gpu import check_installed
from jaxft.kernels.launch import fitting, padded

# numbers of a head that a program holds: without a low-rank part; with one of rank 16 and no gradient of the weight, as
# measured; with others, where more would not fit the registers
ELEMENTS, RANK_16, MORE = 2048, 8192, 4096
WARPS = 4
HEADS = 8  # that a program walks over, at most; 4 without a low-rank part
PROGRAMS = 256  # that fill a card: fewer heads a program before there are fewer
LARGEST_RANK = 128


class LowRank(NamedTuple):
    """What a linear layer's LoRA adds to its product: u (T, WIDTH), whose columns from `start` on are the layer's, and
    the scaled B (N · H, R), in the product's dtype."""

    u: jax.Array
    b: jax.Array
    start: int


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
    return rotated(x, None, weight, cos, sin, eps, capability)


def _forward(x, weight, cos, sin, eps, capability):
    wanted = weight.perturbed
    x, weight, cos, sin = x.value, weight.value, cos.value, sin.value
    return norm_rope(x, weight, cos, sin, eps, capability), (x, weight, cos, sin, _Wanted(wanted))


def _backward(eps, capability, kept, dy):
    x, weight, cos, sin, wanted = kept
    dy = jnp.zeros(x.shape, x.dtype) if isinstance(dy, SymbolicZero) else dy
    dx, dw = rotated_backward(x, None, weight, cos, sin, dy, eps, capability, wanted.weight)
    return dx, None if dw is None else dw.astype(weight.dtype), None, None


norm_rope.defvjp(_forward, _backward, symbolic_zeros=True)


def rotated(
    x: jax.Array, low: LowRank | None, weight: jax.Array | None, cos: jax.Array, sin: jax.Array, eps: float,
    capability: int,
) -> jax.Array:  # fmt: skip
    """rotate(norm(x + u bᵀ)) of x (B, T, N, H), without the norm where weight is None."""
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _launch("forward", _tile(x, low, False), x, low, weight, cos, sin, (), like, eps, capability)


def rotated_backward(
    x: jax.Array | None, low: LowRank | None, weight: jax.Array | None, cos: jax.Array, sin: jax.Array,
    dy: jax.Array, eps: float, capability: int, wanted: bool,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """The gradients of x, which is u bᵀ's too, and where wanted of weight, (H,) float32. Without a weight neither x nor
    low is read, and x may be None."""
    if weight is None:
        x, low = dy, None  # an array that is not read is stood for by another
    assert x is not None
    tile = _tile(x, low, wanted)
    programs = math.prod(tile.grid) if wanted else 1
    like = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((programs, x.shape[-1]), jnp.float32),
    )
    dx, parts = _launch("backward", tile, x, low, weight, cos, sin, (dy,), like, eps, capability, DW=wanted)
    return dx, jnp.sum(parts, axis=0) if wanted else None


class Tile(NamedTuple):
    """Tokens of a program, the heads that it walks over, and the grid."""

    tokens: int
    heads: int
    grid: tuple[int, int]


def _tile(x: jax.Array, low: LowRank | None, wanted: bool) -> Tile:
    """wanted: whether the weight has a gradient."""
    N, H = x.shape[-2:]
    elements, most, least = ELEMENTS, HEADS // 2, 1
    if low is not None:
        least = 16  # rows of a product
        elements, most = RANK_16 if padded(low.b.shape[1]) == 16 and H <= 128 and not wanted else MORE, HEADS
    T = x.size // (N * H)
    tokens = fitting(T, max(least, elements // H))
    rows, heads = -(-T // tokens), math.gcd(N, most)
    while heads % 2 == 0 and rows * (N // heads) < PROGRAMS:
        heads //= 2
    return Tile(tokens, heads, (N // heads, rows))


def _launch(name, tile, x, low, weight, cos, sin, more, like: Any, eps, capability, **flags):
    from jaxft.kernels.norm_rope import triton_kernels

    N, H = x.shape[-2:]
    T = x.size // (N * H)
    u, b, start = low or LowRank(x, x, 0)  # an array that is not read is stood for by another
    rank, width = (b.shape[1], u.shape[-1]) if low else (0, 0)
    columns = padded(rank) if low else 16
    # heads that are on their way: with those of `check` in `qkv` what fits shared memory everywhere
    stages = (3 if columns == 16 else 2) if low else 1
    return launch.triton_call(
        x, u, b, cos if weight is None else weight, cos, sin, *more, kernel=getattr(triton_kernels, name),
        out_shape=like, grid=tile.grid, num_warps=WARPS, num_stages=1,
        compute_capability=capability, name=f"norm_rope_{name}", eps=float(eps), T=T, N=N, H=H, R=rank,
        RP=columns, WIDTH=width, START=start, BT=tile.tokens, HEADS=tile.heads, STAGES=stages,
        LOW=low is not None, NORM=weight is not None, **flags,
    )  # fmt: skip
