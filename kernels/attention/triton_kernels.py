"""The Triton kernels of packed causal attention: forward, dq, and dk with dv. `triton.py` launches them.

Per query head n of kv head n // G, query t, keys s with first_key[t] <= s <= t:

    x = raw · factor            raw = q·k, factor = scale · log2 e            (logits in base 2)
                                with softcap: raw = tanh(q·k · scale / cap), factor = cap · log2 e
    lse = log2 Σ 2^x    out = Σ 2^(x − lse) v
    delta = Σ_h dout · out      ds = 2^(x − lse) · (dout·v − delta) · (1 − raw² where capped)
    dq = scale Σ_s ds k         dk = scale Σ_n,t ds q         dv = Σ_n,t 2^(x − lse) dout

Tiles. A program of `forward` and of `queries_backward` holds BQ queries of one head and walks over tiles of BK keys;
one of `keys_backward` holds BK keys of one kv head and walks over tiles of BQ queries of each of its G query heads, so
that dk and dv are sums in registers and no atomics are needed. A walk covers only tiles that some query of the tile
reaches, in three loops: masked tiles (the document's or window's start), full tiles, masked tiles (the diagonal).
Sums are float32. Head sizes that are no power of two are padded to one (HP) by masked loads.

Kept for the backward: out and lse (B, N, T) float32. delta comes out of `queries_backward` for `keys_backward`.
Sources: Dao 2023 (https://arxiv.org/abs/2307.08691) for the sums; the key ranges are this project's.
Measured on an H200 beside cuDNN: the figures stand in `cudnn.py` and docs/log.md.
"""

import triton
import triton.language as tl

from jaxft.kernels.triton_tanh import tanh

LOG2E = tl.constexpr(1.4426950408889634)
# the raw score of a hidden key: finite, so that a row of a tile may be hidden wholly, and a power of two, so that its
# product with the factor is exact, the exponent there 0, and what it adds goes away with the first key that is seen
HIDDEN = tl.constexpr(-(2.0**99))


@triton.jit
def _rows(base, start, count, STRIDE: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
          EDGE: tl.constexpr):  # fmt: skip
    """Loads rows start … start + ROWS − 1 as (ROWS, HP); zeros past `count` (only where EDGE) and past H."""
    row = tl.arange(0, ROWS)
    h = tl.arange(0, HP)
    at = base + (tl.full((), 0, tl.int64) + start) * STRIDE + row[:, None] * STRIDE + h[None, :]
    if EDGE and H < HP:
        return tl.load(at, mask=(start + row < count)[:, None] & (h < H)[None, :], other=0.0)
    elif EDGE:
        return tl.load(at, mask=(start + row < count)[:, None], other=0.0)
    elif H < HP:
        return tl.load(at, mask=(h < H)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store_rows(base, x, start, count, STRIDE: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr):
    """Writes x (ROWS, HP) to rows start …, without what lies past `count` and H."""
    row = tl.arange(0, ROWS)
    h = tl.arange(0, HP)
    at = base + (tl.full((), 0, tl.int64) + start) * STRIDE + row[:, None] * STRIDE + h[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(start + row < count)[:, None] & (h < H)[None, :])


@triton.jit
def _raw(products, scale: tl.constexpr, softcap: tl.constexpr):
    if softcap is None:
        return products
    else:
        return tanh(products, scale / softcap)


@triton.jit
def _seen(key, first, last):
    """first <= key <= last, by one comparison: below first the difference wraps around."""
    return (key - first).to(tl.uint32, bitcast=True) <= (last - first).to(tl.uint32, bitcast=True)


@triton.jit
def _query_walk(first, q0, T, BQ: tl.constexpr, BK: tl.constexpr):
    """The ends of the three loops over keys: masked [a, b), full [b, c), masked [c, d)."""
    a = tl.min(first) // BK * BK
    d = tl.minimum(q0 + BQ, T)
    b = tl.minimum((tl.max(first) + BK - 1) // BK * BK, d)
    c = tl.maximum((q0 + 1) // BK * BK, b)  # a tile below c ends at or before the block's first query
    return a, b, c, d


@triton.jit
def _forward_tiles(
    acc, top, total, q, k_base, v_base, first, t, begin, end, T,
    scale: tl.constexpr, softcap: tl.constexpr, KV_STRIDE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BK: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    factor: tl.constexpr = (scale if softcap is None else softcap) * LOG2E
    for k0 in range(begin, end, BK):
        k = _rows(k_base, k0, T, KV_STRIDE, BK, H, HP, EDGE and MASKED)
        raw = _raw(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
        if MASKED:
            key = k0 + tl.arange(0, BK)
            raw = tl.where(_seen(key[None, :], first[:, None], t[:, None]), raw, HIDDEN)
        higher = tl.maximum(top, tl.max(raw, 1) * factor)
        p = tl.exp2(raw * factor - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = _rows(v_base, k0, T, KV_STRIDE, BK, H, HP, EDGE and MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr,
    scale: tl.constexpr, softcap: tl.constexpr, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N, query tiles, B), the longest walks first."""
    n = tl.program_id(0)
    q0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ
    b = tl.program_id(2).to(tl.int64)
    head = n // (N // K)
    k_base = k_ptr + b * T * K * H + head * H
    v_base = v_ptr + b * T * K * H + head * H
    t = q0 + tl.arange(0, BQ)
    first = tl.load(first_ptr + b * T + tl.minimum(t, T - 1))
    q = _rows(q_ptr + b * T * N * H + n * H, q0, T, N * H, BQ, H, HP, EDGE)
    acc = tl.zeros((BQ, HP), tl.float32)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    begin, full, diagonal, end = _query_walk(first, q0, T, BQ, BK)
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_base, v_base, first, t, begin, full, T, scale, softcap, K * H, H, HP, BK, EDGE, True,
        PRECISION,
    )  # fmt: skip
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_base, v_base, first, t, full, diagonal, T, scale, softcap, K * H, H, HP, BK, EDGE, False,
        PRECISION,
    )  # fmt: skip
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_base, v_base, first, t, diagonal, end, T, scale, softcap, K * H, H, HP, BK, EDGE, True,
        PRECISION,
    )  # fmt: skip
    _store_rows(out_ptr + b * T * N * H + n * H, acc / total[:, None], q0, T, N * H, BQ, H, HP)
    tl.store(lse_ptr + (b * N + n) * T + t, top + tl.log2(total), mask=t < T)


@triton.jit
def _dq_tiles(
    dq, q, dout, lse, delta, k_base, v_base, first, t, begin, end, T,
    scale: tl.constexpr, softcap: tl.constexpr, KV_STRIDE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BK: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    factor: tl.constexpr = (scale if softcap is None else softcap) * LOG2E
    for k0 in range(begin, end, BK):
        k = _rows(k_base, k0, T, KV_STRIDE, BK, H, HP, EDGE and MASKED)
        v = _rows(v_base, k0, T, KV_STRIDE, BK, H, HP, EDGE and MASKED)
        raw = _raw(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
        p = tl.exp2(raw * factor - lse[:, None])
        if MASKED:
            key = k0 + tl.arange(0, BK)
            p = tl.where(_seen(key[None, :], first[:, None], t[:, None]), p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if softcap is not None:
            ds = ds * (1.0 - raw * raw)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries_backward(
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, delta_ptr,
    scale: tl.constexpr, softcap: tl.constexpr, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta (B, N, T) on the way. Grid as `forward`."""
    n = tl.program_id(0)
    q0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ
    b = tl.program_id(2).to(tl.int64)
    head = n // (N // K)
    q_offset = b * T * N * H + n * H
    k_base = k_ptr + b * T * K * H + head * H
    v_base = v_ptr + b * T * K * H + head * H
    t = q0 + tl.arange(0, BQ)
    first = tl.load(first_ptr + b * T + tl.minimum(t, T - 1))
    dout = _rows(dout_ptr + q_offset, q0, T, N * H, BQ, H, HP, EDGE)
    out = _rows(out_ptr + q_offset, q0, T, N * H, BQ, H, HP, EDGE)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (b * N + n) * T + t, delta, mask=t < T)
    lse = tl.load(lse_ptr + (b * N + n) * T + tl.minimum(t, T - 1))
    q = _rows(q_ptr + q_offset, q0, T, N * H, BQ, H, HP, EDGE)
    dq = tl.zeros((BQ, HP), tl.float32)
    begin, full, diagonal, end = _query_walk(first, q0, T, BQ, BK)
    dq = _dq_tiles(
        dq, q, dout, lse, delta, k_base, v_base, first, t, begin, full, T, scale, softcap, K * H, H, HP, BK, EDGE, True,
        PRECISION,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, dout, lse, delta, k_base, v_base, first, t, full, diagonal, T, scale, softcap, K * H, H, HP, BK, EDGE,
        False, PRECISION,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, dout, lse, delta, k_base, v_base, first, t, diagonal, end, T, scale, softcap, K * H, H, HP, BK, EDGE,
        True, PRECISION,
    )  # fmt: skip
    _store_rows(dq_ptr + q_offset, dq * scale, q0, T, N * H, BQ, H, HP)


@triton.jit
def _dkv_tiles(
    dk, dv, k, v, key, q_base, dout_base, first_base, lse_base, delta_base, begin, end, T,
    scale: tl.constexpr, softcap: tl.constexpr, Q_STRIDE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BQ: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    factor: tl.constexpr = (scale if softcap is None else softcap) * LOG2E
    for q0 in range(begin, end, BQ):
        t = q0 + tl.arange(0, BQ)
        at = tl.minimum(t, T - 1) if EDGE and MASKED else t
        q = _rows(q_base, q0, T, Q_STRIDE, BQ, H, HP, EDGE and MASKED)
        lse = tl.load(lse_base + at)
        raw = _raw(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)  # (BK, BQ)
        p = tl.exp2(raw * factor - lse[None, :])
        if MASKED:
            first = tl.load(first_base + at)
            seen = (key[:, None] <= t[None, :]) & (key[:, None] >= first[None, :])  # `_seen` would take more registers
            if EDGE:
                seen = seen & (t < T)[None, :]
            p = tl.where(seen, p, 0.0)
        dout = _rows(dout_base, q0, T, Q_STRIDE, BQ, H, HP, EDGE and MASKED)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        delta = tl.load(delta_base + at)
        ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
        if softcap is not None:
            ds = ds * (1.0 - raw * raw)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_backward(
    q_ptr, k_ptr, v_ptr, first_ptr, lse_ptr, dout_ptr, delta_ptr, full_end_ptr, last_end_ptr, dk_ptr, dv_ptr,
    scale: tl.constexpr, softcap: tl.constexpr, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid (K, key tiles, B). full_end, last_end (B, key tiles) int32 as `triton.reach` makes them."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    G: tl.constexpr = N // K
    k0 = tile * BK
    kv_offset = b * T * K * H + head * H
    key = k0 + tl.arange(0, BK)
    k = _rows(k_ptr + kv_offset, k0, T, K * H, BK, H, HP, EDGE)
    v = _rows(v_ptr + kv_offset, k0, T, K * H, BK, H, HP, EDGE)
    dk = tl.zeros((BK, HP), tl.float32)
    dv = tl.zeros((BK, HP), tl.float32)
    begin = k0 // BQ * BQ
    end = tl.load(last_end_ptr + b * tl.num_programs(1) + tile)
    # all queries of a tile in [full, tail) stand behind all these keys, and none of them starts after k0
    full = tl.minimum((k0 + BK - 1 + BQ - 1) // BQ * BQ, end)
    tail = tl.maximum(tl.load(full_end_ptr + b * tl.num_programs(1) + tile) // BQ * BQ, full)
    first_base = first_ptr + b * T
    for g in range(0, G):
        n = head * G + g
        q_base = q_ptr + b * T * N * H + n * H
        dout_base = dout_ptr + b * T * N * H + n * H
        lse_base = lse_ptr + (b * N + n) * T
        delta_base = delta_ptr + (b * N + n) * T
        dk, dv = _dkv_tiles(
            dk, dv, k, v, key, q_base, dout_base, first_base, lse_base, delta_base, begin, full, T, scale, softcap,
            N * H, H, HP, BQ, EDGE, True, PRECISION,
        )  # fmt: skip
        dk, dv = _dkv_tiles(
            dk, dv, k, v, key, q_base, dout_base, first_base, lse_base, delta_base, full, tail, T, scale, softcap,
            N * H, H, HP, BQ, EDGE, False, PRECISION,
        )  # fmt: skip
        dk, dv = _dkv_tiles(
            dk, dv, k, v, key, q_base, dout_base, first_base, lse_base, delta_base, tail, end, T, scale, softcap,
            N * H, H, HP, BQ, EDGE, True, PRECISION,
        )  # fmt: skip
    _store_rows(dk_ptr + kv_offset, dk * scale, k0, T, K * H, BK, H, HP)
    _store_rows(dv_ptr + kv_offset, dv, k0, T, K * H, BK, H, HP)
