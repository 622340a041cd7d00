"""Runs the Triton kernels that read NF4 by Triton's interpreter on the CPU and compares them with the reference.

Its own process, because of `tests/interpreted.py`: `python tests/interpret_dequantize.py` prints one line a case and
fails on the first value that differs.
"""

from tests import interpreted  # before triton  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import triton as compiler
import triton.language as tl

from jaxft.kernels.dequantize import Held, reference, triton, triton_kernels
from jaxft.quant import quantize_nf4


@compiler.jit
def levels_of(word, levels):
    """In place of the kernel's own, whose shuffle the interpreter does not know (tests/test_nf4.py takes its place)."""
    return (
        tl.load(levels + (word >> 4 & 15)), tl.load(levels + (word & 15)), tl.load(levels + (word >> 12 & 15)),
        tl.load(levels + (word >> 8 & 15)), tl.load(levels + (word >> 20 & 15)), tl.load(levels + (word >> 16 & 15)),
        tl.load(levels + (word >> 28 & 15)), tl.load(levels + (word >> 24 & 15)),
    )  # fmt: skip


triton_kernels.levels_of = levels_of


def compare(shape: tuple[int, int], dtype: str, block: int = 64, double: bool = True) -> None:
    weight = jnp.asarray(np.random.default_rng(shape[0]).normal(size=shape), jnp.float32)
    leaf = jax.jit(lambda w: quantize_nf4(w, block=block, double=double))(weight)
    parts = leaf.codes, leaf.scales, leaf.nested, leaf.offset
    wanted = by_reference(parts, shape, block, dtype)
    (got,) = triton.dequantize_nf4([Held(*parts, None, shape)], None, block, jnp.dtype(dtype), 90)
    name = f"{shape} {dtype} block {block} {'double' if double else 'single'}"
    interpreted.compare(name, np.asarray(got), wanted, 1e-30)
    (got,) = triton.dequantize_nf4([Held(*stacked(parts), jnp.int32(1), shape)], None, block, jnp.dtype(dtype), 90)
    interpreted.compare(f"{name}, the second of a stack", np.asarray(got), wanted, 1e-30)


def by_reference(parts, shape: tuple[int, int], block: int, dtype: str) -> np.ndarray:
    return np.asarray(reference.dequantize_nf4(*parts, shape, block, jnp.dtype(dtype)))


def compare_together(shapes: list[tuple[int, int]], dtype: str, stacks: str, block: int = 64, double: bool = True):
    """Several weights by one call; stacks: of each whether it is one of a stack, y or n."""
    weights, wanted = [], []
    for number, (shape, stack) in enumerate(zip(shapes, stacks, strict=True)):
        weight = jnp.asarray(np.random.default_rng(number).normal(size=shape), jnp.float32)
        leaf = jax.jit(lambda w: quantize_nf4(w, block=block, double=double))(weight)
        parts = leaf.codes, leaf.scales, leaf.nested, leaf.offset
        held = (*stacked(parts), jnp.int32(1)) if stack == "y" else (*parts, None)
        weights.append(Held(*held, shape))
        wanted.append(by_reference(parts, shape, block, dtype))
    got = triton.dequantize_nf4(weights, jnp.zeros((2, 3)), block, jnp.dtype(dtype), 90)
    name = f"together {shapes} {dtype} stacks {stacks} block {block} {'double' if double else 'single'}"
    interpreted.compare(name, [np.asarray(one) for one in got], wanted, 1e-30)


def stacked(parts):
    """The arrays of a weight between those of two others."""
    return [None if part is None else jnp.stack([jnp.zeros_like(part), part, jnp.ones_like(part)]) for part in parts]


def compare_product(
    shape: tuple[int, int], rows: int, dtype: str, tolerance: float, block: int = 64, double: bool = True,
    programs: int = triton.PROGRAMS,
):  # fmt: skip
    random = np.random.default_rng(shape[0])
    weight = jnp.asarray(random.normal(size=shape), jnp.float32)
    leaf = jax.jit(lambda w: quantize_nf4(w, block=block, double=double))(weight)
    x = jnp.asarray(random.normal(size=(rows, 1, shape[1])), dtype)
    parts = leaf.codes, leaf.scales, leaf.nested, leaf.offset
    got = triton.multiply_nf4(x, Held(*parts, None, shape), block, 90, programs=programs)
    assert got.shape == (rows, 1, shape[0]) and got.dtype == x.dtype
    dense = reference.dequantize_nf4(*parts, shape, block, x.dtype)
    wanted = np.einsum("rti,oi->rto", np.float32(x), np.float32(dense))
    name = f"product {shape} × {rows} {dtype} block {block} {'double' if double else 'single'}"
    interpreted.compare(name, got, wanted, tolerance)
    second = Held(*stacked(parts), jnp.int32(1), shape)
    got = triton.multiply_nf4(x, second, block, 90, programs=programs)
    interpreted.compare(f"{name}, the second of a stack", got, wanted, tolerance)
    got = triton.multiply_nf4(x, second, block, 90, programs=programs, dtype=jnp.float32)
    assert got.dtype == jnp.float32
    exact = np.einsum(
        "rti,oi->rto", np.float32(x), np.float32(reference.dequantize_nf4(*parts, shape, block, "float32"))
    )
    interpreted.compare(f"{name}, not rounded", got, exact, 1e-6)


if __name__ == "__main__":
    compare((64, 256), "bfloat16")
    compare((33, 35), "bfloat16")
    compare((5, 7), "float32")
    compare((96, 64), "float16", block=128)
    compare((48, 100), "float32", block=32, double=False)
    compare_together([(64, 128), (16, 128), (16, 128)], "bfloat16", "yyy")
    compare_together([(33, 35), (128, 64), (64, 129)], "bfloat16", "nnn")  # one and two tiles, full and not
    compare_together([(5, 7), (96, 64)], "float32", "ny", block=32, double=False)
    compare_together([(8, 64), (64, 128), (5, 7), (33, 35)], "float16", "yyny", block=128)  # two launches
    compare_product((64, 256), 3, "float16", 1e-3)
    compare_product((40, 1024), 10, "float16", 1e-3)  # a last tile that is not full, a step a part, two halves of rows
    compare_product((33, 1120), 9, "float16", 1e-3, programs=4)  # parts of 3 and 2 steps, the last of these not full
    compare_product((32, 672), 1, "float16", 1e-3, programs=1)  # one part
    compare_product((64, 384), 1, "float16", 1e-3, block=128, double=False)
    compare_product((64, 128), 2, "float16", 1e-3, block=32)
    compare_product((40, 96), 1, "float32", 1e-6)  # a row that ends in the middle of a block
    compare_product((32, 256), 4, "float32", 1e-6, double=False)
    compare_product((32, 256), 1, "bfloat16", 1e-2)
