"""The gated MLP's passes between its large products by our own Triton kernels: what they serve, tile sizes, launches.

The kernels and their formulas are in `triton_kernels.py`. Triton and jax-triton are imported when a kernel is launched
and not before.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.kernels import launch
from jaxft.kernels.gpu import CARDS, check_16_bits, check_installed
from jaxft.kernels.launch import padded
from jaxft.kernels.linear.weights import Weights


@dataclass(frozen=True)
class Tile:
    """BT tokens by BF features, and how Triton compiles the kernel."""

    tokens: int
    features: int
    warps: int
    stages: int


# (forward, backward) by card and the largest rank, padded to a power of two: what fits shared memory (99 KB on consumer
# cards, A10, L4 and L40S, 163 KB on an A100, 227 KB on Hopper and data-centre Blackwell) and spills no more than a few
# registers. Hopper's of rank 16 are the fastest of a sweep on a card; the others are so far only compiled.
TILES = {
    ("large", 16): (Tile(64, 128, 4, 3), Tile(64, 64, 4, 3)),
    ("large", 32): (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
    ("large", 64): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("large", 128): (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    ("small", 16): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("small", 32): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("small", 64): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    ("small", 128): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
}
PROGRAMS = 1024  # of the forward kernel: enough to fill a card and to even out its last wave
ENOUGH = 256  # tiles of tokens fill it without cutting the features
CHUNKS = 8, 16  # parts of the tokens whose gradients of the low-rank matrices are summed apart: of few and of many
MANY = 16384  # tokens
NUMBERS = 1024  # a program of the kernels without low-rank parts holds
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
LARGEST_RANK = 128


class Kernels(NamedTuple):
    """Which kernels serve a call: compiled for a compute capability such as 90, with or without LoRA's branches."""

    capability: int
    low_rank: bool


def check(dtype: jnp.dtype, activation: str, capability: int) -> None:
    """Raises NotImplementedError with the reason where no kernel can serve."""
    check_16_bits(dtype, capability)
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"activation {activation}: needs {' or '.join(ACTIVATIONS)}")
    check_installed()


def low_rank(layers: tuple[Weights, ...], dropped: bool) -> bool:
    """Whether the kernels can take LoRA's branches in: LoRA alone on all three, of no large rank, and no masks."""
    loras = [layer.lora for layer in layers if layer.bias is None and layer.lora is not None]
    return len(loras) == len(layers) and not dropped and all(lora[0].shape[0] <= LARGEST_RANK for lora in loras)


def tiles(capability: int, ranks: tuple[int, int, int]) -> tuple[Tile, Tile]:
    """The tile sizes of forward and backward for a compute capability such as 89; an unknown one takes small ones."""
    size = "large" if CARDS.get(capability) in ("hopper", "blackwell") else "small"
    return TILES[size, max(map(padded, ranks))]


def constants(e: jax.Array, ranks: tuple[int, int, int], activation: str, tile: Tile) -> dict[str, int | str]:
    """The compile-time arguments that both kernels take, in their order."""
    T, F = e.shape
    return dict(
        zip(("T", "F", "RE", "RV", "RD", "REP", "RVP", "RDP"), (T, F, *ranks, *map(padded, ranks)), strict=True),
        KIND=activation, BT=tile.tokens, BF=tile.features, STAGES=tile.stages,
    )  # fmt: skip


def forward(
    e: jax.Array, v: jax.Array, u: jax.Array, scaled: tuple[jax.Array, jax.Array], a: jax.Array,
    activation: str, capability: int, tile: Tile | None = None, programs: int | None = None, in_place: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """h (..., F) and down's low-rank input (..., R) in e's dtype.

    e, v: (..., F), the large products of gate and up; u: their low-rank inputs (..., RE + RV), side by side; scaled:
    their s B (F, R); a: down's A (R, F). All of one 16-bit dtype. programs: about how many the kernel is cut into; None
    goes by T. in_place: h takes the place of e, which XLA copies first where it is still read.
    """
    from jaxft.kernels.mlp import triton_kernels

    lead = e.shape[:-1]
    e, v, u = (x.reshape(-1, x.shape[-1]) for x in (e, v, u))
    ranks = (scaled[0].shape[1], scaled[1].shape[1], a.shape[0])
    tile = tile or tiles(capability, ranks)[0]
    T, F = e.shape
    rows = -(-T // tile.tokens)
    programs = programs or (rows if rows >= ENOUGH else PROGRAMS)
    chunk = -(-F * rows // (programs * tile.features)) * tile.features
    count = -(-F // chunk)
    h, parts = _launch(
        triton_kernels.forward, (e, v, u, *scaled, a),
        (jax.ShapeDtypeStruct(e.shape, e.dtype), jax.ShapeDtypeStruct((count, T, ranks[2]), jnp.float32)),
        (rows, count), tile, capability, constants(e, ranks, activation, tile) | {"CHUNK": chunk}, 1 * in_place,
    )  # fmt: skip
    return h.reshape(*lead, -1), jnp.sum(parts, axis=0).astype(e.dtype).reshape(*lead, -1)


def backward(
    e: jax.Array, v: jax.Array, dh: jax.Array, u: jax.Array, g: jax.Array, scaled: tuple[jax.Array, jax.Array],
    a: jax.Array, activation: str, capability: int, tile: Tile | None = None, chunks: int | None = None,
    in_place: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """de, dv (..., F) in e's dtype, and in float32 deᵀ u_e, dvᵀ u_v (F, R) and g_dᵀ h (R, F).

    As `forward`, with dh (..., F), the large product of down's backward, and g (..., R), its low-rank one. in_place: de
    and dv take the places of e and v.
    """
    from jaxft.kernels.mlp import triton_kernels

    shape = e.shape
    e, v, dh, u, g = (x.reshape(-1, x.shape[-1]) for x in (e, v, dh, u, g))
    T, F = e.shape
    ranks = (scaled[0].shape[1], scaled[1].shape[1], a.shape[0])
    tile = tile or tiles(capability, ranks)[1]
    chunks = chunks or CHUNKS[T >= MANY]
    chunk = -(-T // (chunks * tile.tokens)) * tile.tokens
    count = -(-T // chunk)
    full, sums = jax.ShapeDtypeStruct(e.shape, e.dtype), [(F, ranks[0]), (F, ranks[1]), (ranks[2], F)]
    de, dv, *parts = _launch(
        triton_kernels.backward, (e, v, dh, u, g, *scaled, a),
        (full, full, *(jax.ShapeDtypeStruct((count, *one), jnp.float32) for one in sums)),
        (-(-F // tile.features), count), tile, capability,
        constants(e, ranks, activation, tile) | {"CHUNK": chunk}, 2 * in_place,
    )  # fmt: skip
    d_be, d_bv, d_a = (jnp.sum(part, axis=0) for part in parts)
    return de.reshape(shape), dv.reshape(shape), d_be, d_bv, d_a


def product(e: jax.Array, v: jax.Array, activation: str, capability: int, in_place: bool = False) -> jax.Array:
    """h = act(e) · v in e's dtype, of any shape; in_place: in the place of e."""
    from jaxft.kernels.mlp import triton_kernels

    return _numbers(triton_kernels.product, (e, v), 1, activation, capability, 1 * in_place)[0]


def product_backward(
    e: jax.Array, v: jax.Array, dh: jax.Array, activation: str, capability: int, in_place: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """de, dv and h in e's dtype; in_place: in the places of e, v and dh."""
    from jaxft.kernels.mlp import triton_kernels

    de, dv, h = _numbers(triton_kernels.product_backward, (e, v, dh), 3, activation, capability, 3 * in_place)
    return de, dv, h


def _numbers(kernel, arrays, outputs, activation, capability, aliased):
    first = arrays[0]
    out_shape = (jax.ShapeDtypeStruct(first.shape, first.dtype),) * outputs
    grid, tile = (-(-first.size // NUMBERS),), Tile(NUMBERS, 1, 4, 1)
    constants = {"N": first.size, "KIND": activation, "BLOCK": NUMBERS}
    return _launch(kernel, arrays, out_shape, grid, tile, capability, constants, aliased)


def _launch(kernel, arrays, out_shape, grid, tile, capability, constants, aliased):
    """aliased: how many of the first outputs lie where the inputs of their number do."""
    return launch.triton_call(
        *arrays, kernel=kernel, out_shape=out_shape, grid=grid, num_warps=tile.warps, num_stages=tile.stages,
        input_output_aliases=tuple((n, n) for n in range(aliased)), compute_capability=capability,
        name=f"mlp_{kernel.fn.__name__}", **constants,
    )  # fmt: skip
