"""Cross entropy of a linear head over a vocabulary, without the logits of all tokens in memory at once."""

from typing import Literal, overload

import jax
import jax.numpy as jnp

from jaxft.kernels.gpu import serving
from jaxft.kernels.linear_cross_entropy import reference, tiled, triton

TILE = 4096  # most rows a tile
TILE_BYTES = 300 << 20  # most bytes of a tile's float32 logits: 512 rows of the largest vocabulary of Qwen
ENOUGH = 256  # rows, of which products with the head are nearly as fast as of twice as many
ROWS = 128  # a tile that has more rows than this has a multiple of it, as matrix units like it


@overload
def linear_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, softcap: float | None = None,
    tile: int | None = None, implementation: str | None = None, return_logits: Literal[False] = False,
) -> jax.Array: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, softcap: float | None = None,
    tile: int | None = None, implementation: str | None = None, return_logits: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip
def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None = None,
    tile: int | None = None,
    implementation: str | None = None,
    return_logits: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Σ_m weights[m] · (logsumexp_v z[m, v] − z[m, targets[m]]) with z = cap(hidden headᵀ).

    hidden: (M, D); head: (V, D); targets: (M,) int in [0, V); weights: (M,) float32, rows of weight 0 count nothing
    and cost nothing. Logits, softmax and the sum are float32; returns a float32 scalar, or with return_logits that and
    z (M, V) float32, which the default then computes by "reference". tile: rows whose logits exist at a time, on each
    device; None chooses by `tile_rows`. implementation: "triton", "tiled", which is the same by XLA alone, or
    "reference"; None: the first that serves. All differentiate with respect to hidden and head (the first two in
    reverse mode only). Raises ValueError on shapes that do not fit and names that are unknown, NotImplementedError
    where the implementation that was asked for cannot serve: the first two never have all logits.
    """
    M, D = hidden.shape
    if head.shape[1:] != (D,) or targets.shape != (M,) or weights.shape != (M,):
        raise ValueError(
            f"hidden has shape {hidden.shape}, head {head.shape}, targets {targets.shape}, weights {weights.shape}; "
            "need (M, D), (V, D), (M,), (M,)"
        )
    if implementation not in (None, "triton", "tiled", "reference"):
        raise ValueError(f"implementation {implementation!r}: must be 'triton', 'tiled' or 'reference'")
    weights = weights.astype(jnp.float32)
    if return_logits and implementation in ("triton", "tiled"):
        raise NotImplementedError(
            f"return_logits: {implementation} never holds all logits; leave the implementation to be chosen"
        )
    if return_logits or implementation == "reference":
        scores = reference.logits(hidden, head, softcap)
        total = reference.cross_entropy(scores, targets, weights)
        return (total, scores) if return_logits else total
    groups = _row_groups(M)
    tile = tile or tile_rows(M // groups, head.shape[0])
    capability = None
    if implementation != "tiled":
        capability = serving("linear_cross_entropy", triton.check, implementation)
    return tiled.linear_cross_entropy(hidden, head, targets, weights, softcap, tile, groups, capability)


def logits(hidden: jax.Array, head: jax.Array, *, softcap: float | None = None) -> jax.Array:
    """cap(hidden headᵀ): hidden (..., D), head (V, D), result (..., V) float32."""
    return reference.logits(hidden, head, softcap)


def tile_rows(M: int, V: int) -> int:
    """Rows a tile: an eighth of all where that is enough for matrix units, no more than `TILE` and `TILE_BYTES` allow,
    and of those sizes the one with the fewest rows of padding behind the last.

    tile_rows(16384, 151936) == 512; tile_rows(2048, 151936) == 256, so that few tokens need little memory.
    """
    most = max(1, min(TILE, TILE_BYTES // (4 * V), max(ENOUGH, -(-M // 8 // ROWS) * ROWS), M))
    if most > ROWS:
        most -= most % ROWS
    if most < ENOUGH:
        return -(-M // -(-M // most))
    return min(range(ENOUGH, most + 1, ROWS), key=lambda size: (-(-M // size) * size, -size))


def _row_groups(M: int) -> int:
    """Over how many devices the rows are split, by the mesh of `jax.set_mesh`; 1 where they cannot be split evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    groups = 1 if mesh.empty else mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    return groups if M % groups == 0 else 1
