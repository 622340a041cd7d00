"""The Triton kernel of NF4 dequantisation, one pass: packed nibbles and 8-bit scales in, dense weights out.

    out[2i] = levels[codes[i] >> 4] · s,  out[2i + 1] = levels[codes[i] & 15] · s
    s = map[scales[b]] · nested[b // 256] + offset                  for block b

Tiles. A program writes UNROLL rows of THREADS · 4 bytes; a thread owns 4 neighbouring bytes of a row, which never cross
a block: one 4-byte load, one scale, eight look-ups of the 64-byte table (always in L1) and one store of 8 values, 16
bytes in bfloat16. Traffic for bfloat16: 0.5 + 2 + 1/64 bytes a value.
Nothing is kept for backward. Fusion of products and sums is off: a scale is rounded twice, as bitsandbytes rounds it.
A layer of a stack is read where it lies: sliced by XLA, each of the four arrays would be copied first.
Measured: docs/log.md; 34 µs for 14336 × 4096 is what the memory of an H200 allows.
"""

import triton
import triton.language as tl


@triton.jit
def nf4(
    codes, scales, nested, offset, layer, levels, entries, out,
    N: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, STACKED: tl.constexpr,
    UNROLL: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """N values in out, BLOCK of them a scale, NESTED scales a second one; STACKED: of that layer of a stack."""
    if STACKED:
        at = tl.load(layer).to(tl.int64)
        blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
        codes += at * ((N + 1) // 2)
        scales += at * blocks
        if DOUBLE:
            nested += at * ((blocks + NESTED - 1) // NESTED)
            offset += at
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
