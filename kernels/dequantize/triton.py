"""NF4 dequantisation by our own Triton kernel (`triton_kernels.py`): what it serves, and its launch.

Triton and jax-triton are imported when the kernel is launched and not before.
"""

import math

import jax
import jax.numpy as jnp

from jaxft.kernels.dequantize.tables import NESTED_BLOCK, dynamic_map, nf4_levels
from jaxft.kernels.gpu import check_installed

THREADS = 128
UNROLL = 4
DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_CAPABILITY = 75


def check(n: int, dtype: jnp.dtype, capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot serve."""
    if jnp.dtype(dtype).name not in DTYPES:
        raise NotImplementedError(f"dtype {jnp.dtype(dtype).name}: the kernel writes {', '.join(DTYPES)}")
    if n > 2**31 - 2**16:
        raise NotImplementedError(f"{n} values: the kernel counts in 32 bits")
    if capability < SMALLEST_CAPABILITY:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 7.5")
    check_installed()


def constants(n: int, block: int, double: bool) -> dict[str, int | bool]:
    """The kernel's compile-time arguments, in its order."""
    return {"N": n, "BLOCK": block, "NESTED": NESTED_BLOCK, "DOUBLE": double, "UNROLL": UNROLL, "THREADS": THREADS}


def dequantize_nf4(
    packed: jax.Array,
    scales: jax.Array,
    nested: jax.Array | None,
    offset: jax.Array | None,
    shape: tuple[int, ...],
    block: int,
    dtype: jnp.dtype,
    capability: int,
) -> jax.Array:
    """level[code] · scale; see `__init__`. capability: compute capability of the device, 90 for 9.0."""
    import jax_triton

    from jaxft.kernels.dequantize import triton_kernels

    n = math.prod(shape)
    double = nested is not None and offset is not None
    second = [nested, offset.reshape(1)] if nested is not None and offset is not None else [scales, scales]
    out = jax_triton.triton_call(
        packed, scales, *second, jnp.asarray(nf4_levels()), jnp.asarray(dynamic_map()),
        kernel=triton_kernels.nf4, out_shape=jax.ShapeDtypeStruct((n,), dtype), name="dequantize_nf4",
        grid=(-(-n // (UNROLL * THREADS * 8)),), num_warps=THREADS // 32, num_stages=1, enable_fp_fusion=False,
        compute_capability=capability, **constants(n, block, double),
    )  # fmt: skip
    return out.reshape(shape)
