"""tanh for the Triton kernels that cap scores: libdevice's is none that Triton's interpreter could run."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x, SCALE: tl.constexpr):
    """tanh(x · SCALE) float32, by exp2: right at both ends, where that gives 0 or ∞."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * SCALE * LOG2E)) + 1.0)
