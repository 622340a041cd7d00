"""A gated MLP as one operation with its own backward, whole or one tile of tokens at a time.

    e = gate(x), v = up(x), h = act(e) · v, y = down(h)        each with its LoRA branch (`linear/fused.py`)
    dh = ∂down/∂h (dY),  de = dh · v · act′(e),  dv = dh · act(e),  dx = ∂gate/∂x (de) + ∂up/∂x (dv)

Kept for backward: x, e, v and the R columns of the low-rank inputs; h is computed again, in the same pass over e, v
and dh that gives de and dv. e and v carry the names "mlp_gate" and "mlp_up", so that a rematerialisation policy can
keep them or not. Tiled: only x is kept, and a tile's e and v are computed again in backward; gradients of parameters
are added up over the tiles in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels.linear import fused as linear
from jaxft.kernels.linear.fused import Keys, Wanted
from jaxft.kernels.linear.weights import Weights
from jaxft.kernels.mlp.reference import ACTIVATIONS
from jaxft.quant import dense, is_quantized

Layers = tuple[Weights, Weights, Weights]  # gate, up, down


def _product(e: jax.Array, v: jax.Array, activation: str) -> jax.Array:
    """act(e) · v in float32, rounded once."""
    return (ACTIVATIONS[activation](e.astype(jnp.float32)) * v.astype(jnp.float32)).astype(e.dtype)


def _inner(x, layers: Layers, rate: float, keys: Keys):
    """e, v and the low-rank inputs of gate and up."""
    lows = linear.low_rank_inputs(x, layers[:2], rate, keys[:2])
    e, v = linear.outputs(x, lows, layers[:2])
    return checkpoint_name(e, "mlp_gate"), checkpoint_name(v, "mlp_up"), lows


def _outer(e, v, layers: Layers, activation: str, rate: float, keys: Keys):
    """y and the low-rank input of down."""
    h = _product(e, v, activation)
    lows = linear.low_rank_inputs(h, layers[2:], rate, keys[2:])
    return linear.outputs(h, lows, layers[2:])[0], lows


def _gradients(
    x, e, v, lows, dy, layers: Layers, wanted: Wanted, activation: str, rate: float, keys: Keys, weight_dtype=None
):
    """dx or None, and the gradients of gate, up and down as `linear.fused.gradients` returns them."""
    h = _product(e, v, activation)
    down_wanted, inner_wanted = Wanted(True, wanted.layers[2:]), Wanted(wanted.x, wanted.layers[:2])
    dh, down_grads = linear.gradients(h, lows[2:], (dy,), layers[2:], down_wanted, rate, keys[2:], weight_dtype)
    assert dh is not None  # it was asked for
    _, pull = jax.vjp(
        lambda e, v: ACTIVATIONS[activation](e) * v, e.astype(jnp.float32), v.astype(jnp.float32)
    )  # the derivative of an elementwise function: float32 in registers, one pass
    de, dv = (d.astype(e.dtype) for d in pull(dh.astype(jnp.float32)))
    dx, inner_grads = linear.gradients(x, lows[:2], (de, dv), layers[:2], inner_wanted, rate, keys[:2], weight_dtype)
    return dx, inner_grads + down_grads


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def mlp(x: jax.Array, layers: Layers, activation: str, rate: float, keys: Keys) -> jax.Array:
    """As `reference.mlp`; keys one a layer (None switches dropout off)."""
    e, v, _ = _inner(x, layers, rate, keys)
    return _outer(e, v, layers, activation, rate, keys)[0]


def _mlp_forward(x, layers, activation, rate, keys):
    wanted, x, layers, keys = linear.perturbed(x, layers), x.value, linear.values(layers), linear.values(keys)
    e, v, inner_lows = _inner(x, layers, rate, keys)
    y, outer_lows = _outer(e, v, layers, activation, rate, keys)
    return y, (x, e, v, inner_lows + outer_lows, layers, keys, wanted)


def _mlp_backward(activation, rate, kept, dy):
    x, e, v, lows, layers, keys, wanted = kept
    dx, grads = _gradients(x, e, v, lows, linear.cotangents(dy), layers, wanted, activation, rate, keys)
    return dx, linear.in_dtypes(grads, layers), (None,) * len(keys)


mlp.defvjp(_mlp_forward, _mlp_backward, symbolic_zeros=True)


def _cut(x: jax.Array, tiles: int) -> jax.Array:
    """(..., T, D) to (tiles, ..., t, D); the last tile is padded with zeros.

    On one device all tokens count as one row, so that no data moves; on a mesh only T is cut, because the other
    dimensions are split over devices.
    """
    if _one_device():
        x = x.reshape(-1, x.shape[-1])
    T = x.shape[-2]
    t = -(-T // tiles)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, t * tiles - T), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], tiles, t, x.shape[-1]), -3, 0)


def _join(parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `_cut` took apart, as `shape` (..., T, D)."""
    rows = jnp.moveaxis(parts, 0, -3)
    rows = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    T = shape[-2] if rows.ndim == len(shape) else math.prod(shape[:-1])
    return rows[..., :T, :].reshape(shape)


def _one_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _dense(layers: Layers, dtype: jnp.dtype, after: jax.Array | None = None) -> Layers:
    """The layers with quantised weights made dense, once for all tiles; a plain weight stays as it is."""
    gate, up, down = (
        layer._replace(weight=dense(layer.weight, dtype, after=after)) if is_quantized(layer.weight) else layer
        for layer in layers
    )
    return gate, up, down


def _tile_keys(keys: Keys, index: jax.Array) -> Keys:
    return tuple(None if key is None else jax.random.fold_in(key, index) for key in keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 5))
def tiled_mlp(x: jax.Array, layers: Layers, activation: str, rate: float, keys: Keys, tiles: int) -> jax.Array:
    """As `mlp`, in `tiles` parts of the tokens; dropout's masks differ from those of `mlp`."""
    layers = _dense(layers, x.dtype)

    def one(_, inputs):
        part, index = inputs
        own = _tile_keys(keys, index)
        e, v, _ = _inner(part, layers, rate, own)
        return None, _outer(e, v, layers, activation, rate, own)[0]

    _, parts = jax.lax.scan(one, None, (_cut(x, tiles), jnp.arange(tiles)))
    return _join(parts, x.shape)


def _tiled_forward(x, layers, activation, rate, keys, tiles):
    wanted, x, layers, keys = linear.perturbed(x, layers), x.value, linear.values(layers), linear.values(keys)
    return tiled_mlp(x, layers, activation, rate, keys, tiles), (x, layers, keys, wanted)


def _tiled_backward(activation, rate, tiles, kept, dy):
    x, layers, keys, wanted = kept
    dy = linear.cotangents(dy)
    layers = _dense(layers, x.dtype, after=dy)

    def one(total, inputs):
        part, d_part, index = inputs
        own = _tile_keys(keys, index)
        e, v, lows = _inner(part, layers, rate, own)
        h = _product(e, v, activation)
        lows = lows + linear.low_rank_inputs(h, layers[2:], rate, own[2:])
        dx, grads = _gradients(part, e, v, lows, d_part, layers, wanted, activation, rate, own, jnp.float32)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), dx

    inputs = (_cut(x, tiles), _cut(dy, tiles), jnp.arange(tiles))
    grads, parts = jax.lax.scan(one, linear.no_gradients(layers, wanted), inputs)
    dx = None if parts is None else _join(parts, x.shape)
    return dx, linear.in_dtypes(grads, layers), (None,) * len(keys)


tiled_mlp.defvjp(_tiled_forward, _tiled_backward, symbolic_zeros=True)
