"""The gated MLP of Llama-like models (SwiGLU, GeGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202) with LoRA."""

import jax

from jaxft.kernels.linear import Weights, check_fit, layer_keys
from jaxft.kernels.mlp import fused, reference
from jaxft.kernels.mlp.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "mlp"]


def mlp(
    x: jax.Array,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    activation: str,
    dropout: float = 0.0,
    keys: tuple[jax.Array | None, jax.Array | None] = (None, None),
    tiles: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """y = down(act(gate(x)) · up(x)) with three linear layers as `jaxft.kernels.linear` defines them.

    x: (..., T, D), its dtype is the compute dtype; gate, up: weights (F, D); down: (D, F); y: (..., T, D) in x's dtype.
    activation: "silu", "gelu" (exact) or "gelu_pytorch_tanh", computed in float32. dropout: LoRA's; keys: one for
    gate and up, one for down, off where None.
    tiles: how many parts the tokens are cut into, one after the other, each computed again in the backward pass: only
    one part's (…, F) arrays exist at a time. Dropout draws other masks for each number of tiles.
    implementation: "fused" (default; reverse-mode derivatives only) or "reference" (tiles must be 1). With one tile,
    "fused" keeps x, gate(x) and up(x) for backward; their names for rematerialisation policies are "mlp_gate" and
    "mlp_up". Raises ValueError where a shape does not fit or a name is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    F = gate.weight.shape[0]
    check_fit(x.shape, (gate, up))
    check_fit((*x.shape[:-1], F), (down,))
    if up.weight.shape[0] != F:
        raise ValueError(f"gate has shape {gate.weight.shape}, up {up.weight.shape}; both must be (F, D)")
    if tiles < 1 or x.ndim < 2:
        raise ValueError(f"tiles is {tiles}, x has shape {x.shape}; need at least one tile and x (..., T, D)")
    both = (*layer_keys(keys[0], 2), *layer_keys(keys[1], 1))
    if implementation == "reference":
        if tiles != 1:
            raise NotImplementedError(f"the reference is not tiled; tiles is {tiles}")
        return reference.mlp(x, gate, up, down, activation, dropout, both)
    if implementation not in (None, "fused"):
        raise ValueError(f"implementation {implementation!r}: must be 'fused' or 'reference'")
    if tiles == 1:
        return fused.mlp(x, (gate, up, down), activation, dropout, both)
    return fused.tiled_mlp(x, (gate, up, down), activation, dropout, both, tiles)
