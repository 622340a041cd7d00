"""Packed causal attention by our own Triton kernels, sm_80 and later: what they serve, tile sizes, launches, gradient.

The kernels, their formula and their tile layout are in `triton_kernels.py`. Triton and jax-triton are imported when a
kernel is launched and not before: importing jax-triton clears TRITON_CACHE_DIR.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels import launch
from jaxft.kernels.gpu import CARDS, check_installed


@dataclass(frozen=True)
class Tile:
    """BQ queries by BK keys, and how Triton compiles the kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    queries_backward: Tile
    keys_backward: Tile


# By card and head size padded to a power of two, for 16-bit inputs. Shared memory a block: Hopper and data-centre
# Blackwell 227 KB, A100 163 KB, consumer cards (also A10, L4, L40S; compute capability 8.6, 8.9, 12.x) 99 KB. Blackwell
# has besides only 512 columns of tensor memory for the accumulators.
TILES = {
    ("hopper", 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    ("hopper", 128): Tiles(Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("hopper", 256): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    ("blackwell", 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    ("blackwell", 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    ("blackwell", 256): Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
    ("a100", 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    ("a100", 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    ("a100", 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    ("consumer", 64): Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("consumer", 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    ("consumer", 256): Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
# float32 inputs, for tests and parity runs: small tiles that fit every card
FLOAT32_TILES = {
    64: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
# Tokens of a document, on average, below which the tiles of TILES win over cuDNN's kernels, where `mosaic` does not
# serve; what is not here was not measured. H200, heads of 128, rows of 2,048: 5 documents cuDNN 1.55 ms, Triton 1.70;
# 7: 1.39 and 1.23
SHORT = {("hopper", 128): 350}
SMALLEST_CAPABILITY = 80


def tiles(capability: int, head_size: int, dtype: jnp.dtype) -> Tiles:
    """The tile sizes for a compute capability such as 89; one that is not known takes those of the smallest cards."""
    card, padded = _kind(capability, head_size)
    return FLOAT32_TILES[padded] if dtype == jnp.float32 else TILES[card, padded]


def short_documents(capability: int, head_size: int) -> int:
    """`SHORT` of a compute capability; 0 where cuDNN is not known to lose."""
    return SHORT.get(_kind(capability, head_size), 0)


def _kind(capability: int, head_size: int) -> tuple[str, int]:
    """What the tables go by."""
    return CARDS.get(capability, "consumer"), max(64, 1 << (head_size - 1).bit_length())


def check(q: jax.Array, *, scale: float, last_key: jax.Array | None, capability: int) -> None:
    """Raises NotImplementedError with the reason where these kernels cannot serve."""
    H = q.shape[3]
    if not 16 <= H <= 256:
        raise NotImplementedError(f"head size {H}: needs 16 to 256")
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {q.dtype}: needs bfloat16, float16 or float32")
    if last_key is not None:
        raise NotImplementedError("last_key: the kernels end every range at its query")
    if scale <= 0:
        raise NotImplementedError(f"scale {scale}: needs a positive one")
    if capability < SMALLEST_CAPABILITY:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 8.0 (tensor cores through Triton)")
    check_installed()


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    capability: int,
    sizes: Tiles | None = None,
) -> jax.Array:
    """`attention` of this folder with last_key None, as `check` allows it; capability picks tile sizes and PTX.

    `sizes` replaces the table's tiles, for measurements. out and lse are named attention_out and attention_lse: under
    `save_only_these_names` of both, the backward pass does not run the forward kernel again.
    """
    sizes = tiles(capability, q.shape[3], q.dtype) if sizes is None else sizes
    return _attention(q, k, v, first_key, scale, softcap, capability, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attention(q, k, v, first_key, scale, softcap, capability, sizes):
    return run_forward(q, k, v, first_key, scale, softcap, capability, sizes)[0]


def _attention_fwd(q, k, v, first_key, scale, softcap, capability, sizes):
    out, lse = run_forward(q, k, v, first_key, scale, softcap, capability, sizes)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, first_key, out, lse)


def _attention_bwd(scale, softcap, capability, sizes, kept, dout):
    q, k, v, first_key, out, lse = kept
    return *run_backward(q, k, v, first_key, out, lse, dout, scale, softcap, capability, sizes), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def run_forward(q, k, v, first_key, scale, softcap, capability, sizes):
    """out (B, T, N, H) and the base-2 log-sum-exp (B, N, T) float32."""
    from jaxft.kernels.attention import triton_kernels

    B, T, N, _ = q.shape
    tile = sizes.forward
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    lse = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    return _launch(
        triton_kernels.forward, (q, k, v, first_key), (out, lse), (N, -(-T // tile.queries), B), tile, capability,
        scale, softcap,
    )  # fmt: skip


def run_backward(q, k, v, first_key, out, lse, dout, scale, softcap, capability, sizes):
    """The gradients of q, k and v."""
    dq, delta = run_queries_backward(q, k, v, first_key, out, lse, dout, scale, softcap, capability, sizes)
    return dq, *run_keys_backward(q, k, v, first_key, lse, dout, delta, scale, softcap, capability, sizes)


def run_queries_backward(q, k, v, first_key, out, lse, dout, scale, softcap, capability, sizes):
    """The gradient of q and delta = Σ_h dout · out (B, N, T) float32."""
    from jaxft.kernels.attention import triton_kernels

    B, T, N, _ = q.shape
    tile = sizes.queries_backward
    return _launch(
        triton_kernels.queries_backward, (q, k, v, first_key, out, lse, dout),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        (N, -(-T // tile.queries), B), tile, capability, scale, softcap,
    )  # fmt: skip


def run_keys_backward(q, k, v, first_key, lse, dout, delta, scale, softcap, capability, sizes):
    """The gradients of k and v."""
    from jaxft.kernels.attention import triton_kernels

    B, T, K, _ = k.shape
    tile = sizes.keys_backward
    return _launch(
        triton_kernels.keys_backward, (q, k, v, first_key, lse, dout, delta, *reach(first_key, tile.keys)),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (K, -(-T // tile.keys), B), tile, capability, scale, softcap,
    )  # fmt: skip


def reach(first_key: jax.Array, keys: int) -> tuple[jax.Array, jax.Array]:
    """For each tile of `keys` keys that starts at k0: up to which query its keys are seen, (B, tiles) int32 twice.

    The first is the first query at or behind k0 that does not see key k0 (T where all do), the second one past the
    last query that sees any key of the tile.
    """
    T = first_key.shape[1]
    t = jnp.arange(T, dtype=jnp.int32)[None, None, :]
    start = jnp.arange(0, T, keys, dtype=jnp.int32)[None, :, None]
    first = first_key[:, None, :]
    full_end = jnp.min(jnp.where((t >= start) & (first > start), t, T), axis=-1)
    last_end = jnp.max(jnp.where(first < start + keys, t + 1, 0), axis=-1)
    return full_end, last_end


def _launch(kernel, arrays, out_shape, grid, tile, capability, scale, softcap):

    q, k = arrays[:2]
    T, N, H = q.shape[1:]
    return launch.triton_call(
        *arrays, kernel=kernel, out_shape=out_shape, grid=grid, num_warps=tile.warps, num_stages=tile.stages,
        compute_capability=capability, name=f"attention_{kernel.fn.__name__}",
        scale=float(scale), softcap=None if softcap is None else float(softcap), T=T, N=N, K=k.shape[2], H=H,
        HP=max(16, 1 << (H - 1).bit_length()), BQ=tile.queries, BK=tile.keys,
        EDGE=T % max(tile.queries, tile.keys) != 0,
        # three TF32 products instead of one: float32 means float32
        PRECISION="tf32x3" if q.dtype == jnp.float32 else "tf32",
    )  # fmt: skip
