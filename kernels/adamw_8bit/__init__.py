"""One AdamW step on a tensor whose moments are in 8 bits, in place (Dettmers et al. 2021, arXiv 2110.02861)."""

import jax
import jax.numpy as jnp

from jaxft.kernels.adamw_8bit import pieces, reference, triton
from jaxft.kernels.adamw_8bit.reference import adamw, to_bfloat16
from jaxft.kernels.gpu import serving
from jaxft.optim_8bit import BLOCK, Moment8

__all__ = ["adamw", "adamw_8bit", "to_bfloat16"]

IMPLEMENTATIONS = ("triton", "pieces", "reference")


def adamw_8bit(
    param: jax.Array,
    grad: jax.Array,
    mu: Moment8,
    nu: Moment8,
    scalars: jax.Array,
    key: jax.Array,
    *,
    b1: float,
    b2: float,
    eps: float,
    decay: float,
    implementation: str | None = None,
) -> tuple[jax.Array, Moment8, Moment8]:
    """param, mu and nu after the step; g = grad · factor, and from m, v, the moments after this gradient,

        param − rate · ((m / first) / (√(v / second) + eps) + decay · param)

    param, grad: (...) of one shape, float32, bfloat16 or float16; mu, nu: codes (L, blocks, 256), largest (L, blocks)
    of that tensor or of the L that it stacks. scalars: (5,) float32: factor, rate, first, second (1 − b^steps), and
    finite: where that is 0, everything comes back as it was. Moments are used before they are rounded; all sums are
    float32. A bfloat16 parameter is rounded stochastically, with bits from key that differ between implementations.
    implementation: "triton" (CUDA, one pass over memory), "pieces" (XLA), "reference", or None: the first that serves.
    Raises ValueError where shapes do not fit, NotImplementedError where "triton" cannot serve.
    """
    layers, blocks = mu.largest.shape
    size = param.size // layers
    if grad.shape != param.shape or size * layers != param.size or blocks != -(-size // BLOCK):
        raise ValueError(f"param {param.shape}, grad {grad.shape} and moments {mu.codes.shape} do not belong together")
    if mu.codes.shape != (layers, blocks, BLOCK) or nu.codes.shape != mu.codes.shape or scalars.shape != (5,):
        raise ValueError(
            f"moments {mu.codes.shape}, {nu.codes.shape}, scalars {scalars.shape}: need one shape and (5,)"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    constants = (b1, b2, eps, decay)
    if implementation in (None, "triton"):
        capability = serving("adamw_8bit", lambda capability: triton.check(param, capability), implementation)
        if capability is not None:
            seed = jax.random.bits(key, (1,), jnp.uint32)
            return triton.adamw_8bit(param, grad, mu, nu, scalars, seed, *constants, capability)
    way = reference if implementation == "reference" else pieces
    return way.adamw_8bit(param, grad, mu, nu, scalars, key, *constants)
