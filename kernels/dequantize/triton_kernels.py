"""The Triton kernels that read NF4: packed nibbles and 8-bit scales in; out come dense weights, or a product with them.

`nf4`, one pass:

    out[2i] = levels[codes[i] >> 4] · s,  out[2i + 1] = levels[codes[i] & 15] · s
    s = map[scales[b]] · nested[b // 256] + offset                  for block b

Tiles. A program writes UNROLL rows of THREADS · 4 bytes; a thread owns 4 neighbouring bytes of a row, which never cross
a block: one 4-byte load, one scale, eight look-ups of the 64-byte table (always in L1) and one store of 8 values, 16
bytes in bfloat16. Traffic for bfloat16: 0.5 + 2 + 1/64 bytes a value.
Nothing is kept for backward. Fusion of products and sums is off: a scale is rounded twice, as bitsandbytes rounds it.
A layer of a stack is read where it lies: sliced by XLA, each of the four arrays would be copied first.
Measured: docs/log.md; 34 µs for 14336 × 4096 is what the memory of an H200 allows.

`product`, for the few rows of a step of generation:

    out[part, o, m] = Σ_i x[m, i] · W[o, i]   over the part's i, W as above, rounded to x's dtype

Tiles. A program holds BO rows of W and walks over one of `parts` parts of its columns, BK bytes at a time, which are
of one block, so that a row has one scale there; its even and odd columns, the high and low nibbles, are two products
with the even and the odd columns of x. W is read once, in 4 bits, and never written. Sums are float32; the parts are
added up outside.
Measured: docs/log.md.
"""

import triton
import triton.language as tl


@triton.jit
def _of_layer(
    codes, scales, nested, offset, layer,
    N: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, STACKED: tl.constexpr,
):  # fmt: skip
    """Where the arrays of a weight of N values begin; STACKED: of that layer of a stack."""
    if STACKED:
        at = tl.load(layer).to(tl.int64)
        blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
        codes += at * ((N + 1) // 2)
        scales += at * blocks
        if DOUBLE:
            nested += at * ((blocks + NESTED - 1) // NESTED)
            offset += at
    return codes, scales, nested, offset


@triton.jit
def nf4(
    codes, scales, nested, offset, layer, levels, entries, out,
    N: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, STACKED: tl.constexpr,
    UNROLL: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """N values in out, BLOCK of them a scale, NESTED scales a second one; STACKED: of that layer of a stack."""
    codes, scales, nested, offset = _of_layer(codes, scales, nested, offset, layer, N, BLOCK, NESTED, DOUBLE, STACKED)
    first = tl.program_id(0) * (UNROLL * THREADS)  # counted in groups of 4 bytes
    # threads stand in the first dimension: of two that are equally far apart Triton spreads a warp over the first
    row = tl.arange(0, UNROLL)[None, :, None] * THREADS
    group = first + row + tl.arange(0, THREADS)[:, None, None]
    byte = group * 4 + tl.arange(0, 4)[None, None, :]
    if N % (UNROLL * THREADS * 8) == 0:
        packed = tl.load(codes + byte).to(tl.int32)
        block = group * 8 // BLOCK
    else:
        packed = tl.load(codes + byte, mask=byte < (N + 1) // 2, other=0).to(tl.int32)
        block = tl.minimum(group * 8, N - 1) // BLOCK
    if DOUBLE:
        scale = tl.load(entries + tl.load(scales + block).to(tl.int32)) * tl.load(nested + block // NESTED)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(scales + block)
    high = tl.load(levels + (packed >> 4)) * scale
    low = tl.load(levels + (packed & 15)) * scale
    values = tl.reshape(tl.join(high, low).to(out.dtype.element_ty), (THREADS, UNROLL, 8))
    at = group * 8 + tl.arange(0, 8)[None, None, :]
    if N % (UNROLL * THREADS * 8) == 0:
        tl.store(out + at, values)
    else:
        tl.store(out + at, values, mask=at < N)


@triton.jit
def product(
    x, codes, scales, nested, offset, layer, levels, entries, out,
    O: tl.constexpr, I: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr,
    STACKED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x: (2, I/2, ROWS), even and odd columns; out: (parts, O, ROWS) float32.

    Grid (tiles of O, parts of STEPS · BK bytes of a row). BK divides a block's bytes, and a block a row.
    """
    codes, scales, nested, offset = _of_layer(
        codes, scales, nested, offset, layer, O * I, BLOCK, NESTED, DOUBLE, STACKED
    )
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    row = tl.minimum(o, O - 1)  # what is past the end is computed and not stored
    m = tl.arange(0, ROWS)
    total = tl.zeros((BO, ROWS), tl.float32)
    first = tl.program_id(1) * STEPS * BK
    for start in range(first, tl.minimum(first + STEPS * BK, I // 2), BK):
        byte = start + tl.arange(0, BK)
        packed = tl.load(codes + row[:, None] * (I // 2) + byte[None, :]).to(tl.int32)
        block = row * (I // BLOCK) + start * 2 // BLOCK
        if DOUBLE:
            scale = tl.load(entries + tl.load(scales + block).to(tl.int32)) * tl.load(nested + block // NESTED)
            scale = scale + tl.load(offset)
        else:
            scale = tl.load(scales + block)
        at = byte[:, None] * ROWS + m[None, :]
        even = tl.load(x + at)
        odd = tl.load(x + I // 2 * ROWS + at)
        high = (tl.load(levels + (packed >> 4)) * scale[:, None]).to(even.dtype)
        low = (tl.load(levels + (packed & 15)) * scale[:, None]).to(even.dtype)
        total = tl.dot(high, even, total)
        total = tl.dot(low, odd, total)
    at = (tl.program_id(1) * O + o)[:, None] * ROWS + m[None, :]
    tl.store(out + at, total, mask=(o < O)[:, None])
