"""The Triton kernel of cross entropy: a row's loss and the gradient of its logits, with the logits read twice.

    z = cap(x),  nll = log Σ_v exp z_v − z_target,  dx = weight · (softmax(z) − onehot(target)) · cap′(x)

A program holds one row and walks over it twice, in parts of BLOCK. On the first walk each lane has a maximum and a sum
of its own (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, eq. 4), joined at the end. The second goes
back from the row's end, as what was read last is still in the cache: few rows are under way at a time (`triton.py`).
Everything is float32. Measured: docs/log.md.
"""

import triton
import triton.language as tl

from jaxft.kernels.triton_tanh import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)  # −∞ would be subtracted from itself


@triton.jit
def _capped(x, CAP: tl.constexpr):
    """c · tanh(x / c), where there is a cap."""
    if CAP is None:
        return x
    else:
        return CAP * tanh(x, 1.0 / CAP)


@triton.jit
def _row(
    row, first, x_ptr, target_ptr, weight_ptr, loss_ptr, dx_ptr,
    V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """loss, weight included, and dx of a row, the latter in row first + row; both 0 where the weight is."""
    weight = tl.load(weight_ptr + row)
    target = tl.load(target_ptr + row)
    lane = tl.arange(0, BLOCK)
    x_ptr += row * V
    dx_ptr += (first + row) * V
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    if weight != 0:
        top = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for number in range(BLOCKS):
            v = number * BLOCK + lane
            z = tl.where(v < V, _capped(tl.load(x_ptr + v, mask=v < V, other=0.0), CAP), float("-inf"))
            shrunk = tl.exp2(-tl.abs(top - z) * LOG2E)
            total = tl.where(z > top, total * shrunk + 1.0, total + shrunk)
            top = tl.maximum(top, z)
        most = tl.max(top, 0)
        log_sum = tl.log(tl.sum(total * tl.exp2((top - most) * LOG2E), 0))
        of_target = _capped(tl.load(x_ptr + target), CAP)
        tl.store(loss_ptr + row, weight * (log_sum + most - of_target))
        if GRADIENT:
            for number in range(BLOCKS):
                v = (BLOCKS - 1 - number) * BLOCK + lane
                z = _capped(tl.load(x_ptr + v, mask=v < V, other=0.0), CAP)
                dz = (tl.exp2(((z - most) - log_sum) * LOG2E) - tl.where(v == target, 1.0, 0.0)) * weight
                if CAP is not None:
                    dz *= 1.0 - (z / CAP) * (z / CAP)
                tl.store(dx_ptr + v, dz.to(dx_ptr.dtype.element_ty), mask=v < V)
    else:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for number in range(BLOCKS):
                v = number * BLOCK + lane
                tl.store(dx_ptr + v, tl.zeros((BLOCK,), dx_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def rows(
    x_ptr, target_ptr, weight_ptr, loss_ptr, dx_ptr,
    V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """loss (M,) float32 and dx (M, V). Grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    _row(row, 0, x_ptr, target_ptr, weight_ptr, loss_ptr, dx_ptr, V, CAP, BLOCK, GRADIENT)


@triton.jit
def rows_into(
    x_ptr, target_ptr, weight_ptr, first_ptr, before_ptr, loss_ptr, dx_ptr,
    V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """loss (M,) float32, and dx in M rows from `first` on of an array that has more (before_ptr is dx_ptr). Grid (M,).

    `first` is read by the kernel, so that one kernel serves every tile.
    """
    row, first = tl.program_id(0).to(tl.int64), tl.load(first_ptr).to(tl.int64)
    _row(row, first, x_ptr, target_ptr, weight_ptr, loss_ptr, dx_ptr, V, CAP, BLOCK, GRADIENT)
