"""Packed causal attention on Hopper whose backward pass is our own, in Pallas' Mosaic GPU.

Its kernels are in `mosaic_kernels.py`. The forward pass is cuDNN's where a row is one document, but for few of them our
own, and where it is packed or has a window our own with masks or our Triton kernel's. Each leaves the log-sum-exp, in
base e where a row is one document, else in base 2, and the backward pass takes both.
cuDNN's own backward pass sums dq in float32 by atomics, so that it clears, converts and adds up over grouped heads in
passes of their own, in scratch memory that a plan does not see; Triton's waits for memory in the warps that compute.
Milliseconds a backward pass on an H200, jax 0.11.2, 32/8 heads: docs/log.md, "A backward pass of our own".
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels import launch
from jaxft.kernels.attention import cudnn, triton
from jaxft.kernels.attention.cudnn import Documents
from jaxft.kernels.gpu import check_16_bits, one_device

TILE = 128  # tokens that a program has for its own
PROGRAMS = 256  # fewer of them leave multiprocessors without work: then a group's heads are parted


@dataclass(frozen=True)
class Tile:
    """How many tokens a step reads of the others, keys or queries, and into how many slots they are fetched."""

    others: int
    stages: int


# by head size: programs up to which our forward pass is faster than cuDNN's, and its tile (H200, 32/8 heads, 1×2048:
# 109 us and 129; 8×2048: 714 and 615; heads of 64 were measured at 8×2048 alone, 510 and 444)
FEW = {128: (512, Tile(128, 2))}
# by head size, where rows are packed or have a window: the tile of our forward pass for documents of LONG tokens and
# more on average, and for shorter ones or where that is not known; None where Triton's is faster (H200, 8×2048, 32/8
# heads, documents of 1024, 512, 200 and 50 tokens; microseconds of Triton's, of tiles of 128, of 64. Heads of 128: 469,
# 402, 400; 291, 283, 264; 208, 290, 247; 161, 275, 218. Of 64: 363, 308, 311; 274, 224, 214; 288, 242, 211; 275, 225,
# 184. One of 1900 beside one of 148: 730, 594, 629 and 531, 451, 481)
PACKED = {64: (Tile(128, 2), Tile(64, 2)), 128: (Tile(128, 2), None)}
LONG = {64: 1024, 128: 400}
# tokens of a row that is one document, beyond which cuDNN's backward pass of five products is faster than ours of seven
# (both passes, ours to cuDNN's, 32/8 heads of 128: 2048 tokens 0.96, 4096 1.02, 8192 1.06, 32768 1.09; of 64: 2048
# 0.96, 8192 1.07)
LONGEST = 4096
# by head size: of the kernel of dq, of that of dk and dv
TILES = {64: (Tile(128, 2), Tile(64, 3)), 128: (Tile(64, 3), Tile(64, 2))}


def check(
    q: jax.Array, *, softcap: float | None, last_key: jax.Array | None, documents: Documents | None, scale: float,
    capability: int,
) -> None:  # fmt: skip
    """Raises NotImplementedError with the reason where the backward pass, or the forward pass before it, cannot serve.

    documents: None where a window hides keys that they do not."""
    if capability != 90:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 9.0")
    check_16_bits(q.dtype, capability)
    if not (0, 11, 2) <= jax.__version_info__[:3] < (0, 13):
        raise NotImplementedError(f"jax {jax.__version__}: needs 0.11.2 to 0.12")
    if not one_device():
        raise NotImplementedError("a mesh of several devices: the kernels have no rule to be split")
    if softcap is not None:
        raise NotImplementedError("softcap: the kernels have none")
    if scale <= 0:
        raise NotImplementedError(f"scale {scale}: needs a positive one")
    if q.shape[3] not in TILES:
        raise NotImplementedError(f"head size {q.shape[3]}: needs {' or '.join(map(str, TILES))}")
    if q.shape[1] % TILE:
        raise NotImplementedError(f"{q.shape[1]} tokens: needs a multiple of {TILE}")
    if last_key is not None:
        raise NotImplementedError("last_key: the kernels end every range at its query")
    if is_one_document(documents):
        cudnn.check(q, softcap=softcap, window=None, last_key=last_key, documents=documents, capability=capability)
    elif packed_tile(q, documents) is None:
        triton.check(q, scale=scale, last_key=last_key, capability=capability)


def is_one_document(documents: Documents | None) -> bool:
    """Whether a query sees all keys before it, so that nothing need be said of ranges."""
    return documents is not None and documents.lengths.shape[1] == 1


def packed_tile(q: jax.Array, documents: Documents | None) -> Tile | None:
    """The tile of our forward pass with masks, None where Triton's is taken."""
    _, T, _, H = q.shape
    long, short = PACKED[H]
    return short if documents is None or T // documents.lengths.shape[1] < LONG[H] else long


def most_alike(most: int, q: jax.Array) -> int | None:
    """The largest number of documents a row that has the tile of `most`; None where unknown ones have it, too."""
    _, T, _, H = q.shape
    return None if most > T // LONG[H] else T // LONG[H]


def is_slow(q: jax.Array, documents: Documents | None) -> bool:
    """Whether cuDNN's backward pass is faster, for scratch memory that a plan does not see."""
    return is_one_document(documents) and q.shape[1] > LONGEST


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, documents: Documents | None, *, scale: float,
    capability: int,
) -> jax.Array:  # fmt: skip
    """`attention` of this folder as `check` allows it; out and lse are named as the Triton kernels' are."""
    return _attention(q, k, v, first_key, documents, scale, capability)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, first_key, documents, scale, capability):
    return _run_forward(q, k, v, first_key, documents, scale, capability)[0]


def _run_forward(q, k, v, first_key, documents, scale, capability):
    if is_one_document(documents):
        B, T, N, H = q.shape
        programs, (most, tile) = B * N * (T // TILE), FEW.get(H, (0, None))
        if programs <= most:
            return run_forward(q, k, v, None, scale=scale, tile=tile)
        return cudnn.run_forward(q, k, v, documents, scale)
    tile = packed_tile(q, documents)
    if tile is not None:
        return run_forward(q, k, v, first_key, scale=scale, tile=tile)
    sizes = triton.tiles(capability, q.shape[3], q.dtype)
    return triton.run_forward(q, k, v, first_key, scale, None, capability, sizes)


def _attention_fwd(q, k, v, first_key, documents, scale, capability):
    out, lse = _run_forward(q, k, v, first_key, documents, scale, capability)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, first_key, documents, out, lse)


def _attention_bwd(scale, capability, kept, dout):
    q, k, v, first_key, documents, out, lse = kept
    ranges = None if is_one_document(documents) else first_key
    grads = run_backward(q, k, v, ranges, out, lse, dout, scale=scale)
    none = None if documents is None else Documents(None, None, None)  # type: ignore[arg-type]
    return *grads, None, none


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.jit, static_argnames=("scale", "tile", "interpret"))  # one trace a shape
def run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array | None, *, scale: float, tile: Tile, interpret=None
) -> tuple[jax.Array, jax.Array]:
    """out (B, T, N, H) and the log-sum-exp (B, N, T) float32, first_key and the base as `run_backward` takes them."""
    B, T, N, _ = q.shape
    like = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    ranges = None if first_key is None else (first_key, *walks(first_key, tile.others))
    return _launch("forward", (q, k, v, ranges), like, interpret, scale=scale, tile=tile)


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "heads", "interpret"))  # one trace a shape
def run_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array | None, out: jax.Array, lse: jax.Array,
    dout: jax.Array, *, scale: float, tiles: tuple[Tile, Tile] | None = None, heads: int | None = None, interpret=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradients of q, k and v. first_key: None where all keys before a query are seen. lse: (B, N, T) float32, to
    base e where first_key is None, else to base 2, as the forward passes of either leave it. tiles and heads replace
    what is chosen, for measurements and tests."""
    (B, T, N, H), K = q.shape, k.shape[2]
    of_queries, of_keys = TILES[H] if tiles is None else tiles
    heads = _heads(N // K, B * K * (T // TILE)) if heads is None else heads
    common = dict(scale=scale, base=math.e if first_key is None else 2.0)
    ranges = None if first_key is None else (first_key, *walks(first_key, of_queries.others))
    like = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    arrays = q, k, v, out, lse, dout, ranges
    dq, delta = _launch("queries_backward", arrays, like, interpret, tile=of_queries, **common)
    ranges = None if first_key is None else (first_key, *triton.reach(first_key, TILE))
    parts = N // K // heads
    like = (jax.ShapeDtypeStruct((B, T, K * parts, H), k.dtype if parts == 1 else jnp.float32),) * 2
    arrays = q, k, v, lse, dout, delta, ranges
    dk, dv = _launch("keys_backward", arrays, like, interpret, tile=of_keys, heads=heads, **common)
    if parts > 1:
        dk, dv = (one.reshape(B, T, K, parts, H).sum(3).astype(k.dtype) for one in (dk, dv))
    return dq, dk, dv


def _launch(name: str, arrays: tuple, like: Any, interpret: Any, **options: Any) -> Any:
    """A kernel of `mosaic_kernels`, called on a simulated GPU where `interpret` says so."""
    if interpret is not None:
        from jaxft.kernels.attention import mosaic_kernels

        return getattr(mosaic_kernels, name)(*arrays, interpret=interpret, **options)
    module = f"{__package__}.mosaic_kernels"
    return launch.mosaic_call(*arrays, module=module, name=name, reads=(__name__,), out_shape=like, **options)


def _heads(group: int, programs: int) -> int:
    """How many of a group's query heads a program goes through: all, or a divisor that leaves programs enough."""
    return next(
        (heads for heads in range(group, 1, -1) if group % heads == 0 and programs * group // heads >= PROGRAMS), 1
    )


def walks(first_key: jax.Array, keys: int) -> tuple[jax.Array, jax.Array]:
    """Of each tile of TILE queries: the first tile of `keys` keys that some query sees any of, and the first of which,
    and of those after it up to the query, all see all. (B, tiles) int32 twice."""
    tiles = first_key.reshape(len(first_key), -1, TILE)
    return jnp.min(tiles, axis=2) // keys, -(-jnp.max(tiles, axis=2) // keys)
