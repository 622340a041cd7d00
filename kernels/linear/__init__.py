"""Linear layers with a frozen weight and a low-rank branch: LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from functools import partial

import jax

from jaxft.kernels.gpu import serving
from jaxft.kernels.linear import dora, fused, reference, triton
from jaxft.kernels.linear.reference import times_scale
from jaxft.kernels.linear.weights import Weights

__all__ = ["Weights", "check_add", "check_fit", "layer_keys", "linears", "times_scale"]


def linears(
    x: jax.Array,
    layers: tuple[Weights, ...],
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    add: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """y_i = x W_iᵀ + bias_i + s_i · dropout(x) A_iᵀ B_iᵀ for layers that read the same x (q, k, v; or gate, up).

    x: (..., I), its dtype is the compute dtype: weights, A and B are read in theirs and cast to it; products
    accumulate in float32; each y_i is (..., O_i) in x's dtype. bias: of any dtype, which "triton" adds as it is and the
    others round to x's first. dropout is LoRA's, drawn anew for each layer from key, and off where key is None. add:
    added to y_0, a residual, of its shape and dtype. A layer with a magnitude is DoRA's, see `dora`.
    implementation: "triton" (an own kernel adds up a layer's product, LoRA's part, bias and `add`, and rounds once),
    "fused" (plain XLA; both with reverse-mode derivatives only), "reference", or None: the first that serves. Raises
    ValueError where a shape does not fit or the implementation is unknown, NotImplementedError where the one that was
    asked for cannot serve.
    """
    check_fit(x.shape, layers)
    check_add(x, layers[0], add)
    keys = layer_keys(key, len(layers))
    if implementation == "reference":
        found = [
            reference.linear(x, layer.weight, layer.bias, layer.lora, dropout, layer_key, layer.magnitude)
            for layer, layer_key in zip(layers, keys, strict=True)
        ]
        return (found[0] if add is None else found[0] + add, *found[1:])
    if implementation not in (None, "triton", "fused"):
        raise ValueError(f"implementation {implementation!r}: must be 'triton', 'fused' or 'reference'")
    capability = None
    if implementation != "fused":
        capability = serving("linear", partial(triton.check, x, layers), implementation)
    if any(layer.magnitude is not None for layer in layers):
        return dora.linears(x, layers, dropout, keys, add)
    return fused.linears(x, layers, dropout, keys, add, capability)


def check_fit(shape: tuple[int, ...], layers: tuple[Weights, ...]) -> None:
    """Raises ValueError where a layer cannot read an input of `shape` (..., I)."""
    for layer in layers:
        rows, columns = layer.weight.shape
        low_rank = [] if layer.lora is None else [layer.lora[0].shape[1:], layer.lora[1].shape[:1]]
        if shape[-1] != columns or (low_rank and low_rank != [(columns,), (rows,)]):
            raise ValueError(f"x has shape {shape}, weight (O, I) {layer.weight.shape}, A and B need (R, I), (O, R)")
        if layer.magnitude is not None and (layer.lora is None or layer.magnitude.shape != (rows,)):
            raise ValueError(
                f"magnitude has shape {layer.magnitude.shape}; it must be ({rows},) and stand beside A and B"
            )


def check_add(x: jax.Array, layer: Weights, add: jax.Array | None) -> None:
    """Raises ValueError where `add` is not of the shape and dtype of the layer's output."""
    shape = (*x.shape[:-1], layer.weight.shape[0])
    if add is not None and (add.shape != shape or add.dtype != x.dtype):
        raise ValueError(f"add is {add.dtype} {add.shape}; the output is {x.dtype} {shape}")


def layer_keys(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """One dropout key a layer; Nones where dropout is off."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
