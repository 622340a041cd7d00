"""Linear layers that read one x, as one operation: fewer passes over x and dY, and no gradient nobody asked for.

    u_i = drop_i(x) A_iᵀ                        all A_i in one product: x is read once for all of them
    y_i = x W_iᵀ + u_i (s_i B_i)ᵀ + bias_i      the scale is folded into B: the sum can be the large product's own
    g_i = dY_i (s_i B_i)
    dB_i = s_i dY_iᵀ u_i     dA_i = g_iᵀ drop_i(x)     one product for all A_i
    dx  = Σ_i drop_i(g_i A_i) + Σ_i dY_i W_i    the low-rank parts in one product

Kept for backward: x, the u_i (R columns each), and the parameters as they came. Gradients of A, B, biases and the
scales are float32 sums over bfloat16 operands (a float32 operand would make the product a slow TF32 one); dW has the
weight's own dtype. Whatever is not differentiated gets no gradient: a frozen W costs no product. Dropout's masks are
drawn again from the key in backward. A quantised W is kept as it is held, has no gradient, and is made dense once for
each product that reads it.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxft.kernels.kept import kept_product
from jaxft.kernels.linear import reference, triton
from jaxft.kernels.linear.weights import Weights
from jaxft.quant import Weight, dense, is_quantized, multiply

Keys = tuple[jax.Array | None, ...]  # one dropout key a layer


class PerLeaf(NamedTuple):
    """Something about each leaf of a layer's `Weights`, in their structure: whether it is wanted, or its gradient."""

    weight: Any
    bias: Any
    lora: Any


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Which inputs are differentiated: x, and of each layer the leaves that are True; a quantised weight never is."""

    x: bool
    layers: tuple[PerLeaf, ...]


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None  # float32 means float32, not TF32


def times(dy: jax.Array, weight: Weight, after: jax.Array | None = None) -> jax.Array:
    """dY W for dY (..., O) and weight (O, I): (..., I) in dY's dtype, accumulated in float32.

    A quantised weight is made dense after dY, or after what is given, which must come of it.
    """
    contracted = (((dy.ndim - 1,), (0,)), ((), ()))
    matrix = dense(weight, dy.dtype, after=dy if after is None else after)
    return jax.lax.dot_general(dy, matrix, contracted, precision=_precision(dy.dtype))


def over_tokens(left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """leftᵀ right summed over all tokens: (..., O), (..., I) to (O, I) in `dtype`, accumulated in float32."""
    tokens = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(
        left, right, ((tokens, tokens), ((), ())), precision=_precision(left.dtype), preferred_element_type=dtype
    )


def rounded_a(layer: Weights, dtype: jnp.dtype) -> jax.Array:
    """A (R, I) of a layer with LoRA, in `dtype`."""
    assert layer.lora is not None
    return (layer.lora[0] if layer.rounded is None else layer.rounded[0]).astype(dtype)


def scaled_b(layer: Weights, dtype: jnp.dtype) -> jax.Array:
    """s B (O, R) of a layer with LoRA, in `dtype`: multiplied in float32, so that it is rounded once."""
    assert layer.lora is not None
    if layer.rounded is not None:
        return layer.rounded[1].astype(dtype)
    _, b, scale = layer.lora
    return reference.times_scale(b, scale).astype(dtype)


def _dropped(keys: Keys, rate: float) -> bool:
    return bool(rate) and any(key is not None for key in keys)


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    return x if key is None else reference.dropout(x, rate, key)


def _concatenated_a(layers: tuple[Weights, ...], dtype: jnp.dtype) -> jax.Array:
    present = [layer for layer in layers if layer.lora is not None]
    joint = present[0].joint
    if joint is not None and joint.shape[0] == sum(layer.lora[0].shape[0] for layer in present if layer.lora):
        return joint.astype(dtype)
    return jnp.concatenate([rounded_a(layer, dtype) for layer in present])


def split_ranks(array: jax.Array, layers: tuple[Weights, ...], axis: int) -> list[jax.Array | None]:
    """Cuts `array` along `axis` into one part a layer, R wide; None for a layer without LoRA."""
    parts: list[jax.Array | None] = []
    start = 0
    for layer in layers:
        rank = 0 if layer.lora is None else layer.lora[0].shape[0]
        parts.append(jax.lax.slice_in_dim(array, start, start + rank, axis=axis) if rank else None)
        start += rank
    return parts


def low_rank_inputs(x: jax.Array, layers: tuple[Weights, ...], rate: float, keys: Keys) -> list[jax.Array | None]:
    """u_i = drop_i(x) A_iᵀ, (..., R) in x's dtype each; None for a layer without LoRA."""
    if all(layer.lora is None for layer in layers):
        return [None] * len(layers)
    if _dropped(keys, rate):  # each layer has its own mask
        return [
            None
            if layer.lora is None
            else kept_product(reference.matmul(_dropout(x, rate, key), rounded_a(layer, x.dtype)), "lora_low_rank")
            for layer, key in zip(layers, keys, strict=True)
        ]
    return split_ranks(joint_low_rank_input(x, layers), layers, axis=x.ndim - 1)


def joint_low_rank_input(x: jax.Array, layers: tuple[Weights, ...]) -> jax.Array:
    """The u_i of layers that all read x as it is, (..., Σ R), side by side."""
    return kept_product(reference.matmul(x, _concatenated_a(layers, x.dtype)), "lora_low_rank")


def outputs(
    x: jax.Array, lows: list[jax.Array | None], layers: tuple[Weights, ...], add: jax.Array | None = None,
    capability: int | None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """y_i = x W_iᵀ + u_i (s_i B_i)ᵀ + bias_i, (..., O_i) in x's dtype each; the first one + add. capability: that the
    kernel which adds the parts of the first one up is compiled for, None for plain XLA."""
    found: list[jax.Array] = []
    for layer, u in zip(layers, lows, strict=True):
        y = multiply(x, layer.weight)
        if layer.lora is not None and u is not None:
            b = scaled_b(layer, x.dtype)
            if capability is not None and add is not None:
                found.append(triton.summed(y, u, b, add, capability))
                add = None
                continue
            # the large product can take it as its own start (beta = 1). Added to the residual first, whose numbers are
            # larger, a young adapter's part would be rounded away, every time in the same direction
            y = y + reference.matmul(u, b)
        if add is not None:
            y, add = y + add, None
        if layer.bias is not None:
            y = y + jax.lax.expand_dims(layer.bias.astype(x.dtype), range(y.ndim - 1))
        found.append(y)
    return tuple(found)


def gradients(
    x: jax.Array,
    lows: list[jax.Array | None],
    dys: tuple[jax.Array, ...],
    layers: tuple[Weights, ...],
    wanted: Wanted,
    rate: float,
    keys: Keys,
    weight_dtype: jnp.dtype | None = None,
    unscaled: tuple[jax.Array | None, ...] | None = None,
    g: list[jax.Array | None] | None = None,
) -> tuple[jax.Array | None, tuple[PerLeaf, ...]]:
    """dx (..., I) in x's dtype, and for each layer its gradients: float32, dW in weight_dtype (the weight's own where
    None), None for what is not wanted. unscaled: dYᵀ u of each layer, g: its `low_rank_gradient`, where they are
    known already."""
    g = g or [low_rank_gradient(dy, layer) for layer, dy in zip(layers, dys, strict=True)]
    d_a = _a_gradients(x, g, layers, wanted, rate, keys)
    return (
        input_gradient(g, dys, layers, rate, keys) if wanted.x else None,
        parameter_gradients(x, lows, d_a, dys, layers, wanted, weight_dtype, unscaled),
    )


def low_rank_gradient(dy: jax.Array, layer: Weights) -> jax.Array | None:
    """g = dY (s B), (..., R) in dY's dtype; None for a layer without LoRA."""
    return None if layer.lora is None else times(dy, scaled_b(layer, dy.dtype))


def input_gradient(
    g: list[jax.Array | None], dys: tuple[jax.Array, ...], layers: tuple[Weights, ...], rate: float, keys: Keys
) -> jax.Array:
    """dx (..., I) of `gradients` alone; g: each layer's `low_rank_gradient`."""
    dropped = _dropped(keys, rate)
    present = [part for part in g if part is not None]
    dx: jax.Array | None = None
    before: jax.Array | None = None
    if present and not dropped:
        dx = times(jnp.concatenate(present, axis=-1), _concatenated_a(layers, dys[0].dtype))
    for layer, part, dy, key in zip(layers, g, dys, keys, strict=True):
        if part is not None and dropped and layer.lora is not None:
            low_rank = _dropout(times(part, rounded_a(layer, part.dtype)), rate, key)
            dx = low_rank if dx is None else low_rank + dx
        # the large product stands on the left, so that it takes the sum so far as its own start (beta = 1); weights
        # that are dequantised wait for it, so that their dense arrays are never there together
        full = times(dy, layer.weight, after=before)
        dx = before = full if dx is None else full + dx
    assert dx is not None  # there is a layer
    return dx


def _a_gradients(x, g, layers, wanted, rate, keys):
    """dA_i (R, I) float32; None where it is not wanted."""
    asked = [want.lora is not None and want.lora[0] for want in wanted.layers]
    if not any(asked):
        return (None,) * len(layers)
    if _dropped(keys, rate):
        together = [
            None if part is None else over_tokens(part, _dropout(x, rate, key), jnp.float32)
            for part, key in zip(g, keys, strict=True)
        ]
    else:
        joined = jnp.concatenate([part for part in g if part is not None], axis=-1)
        together = split_ranks(over_tokens(joined, x, jnp.float32), layers, axis=0)
    return tuple(d_a if want else None for d_a, want in zip(together, asked, strict=True))


def parameter_gradients(
    x: jax.Array,
    lows: list[jax.Array | None],
    d_a: tuple[jax.Array | None, ...],
    dys: tuple[jax.Array, ...],
    layers: tuple[Weights, ...],
    wanted: Wanted,
    weight_dtype: jnp.dtype | None = None,
    unscaled: tuple[jax.Array | None, ...] | None = None,
) -> tuple[PerLeaf, ...]:
    """The gradients that `gradients` returns for each layer, with dA_i given."""
    found = []
    known = unscaled or (None,) * len(layers)
    for layer, want, u, dy, of_a, product in zip(layers, wanted.layers, lows, dys, d_a, known, strict=True):
        tokens = tuple(range(dy.ndim - 1))
        d_weight = over_tokens(dy, x, weight_dtype or layer.weight.dtype) if want.weight else None
        d_bias = jnp.sum(dy.astype(jnp.float32), axis=tokens) if want.bias else None
        d_lora = None
        if layer.lora is not None:
            _, b, scale = layer.lora
            if product is None and u is not None and (want.lora[1] or want.lora[2]):
                product = over_tokens(dy, u, jnp.float32)
            d_lora = (
                of_a,
                product * scale.astype(jnp.float32) if want.lora[1] else None,
                jnp.sum(product * b.astype(jnp.float32)) if want.lora[2] else None,
            )
        found.append(PerLeaf(d_weight, d_bias, d_lora))
    return tuple(found)


def no_gradients(layers: tuple[Weights, ...], wanted: Wanted) -> tuple[PerLeaf, ...]:
    """Float32 zeros in the structure that `gradients` returns."""

    def zeros(asked: bool, leaf: Any) -> jax.Array | None:
        return jnp.zeros(leaf.shape, jnp.float32) if asked else None

    return tuple(
        PerLeaf(*jax.tree.map(zeros, tuple(want), (layer.weight, layer.bias, layer.lora)))
        for layer, want in zip(layers, wanted.layers, strict=True)
    )


def values(primals: Any) -> Any:
    """The arrays of a tree of `custom_vjp` primals."""
    return jax.tree.map(lambda leaf: leaf.value, primals)


def perturbed(x: Any, layers: Any) -> Wanted:
    """What the primals x and layers of a `custom_vjp` say is differentiated."""

    def asked(layer: Any) -> PerLeaf:
        weight = False if is_quantized(layer.weight) else layer.weight.perturbed
        return PerLeaf(weight, *jax.tree.map(lambda leaf: leaf.perturbed, (layer.bias, layer.lora)))

    return Wanted(x.perturbed, tuple(map(asked, layers)))


def cotangents(tree: Any) -> Any:
    """Upstream gradients with zeros where nothing depends on an output."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, SymbolicZero) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, SymbolicZero),
    )


def in_dtypes(grads: tuple[PerLeaf, ...], layers: tuple[Weights, ...]) -> Any:
    """Gradients as `Weights` in their parameters' dtypes; None stays None."""

    def cast(grad: jax.Array | None, parameter: Any) -> jax.Array | None:
        return None if grad is None else grad.astype(parameter.dtype)

    def one(grad: PerLeaf, layer: Any) -> Any:
        bias = None if layer.bias is None else cast(grad.bias, layer.bias)
        lora = None if layer.lora is None else tuple(map(cast, grad.lora, layer.lora))
        return layer._replace(weight=cast(grad.weight, layer.weight), bias=bias, lora=lora, rounded=None, joint=None)

    return tuple(map(one, grads, layers))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 5))
def linears(
    x: jax.Array, layers: tuple[Weights, ...], rate: float, keys: Keys, add: jax.Array | None, capability: int | None
) -> tuple[jax.Array, ...]:
    """As `reference.linear` for each layer, keys one a layer (None switches dropout off); the first one + add.
    capability: see `outputs`."""
    return outputs(x, low_rank_inputs(x, layers, rate, keys), layers, add, capability)


def _vjp_forward(x, layers, rate, keys, add, capability):
    wanted, x, layers, keys, add = perturbed(x, layers), x.value, values(layers), values(keys), values(add)
    lows = low_rank_inputs(x, layers, rate, keys)
    out = outputs(x, lows, layers, add, capability)
    return out, (x, lows, layers, keys, wanted, add is not None)


def _vjp_backward(rate, _, kept, upstream):
    x, lows, layers, keys, wanted, added = kept
    dys = cotangents(upstream)
    dx, grads = gradients(x, lows, dys, layers, wanted, rate, keys)
    return dx, in_dtypes(grads, layers), (None,) * len(keys), dys[0] if added else None


linears.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
