"""The Triton kernels of RMSNorm over wide rows: one pass each way.

    r = 1 / √(mean(x²) + eps),  y = x r w
    dx = dx' + r (dy w − x r · mean(dy w · x r)),  dw = Σ dy · x r            dx': what else x receives

Tiles. A program holds one row at a time (D padded to a power of two, WIDE) and walks over ROWS rows, so that dw is a
sum in registers, added up outside. Everything is float32 in registers. Kept for backward: x. Measured: docs/log.md.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x_ptr, w_ptr, y_ptr, eps: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """y (COUNT, D). Grid (COUNT,)."""
    d = tl.arange(0, WIDE)
    inside = d < D
    at = tl.program_id(0).to(tl.int64) * D + d
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + d, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(y_ptr + at, (x * r * w).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x_ptr, w_ptr, more_ptr, dy_ptr, dx_ptr, dw_ptr,
    eps: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """dx (COUNT, D), and where DW each program's part of dw (programs, D) float32. Grid (⌈COUNT / ROWS⌉,)."""
    d = tl.arange(0, WIDE)
    inside = d < D
    w = tl.load(w_ptr + d, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((WIDE,), tl.float32)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, COUNT)):
        at = (tl.full((), 0, tl.int64) + row) * D + d
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        more = tl.load(more_ptr + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x = x * r
        if DW:
            dw += dy * x
        dy = dy * w
        dx = more + r * (dy - x * (tl.sum(dy * x, 0) / D))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if DW:
        tl.store(dw_ptr + tl.program_id(0) * D + d, dw, mask=inside)
