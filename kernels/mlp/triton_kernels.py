"""The Triton kernels of a gated MLP: what stands between its large products, in one pass each way. First with LoRA:

    e = E + u_e b_eᵀ,  v = V + u_v b_vᵀ,  h = act(e) · v          E, V (T, F): the large products of gate and up
    u_d = h A_dᵀ
    dh = DH + g_d A_d                                             DH (T, F): the large product of down's backward
    de = dh · v · act′(e),  dv = dh · act(e)
    dB_e = deᵀ u_e,  dB_v = dvᵀ u_v,  dA_d = g_dᵀ h

u, g (T, R) are the low-rank inputs and their gradients, u_e and u_v columns of one array, as one product makes them
(its width is the sum of both ranks, which may differ); b (F, R) is the scaled B of gate and up, A_d (R, F) the A of
down.

Tiles. A program of `forward` holds BT tokens and walks over one chunk of F in tiles of BF, so that u_d is a sum in
registers; each chunk writes its own, added up outside. (One program for all of F is too few where tokens are few: 2,048
of them filled 32 of 132 multiprocessors.) A program of `backward` holds BF features and walks over one chunk of the
tokens in tiles of BT, so that the gradients of the low-rank matrices are sums in registers; each chunk writes its own,
added up outside. The loops say how many tiles are on their way (STAGES): Triton fetches ahead of itself what a product
reads, and what is only added to one where the loop asks for it. Sums and everything elementwise are float32; e, v, h
and dh are never rounded before they are used.
Traffic: 3 and 5 arrays of (T, F), where separate passes take 8 and 18 (each low-rank product is written and read again,
and each thin product reads all of h, de or dv). Nothing is kept for the backward beyond E, V and u.
`product` and `product_backward` are the same without the low-rank parts, number by number.
In place: an output may lie where an input of its shape does, as every number is read by the program that writes it.
Measured: docs/log.md.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(−x)) within 2⁻²¹ of itself near 0 and |x| · 2⁻²⁴ far off, by two instructions that take no care of
    subnormal numbers, which are nothing beside 1. Triton's own exp and division do, at the price of registers. The
    interpreter has no such instructions: their values are checked on a card alone (`python -m jaxft`)."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        z = x * -1.4426950408889634
        z = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + z], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """act(x) and act′(x), float32."""
    if KIND == "silu":
        s = _sigmoid(x)
        y = x * s
        return y, s + y * (1.0 - s)
    else:  # gelu_pytorch_tanh: x σ(2z) with z = √(2/π) (x + 0.044715 x³)
        z2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = _sigmoid(z2)
        dz2 = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * s, s + x * s * (1.0 - s) * dz2


@triton.jit
def _matrix(
    base, row, column, rows, columns: tl.constexpr, EDGE: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr = 0
):
    """base[row, column] of a (rows, columns) array; zeros past its rows (where EDGE) and columns (where WIDE).

    STRIDE: how far apart its rows are, where that is not `columns`.
    """
    at = base + row.to(tl.int64)[:, None] * (STRIDE or columns) + column[None, :]
    if EDGE and WIDE:
        return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    elif EDGE:
        return tl.load(at, mask=(row < rows)[:, None], other=0.0)
    elif WIDE:
        return tl.load(at, mask=(column < columns)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _tile(at, inside, EDGE: tl.constexpr):
    if EDGE:
        return tl.load(at, mask=inside, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def forward(
    e_ptr, v_ptr, u_ptr, be_ptr, bv_ptr, ad_ptr, h_ptr, ud_ptr,
    T: tl.constexpr, F: tl.constexpr, RE: tl.constexpr, RV: tl.constexpr, RD: tl.constexpr, REP: tl.constexpr,
    RVP: tl.constexpr, RDP: tl.constexpr, KIND: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """h (T, F) and float32 sums of each chunk of CHUNK features: u_d (chunks, T, RD). Grid (token tiles, chunks).

    CHUNK is a multiple of BF. REP, RVP, RDP: the ranks padded to powers of two from 16.
    """
    chunk = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    TE: tl.constexpr = T % BT != 0
    FE: tl.constexpr = F % BF != 0
    re, rv, rd = tl.arange(0, REP), tl.arange(0, RVP), tl.arange(0, RDP)
    ue = _matrix(u_ptr, t, re, T, RE, TE, RE < REP, RE + RV)
    uv = _matrix(u_ptr + RE, t, rv, T, RV, TE, RV < RVP, RE + RV)
    ud = tl.zeros((BT, RDP), tl.float32)
    for f0 in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, F), BF, num_stages=STAGES):
        f = f0 + tl.arange(0, BF)
        be = _matrix(be_ptr, f, re, F, RE, FE, RE < REP)
        bv = _matrix(bv_ptr, f, rv, F, RV, FE, RV < RVP)
        ad = _matrix(ad_ptr, rd, f, RD, F, RD < RDP, FE)
        e = _matrix(e_ptr, t, f, T, F, TE, FE).to(tl.float32) + tl.dot(ue, tl.trans(be))
        v = _matrix(v_ptr, t, f, T, F, TE, FE).to(tl.float32) + tl.dot(uv, tl.trans(bv))
        activated, _ = _activation(e, KIND)
        h = (activated * v).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + t.to(tl.int64)[:, None] * F + f[None, :], h, mask=(t < T)[:, None] & (f < F)[None, :])
        ud = tl.dot(h, tl.trans(ad), ud)
    at = ud_ptr + (chunk.to(tl.int64) * T + t)[:, None] * RD + rd[None, :]
    tl.store(at, ud, mask=(t < T)[:, None] & (rd < RD)[None, :])


@triton.jit
def backward(
    e_ptr, v_ptr, dh_ptr, u_ptr, gd_ptr, be_ptr, bv_ptr, ad_ptr,
    de_ptr, dv_ptr, dbe_ptr, dbv_ptr, dad_ptr,
    T: tl.constexpr, F: tl.constexpr, RE: tl.constexpr, RV: tl.constexpr, RD: tl.constexpr, REP: tl.constexpr,
    RVP: tl.constexpr, RDP: tl.constexpr, KIND: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """de, dv (T, F) and float32 sums of each chunk: dB_e (chunks, F, RE), dB_v (chunks, F, RV), dA_d (chunks, RD, F).

    Grid (feature tiles, chunks); CHUNK, the tokens of a chunk, is a multiple of BT.
    """
    chunk = tl.program_id(1)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    TE: tl.constexpr = T % BT != 0
    FE: tl.constexpr = F % BF != 0
    re, rv, rd = tl.arange(0, REP), tl.arange(0, RVP), tl.arange(0, RDP)
    be = tl.trans(_matrix(be_ptr, f, re, F, RE, FE, RE < REP))
    bv = tl.trans(_matrix(bv_ptr, f, rv, F, RV, FE, RV < RVP))
    ad = _matrix(ad_ptr, rd, f, RD, F, RD < RDP, FE)
    dbe = tl.zeros((REP, BF), tl.float32)
    dbv = tl.zeros((RVP, BF), tl.float32)
    dad = tl.zeros((RDP, BF), tl.float32)
    for t0 in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT)
        ue = _matrix(u_ptr, t, re, T, RE, TE, RE < REP, RE + RV)
        uv = _matrix(u_ptr + RE, t, rv, T, RV, TE, RV < RVP, RE + RV)
        gd = _matrix(gd_ptr, t, rd, T, RD, TE, RD < RDP)
        e = _matrix(e_ptr, t, f, T, F, TE, FE).to(tl.float32) + tl.dot(ue, be)
        v = _matrix(v_ptr, t, f, T, F, TE, FE).to(tl.float32) + tl.dot(uv, bv)
        dh = _matrix(dh_ptr, t, f, T, F, TE, FE).to(tl.float32) + tl.dot(gd, ad)
        activated, slope = _activation(e, KIND)
        h = (activated * v).to(ue.dtype)
        de = (dh * v * slope).to(ue.dtype)
        dv = (dh * activated).to(ue.dtype)
        dbe = tl.dot(tl.trans(ue), de, dbe)
        dbv = tl.dot(tl.trans(uv), dv, dbv)
        dad = tl.dot(tl.trans(gd), h, dad)
        at = t.to(tl.int64)[:, None] * F + f[None, :]
        inside = (t < T)[:, None] & (f < F)[None, :]
        tl.store(de_ptr + at, de, mask=inside)
        tl.store(dv_ptr + at, dv, mask=inside)
    row = (chunk.to(tl.int64) * F + f)[:, None]
    tl.store(dbe_ptr + row * RE + re[None, :], tl.trans(dbe), mask=(f < F)[:, None] & (re < RE)[None, :])
    tl.store(dbv_ptr + row * RV + rv[None, :], tl.trans(dbv), mask=(f < F)[:, None] & (rv < RV)[None, :])
    at = dad_ptr + (chunk.to(tl.int64) * RD + rd)[:, None] * F + f[None, :]
    tl.store(at, dad, mask=(rd < RD)[:, None] & (f < F)[None, :])


@triton.jit
def product(e_ptr, v_ptr, h_ptr, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """h = act(e) · v for N numbers. Grid (N / BLOCK,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    e = _tile(e_ptr + at, inside, N % BLOCK != 0).to(tl.float32)
    v = _tile(v_ptr + at, inside, N % BLOCK != 0).to(tl.float32)
    activated, _ = _activation(e, KIND)
    tl.store(h_ptr + at, (activated * v).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product_backward(
    e_ptr, v_ptr, dh_ptr, de_ptr, dv_ptr, h_ptr, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """de, dv and h for N numbers. Grid (N / BLOCK,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    e = _tile(e_ptr + at, inside, N % BLOCK != 0).to(tl.float32)
    v = _tile(v_ptr + at, inside, N % BLOCK != 0).to(tl.float32)
    dh = _tile(dh_ptr + at, inside, N % BLOCK != 0).to(tl.float32)
    activated, slope = _activation(e, KIND)
    dtype = h_ptr.dtype.element_ty
    tl.store(de_ptr + at, (dh * v * slope).to(dtype), mask=inside)
    tl.store(dv_ptr + at, (dh * activated).to(dtype), mask=inside)
    tl.store(h_ptr + at, (activated * v).to(dtype), mask=inside)
