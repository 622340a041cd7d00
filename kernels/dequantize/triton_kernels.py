"""The Triton kernels that read NF4: packed nibbles and 8-bit scales in; out come dense weights, or a product with them.

`nf4`, one pass over one weight or several:

    out[2i] = levels[codes[i] >> 4] · s,  out[2i + 1] = levels[codes[i] & 15] · s
    s = map[scales[b]] · nested[b // 256] + offset                  for block b

Several weights are one launch: while one starts and ends, little is written. Each has its own arrays and its own tiles
of the grid; sizes are tuples, one entry a weight, and arrays that are not there are stood for by another weight's.
Tiles. A program writes UNROLL rows of THREADS · 4 bytes; a thread owns 4 neighbouring bytes of a row, which never cross
a block: one 4-byte load, one scale, eight look-ups of the 64-byte table (always in L1) and one store of 8 values, 16
bytes in bfloat16. Traffic for bfloat16: 0.5 + 2 + 1/64 bytes a value.
Nothing is kept for backward. Fusion of products and sums is off: a scale is rounded twice, as bitsandbytes rounds it.
A layer of a stack is read where it lies: sliced by XLA, each of the four arrays would be copied first.
Measured: docs/log.md; 34 µs for 14336 × 4096 is what the memory of an H200 allows.

`product`, for the few rows of a step of generation:

    out[part, m, o] = Σ_b s[b] · Σ_i levels[code[o, i]] · x[m, i]   over the part's blocks b of row o, and i in b

Tiles. A program holds BO rows of W and walks over one of `parts` parts of their columns; a thread takes groups of
WORDS · 4 bytes of codes, neighbours of a warp those next to each other in a row. A code becomes its level by a shuffle
(`levels_of`): shift, shuffle, and one fused multiply-add for each row of x. A level is float32 and exact; a group's sum
is scaled once, so that no value of W is rounded to x's dtype. x is read where it lies, 8 bytes at a time, from L1, and
serves all rows of W that a thread has. W is read once for 8 rows of x, in 4 bits, and never written. Sums are float32;
the parts are added up outside. No shared memory and no barrier before the last sum over a row's lanes.
Compiled for sm_90 and bfloat16, a step of the loop has 4.4 instructions a value with one row of x and 15 with 8, 56 and
168 registers, none spilled; not measured on a card yet. Levels looked up in memory are no way: Triton makes each an
asynchronous copy of 4 bytes to shared memory where it pipelines the loop (docs/log.md).
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
def _tile(
    codes, scales, nested, offset, layer, levels, entries, out, tile,
    N: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, STACKED: tl.constexpr,
    UNROLL: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """That tile of the N values in out."""
    codes, scales, nested, offset = _of_layer(codes, scales, nested, offset, layer, N, BLOCK, NESTED, DOUBLE, STACKED)
    first = tile * (UNROLL * THREADS)  # counted in groups of 4 bytes
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
def nf4(
    codes0, codes1, codes2, scales0, scales1, scales2, nested0, nested1, nested2, offset0, offset1, offset2,
    layer0, layer1, layer2, levels, entries, after, out0, out1, out2,
    COUNT: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, STACKED: tl.constexpr, BLOCK: tl.constexpr,
    NESTED: tl.constexpr, DOUBLE: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """N[i] values in out i, BLOCK of them a scale, NESTED scales a second one; STACKED[i]: of that layer of a stack.

    Grid (TILE[COUNT],); weight i has the tiles from TILE[i] on. after: for the order alone, it is not read.
    """
    n = tl.program_id(0)
    codes, scales, nested = (codes0, codes1, codes2), (scales0, scales1, scales2), (nested0, nested1, nested2)
    offsets, layers, outs = (offset0, offset1, offset2), (layer0, layer1, layer2), (out0, out1, out2)
    for i in tl.static_range(COUNT):
        if (n >= TILE[i]) & (n < TILE[i + 1]):
            _tile(
                codes[i], scales[i], nested[i], offsets[i], layers[i], levels, entries, outs[i], n - TILE[i],
                N[i], BLOCK, NESTED, DOUBLE, STACKED[i], UNROLL, THREADS,
            )  # fmt: skip


@triton.jit
def levels_of(word, levels):
    """The levels of the 8 codes in each 4 bytes, in the order of their columns: 8 arrays of word's shape.

    Every lane of a warp holds the level of its number's lowest 4 bits, and a shuffle within 16 lanes asks the one of a
    code's number: what looks up in no memory and is exact. It reads the lowest 4 bits of what it is given.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lane, level, code;
        .reg .b64 at;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mul.wide.u32 at, lane, 4;
        add.s64 at, at, $9;
        ld.global.nc.b32 level, [at];
        shr.u32 code, $8, 4;
        shfl.sync.idx.b32 $0, level, code, 0x101f, 0xffffffff;
        shfl.sync.idx.b32 $1, level, $8, 0x101f, 0xffffffff;
        shr.u32 code, $8, 12;
        shfl.sync.idx.b32 $2, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 8;
        shfl.sync.idx.b32 $3, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 20;
        shfl.sync.idx.b32 $4, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 16;
        shfl.sync.idx.b32 $5, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 28;
        shfl.sync.idx.b32 $6, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 24;
        shfl.sync.idx.b32 $7, level, code, 0x101f, 0xffffffff;
        }""",
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,l", [word, levels], dtype=(tl.float32,) * 8, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def product(
    x, codes, scales, nested, offset, layer, levels, entries, out,
    O: tl.constexpr, I: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr,
    STACKED: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BO: tl.constexpr,
    BG: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """x: (M, I); out: (parts, M, O). Grid (tiles of BO of O, parts of STEPS · BG groups of a row, parts of ROWS of M).

    A group is WORDS times 4 bytes of codes, 8 columns each; it is of one block and of one row.
    """
    codes, scales, nested, offset = _of_layer(
        codes, scales, nested, offset, layer, O * I, BLOCK, NESTED, DOUBLE, STACKED
    )
    groups: tl.constexpr = I // (8 * WORDS)
    kind: tl.constexpr = x.dtype.element_ty
    size: tl.constexpr = kind.primitive_bitwidth
    bits: tl.constexpr = tl.int16 if size == 16 else tl.int32
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    row = tl.minimum(o, O - 1)  # what is past the end is computed and not stored
    # groups stand in the first dimension: of two that are equally far apart Triton spreads a warp over the first
    group = tl.arange(0, BG)
    word = tl.arange(0, WORDS)[None, None, :]
    codes = codes.to(tl.pointer_type(tl.int32)) + row[None, :, None] * (I // 8) + word
    x = x.to(tl.pointer_type(tl.int64)) + word * (size // 8)
    first = tl.program_id(1) * (STEPS * BG)
    last = tl.minimum(first + STEPS * BG, groups)
    first_row = tl.program_id(2) * ROWS
    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (tl.zeros((BG, BO), tl.float32),)  # type: ignore[assignment]  # one longer
    packed = tl.load(codes + tl.minimum(first + group, last - 1)[:, None, None] * WORDS)
    for start in range(first, last, BG):
        at = tl.minimum(start + group, last - 1)
        # the next step's codes are asked for before this one's are worked on
        following = tl.load(codes + tl.minimum(start + BG + group, last - 1)[:, None, None] * WORDS)
        block = (row[None, :] * I + at[:, None] * (8 * WORDS)).to(tl.uint32) // BLOCK  # unsigned: a shift
        if DOUBLE:
            scale = tl.load(entries + tl.load(scales + block).to(tl.int32)) * tl.load(nested + block // NESTED)
            scale = scale + tl.load(offset)
        else:
            scale = tl.load(scales + block)
        if groups % BG:
            scale = tl.where((start + group < last)[:, None], scale, 0.0)
        level = levels_of(packed, levels)
        sums = ()
        for m in tl.static_range(ROWS):
            line = first_row + m
            if M % ROWS:
                line = tl.minimum(line, M - 1)
            part = tl.zeros((BG, BO, WORDS), tl.float32)
            for some in tl.static_range(size // 8):  # 64 bits of x at a time
                numbers = tl.load(x + (line * (I * size // 64) + at[:, None, None] * (WORDS * size // 8) + some))
                for k in tl.static_range(64 // size):
                    if kind == tl.bfloat16:  # the upper half of a float32
                        pair = (numbers >> (k // 2 * 32)).to(tl.int32)
                        number = (pair & -65536 if k % 2 else pair << 16).to(tl.float32, bitcast=True)
                    else:
                        number = (numbers >> (k * size)).to(bits).to(kind, bitcast=True).to(tl.float32)
                    part = tl.fma(level[some * (64 // size) + k], number, part)
            sums += (tl.fma(tl.sum(part, 2), scale, totals[m]),)  # type: ignore[assignment]
        totals = sums
        packed = following
    for m in tl.static_range(ROWS):
        end = tl.where(first_row + m < M, O, 0)
        to = out + (tl.program_id(1) * M + first_row + m) * O + o
        tl.store(to, tl.sum(totals[m], 0).to(out.dtype.element_ty), mask=o < end)
