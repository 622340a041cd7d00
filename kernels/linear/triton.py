"""A linear layer's thin products and the sum of its parts by our own Triton kernels: serving, tiles, launches.

The kernels and their formulas are in `triton_kernels.py`. Triton and jax-triton are imported when a kernel is launched
and not before.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.kernels import launch
from jaxft.kernels.gpu import check_16_bits, check_installed
from jaxft.kernels.launch import filled, fitting, padded
from jaxft.kernels.linear.weights import Weights

TOKENS, FEATURES, WARPS = 64, 64, 4  # of a program of `summed`
LARGEST_RANK = 128
MOST = 4  # products of a launch
SIDES = 3  # products that stand side by side
PROGRAMS = 512  # of `over_tokens`, about: what fills a card
MANY = 8192  # tokens, from which on `side_by_side` has programs enough with larger tiles


class Tile(NamedTuple):
    """BT tokens by BK columns of a thin product's wide array, and how Triton compiles the kernel."""

    tokens: int
    columns: int
    warps: int = 4
    stages: int = 3


# of `side_by_side`, by the tokens: the fastest of a sweep on an H200 for ranks of at most 32; of larger ones narrower
FEW, MORE = Tile(16, 128, warps=2, stages=5), Tile(64, 128)


def check(x: jax.Array, layers: tuple[Weights, ...], capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot add up any layer's parts."""
    ranks = [layer.lora[0].shape[0] for layer in layers if layer.lora is not None]
    if not ranks:
        raise NotImplementedError("nothing to add up: needs LoRA")
    if any(layer.magnitude is not None for layer in layers):
        raise NotImplementedError("a magnitude (DoRA): serves LoRA alone")
    check_16_bits(x.dtype, capability)
    if min(ranks) > LARGEST_RANK:
        raise NotImplementedError(f"rank {min(ranks)}: needs at most {LARGEST_RANK}")
    check_installed()


def thin(capability: int | None, ranks: Sequence[int]) -> int | None:
    """The compute capability that the kernels of thin products are compiled for; None where they serve no such ranks of
    layers that read one x."""
    return capability if len(ranks) <= SIDES and max(ranks, default=0) <= LARGEST_RANK else None


def summed(
    product: jax.Array, u: jax.Array, b: jax.Array, capability: int, *, start: int = 0,
    bias: jax.Array | None = None, add: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """product + u bᵀ + bias + add in float32, rounded once, to u's dtype: product (..., O) float32, b (O, R), bias (O,)
    of any dtype, add (..., O); of u (..., WIDTH) the R columns from `start` on."""
    from jaxft.kernels.linear import triton_kernels

    O, R = b.shape
    T = product.size // O
    tokens = fitting(T, TOKENS)
    return launch.triton_call(
        product, u, b, b if bias is None else bias, b if add is None else add, kernel=triton_kernels.summed,
        out_shape=jax.ShapeDtypeStruct(product.shape, u.dtype), grid=(-(-O // FEATURES), -(-T // tokens)),
        num_warps=WARPS, num_stages=1, compute_capability=capability, name="linear_summed", T=T, O=O, R=R,
        START=start, WIDTH=u.shape[-1], RP=padded(R), BT=tokens, BO=FEATURES, BIASED=bias is not None,
        ADDED=add is not None,
    )  # fmt: skip


class Thin(NamedTuple):
    """XᵀU over all tokens: x (..., K), and of u (..., WIDTH) the `rank` columns from `start` on; of one 16-bit dtype.
    across: the product lies as (R, K) instead of (K, R)."""

    x: jax.Array
    u: jax.Array
    start: int
    rank: int
    across: bool


def over_tokens(products: list[Thin], capability: int, tile: Tile | None = None) -> list[jax.Array]:
    """Each product, (K, R) or (R, K) float32, of arrays with the same tokens; ranks of at most `LARGEST_RANK`."""
    groups = [products[first : first + MOST] for first in range(0, len(products), MOST)]
    return [one for group in groups for one in _over_tokens(group, capability, tile)]


def _over_tokens(products: list[Thin], capability: int, tile: Tile | None) -> list[jax.Array]:
    from jaxft.kernels.linear import triton_kernels

    columns = [one.x.shape[-1] for one in products]
    T = products[0].x.size // columns[0]
    ranks = tuple(padded(one.rank) for one in products)
    tile = tile or Tile(64, 128 if max(ranks) <= 64 else 64, stages=2)
    tiles = tuple(itertools.accumulate((-(-k // tile.columns) for k in columns), initial=0))
    out = tuple(itertools.accumulate((k * one.rank for k, one in zip(columns, products, strict=True)), initial=0))
    chunk = max(1, -(-T * tiles[-1] // PROGRAMS // tile.tokens)) * tile.tokens
    chunks = -(-T // chunk)
    parts = launch.triton_call(
        *filled([one.x for one in products], MOST), *filled([one.u for one in products], MOST),
        kernel=triton_kernels.over_tokens, out_shape=jax.ShapeDtypeStruct((chunks, out[-1]), jnp.float32),
        grid=(tiles[-1], chunks), num_warps=tile.warps, num_stages=1, compute_capability=capability,
        name="linear_over_tokens", COUNT=len(products), T=T, K=tuple(columns), R=tuple(one.rank for one in products),
        START=tuple(one.start for one in products), WIDTH=tuple(one.u.shape[-1] for one in products),
        ACROSS=tuple(one.across for one in products), TILE=tiles, OUT=out, CHUNK=chunk, RP=ranks, BT=tile.tokens,
        BK=tile.columns, STAGES=tile.stages,
    )  # fmt: skip
    sums = jnp.split(jnp.sum(parts, axis=0), out[1:-1])
    shapes = [(one.rank, k) if one.across else (k, one.rank) for one, k in zip(products, columns, strict=True)]
    return [one.reshape(shape) for one, shape in zip(sums, shapes, strict=True)]


def side_by_side(
    xs: Sequence[jax.Array], bs: Sequence[jax.Array], capability: int, tile: Tile | None = None
) -> jax.Array:
    """[x_0 b_0 | x_1 b_1 | ...], (..., Σ R) in x's dtype, for at most `SIDES`: x_i (..., K_i) of the same tokens, b_i
    (K_i, R_i)."""
    from jaxft.kernels.linear import triton_kernels

    lead = xs[0].shape[:-1]
    T = math.prod(lead)
    R = tuple(b.shape[1] for b in bs)
    start = tuple(itertools.accumulate(R, initial=0))
    if tile is None:
        tile = FEW if T < MANY else MORE
        tile = tile if max(R) <= 32 else tile._replace(columns=64)
    g = launch.triton_call(
        *filled(xs, SIDES), *filled(bs, SIDES), kernel=triton_kernels.side_by_side,
        out_shape=jax.ShapeDtypeStruct((T, start[-1]), xs[0].dtype), grid=(-(-T // tile.tokens), len(xs)),
        num_warps=tile.warps, num_stages=1, compute_capability=capability, name="linear_side_by_side", COUNT=len(xs),
        T=T, K=tuple(x.shape[-1] for x in xs), R=R, START=start[:-1], WIDTH=start[-1],
        RP=tuple(map(padded, R)), BT=tile.tokens, BK=tile.columns, STAGES=tile.stages,
    )  # fmt: skip
    return g.reshape(*lead, start[-1])
