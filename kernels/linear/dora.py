"""Linear layers with trained row lengths: DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    y = c ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias,   c_o = m_o / ‖W_o + s (B A)_o‖

The norm is a constant to the gradient (section 4.3), so that dm_o = dc_o / norm_o and all else is LoRA's with dY ∘ c.
It is computed in float32, of a quantised W from its dense values, and kept by every rematerialisation policy under the
name "dora_norm"; the product in brackets, which dm reads, is "dora_product". With dropout the adapted part alone reads
the dropped input, as in PEFT: y = (x − drop(x)) Wᵀ + c ∘ (drop(x) Wᵀ + s drop(x) Aᵀ Bᵀ) + bias.

A magnitude of 0 stands for a row that has none: its c is 1, and it stays 0. So a stack of layers may have magnitudes in
some of them, and a row of zeros in W, which has no direction, trains as LoRA does.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels.kept import kept_product
from jaxft.kernels.linear import fused, reference
from jaxft.kernels.linear.weights import Weights

Norms = tuple[jax.Array | None, ...]


def norm(layer: Weights) -> jax.Array | None:
    """‖W_o + s (B A)_o‖ of every row, (O,) float32; None for a layer without magnitudes."""
    if layer.magnitude is None:
        return None
    assert layer.lora is not None
    return checkpoint_name(reference.row_norms(layer.weight, layer.lora), "dora_norm")


def factor(magnitude: jax.Array, norm: jax.Array) -> jax.Array:
    """c (O,) float32."""
    divisor = jnp.where(norm > 0, norm, 1.0)
    return jnp.where(magnitude != 0, magnitude.astype(jnp.float32) / divisor, 1.0)


def linears(
    x: jax.Array,
    layers: tuple[Weights, ...],
    rate: float,
    keys: tuple[jax.Array | None, ...],
    add: jax.Array | None,
    norms: Norms | None = None,
) -> tuple[jax.Array, ...]:
    """As `fused.linears` for layers of which some have magnitudes. norms: of each layer, where they are known."""
    norms = tuple(map(norm, layers)) if norms is None else norms
    bare = tuple(
        layer if layer.magnitude is None else layer._replace(bias=None, magnitude=None) for layer in layers
    )  # fmt: skip
    adds = (add, *[None] * (len(layers) - 1))
    if rate and any(key is not None for key in keys):
        return tuple(
            fused.linears(x, (one,), rate, (key,), own, None)[0]
            if layer.magnitude is None
            else _scaled(*_dropped(x, one, rate, key), layer, of, own)
            for layer, one, key, of, own in zip(layers, bare, keys, norms, adds, strict=True)
        )
    first = add if layers[0].magnitude is None else None
    found = fused.linears(x, bare, rate, keys, first, None)
    return tuple(
        product if layer.magnitude is None else _scaled(product, None, layer, of, own)
        for product, layer, of, own in zip(found, layers, norms, adds, strict=True)
    )


def _dropped(x: jax.Array, layer: Weights, rate: float, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The adapted product of the dropped input, and W times what was dropped."""
    assert key is not None
    dropped = reference.dropout(x, rate, key)
    (product,) = fused.linears(dropped, (layer,), 0.0, (None,), None, None)
    (rest,) = fused.linears(x - dropped, (Weights(layer.weight),), 0.0, (None,), None, None)
    return product, rest


def _scaled(
    product: jax.Array, rest: jax.Array | None, layer: Weights, norm: jax.Array | None, add: jax.Array | None
) -> jax.Array:
    """c ∘ product + rest + bias + add in float32, rounded once, to the product's dtype."""
    assert layer.magnitude is not None and norm is not None
    product = kept_product(product, "dora_product")
    c = jax.lax.expand_dims(factor(layer.magnitude, norm), range(product.ndim - 1))
    y = product.astype(jnp.float32) * c
    bias = None if layer.bias is None else jax.lax.expand_dims(layer.bias, range(y.ndim - 1))
    for other in (rest, bias, add):
        y = y if other is None else y + other.astype(jnp.float32)
    return y.astype(product.dtype)
