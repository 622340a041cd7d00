"""Product, low-rank part and residual added up by our own Triton kernel (`triton_kernels.py`): serving, launch.

Triton and jax-triton are imported when a kernel is launched and not before.
"""

import jax

from jaxft.kernels import launch
from jaxft.kernels.gpu import check_16_bits, check_installed
from jaxft.kernels.launch import fitting, padded
from jaxft.kernels.linear.weights import Weights

TOKENS, FEATURES, WARPS = 64, 64, 4  # of a program
LARGEST_RANK = 128


def check(x: jax.Array, layers: tuple[Weights, ...], add: jax.Array | None, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot end the first layer, which `add` is added
    to."""
    first = layers[0]
    if add is None or first.lora is None or first.bias is not None:
        raise NotImplementedError("nothing to add up: needs a residual and LoRA, without a bias")
    if any(layer.magnitude is not None for layer in layers):
        raise NotImplementedError("a magnitude (DoRA): serves LoRA alone")
    check_16_bits(x.dtype, capability)
    if first.lora[0].shape[0] > LARGEST_RANK:
        raise NotImplementedError(f"rank {first.lora[0].shape[0]}: needs at most {LARGEST_RANK}")
    check_installed()


def summed(product: jax.Array, u: jax.Array, b: jax.Array, add: jax.Array, capability: int) -> jax.Array:
    """product + u bᵀ + add in float32, rounded once: product and add (..., O), u (..., R), b (O, R), of one dtype."""
    from jaxft.kernels.linear import triton_kernels

    O, R = b.shape
    T = product.size // O
    tokens = fitting(T, TOKENS)
    return launch.triton_call(
        product, u, b, add, kernel=triton_kernels.summed, out_shape=jax.ShapeDtypeStruct(product.shape, product.dtype),
        grid=(-(-O // FEATURES), -(-T // tokens)), num_warps=WARPS, num_stages=1, compute_capability=capability,
        name="linear_summed", T=T, O=O, R=R, RP=padded(R), BT=tokens, BO=FEATURES,
    )  # fmt: skip
