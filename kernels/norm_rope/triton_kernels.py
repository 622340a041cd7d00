"""The Triton kernels of RMSNorm and rotation of heads: memory is read and written once each way.

    r = 1 / √(mean(x²) + eps),  n = x r w,  y₁ = n₁ cos − n₂ sin,  y₂ = n₂ cos + n₁ sin         halves of a head
    dn₁ = dy₁ cos + dy₂ sin,  dn₂ = dy₂ cos − dy₁ sin
    dx = r (dn w − x r · mean(dn w · x r)),  dw = Σ dn · x r

Tiles. A program holds ROWS rows of (tokens · heads, H), each as two halves; everything is float32 in registers. dw is a
sum over the program's rows, added up outside. Kept for backward: x. Measured: docs/log.md.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(ptr, row, count, H: tl.constexpr):
    """Both halves of rows of (count, H), float32; zeros past count."""
    h = tl.arange(0, H // 2)
    at = ptr + row.to(tl.int64)[:, None] * H + h[None, :]
    inside = (row < count)[:, None]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32), tl.load(at + H // 2, mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _store_halves(ptr, row, count, first, second, H: tl.constexpr):
    h = tl.arange(0, H // 2)
    at = ptr + row.to(tl.int64)[:, None] * H + h[None, :]
    inside = (row < count)[:, None]
    tl.store(at, first.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + H // 2, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _angles(cos_ptr, sin_ptr, row, count, N: tl.constexpr, H: tl.constexpr):
    """cos and sin of the rows' tokens."""
    h = tl.arange(0, H // 2)
    at = (row // N)[:, None] * (H // 2) + h[None, :]
    inside = (row < count)[:, None]
    return tl.load(cos_ptr + at, mask=inside, other=0.0), tl.load(sin_ptr + at, mask=inside, other=0.0)


@triton.jit
def forward(
    x_ptr, w_ptr, cos_ptr, sin_ptr, y_ptr,
    eps: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, H // 2)
    w1, w2 = tl.load(w_ptr + h).to(tl.float32), tl.load(w_ptr + H // 2 + h).to(tl.float32)
    x1, x2 = _halves(x_ptr, row, COUNT, H)
    cos, sin = _angles(cos_ptr, sin_ptr, row, COUNT, N, H)
    r = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / H + eps)[:, None]
    n1, n2 = x1 * r * w1[None, :], x2 * r * w2[None, :]
    _store_halves(y_ptr, row, COUNT, n1 * cos - n2 * sin, n2 * cos + n1 * sin, H)


@triton.jit
def backward(
    x_ptr, w_ptr, cos_ptr, sin_ptr, dy_ptr, dx_ptr, dw_ptr,
    eps: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """dx, and where DW each program's part of dw (programs, H) float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, H // 2)
    w1, w2 = tl.load(w_ptr + h).to(tl.float32), tl.load(w_ptr + H // 2 + h).to(tl.float32)
    x1, x2 = _halves(x_ptr, row, COUNT, H)
    dy1, dy2 = _halves(dy_ptr, row, COUNT, H)
    cos, sin = _angles(cos_ptr, sin_ptr, row, COUNT, N, H)
    r = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / H + eps)[:, None]
    x1, x2 = x1 * r, x2 * r
    dn1, dn2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
    if DW:
        at = dw_ptr + tl.program_id(0) * H + h
        tl.store(at, tl.sum(dn1 * x1, 0))
        tl.store(at + H // 2, tl.sum(dn2 * x2, 0))
    dn1, dn2 = dn1 * w1[None, :], dn2 * w2[None, :]
    mean = ((tl.sum(dn1 * x1, 1) + tl.sum(dn2 * x2, 1)) / H)[:, None]
    _store_halves(dx_ptr, row, COUNT, r * (dn1 - x1 * mean), r * (dn2 - x2 * mean), H)
