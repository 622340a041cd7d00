"""The Triton kernel of an AdamW step with moments in 8 bits: one pass, in place.

    g = grad · factor,  m = b1 · levels[mu] · top + (1 − b1) · g,  v = b2 · squares[nu] · top + (1 − b2) · g²
    param −= rate · ((m / first) / (√(v / second) + eps) + decay · param)

Tiles. A program holds ROWS blocks of 256 numbers and all that belongs to them. Traffic with bfloat16 parameters: 10
bytes a number (param, grad and two codes read; param and two codes written), where XLA's fusions, which pass over the
numbers again for each maximum and each code, take about 40. A code is looked up by the number's exponent and 7 bits of
its mantissa and then put right against the middles around its level: no search. Sums are float32.
Rounding. A bfloat16 parameter gets 16 random bits below its last one before the lower half is cut off: the bits are
a finaliser's (MurmurHash3's, public domain) of the number's place and the step's seed.
Measured: docs/log.md.
"""

import triton
import triton.language as tl


@triton.jit
def _code(value, top, bounds, guesses, LOWEST: tl.constexpr, LAST: tl.constexpr, SIGNED: tl.constexpr):
    """The code of the level nearest to value / top, int32; a tie goes to the lower level."""
    x = tl.div_rn(value, tl.broadcast_to(tl.where(top > 0, top, 1.0)[:, None], value.shape))
    bucket = (tl.abs(x).to(tl.int32, bitcast=True) >> 16) - LOWEST
    code = tl.load(guesses + tl.minimum(tl.maximum(bucket, 0), LAST)).to(tl.int32)
    if SIGNED:
        code = tl.where(x < 0, tl.maximum(254 - code, 0), code)
    above, below = x > tl.load(bounds + code + 1), x <= tl.load(bounds + code)
    return code + above.to(tl.int32) - below.to(tl.int32)


@triton.jit
def step(
    param, grad, mu, mu_top, nu, nu_top, scalars, seed, levels, bounds, guesses, squares, square_bounds, square_guesses,
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
        number = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = number < SIZE
        at, coded, row = layer * SIZE + number, layer * BLOCKS * BLOCK + number, layer * BLOCKS + block
        there = (block < BLOCKS)[:, None] & (number >= 0)
        held = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
        m_top = tl.load(mu_top + row, mask=block < BLOCKS, other=0.0)
        v_top = tl.load(nu_top + row, mask=block < BLOCKS, other=0.0)
        m = tl.load(levels + tl.load(mu + coded, mask=there, other=127).to(tl.int32)) * m_top[:, None]
        v = tl.load(squares + tl.load(nu + coded, mask=there, other=0).to(tl.int32)) * v_top[:, None]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        value = held - rate * ((m / first) / (tl.sqrt(v / second) + eps) + decay * held)
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
        m_top, v_top = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
        m_code = _code(m, m_top, bounds, guesses, LOWEST, LAST, True)
        v_code = _code(v, v_top, square_bounds, square_guesses, LOWEST, LAST, False)
        tl.store(mu_out + coded, m_code.to(tl.uint8), mask=there)
        tl.store(nu_out + coded, v_code.to(tl.uint8), mask=there)
        tl.store(mu_top_out + row, m_top, mask=block < BLOCKS)
        tl.store(nu_top_out + row, v_top, mask=block < BLOCKS)
