"""Linear layers that read one x, as one operation: fewer passes over x and dY, and no gradient nobody asked for.

    u_i = drop_i(x) A_iᵀ                        all A_i in one product: x is read once for all of them
    y_i = x W_iᵀ + u_i (s_i B_i)ᵀ + bias_i      the scale is folded into B
    g_i = dY_i (s_i B_i)
    dB_i = s_i dY_iᵀ u_i     dA_i = g_iᵀ drop_i(x)     one product for all A_i
    dx  = Σ_i drop_i(g_i A_i) + Σ_i dY_i W_i    the low-rank parts in one product

Kept for backward: x, the u_i (R columns each), and the parameters as they came. Gradients of A, B, biases and the
scales are float32 sums over bfloat16 operands (a float32 operand would make the product a slow TF32 one); dW has the
weight's own dtype. Whatever is not differentiated gets no gradient: a frozen W costs no product. Dropout's masks are
drawn again from the key in backward. A quantised W is kept as it is held, has no gradient, and is made dense for each
product that reads it, unless who calls has a dense copy at hand.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxft.kernels.kept import kept_product
from jaxft.kernels.linear import reference, triton
from jaxft.kernels.linear.weights import Weights
from jaxft.quant import Weight, dense, dense_together, is_quantized, multiply

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


def dense_weights(layers: tuple[Weights, ...], dtype: jnp.dtype, after: jax.Array | None = None) -> tuple[Weights, ...]:
    """The layers with quantised weights made dense together, after an array that is computed before; a plain weight
    stays as it is."""
    made = iter(dense_together([w.weight for w in layers if is_quantized(w.weight)], dtype, after=after))
    return tuple(layer._replace(weight=next(made)) if is_quantized(layer.weight) else layer for layer in layers)


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
    if joint is not None and joint.shape[0] == sum(ranks(layers)):
        return joint.astype(dtype)
    return jnp.concatenate([rounded_a(layer, dtype) for layer in present])


def ranks(layers: tuple[Weights, ...]) -> list[int]:
    """R of each layer; 0 for one without LoRA."""
    return [0 if layer.lora is None else layer.lora[0].shape[0] for layer in layers]


def split_ranks(u: jax.Array | None, layers: tuple[Weights, ...], start: int = 0) -> list[jax.Array | None]:
    """Cuts what stands side by side, (..., Σ R), into one part a layer, R wide; None for a layer without LoRA. start:
    where the first layer's columns begin."""
    parts: list[jax.Array | None] = []
    for rank in ranks(layers):
        parts.append(None if u is None or not rank else jax.lax.slice_in_dim(u, start, start + rank, axis=u.ndim - 1))
        start += rank
    return parts


def low_rank_inputs(x: jax.Array, layers: tuple[Weights, ...], rate: float, keys: Keys) -> jax.Array | None:
    """The u_i = drop_i(x) A_iᵀ side by side, (..., Σ R) in x's dtype; None where no layer has LoRA."""
    if all(layer.lora is None for layer in layers):
        return None
    if _dropped(keys, rate):  # each layer has its own mask
        parts = [
            reference.matmul(_dropout(x, rate, key), rounded_a(layer, x.dtype))
            for layer, key in zip(layers, keys, strict=True)
            if layer.lora is not None
        ]
        return kept_product(jnp.concatenate(parts, axis=-1), "lora_low_rank")
    return kept_product(reference.matmul(x, _concatenated_a(layers, x.dtype)), "lora_low_rank")


def outputs(
    x: jax.Array, u: jax.Array | None, layers: tuple[Weights, ...], add: jax.Array | None = None,
    capability: int | None = None, start: int = 0,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """y_i = x W_iᵀ + u_i (s_i B_i)ᵀ + bias_i, (..., O_i) in x's dtype each; the first one + add. u: the
    `low_rank_inputs`, in which these layers' begin with the column `start`; capability: that the kernel which adds the
    parts up, rounding once, is compiled for, None for plain XLA, which may round the large product first."""
    found: list[jax.Array] = []
    ends = itertools.accumulate(ranks(layers), initial=start)
    for layer, (first, end) in zip(layers, itertools.pairwise(ends), strict=True):
        adapted = u if end > first else None
        if adapted is not None and capability is not None and end - first <= triton.LARGEST_RANK:
            product, b = multiply(x, layer.weight, jnp.float32), scaled_b(layer, x.dtype)
            found.append(triton.summed(product, adapted, b, capability, start=first, bias=layer.bias, add=add))
        else:
            y = multiply(x, layer.weight)
            if adapted is not None:
                low = jax.lax.slice_in_dim(adapted, first, end, axis=adapted.ndim - 1)
                # the large product can take it as its own start (beta = 1). Added to the residual first, whose numbers
                # are larger, a young adapter's part would be rounded away, every time in the same direction
                y = y + reference.matmul(low, scaled_b(layer, x.dtype))
            if add is not None:
                y = y + add
            if layer.bias is not None:
                y = y + jax.lax.expand_dims(layer.bias.astype(x.dtype), range(y.ndim - 1))
            found.append(y)
        add = None
    return tuple(found)


def gradients(
    x: jax.Array | None,
    u: jax.Array | None,
    dys: tuple[jax.Array, ...],
    layers: tuple[Weights, ...],
    wanted: Wanted,
    rate: float,
    keys: Keys,
    *,
    weight_dtype: jnp.dtype | None = None,
    g: jax.Array | None = None,
    known: tuple[tuple[jax.Array | None, jax.Array | None], ...] | None = None,
    capability: int | None = None,
) -> tuple[jax.Array | None, tuple[PerLeaf, ...]]:
    """dx (..., I) in x's dtype, and for each layer its gradients: float32, dW in weight_dtype (the weight's own where
    None), None for what is not wanted.

    x: None where no gradient reads it. u: the `low_rank_inputs`; g: the `low_rank_gradient`, where it is known already;
    known: of each layer dYᵀ u and gᵀ x or None, likewise. capability: that the kernels of the thin products are
    compiled for, None for plain XLA.
    """
    g = low_rank_gradient(dys, layers, capability) if g is None else g
    products = _low_rank_products(x, u, g, dys, layers, wanted, rate, keys, known, capability)
    grads = []
    for layer, want, dy, (of_b, of_a) in zip(layers, wanted.layers, dys, products, strict=True):
        d_weight = None
        if want.weight:
            assert x is not None
            d_weight = over_tokens(dy, x, weight_dtype or layer.weight.dtype)
        d_bias = jnp.sum(dy.astype(jnp.float32), axis=tuple(range(dy.ndim - 1))) if want.bias else None
        d_lora = None
        if layer.lora is not None:
            _, b, scale = layer.lora
            d_lora = (
                of_a,
                of_b * scale.astype(jnp.float32) if want.lora[1] else None,
                jnp.sum(of_b * b.astype(jnp.float32)) if want.lora[2] else None,
            )
        grads.append(PerLeaf(d_weight, d_bias, d_lora))
    return input_gradient(g, dys, layers, rate, keys) if wanted.x else None, tuple(grads)


def low_rank_gradient(
    dys: tuple[jax.Array, ...], layers: tuple[Weights, ...], capability: int | None = None
) -> jax.Array | None:
    """The g_i = dY_i (s_i B_i) side by side, (..., Σ R) in dY's dtype; None where no layer has LoRA."""
    dys = tuple(dy for layer, dy in zip(layers, dys, strict=True) if layer.lora is not None)
    bs = [scaled_b(layer, dys[0].dtype) for layer in layers if layer.lora is not None]
    if not bs:
        return None
    capability = triton.thin(capability, [b.shape[1] for b in bs])
    if capability is not None:
        return triton.side_by_side(dys, bs, capability)
    return jnp.concatenate([times(dy, b) for dy, b in zip(dys, bs, strict=True)], axis=-1)


def input_gradient(
    g: jax.Array | None, dys: tuple[jax.Array, ...], layers: tuple[Weights, ...], rate: float, keys: Keys
) -> jax.Array:
    """dx (..., I) of `gradients` alone; g: the `low_rank_gradient`."""
    dropped = _dropped(keys, rate)
    dx: jax.Array | None = None
    before: jax.Array | None = None
    if g is not None and not dropped:
        dx = times(g, _concatenated_a(layers, g.dtype))
    for layer, part, dy, key in zip(layers, split_ranks(g, layers), dys, keys, strict=True):
        if part is not None and dropped:
            low_rank = _dropout(times(part, rounded_a(layer, part.dtype)), rate, key)
            dx = low_rank if dx is None else low_rank + dx
        # the large product stands on the left, so that it takes the sum so far as its own start (beta = 1); weights
        # that are dequantised here wait for it, so that their dense arrays are never there together
        full = times(dy, layer.weight, after=before)
        dx = before = full if dx is None else full + dx
    assert dx is not None  # there is a layer
    return dx


def _low_rank_products(x, u, g, dys, layers, wanted, rate, keys, known, capability):
    """dY_iᵀ u_i (O, R) and g_iᵀ drop_i(x) (R, I) of each layer, float32; None for what is not wanted."""
    known = known or ((None, None),) * len(layers)
    sizes = ranks(layers)
    starts = list(itertools.accumulate(sizes, initial=0))
    present = [(i, wanted.layers[i].lora) for i, size in enumerate(sizes) if size]
    wants_b, wants_a = [i for i, want in present if want[1] or want[2]], [i for i, want in present if want[0]]
    of_b, of_a = [i for i in wants_b if known[i][0] is None], [i for i in wants_a if known[i][1] is None]
    dropped = _dropped(keys, rate)
    capability = triton.thin(capability, [size for size in sizes if size])
    asked = [triton.Thin(dys[i], u, starts[i], sizes[i], False) for i in of_b]
    fits = capability is None or starts[-1] <= triton.LARGEST_RANK
    together = bool(of_a) and not dropped and fits  # x is read once for all of them
    if together:
        asked.append(triton.Thin(x, g, 0, starts[-1], True))
    else:
        inputs = [_dropout(x, rate, keys[i]) if dropped else x for i in of_a]
        asked += [triton.Thin(own, g, starts[i], sizes[i], True) for i, own in zip(of_a, inputs, strict=True)]
    if capability is None:
        products = [_thin(one) for one in asked]
    else:  # several in one launch; not where each reads an x of its own, which would be there together
        launches = [[one] for one in asked] if dropped else [asked]
        products = [one for launch in launches for one in triton.over_tokens(launch, capability)]
    rest = products[len(of_b) :]
    if together:
        rest = [rest[0][starts[i] : starts[i + 1]] for i in of_a]
    d_b = {i: known[i][0] for i in wants_b} | dict(zip(of_b, products[: len(of_b)], strict=True))
    d_a = {i: known[i][1] for i in wants_a} | dict(zip(of_a, rest, strict=True))
    return [(d_b.get(i), d_a.get(i)) for i in range(len(layers))]


def _thin(product: triton.Thin) -> jax.Array:
    """The product by plain XLA."""
    u = jax.lax.slice_in_dim(product.u, product.start, product.start + product.rank, axis=product.u.ndim - 1)
    pair = (u, product.x) if product.across else (product.x, u)
    return over_tokens(*pair, jnp.float32)


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
    u = low_rank_inputs(x, layers, rate, keys)
    out = outputs(x, u, layers, add, capability)
    return out, (x, u, layers, keys, wanted, add is not None)


def _vjp_backward(rate, capability, kept, upstream):
    x, u, layers, keys, wanted, added = kept
    dys = cotangents(upstream)
    dx, grads = gradients(x, u, dys, layers, wanted, rate, keys, capability=capability)
    return dx, in_dtypes(grads, layers), (None,) * len(keys), dys[0] if added else None


linears.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
