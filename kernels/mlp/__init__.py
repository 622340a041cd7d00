"""The gated MLP of Llama-like models (SwiGLU, GeGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202) with LoRA."""

from functools import partial

import jax

from jaxft.kernels.gpu import serving
from jaxft.kernels.linear import Weights, check_add, check_fit, layer_keys
from jaxft.kernels.mlp import composed, fused, reference, triton
from jaxft.kernels.mlp.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "hidden", "mlp"]


def mlp(
    x: jax.Array,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    activation: str,
    dropout: float = 0.0,
    keys: tuple[jax.Array | None, jax.Array | None] = (None, None),
    add: jax.Array | None = None,
    tiles: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y = down(act(gate(x)) · up(x)) with three linear layers as `jaxft.kernels.linear` defines them.

    x: (..., T, D), its dtype is the compute dtype; gate, up: weights (F, D); down: (D, F); y: (..., T, D) in x's dtype.
    activation: "silu", "gelu" (exact) or "gelu_pytorch_tanh", computed in float32. dropout: LoRA's; keys: one for
    gate and up, one for down, off where None. add: added to y, a residual, of its shape and dtype.
    tiles: None keeps what the backward pass reads. A number: into how many parts the tokens are cut, one after the
    other, each computed again in the backward pass, so that one part's (…, F) arrays exist at a time, and fewer of
    them; dropout draws other masks for each number of parts.
    implementation: "triton" (own kernels between the large products), "fused" (plain XLA; both with reverse-mode
    derivatives only), "reference" (without tiles), or None: the first of them that serves, and for layers with
    magnitudes (DoRA) `composed`. What is kept for backward, and its names for rematerialisation policies: see `fused`.
    Raises ValueError where a shape does not fit or a name is unknown, NotImplementedError where the implementation that
    was asked for cannot serve.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    F = gate.weight.shape[0]
    check_fit(x.shape, (gate, up))
    check_fit((*x.shape[:-1], F), (down,))
    if up.weight.shape[0] != F:
        raise ValueError(f"gate has shape {gate.weight.shape}, up {up.weight.shape}; both must be (F, D)")
    check_add(x, down, add)
    if (tiles is not None and tiles < 1) or x.ndim < 2:
        raise ValueError(f"tiles is {tiles}, x has shape {x.shape}; need at least one tile and x (..., T, D)")
    both = (*layer_keys(keys[0], 2), *layer_keys(keys[1], 1))
    if implementation == "reference":
        if tiles is not None:
            raise NotImplementedError(f"the reference is not tiled; tiles is {tiles}")
        y = reference.mlp(x, gate, up, down, activation, dropout, both)
        return y if add is None else y + add
    if implementation not in (None, "triton", "fused"):
        raise ValueError(f"implementation {implementation!r}: must be 'triton', 'fused' or 'reference'")
    layers = (gate, up, down)
    if any(layer.magnitude is not None for layer in layers):
        if implementation is not None:
            raise NotImplementedError(f"a magnitude (DoRA): {implementation} serves LoRA alone")
        return composed.mlp(x, layers, activation, dropout, both, add, tiles or 1)
    kernels, card = None, None
    if implementation != "fused":
        card = serving("mlp", partial(triton.check, x.dtype, activation), implementation)
    if card is not None:
        dropped = bool(dropout) and any(key is not None for key in both)
        kernels = triton.Kernels(card, triton.low_rank(layers, dropped))
    if tiles is None:
        return fused.mlp(x, layers, activation, dropout, both, add, kernels)
    return fused.tiled_mlp(x, layers, activation, dropout, both, add, kernels, tiles)


def hidden(x: jax.Array, gate: Weights, up: Weights, *, activation: str) -> jax.Array:
    """act(gate(x)) · up(x), what down reads in `mlp` without dropout: x (..., D) to (..., F) in x's dtype."""
    check_fit(x.shape, (gate, up))
    return fused.hidden(x, (gate, up), activation)
