"""Losses of a tile's rows and the gradient of their logits by our own Triton kernel: what it serves, its launch.

The kernel is in `triton_kernels.py`. Triton and jax-triton are imported when it is launched and not before.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.kernels import launch
from jaxft.kernels.gpu import check_installed

# numbers of a row at a time: so many that a multiprocessor has one row under way, which the cache still holds in part
# when it is read again; and how many of them a warp holds
BLOCK, WARP = 16384, 512


def check(capability: int) -> None:
    """Raises NotImplementedError with the reason where the kernel cannot serve."""
    if capability < 75:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 7.5")
    check_installed()


def losses(
    scores: jax.Array, targets: jax.Array, weights: jax.Array, softcap: float | None, dtype: jnp.dtype, gradient: bool,
    capability: int, into: tuple[jax.Array, jax.Array | int] | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """weight · nll (M,) float32 of scores (M, V) float32, not yet capped, and its gradient by them (M, V) in `dtype`.

    targets: (M,) int32 in [0, V); weights: (M,) float32, where 0 both are 0 whatever the scores are. Without `gradient`
    that is an array of one number. capability: of the device, 90 for 9.0. into: an array (rows, V) in `dtype` and the
    row in it from which on the gradient is written; that array comes back in its place.
    """
    from jaxft.kernels.linear_cross_entropy import triton_kernels

    M, V = scores.shape
    block = min(BLOCK, max(WARP, 1 << (V - 1).bit_length()))
    gradients = jax.ShapeDtypeStruct((M, V) if gradient else (1,), dtype)
    options: dict[str, Any] = dict(kernel=triton_kernels.rows)
    place: tuple[jax.Array, ...] = ()
    if into is not None:
        array, first = into
        gradients = jax.ShapeDtypeStruct(array.shape, dtype)
        options = dict(kernel=triton_kernels.rows_into, input_output_aliases=((4, 1),))
        place = jnp.asarray(first, jnp.int32).reshape(1), array
    return launch.triton_call(
        scores, targets, weights, *place, **options, out_shape=(jax.ShapeDtypeStruct((M,), jnp.float32), gradients),
        grid=(M,), num_warps=block // WARP, num_stages=1, compute_capability=capability, name="cross_entropy_rows",
        V=V, CAP=None if softcap is None else float(softcap), BLOCK=block, GRADIENT=gradient,
    )  # fmt: skip
