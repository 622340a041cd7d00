"""Products, LoRA, norm and rotation as one operation with its own backward, by the kernels of `norm_rope`.

    q = rotate(norm(x W_qᵀ + u_q (s B_q)ᵀ)), k likewise, v = x W_vᵀ + u_v (s B_v)ᵀ

The low-rank parts of q and k are added by the kernel that normalises and rotates them, in float32: a product of their
own would write them, and the large product read them, as wide as q and k. v is a sum of `linear`'s. v, and the products
of q and k without those parts, are named for a rematerialisation policy. Kept for backward: x, those products where
there are norms, the columns of the low-rank inputs, and where they cost nothing the dense copies of quantised weights.
"""

import functools
from dataclasses import dataclass

import jax

from jaxft.kernels.gpu import check_16_bits
from jaxft.kernels.kept import keeps_dense
from jaxft.kernels.linear import Weights
from jaxft.kernels.linear import fused as linear
from jaxft.kernels.norm_rope import triton as kernels
from jaxft.kernels.norm_rope.triton import LowRank
from jaxft.kernels.qkv.reference import heads
from jaxft.quant import multiply, reads_codes

Layers = tuple[Weights, Weights, Weights]
Norms = tuple[jax.Array, jax.Array] | None
NO_KEYS = (None, None, None)
LARGEST_HEAD = 256


def check(x: jax.Array, layers: Layers, head_dim: int, dropped: bool, capability: int) -> None:
    """Raises NotImplementedError with the reason where this way cannot serve."""
    kernels.check(jax.ShapeDtypeStruct((head_dim,), x.dtype), capability)  # type: ignore[arg-type]
    check_16_bits(x.dtype, capability)
    if head_dim > LARGEST_HEAD:
        raise NotImplementedError(f"head size {head_dim}: needs at most {LARGEST_HEAD} (shared memory)")
    if dropped:
        raise NotImplementedError("dropout: each layer would have low-rank inputs of its own")
    if any(layer.bias is not None or layer.magnitude is not None for layer in layers):
        raise NotImplementedError("biases or magnitudes (DoRA): LoRA alone")
    ranks = linear.ranks(layers)
    if not any(ranks[:2]) or max(ranks) > kernels.LARGEST_RANK:
        raise NotImplementedError(f"ranks {ranks}: needs LoRA on q or k, of at most {kernels.LARGEST_RANK}")


def _low_ranks(u: jax.Array, layers: Layers) -> list[LowRank | None]:
    """What the kernels of q and k read beside a product."""
    starts = 0, linear.ranks(layers)[0]
    return [
        None if layer.lora is None else LowRank(u, linear.scaled_b(layer, u.dtype), start)
        for layer, start in zip(layers[:2], starts, strict=True)
    ]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Trained:
    """Which of the norms' weights are differentiated."""

    norms: tuple[bool, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def qkv(
    x: jax.Array, layers: Layers, norms: Norms, cos: jax.Array, sin: jax.Array, head_dim: int, eps: float,
    capability: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As `qkv` of this folder, without dropout, where `check` allows it; capability: of the device, 90 for 9.0."""
    return _run(x, layers, norms, cos, sin, head_dim, eps, capability)[0]


def _run(x, layers, norms, cos, sin, head_dim, eps, capability):
    u = linear.low_rank_inputs(x, layers, 0.0, NO_KEYS)
    assert u is not None  # `check` has seen LoRA
    if not reads_codes(x, [layer.weight for layer in layers]):
        layers = linear.dense_weights(layers, x.dtype)
    start = sum(linear.ranks(layers[:2]))
    v = linear.outputs(x, u, layers[2:], capability=capability, start=start)[0]
    products = *(multiply(x, layer.weight) for layer in layers[:2]), v
    q, k, v = heads(products, head_dim)
    rotated = [
        kernels.rotated(part, low, norm, cos, sin, eps, capability)
        for part, low, norm in zip((q, k), _low_ranks(u, layers), norms or (None, None), strict=True)
    ]
    return (*rotated, v), (q, k, u)


def _forward(x, layers, norms, cos, sin, head_dim, eps, capability):
    wanted = linear.perturbed(x, layers)
    trained = _Trained(tuple(norm.perturbed for norm in norms or ()))
    x, layers, norms, cos, sin = linear.values((x, layers, norms, cos, sin))
    if keeps_dense():  # the products are computed again right before the gradients that read the weights, too
        layers = linear.dense_weights(layers, x.dtype)
    out, (q, k, u) = _run(x, layers, norms, cos, sin, head_dim, eps, capability)
    kept = (None, None, u) if norms is None else (q, k, u)  # to rotate back nothing is read of what was rotated
    return out, (x, layers, norms, cos, sin, kept, wanted, trained)


def _backward(head_dim, eps, capability, residuals, upstream):
    x, layers, norms, cos, sin, (q, k, u), wanted, trained = residuals
    upstream = linear.cotangents(upstream)
    rotated, d_norms = [], []
    rest = zip((q, k), _low_ranks(u, layers), norms or (None, None), trained.norms or (False, False), strict=True)
    for dy, (part, low, norm, asked) in zip(upstream[:2], rest, strict=True):
        d_part, d_norm = kernels.rotated_backward(part, low, norm, cos, sin, dy, eps, capability, asked)
        rotated.append(d_part)
        d_norms.append(None if d_norm is None else d_norm.astype(norm.dtype))
    dys = tuple(dy.reshape(*x.shape[:-1], -1) for dy in (*rotated, upstream[2]))
    dx, grads = linear.gradients(x, u, dys, layers, wanted, 0.0, NO_KEYS, capability=capability)
    return dx, linear.in_dtypes(grads, layers), None if norms is None else tuple(d_norms), None, None


qkv.defvjp(_forward, _backward, symbolic_zeros=True)
