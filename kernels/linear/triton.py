"""Product, low-rank part and residual added up by our own Triton kernel (`triton_kernels.py`): serving, launch.

Triton and jax-triton are imported when a kernel is launched and not before.
"""

import jax
import jax.numpy as jnp

from jaxft.kernels import launch
from jaxft.kernels.gpu import check_installed
from jaxft.kernels.linear.weights import Weights

TOKENS, FEATURES, WARPS = 64, 64, 4  # of a program
LARGEST_RANK = 128


def check(x: jax.Array, layer: Weights, add: jax.Array | None, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot serve the layer that `add` is added to."""
    if add is None or layer.lora is None or layer.bias is not None or layer.magnitude is not None:
        raise NotImplementedError("nothing to add up: needs a residual and LoRA, without bias and magnitude (DoRA)")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {x.dtype}: needs bfloat16 or float16")
    if layer.lora[0].shape[0] > LARGEST_RANK:
        raise NotImplementedError(f"rank {layer.lora[0].shape[0]}: needs at most {LARGEST_RANK}")
    if capability < 80:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 8.0 (tensor cores through Triton)")
    check_installed()


def summed(product: jax.Array, u: jax.Array, b: jax.Array, add: jax.Array, capability: int) -> jax.Array:
    """product + u bᵀ + add in float32, rounded once: product and add (..., O), u (..., R), b (O, R), of one dtype."""
    from jaxft.kernels.linear import triton_kernels

    O, R = b.shape
    T = product.size // O
    return launch.triton_call(
        product, u, b, add, kernel=triton_kernels.summed, out_shape=jax.ShapeDtypeStruct(product.shape, product.dtype),
        grid=(-(-O // FEATURES), -(-T // TOKENS)), num_warps=WARPS, num_stages=1, compute_capability=capability,
        name="linear_summed", T=T, O=O, R=R, RP=max(16, 1 << (R - 1).bit_length()), BT=TOKENS, BO=FEATURES,
    )  # fmt: skip
