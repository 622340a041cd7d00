"""What attention reads: three linear layers with LoRA, the norm of q's and k's heads where a model has it, rotation."""

from functools import partial

import jax

from jaxft.kernels.gpu import serving
from jaxft.kernels.linear import Weights, check_fit
from jaxft.kernels.qkv import composed, reference, triton

__all__ = ["qkv"]


def qkv(
    x: jax.Array,
    q: Weights,
    k: Weights,
    v: Weights,
    *,
    head_dim: int,
    cos: jax.Array,
    sin: jax.Array,
    norms: tuple[jax.Array, jax.Array] | None = None,
    eps: float | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (B, T, N, H), k and v (B, T, K, H) in x's dtype, q and k rotated.

    x: (B, T, D), its dtype is the compute dtype; q, k, v: the layers, as `jaxft.kernels.linear` defines them; head_dim:
    H. cos, sin: (B, T, H/2) float32, which have no derivative. norms: the weights (H,) of an RMSNorm over each head of
    q and of k before its rotation, with eps; None for none. dropout: LoRA's, drawn from key, off where key is None.
    implementation: "triton" (own kernels add LoRA's part while they normalise and rotate; reverse-mode derivatives
    only), "composed" (`linears`, then `norm_rope` or `apply_rope`), "reference", or None: the first that serves.
    Raises ValueError where a shape does not fit or the name is unknown, NotImplementedError where the implementation
    that was asked for cannot serve.
    """
    layers = q, k, v
    check_fit(x.shape, layers)
    expected = (*x.shape[:2], head_dim // 2)
    rows = [layer.weight.shape[0] for layer in layers]
    if x.ndim != 3 or any(size % head_dim for size in rows) or cos.shape != expected or sin.shape != expected:
        raise ValueError(
            f"x has shape {x.shape}, the weights {rows} rows, cos {cos.shape}, sin {sin.shape}; need (B, T, D), "
            f"multiples of {head_dim}, and {expected}"
        )
    if norms is not None and any(norm.shape != (head_dim,) for norm in norms):
        raise ValueError(f"norms have shapes {[norm.shape for norm in norms]}; both must be ({head_dim},)")
    if norms is not None and eps is None:
        raise ValueError("norms without eps: a model's constant has no default")
    if implementation not in (None, "triton", "composed", "reference"):
        raise ValueError(f"implementation {implementation!r}: must be 'triton', 'composed' or 'reference'")
    if implementation in (None, "triton"):
        dropped = bool(dropout) and key is not None
        check = partial(triton.check, x, layers, head_dim, dropped)
        capability = serving("qkv", check, implementation)
        if capability is not None:
            return triton.qkv(x, layers, norms, cos, sin, head_dim, eps or 0.0, capability)
    way = reference if implementation == "reference" else composed
    return way.qkv(x, layers, norms, cos, sin, head_dim=head_dim, eps=eps or 0.0, dropout=dropout, key=key)
