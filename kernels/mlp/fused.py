"""A gated MLP as one operation with its own backward, whole or one tile of tokens at a time.

    e = gate(x), v = up(x), h = act(e) · v, y = down(h)        each with its LoRA branch (`linear/fused.py`)
    dh = ∂down/∂h (dY),  de = dh · v · act′(e),  dv = dh · act(e),  dx = ∂gate/∂x (de) + ∂up/∂x (dv)

What stands between the large products is one Triton kernel each way where `triton.check` lets it, and one more sums
down's parts (`linear/triton.py`); else plain XLA. Under dropout gate's and up's parts are XLA's to add.
Kept for backward by `mlp`: x, e, v (without their low-rank parts where the kernels add them) and the R columns of the
low-rank inputs; h is computed again, in the same pass over e, v and dh that gives de and dv. Names for a
rematerialisation policy: "mlp_gate", "mlp_up" and "mlp_low_rank", the input of down's B, which costs R columns and
spares the backward pass the whole of h. `tiled_mlp` keeps only x and mlp_low_rank; a tile's e and v are computed again
in backward, and as nothing else reads them, the kernels write over them: three of the widest arrays instead of five or
six. Gradients of parameters are added up over the tiles in float32; those of weights are there before dx goes on.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels.gpu import one_device
from jaxft.kernels.kept import kept_product
from jaxft.kernels.linear import fused as linear
from jaxft.kernels.linear import reference
from jaxft.kernels.linear.fused import Keys, Wanted
from jaxft.kernels.linear.weights import Weights
from jaxft.kernels.mlp import triton
from jaxft.kernels.mlp.reference import ACTIVATIONS
from jaxft.kernels.mlp.triton import Kernels
from jaxft.quant import multiply, reads_codes

Layers = tuple[Weights, Weights, Weights]  # gate, up, down


def _product(e: jax.Array, v: jax.Array, activation: str) -> jax.Array:
    """act(e) · v in float32, rounded once."""
    return (ACTIVATIONS[activation](e.astype(jnp.float32)) * v.astype(jnp.float32)).astype(e.dtype)


def hidden(x: jax.Array, layers: tuple[Weights, Weights], activation: str) -> jax.Array:
    """h of gate and up alone, by plain XLA and without dropout."""
    e, v = linear.outputs(x, linear.low_rank_inputs(x, layers, 0.0, (None, None)), layers)
    return _product(e, v, activation)


def _inner(x, layers: Layers, rate: float, keys: Keys, kernels: Kernels | None):
    """e, v and the low-rank inputs of gate and up; e and v without their low-rank parts where kernels add them."""
    inner: tuple[Weights, ...] = layers[:2]
    u = linear.low_rank_inputs(x, inner, rate, keys[:2])
    if _hoisted(x, 1) and not reads_codes(x, [layer.weight for layer in inner]):
        inner = linear.dense_weights(inner, x.dtype)
    if _capability(kernels) is not None:
        e, v = (multiply(x, layer.weight) for layer in inner)
    else:
        e, v = linear.outputs(x, u, inner)
    return kept_product(e, "mlp_gate"), kept_product(v, "mlp_up"), u


def _outer(
    e, v, u, layers: Layers, activation: str, rate: float, keys: Keys, kernels: Kernels | None, add, in_place: bool
):
    """y and the low-rank input of down; in_place: e is not read again."""
    capability = _capability(kernels)
    of_down: jax.Array | None
    if capability is not None:
        h, of_down = triton.forward(
            e, v, u, _scaled(layers, e.dtype), _a(layers, e.dtype), activation, capability, in_place=in_place
        )
    else:
        h = triton.product(e, v, activation, kernels.capability, in_place) if kernels else _product(e, v, activation)
        of_down = linear.low_rank_inputs(h, layers[2:], rate, keys[2:])
    return linear.outputs(h, of_down, layers[2:], add, kernels and kernels.capability)[0], of_down


def _named(u: jax.Array | None) -> jax.Array | None:
    """Down's low-rank input under its name: R columns that spare backward the whole of h."""
    return None if u is None else checkpoint_name(u, "mlp_low_rank")


def _scaled(layers: Layers, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """s B of gate and up."""
    return linear.scaled_b(layers[0], dtype), linear.scaled_b(layers[1], dtype)


def _a(layers: Layers, dtype: jnp.dtype) -> jax.Array:
    """A of down."""
    return linear.rounded_a(layers[2], dtype)


def _capability(kernels: Kernels | None) -> int | None:
    """That the kernels are compiled for which take LoRA's branches in; None where none do."""
    return kernels.capability if kernels and kernels.low_rank else None


def _adds(kernels: Kernels | None, wanted: Wanted) -> bool:
    """Whether the backward kernel adds the low-rank parts itself. It gives no h, which a trained weight's gradient
    reads."""
    return kernels is not None and kernels.low_rank and not any(want.weight for want in wanted.layers)


def _through_down(dy, layers: Layers, wanted: Wanted, rate: float, keys: Keys, kernels: Kernels | None):
    """Down's low-rank gradient, and dh, without its low-rank part where the kernel adds that."""
    g = linear.low_rank_gradient((dy,), layers[2:], _capability(kernels))
    if _adds(kernels, wanted):
        return g, linear.times(dy, layers[2].weight)
    return g, linear.input_gradient(g, (dy,), layers[2:], rate, keys[2:])


def _gradients(
    x, e, v, u, of_down, dy, back, layers: Layers, wanted: Wanted, activation: str, rate: float, keys: Keys,
    kernels: Kernels | None, in_place: bool, weight_dtype=None,
):  # fmt: skip
    """dx or None, and the gradients of gate, up and down as `linear.fused.gradients` returns them; u, of_down: the
    low-rank inputs; back: what `_through_down` gives; in_place: e and v are not read again."""
    inner_wanted, down_wanted = Wanted(wanted.x, wanted.layers[:2]), Wanted(False, wanted.layers[2:])
    g, dh = back
    capability = _capability(kernels)
    if capability is not None and _adds(kernels, wanted):
        de, dv, *of_b, of_a = triton.backward(
            e, v, dh, u, g, _scaled(layers, e.dtype), _a(layers, e.dtype), activation, capability, in_place=in_place
        )
        _, down_grads = linear.gradients(
            None, of_down, (dy,), layers[2:], down_wanted, rate, keys[2:], g=g, known=((None, of_a),),
            capability=capability,
        )  # fmt: skip
        dx, inner_grads = linear.gradients(
            x, u, (de, dv), layers[:2], inner_wanted, rate, keys[:2], known=tuple((one, None) for one in of_b),
            capability=capability,
        )  # fmt: skip
        return dx, inner_grads + down_grads
    if capability is not None:
        e, v = (
            product + reference.matmul(low, linear.scaled_b(layer, product.dtype))  # type: ignore[arg-type]  # all have LoRA
            for product, low, layer in zip((e, v), linear.split_ranks(u, layers[:2]), layers[:2], strict=True)
        )
    if kernels:
        de, dv, h = triton.product_backward(e, v, dh, activation, kernels.capability, in_place)
    else:
        h = _product(e, v, activation)
        _, pull = jax.vjp(
            lambda e, v: ACTIVATIONS[activation](e) * v, e.astype(jnp.float32), v.astype(jnp.float32)
        )  # the derivative of an elementwise function: float32 in registers, one pass
        de, dv = (d.astype(e.dtype) for d in pull(dh.astype(jnp.float32)))
    _, down_grads = linear.gradients(
        h, of_down, (dy,), layers[2:], down_wanted, rate, keys[2:], weight_dtype=weight_dtype, g=g,
        capability=capability,
    )  # fmt: skip
    dx, inner_grads = linear.gradients(
        x, u, (de, dv), layers[:2], inner_wanted, rate, keys[:2], weight_dtype=weight_dtype, capability=capability
    )
    if any(want.weight for want in wanted.layers):
        # else XLA puts them off to the end of the layer, and h, de and dv are there during attention's backward pass
        return jax.lax.optimization_barrier((dx, inner_grads + down_grads))
    return dx, inner_grads + down_grads


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 6))
def mlp(
    x: jax.Array, layers: Layers, activation: str, rate: float, keys: Keys, add: jax.Array | None,
    kernels: Kernels | None,
) -> jax.Array:  # fmt: skip
    """As `reference.mlp` + add; keys one a layer (None switches dropout off). kernels: None takes plain XLA."""
    e, v, u = _inner(x, layers, rate, keys, kernels)
    return _outer(e, v, u, layers, activation, rate, keys, kernels, add, False)[0]


def _mlp_forward(x, layers, activation, rate, keys, add, kernels):
    wanted = linear.perturbed(x, layers)
    x, layers, keys, add = linear.values((x, layers, keys, add))
    e, v, u = _inner(x, layers, rate, keys, kernels)
    y, of_down = _outer(e, v, u, layers, activation, rate, keys, kernels, add, False)
    return y, (x, e, v, u, _named(of_down), layers, keys, wanted, add is not None)


def _mlp_backward(activation, rate, kernels, kept, dy):
    x, e, v, u, of_down, layers, keys, wanted, added = kept
    dy = linear.cotangents(dy)
    back = _through_down(dy, layers, wanted, rate, keys, kernels)
    dx, grads = _gradients(x, e, v, u, of_down, dy, back, layers, wanted, activation, rate, keys, kernels, False)
    return dx, linear.in_dtypes(grads, layers), (None,) * len(keys), dy if added else None


mlp.defvjp(_mlp_forward, _mlp_backward, symbolic_zeros=True)


def cut(x: jax.Array, tiles: int) -> jax.Array:
    """(..., T, D) to (tiles, ..., t, D); the last tile is padded with zeros.

    On one device all tokens count as one row, so that no data moves; on a mesh only T is cut, because the other
    dimensions are split over devices.
    """
    if one_device():
        x = x.reshape(-1, x.shape[-1])
    T = x.shape[-2]
    t = -(-T // tiles)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, t * tiles - T), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], tiles, t, x.shape[-1]), -3, 0)


def join(parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `cut` took apart, as `shape` (..., T, D)."""
    rows = jnp.moveaxis(parts, 0, -3)
    rows = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    T = shape[-2] if rows.ndim == len(shape) else math.prod(shape[:-1])
    return rows[..., :T, :].reshape(shape)


def _hoisted(x: jax.Array, tiles: int) -> bool:
    """Whether dense copies of quantised weights are there together, made once for all tiles: where they are smaller
    than what stands between the products of one tile, 3 D F numbers against about 6 t F."""
    return 2 * math.prod(x.shape[:-1]) >= tiles * x.shape[-1]


def tile_keys(keys: Keys, index: jax.Array) -> Keys:
    return tuple(None if key is None else jax.random.fold_in(key, index) for key in keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 6, 7))
def tiled_mlp(
    x: jax.Array,
    layers: Layers,
    activation: str,
    rate: float,
    keys: Keys,
    add: jax.Array | None,
    kernels: Kernels | None,
    tiles: int,
) -> jax.Array:
    """As `mlp`, in `tiles` parts of the tokens; with several, dropout's masks differ from those of `mlp`."""
    return _tiles(x, layers, activation, rate, keys, add, kernels, tiles)[0]


def _tiles(x, layers, activation, rate, keys, add, kernels, tiles):
    """y, and each tile's low-rank input of down."""
    if tiles == 1:
        e, v, u = _inner(x, layers, rate, keys, kernels)
        return _outer(e, v, u, layers, activation, rate, keys, kernels, add, True)
    if _hoisted(x, tiles):
        layers = linear.dense_weights(layers, x.dtype)

    def one(_, inputs):
        part, part_add, index = inputs
        own = tile_keys(keys, index)
        e, v, u = _inner(part, layers, rate, own, kernels)
        return None, _outer(e, v, u, layers, activation, rate, own, kernels, part_add, True)

    adds = None if add is None else cut(add, tiles)
    _, (parts, of_down) = jax.lax.scan(one, None, (cut(x, tiles), adds, jnp.arange(tiles)))
    return join(parts, x.shape), of_down


def _tiled_forward(x, layers, activation, rate, keys, add, kernels, tiles):
    wanted = linear.perturbed(x, layers)
    x, layers, keys, add = linear.values((x, layers, keys, add))
    y, of_down = _tiles(x, layers, activation, rate, keys, add, kernels, tiles)
    return y, (x, _named(of_down), layers, keys, wanted, add is not None)


def _tiled_backward(activation, rate, kernels, tiles, kept, dy):
    x, of_down, layers, keys, wanted, added = kept
    dy = linear.cotangents(dy)

    def gradients(x, dy, back, of_down, own, weight_dtype=None):
        e, v, u = _inner(x, layers, rate, own, kernels)
        return _gradients(
            x, e, v, u, of_down, dy, back, layers, wanted, activation, rate, own, kernels, True, weight_dtype
        )  # fmt: skip

    def one(total, inputs):
        part, d_part, of_down, index = inputs
        own = tile_keys(keys, index)
        back = _through_down(d_part, layers, wanted, rate, own, kernels)
        dx, grads = gradients(part, d_part, back, of_down, own, jnp.float32)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), dx

    if tiles == 1:
        back = _through_down(dy, layers, wanted, rate, keys, kernels)
        if _hoisted(x, tiles):  # gate and up are read twice, and are dense when down's dense array is gone
            layers = (*linear.dense_weights(layers[:2], x.dtype, after=back[1]), layers[2])
        dx, grads = gradients(x, dy, back, of_down, keys)
    else:
        if _hoisted(x, tiles):
            layers = linear.dense_weights(layers, x.dtype, after=dy)
        inputs = (cut(x, tiles), cut(dy, tiles), of_down, jnp.arange(tiles))
        grads, parts = jax.lax.scan(one, linear.no_gradients(layers, wanted), inputs)
        dx = None if parts is None else join(parts, x.shape)
    return dx, linear.in_dtypes(grads, layers), (None,) * len(keys), dy if added else None


tiled_mlp.defvjp(_tiled_forward, _tiled_backward, symbolic_zeros=True)
