"""The Triton kernels of RMSNorm and rotation of heads: memory is read and written once each way.

    x = X + u bᵀ                                                       where LOW: what a linear layer's LoRA adds
    r = 1 / √(mean(x²) + eps),  n = x r w                              where NORM, else n = x
    y₁ = n₁ cos − n₂ sin,  y₂ = n₂ cos + n₁ sin                         halves of a head
    dn₁ = dy₁ cos + dy₂ sin,  dn₂ = dy₂ cos − dy₁ sin
    dx = r (dn w − x r · mean(dn w · x r)),  dw = Σ dn · x r            where NORM, else dx = dn

u (T, R) are columns of an array of WIDTH of them, from START on, as one product makes the low-rank inputs of all layers
that read one x; b (N · H, R) is the scaled B.

Tiles. A program holds BT tokens of one head at a time, each as two halves, and walks over HEADS heads, whose tokens
share the angles and u; everything is float32 in registers. dw is a sum over the program's rows, added up outside. Kept
for backward: X and u. Measured: docs/log.md.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(ptr, t, head, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, EDGE: tl.constexpr):
    """Both halves of a head of the tokens t of (T, N, H), float32; zeros past T."""
    h = tl.arange(0, H // 2)
    at = ptr + t.to(tl.int64)[:, None] * (N * H) + head * H + h[None, :]
    if EDGE:
        inside = (t < T)[:, None]
        first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + H // 2, mask=inside, other=0.0)
    else:
        first, second = tl.load(at), tl.load(at + H // 2)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_halves(ptr, t, head, first, second, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    h = tl.arange(0, H // 2)
    at = ptr + t.to(tl.int64)[:, None] * (N * H) + head * H + h[None, :]
    inside = (t < T)[:, None]
    tl.store(at, first.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + H // 2, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _angles(cos_ptr, sin_ptr, t, T: tl.constexpr, H: tl.constexpr):
    """cos and sin of the tokens t, of (T, H/2) each."""
    at = t[:, None] * (H // 2) + tl.arange(0, H // 2)[None, :]
    inside = (t < T)[:, None]
    return tl.load(cos_ptr + at, mask=inside, other=0.0), tl.load(sin_ptr + at, mask=inside, other=0.0)


@triton.jit
def _low_rank_inputs(
    u_ptr, t, T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr
):
    rank = tl.arange(0, RP)
    at = u_ptr + t.to(tl.int64)[:, None] * WIDTH + START + rank[None, :]
    return tl.load(at, mask=(t < T)[:, None] & (rank < R)[None, :], other=0.0)


@triton.jit
def _with_low_rank(x1, x2, u, b_ptr, head, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr):
    """x + u bᵀ for the halves of one head."""
    row = head * H + tl.arange(0, H // 2)
    rank = tl.arange(0, RP)
    at = b_ptr + row[:, None] * R + rank[None, :]
    inside = (rank < R)[None, :]
    b1, b2 = tl.load(at, mask=inside, other=0.0), tl.load(at + H // 2 * R, mask=inside, other=0.0)
    return tl.dot(u, tl.trans(b1), x1), tl.dot(u, tl.trans(b2), x2)


@triton.jit
def forward(
    x_ptr, u_ptr, b_ptr, w_ptr, cos_ptr, sin_ptr, y_ptr,
    eps: tl.constexpr, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    WIDTH: tl.constexpr, START: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
    LOW: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """y (T, N, H). Grid (N / HEADS, ⌈T / BT⌉)."""
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    h = tl.arange(0, H // 2)
    cos, sin = _angles(cos_ptr, sin_ptr, t, T, H)
    if LOW:
        u = _low_rank_inputs(u_ptr, t, T, R, RP, WIDTH, START)
    if NORM:
        w1, w2 = tl.load(w_ptr + h).to(tl.float32)[None, :], tl.load(w_ptr + H // 2 + h).to(tl.float32)[None, :]
    for n in tl.range(0, HEADS, num_stages=STAGES):
        head = tl.program_id(0) * HEADS + n
        x1, x2 = _halves(x_ptr, t, head, T, N, H, T % BT != 0)
        if LOW:
            x1, x2 = _with_low_rank(x1, x2, u, b_ptr, head, R, RP, H)
        if NORM:
            r = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / H + eps)[:, None]
            x1, x2 = x1 * r * w1, x2 * r * w2
        _store_halves(y_ptr, t, head, x1 * cos - x2 * sin, x2 * cos + x1 * sin, T, N, H)


@triton.jit
def backward(
    x_ptr, u_ptr, b_ptr, w_ptr, cos_ptr, sin_ptr, dy_ptr, dx_ptr, dw_ptr,
    eps: tl.constexpr, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    WIDTH: tl.constexpr, START: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
    LOW: tl.constexpr, NORM: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """dx (T, N, H), and where DW each program's part of dw (programs, H) float32. Grid (N / HEADS, ⌈T / BT⌉)."""
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    h = tl.arange(0, H // 2)
    cos, sin = _angles(cos_ptr, sin_ptr, t, T, H)
    dw1, dw2 = tl.zeros((H // 2,), tl.float32), tl.zeros((H // 2,), tl.float32)
    if LOW and NORM:
        u = _low_rank_inputs(u_ptr, t, T, R, RP, WIDTH, START)
    if NORM:
        w1, w2 = tl.load(w_ptr + h).to(tl.float32)[None, :], tl.load(w_ptr + H // 2 + h).to(tl.float32)[None, :]
    for n in tl.range(0, HEADS, num_stages=STAGES):
        head = tl.program_id(0) * HEADS + n
        dy1, dy2 = _halves(dy_ptr, t, head, T, N, H, T % BT != 0)
        dn1, dn2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
        if NORM:
            x1, x2 = _halves(x_ptr, t, head, T, N, H, T % BT != 0)
            if LOW:
                x1, x2 = _with_low_rank(x1, x2, u, b_ptr, head, R, RP, H)
            r = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / H + eps)[:, None]
            x1, x2 = x1 * r, x2 * r
            if DW:
                dw1 += tl.sum(dn1 * x1, 0)
                dw2 += tl.sum(dn2 * x2, 0)
            dn1, dn2 = dn1 * w1, dn2 * w2
            mean = ((tl.sum(dn1 * x1, 1) + tl.sum(dn2 * x2, 1)) / H)[:, None]
            dn1, dn2 = r * (dn1 - x1 * mean), r * (dn2 - x2 * mean)
        _store_halves(dx_ptr, t, head, dn1, dn2, T, N, H)
    if DW:
        at = dw_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * H + h
        tl.store(at, dw1)
        tl.store(at + H // 2, dw2)
