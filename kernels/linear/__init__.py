"""Linear layers with a frozen weight and a low-rank branch: LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from typing import NamedTuple

import jax

from jaxft.kernels.linear import reference


class Weights(NamedTuple):
    """What one linear layer reads: weight (O, I), bias (O,), and LoRA's A (R, I), B (O, R), scale ()."""

    weight: jax.Array
    bias: jax.Array | None = None
    lora: tuple[jax.Array, jax.Array, jax.Array] | None = None


def linears(
    x: jax.Array, layers: tuple[Weights, ...], *, dropout: float = 0.0, key: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """y_i = x W_iᵀ + bias_i + s_i · dropout(x) A_iᵀ B_iᵀ for layers that read the same x (q, k, v; or gate, up).

    x: (..., I), its dtype is the compute dtype: weights, A and B are read in theirs and cast to it; products
    accumulate in float32; each y_i is (..., O_i) in x's dtype. dropout is LoRA's, drawn anew for each layer from
    key, and off where key is None. Raises ValueError where a shape does not fit.
    """
    for layer in layers:
        O, I = layer.weight.shape
        shapes = [] if layer.lora is None else [layer.lora[0].shape[1:], layer.lora[1].shape[:1]]
        if x.shape[-1] != I or (shapes and shapes != [(I,), (O,)]):
            raise ValueError(f"x has shape {x.shape}, weight (O, I) {layer.weight.shape}, A and B need (R, I), (O, R)")
    keys = [None] * len(layers) if key is None else list(jax.random.split(key, len(layers)))
    return tuple(
        reference.linear(x, layer.weight, layer.bias, layer.lora, dropout, layer_key)
        for layer, layer_key in zip(layers, keys, strict=True)
    )
