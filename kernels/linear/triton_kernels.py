"""The Triton kernels of a linear layer with LoRA: what is thin, and the sum of a layer's parts.

    G = [X₀ B₀ | X₁ B₁ | …]        `side_by_side`: X_i (T, K_i), B_i (K_i, R_i) with a few columns
    D_i = X_iᵀ U_i                 `over_tokens`: sums over all tokens, float32
    y = P + u bᵀ + bias + add      `summed`

A product with R columns is read and not computed: what decides is how much of X is on its way, and several short
products are one launch. `over_tokens`: a program holds BK columns of one X and walks over a chunk of the tokens; the
chunks are added up outside. `side_by_side`: BT tokens, and walks over the columns. `summed`: P (T, O) is the large
product, u the low-rank input, R columns from START of (T, WIDTH), b (O, R) the scaled B. A product of its own for u bᵀ
would write an array as wide as y for the large product to read. P is float32, as the product summed it up, and the sum
is rounded once. Were P rounded too, a small u bᵀ alone would be rounded away again; and P + add would often lie halfway
between two numbers of y's dtype, where the smallest u bᵀ carries it to the next, and a young adapter would do twice
what its numbers say. A program holds BT tokens by BO outputs.
Measured: docs/log.md. x Aᵀ, few columns of one X, is cuBLAS's: `side_by_side` was no faster.

Sizes of several products are tuples, one entry a product; arrays that are not there are stood for by another one.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(ptr, row, column, rows, columns: tl.constexpr, STRIDE: tl.constexpr):
    """ptr[row, column] of a (rows, columns) array whose rows are STRIDE apart; zeros outside."""
    at = ptr + row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _side(
    x_ptr, b_ptr, out_ptr, t, T: tl.constexpr, K: tl.constexpr, R: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rank = tl.arange(0, RP)
    total = tl.zeros((BT, RP), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        total = tl.dot(_rows(x_ptr, t, k, T, K, K), _rows(b_ptr, k, rank, K, R, R), total)
    at = out_ptr + t.to(tl.int64)[:, None] * WIDTH + START + rank[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (rank < R)[None, :])


@triton.jit
def side_by_side(
    x0, x1, x2, b0, b1, b2, out_ptr,
    COUNT: tl.constexpr, T: tl.constexpr, K: tl.constexpr, R: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G (T, WIDTH), product i in the columns from START[i] on. Grid (⌈T / BT⌉, COUNT)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    xs, bs = (x0, x1, x2), (b0, b1, b2)
    for i in tl.static_range(COUNT):
        if tl.program_id(1) == i:
            _side(xs[i], bs[i], out_ptr, t, T, K[i], R[i], START[i], WIDTH, RP[i], BT, BK, STAGES)


@triton.jit
def _over(
    x_ptr, u_ptr, out_ptr, tile, first, last, T: tl.constexpr, K: tl.constexpr, R: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, ACROSS: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    k = tile * BK + tl.arange(0, BK)
    rank = tl.arange(0, RP)
    total = tl.zeros((RP, BK), tl.float32)
    for t0 in tl.range(first, last, BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT)
        u = _rows(u_ptr + START, t, rank, T, R, WIDTH)
        total = tl.dot(tl.trans(u), _rows(x_ptr, t, k, T, K, K), total)
    if ACROSS:
        inside = (rank < R)[:, None] & (k < K)[None, :]
        tl.store(out_ptr + rank[:, None] * K + k[None, :], total, mask=inside)
    else:
        inside = (k < K)[:, None] & (rank < R)[None, :]
        tl.store(out_ptr + k[:, None] * R + rank[None, :], tl.trans(total), mask=inside)


@triton.jit
def over_tokens(
    x0, x1, x2, x3, u0, u1, u2, u3, out_ptr,
    COUNT: tl.constexpr, T: tl.constexpr, K: tl.constexpr, R: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    ACROSS: tl.constexpr, TILE: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr, RP: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each chunk's D (chunks, OUT[COUNT]) float32, product i from OUT[i] on, (K, R) or where ACROSS[i] (R, K).

    U_i: R[i] columns from START[i] on of an array of WIDTH[i]. Grid (TILE[COUNT], chunks); product i has the tiles from
    TILE[i] on. CHUNK, the tokens of a chunk, is a multiple of BT.
    """
    n = tl.program_id(0)
    first = tl.program_id(1) * CHUNK
    last = tl.minimum(first + CHUNK, T)
    out = out_ptr + tl.program_id(1).to(tl.int64) * OUT[COUNT]
    xs, us = (x0, x1, x2, x3), (u0, u1, u2, u3)
    for i in tl.static_range(COUNT):
        if (n >= TILE[i]) & (n < TILE[i + 1]):
            _over(
                xs[i], us[i], out + OUT[i], n - TILE[i], first, last, T, K[i], R[i], START[i], WIDTH[i], ACROSS[i],
                RP[i], BT, BK, STAGES,
            )  # fmt: skip


@triton.jit
def summed(
    p_ptr, u_ptr, b_ptr, bias_ptr, add_ptr, y_ptr,
    T: tl.constexpr, O: tl.constexpr, R: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, RP: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """y (T, O), with a bias (O,) and add (T, O) where there are such. Grid (⌈O / BO⌉, ⌈T / BT⌉)."""
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    rank = tl.arange(0, RP)
    total = _rows(p_ptr, t, o, T, O, O)
    if ADDED:
        total += _rows(add_ptr, t, o, T, O, O).to(tl.float32)
    if BIASED:
        total += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    total = tl.dot(_rows(u_ptr + START, t, rank, T, R, WIDTH), tl.trans(_rows(b_ptr, o, rank, O, R, R)), total)
    at = y_ptr + t.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & (o < O)[None, :])
