"""The Triton kernel of an AdamW step with moments in 8 bits: one pass, in place.

    g = grad · factor,  m = b1 · levels[mu] · top + (1 − b1) · g,  v = b2 · squares[nu] · top + (1 − b2) · g²
    param −= rate · ((m / first) / (√(v / second) + eps) + decay · param)

Tiles. A program holds ROWS blocks of 256 numbers and all that belongs to them, best a block a warp. Traffic with
bfloat16 parameters: 10 bytes a number (param, grad and two codes read; param and two codes written), where XLA's
fusions, which pass over the numbers again for each maximum and each code, take about 40. So little traffic leaves
time for few instructions: numbers lie in one dimension, in which Triton gives a table's look-up the layout of the loads
around it (in two it turns every array over, through shared memory); a code is one look and one addition (`tables`); a
row is divided by its largest magnitude through one reciprocal. Sums are float32.
Rounding. A bfloat16 parameter gets 16 random bits below its last one before the lower half is cut off: the bits are
a finaliser's (MurmurHash3's, public domain) of the number's place and the step's seed.
Measured: docs/log.md.
"""

import triton
import triton.language as tl


@triton.jit
def _spread(of_rows, BLOCK: tl.constexpr):
    """(ROWS,) to (ROWS · BLOCK,): each row's value at its numbers."""
    ROWS: tl.constexpr = of_rows.shape[0]
    return tl.reshape(tl.broadcast_to(of_rows[:, None], (ROWS, BLOCK)), (ROWS * BLOCK,))


@triton.jit
def _share(value, top, BLOCK: tl.constexpr):
    """value / top, rounded once where it is not below 2^-24, by one division a row; a row's top is above 0.

    top is scaled to 1 … 2 (to less if it is subnormal, to 2 … 4 in the last octave), value with it. One step of
    Newton's brings the quotient to a neighbour of the right one, and by Markstein's theorem (1990) the next to the
    right one, since the reciprocal is rounded right and the remainder exact.
    """
    scale = (tl.maximum(254 - (top.to(tl.int32, bitcast=True) >> 23), 1) << 23).to(tl.float32, bitcast=True)
    divisor = top * scale
    inverse = _spread(tl.div_rn(1.0, divisor), BLOCK)
    value, divisor = value * _spread(scale, BLOCK), _spread(-divisor, BLOCK)
    x = value * inverse
    x = tl.fma(tl.fma(x, divisor, value), inverse, x)
    return tl.fma(tl.fma(x, divisor, value), inverse, x)


@triton.jit
def _code(x, entries, LOWEST: tl.constexpr, LAST: tl.constexpr, SIGNED: tl.constexpr):
    """The code of the level nearest to x, uint8; a tie goes to the lower level: `tables` has the entries."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    entry = tl.load(entries + tl.minimum(tl.maximum((bits >> 16) - LOWEST, 0), LAST))
    if SIGNED:
        # of a negative number the middle itself counts as above: its mirror's lower level is the one farther out
        negative = x.to(tl.int32, bitcast=True) >> 31  # -1, else 0
        code = (entry + (bits & 0xFFFF) - negative) >> 17
        code = tl.maximum((code ^ negative) + (negative & 255), 0)  # 254 - code
    else:
        code = (entry + (bits & 0xFFFF)) >> 17
    return code.to(tl.uint8)


@triton.jit
def step(
    param, grad, mu, mu_top, nu, nu_top, scalars, seed, levels, entries, squares, square_entries,
    param_out, mu_out, mu_top_out, nu_out, nu_top_out,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr,
    LAST: tl.constexpr, b1: tl.constexpr, b2: tl.constexpr, eps: tl.constexpr, decay: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Grid (blocks / ROWS, layers); a layer has SIZE numbers in BLOCKS blocks. The outputs lie where the inputs do."""
    if tl.load(scalars + 4) != 0:
        factor, rate = tl.load(scalars), tl.load(scalars + 1)
        first, second = tl.load(scalars + 2), tl.load(scalars + 3)
        layer = tl.program_id(1).to(tl.int64)
        block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        number = tl.program_id(0) * ROWS * BLOCK + tl.arange(0, ROWS * BLOCK)
        inside, there = number < SIZE, number < BLOCKS * BLOCK
        at, coded, row = layer * SIZE + number, layer * BLOCKS * BLOCK + number, layer * BLOCKS + block
        held = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
        m_code, v_code = tl.load(mu + coded, mask=there, other=127), tl.load(nu + coded, mask=there, other=0)
        m_top = tl.load(mu_top + row, mask=block < BLOCKS, other=0.0)
        v_top = tl.load(nu_top + row, mask=block < BLOCKS, other=0.0)
        m = b1 * (tl.load(levels + m_code.to(tl.int32)) * _spread(m_top, BLOCK)) + (1 - b1) * g
        v = b2 * (tl.load(squares + v_code.to(tl.int32)) * _spread(v_top, BLOCK)) + (1 - b2) * g * g
        value = held - (m * (rate / first) / (tl.sqrt(v * (1 / second)) + eps) + rate * decay * held)
        if ROUND:
            noise = at.to(tl.uint32) * 0x9E3779B1 + tl.load(seed)
            noise = (noise ^ (noise >> 16)) * 0x85EBCA6B
            noise = (noise ^ (noise >> 13)) * 0xC2B2AE35
            bits = value.to(tl.uint32, bitcast=True) + (noise >> 16)
            rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            tl.store(
                param_out + at, tl.where(tl.abs(value) < float("inf"), rounded, value.to(tl.bfloat16)), mask=inside
            )
        else:
            tl.store(param_out + at, value, mask=inside)
        m_top = tl.max(tl.reshape(tl.abs(m), (ROWS, BLOCK)), axis=1)
        v_top = tl.max(tl.reshape(v, (ROWS, BLOCK)), axis=1)
        tl.store(mu_top_out + row, m_top, mask=block < BLOCKS)
        tl.store(nu_top_out + row, v_top, mask=block < BLOCKS)
        m_top, v_top = tl.where(m_top > 0, m_top, 1.0), tl.where(v_top > 0, v_top, 1.0)
        m_code = _code(_share(m, m_top, BLOCK), entries, LOWEST, LAST, True)
        v_code = _code(_share(v, v_top, BLOCK), square_entries, LOWEST, LAST, False)
        tl.store(mu_out + coded, m_code, mask=there)
        tl.store(nu_out + coded, v_code, mask=there)
