"""The Triton kernel that ends a linear layer with LoRA beside a residual: y = P + u bᵀ + add.

P (T, O) is the large product, u (T, R) the low-rank input, b (O, R) the scaled B. A product of its own for u bᵀ would
write an array as wide as y for the large product to read. The sum is float32 and rounded once, so that a young
adapter's small part is not lost beside a large residual. A program holds BT tokens by BO outputs.
"""

import triton
import triton.language as tl


@triton.jit
def summed(
    p_ptr, u_ptr, b_ptr, add_ptr, y_ptr,
    T: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y (T, O). Grid (⌈O / BO⌉, ⌈T / BT⌉)."""
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    rank = tl.arange(0, RP)
    at = t.to(tl.int64)[:, None] * O + o[None, :]
    inside = (t < T)[:, None] & (o < O)[None, :]
    total = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + t[:, None] * R + rank[None, :], mask=(t < T)[:, None] & (rank < R)[None, :], other=0.0)
    b = tl.load(b_ptr + o[:, None] * R + rank[None, :], mask=(o < O)[:, None] & (rank < R)[None, :], other=0.0)
    total = tl.dot(u, tl.trans(b), total)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)
