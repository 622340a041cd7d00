"""NF4 and 8-bit weights hold the bits that bitsandbytes holds, and the kernel computes what the definition says."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import quant
from jaxft.kernels import gpu
from jaxft.kernels.dequantize import Held, dequantize_nf4, reference, triton
from jaxft.kernels.dequantize.tables import nf4_levels
from jaxft.kernels.linear import Weights, linears
from jaxft.kernels.linear.fused import dense_weights
from jaxft.kernels.mlp import mlp
from jaxft.quant import _divide, dense, dense_together, describe_leaf, multiply, quantize, quantize_nf4
from tests.nf4_cases import CASES, DTYPES, PARTS, bell, digest
from tests.ptx import CAPABILITIES, MISSING, NEEDED, assemble, compiled

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "data" / "nf4_golden.json").read_text(encoding="utf-8"))["cases"]


def weight_of(case: str) -> jax.Array:
    name, dtype = case.rsplit(", ", 1)
    return jnp.asarray(CASES[name][0].astype(np.float32).astype(DTYPES[dtype]))


def leaf_of(case: str, kind: str):
    return jax.jit(quantize, static_argnums=1)(weight_of(case), kind)


@pytest.mark.parametrize("case", GOLDEN)
def test_four_bits_scales_and_values_equal_those_of_bitsandbytes(case):
    leaf = leaf_of(case, "nf4")
    values = jax.jit(lambda leaf: dense(leaf, leaf.dtype))(leaf)
    found = digest(dict(zip(PARTS, [*map(np.asarray, jax.tree.leaves(leaf)), np.asarray(values)], strict=True)))
    assert found == GOLDEN[case]["nf4"]


@pytest.mark.parametrize("case", GOLDEN)
def test_eight_bits_scales_and_values_equal_those_of_bitsandbytes(case):
    leaf = leaf_of(case, "int8")
    values = jax.jit(lambda leaf: dense(leaf, jnp.float32))(leaf)
    found = {"codes": np.asarray(leaf.codes), "scales": np.asarray(leaf.scales), "dense": np.asarray(values)}
    assert digest(found) == GOLDEN[case]["int8"]


def test_division_is_rounded_to_nearest():
    random = np.random.default_rng(0)
    a, b = (np.exp(random.uniform(-40, 40, 50_000)).astype(np.float32) for _ in range(2))
    with np.errstate(over="ignore", under="ignore"):
        exact = a / b
    normal = np.isfinite(exact) & (exact >= np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(np.asarray(jax.jit(_divide)(a, b))[normal], exact[normal])


def test_nf4_takes_four_and_an_eighth_bits_a_weight():
    leaf = leaf_of("large, bfloat16", "nf4")
    bits = 8 * sum(array.nbytes for array in jax.tree.leaves(leaf)) / leaf.size
    assert 4.125 < bits < 4.13
    assert leaf.shape == (640, 832) and leaf.ndim == 2


def test_quantising_a_large_weight_takes_little_beside_it():
    shape = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)
    for kind in ("nf4", "int8"):
        memory = jax.jit(quantize, static_argnums=1).lower(shape, kind).compile().memory_analysis()
        assert memory is not None
        # on a CPU one copy of its bits, and the float32 values of a sixteenth of it
        assert memory.temp_size_in_bytes < 1.3 * 2 * shape.size


@pytest.mark.parametrize(("block", "double"), [(32, True), (64, False), (4096, True)])
def test_other_blocks_and_single_quantisation_read_back_as_level_times_scale(block, double):
    weight = jnp.asarray(bell((48, 200), 9), jnp.float32)
    leaf = jax.jit(lambda w: quantize_nf4(w, block=block, double=double))(weight)
    values = np.asarray(jax.jit(lambda leaf: dense(leaf, jnp.float32))(leaf)).reshape(-1)
    padded = np.pad(np.asarray(weight).reshape(-1), (0, -9600 % block)).reshape(-1, block)
    largest = np.abs(padded).max(1)
    # half the widest gap between levels, and what 8 bits do to a scale
    bound = 0.152 * np.repeat(largest, block)[:9600] + 0.01 * largest.max()
    assert np.all(np.abs(values - np.asarray(weight).reshape(-1)) <= bound)
    assert (leaf.nested is None) == (not double)


def test_a_stack_and_a_wrong_shape_are_refused_with_the_shapes():
    leaf = leaf_of("random, float32", "nf4")
    stack = jax.tree.map(lambda array: array[None], leaf)
    assert stack.shape == (1, 64, 128)
    with pytest.raises(ValueError, match="one layer at a time"):
        dense(stack, jnp.float32)
    with pytest.raises(ValueError, match=r"needs uint8 \(4096,\)"):
        dense(dataclasses.replace(leaf, codes=leaf.codes[:-1]), jnp.float32)
    with pytest.raises(ValueError, match="must be one of triton, reference"):
        dense(leaf, jnp.float32, implementation="cuda")
    with pytest.raises(ValueError, match="must be one of nf4, int8"):
        quantize(leaf.codes, "fp4")


def test_scales_are_repeated_without_a_scatter_that_xla_would_work_out_while_it_compiles():
    S = jax.ShapeDtypeStruct
    parts = S((5000,), jnp.uint8), S((20,), jnp.float32), S((), jnp.float32)
    text = jax.jit(reference.block_scales).lower(*parts).as_text()
    assert "gather" in text and "scatter" not in text and "reduce_window" not in text


# the kernel

needs_triton = pytest.mark.skipif(bool(MISSING), reason=NEEDED)


@needs_triton
@pytest.mark.parametrize("stack", [(), (36,)], ids=["one", "stack"])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [(1024,), (4096, 1024, 1023), (9728, 9728)], ids=["alone", "three", "two"])
def test_the_kernel_compiles_for_every_card_with_wide_stores_and_no_shared_memory(capability, stack, rows, tmp_path):
    def parts(n: int) -> list[jax.ShapeDtypeStruct]:
        blocks = n // 64
        sizes = ((n // 2,), jnp.uint8), ((blocks,), jnp.uint8), ((-(-blocks // 256),), jnp.float32), ((), jnp.float32)
        return [jax.ShapeDtypeStruct((*stack, *size), dtype) for size, dtype in sizes]

    def run(weights, layer):
        held = [Held(*one, layer, (count, 2560)) for one, count in zip(weights, rows, strict=True)]
        return triton.dequantize_nf4(held, None, 64, jnp.bfloat16, capability)

    layer = jax.ShapeDtypeStruct((), jnp.int32) if stack else None
    ((shared, ptx),) = compiled(run, [parts(count * 2560) for count in rows], layer).values()
    assert shared == 0
    assert ptx.count("st.global.v4.b32") >= 4 * len(rows) and "fma.rn.f32" not in ptx
    registers, spilled = assemble(ptx, capability, tmp_path)
    assert registers <= 64 and spilled == 0


@needs_triton
def test_the_kernel_is_handed_what_it_waits_for():
    """A barrier's operand that nothing reads is dropped by XLA, and with it the order."""
    n, S = 512, jax.ShapeDtypeStruct
    arrays = S((n // 2,), jnp.uint8), S((n // 64,), jnp.float32), S((3, 7), jnp.bfloat16)

    def run(codes, scales, before):
        return triton.dequantize_nf4([Held(codes, scales, None, None, None, (8, 64))], before, 64, jnp.bfloat16, 90)

    text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = re.findall(r"custom_call @triton_kernel_call.*", text)
    assert "tensor<3x7xbf16>" in call


def product_of(rows: int, dtype, capability: int) -> tuple[int, str]:
    """Shared memory and PTX of the product's kernel for a stack of q's weights of Qwen3-4B."""
    (O, I), L, S = (4096, 2560), 36, jax.ShapeDtypeStruct
    n = O * I
    sizes = ((n // 2,), jnp.uint8), ((n // 64,), jnp.uint8), ((n // 64 // 256,), jnp.float32), ((), jnp.float32)
    arrays = [S((L, *size), kind) for size, kind in sizes]
    function = lambda x, *rest: triton.multiply_nf4(x, Held(*rest, (O, I)), 64, capability)  # noqa: E731
    (found,) = compiled(function, S((rows, 1, I), dtype), *arrays, S((), jnp.int32)).values()
    return found


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_product_compiles_for_every_card_and_works_in_registers_alone(capability, tmp_path):
    shared, ptx = product_of(1, jnp.bfloat16, capability)
    assert shared <= 1024  # of the last sums
    registers, spilled = assemble(ptx, capability, tmp_path)
    # so that a multiprocessor has 32 warps, whose loads hide memory's latency; Triton 3.9 leaves 24
    assert registers <= (64 if version("triton").startswith("3.6") else 80) and spilled == 0


@needs_triton
@pytest.mark.parametrize("rows", [1, 8, pytest.param(16, marks=pytest.mark.long)])
def test_a_value_of_the_product_costs_a_shift_a_shuffle_and_a_multiply_add_a_row(rows, tmp_path):
    _, ptx = product_of(rows, jnp.bfloat16, 90)
    tile = triton.tile_of(rows)
    sizes, _ = triton.product_constants(rows, (4096, 2560), 64, True, True, tile)
    loop = re.search(r"^(\$L__BB\w+):.*?bra\s+\1;", ptx, re.DOTALL | re.MULTILINE)
    assert bool(loop) == (sizes["STEPS"] > 1)
    step = loop[0] if loop else ptx
    values, held = tile.rows * 8 * tile.words * tile.groups // (32 * tile.warps), min(rows, 8)  # a thread's a step
    names = ("shfl.sync.idx", "fma.rn.f32", "bar.sync", "ld.shared")
    count = {name: len(re.findall(rf"\b{name}", step)) for name in names}
    # one more for each group's scale
    assert count["shfl.sync.idx"] == values
    assert not loop or count["bar.sync"] == count["ld.shared"] == 0  # else the last sums have theirs
    assert values * held < count["fma.rn.f32"] <= (values + 4) * held
    assert re.search(r"ld\.global\.v[24]\.b32", step)
    registers, spilled = assemble(ptx, 90, tmp_path)
    assert registers <= 168 and spilled == 0  # three programs or more share a multiprocessor


@pytest.mark.parametrize("shape", [(4096, 2560), (9728, 2560), (2560, 9728), (1024, 2560)])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_the_product_is_cut_into_enough_programs_that_cover_every_column_once(shape, rows):
    tile = triton.tile_of(rows)
    sizes, (tiles, parts, halves) = triton.product_constants(rows, shape, 64, True, True, tile)
    columns = sizes["STEPS"] * tile.groups * tile.words * 8
    assert (parts - 1) * columns < shape[1] <= parts * columns
    assert (tiles - 1) * tile.rows < shape[0] <= tiles * tile.rows
    assert (halves - 1) * sizes["ROWS"] < rows <= halves * sizes["ROWS"] and sizes["ROWS"] <= 8
    assert tiles * parts >= 4 * 132 or sizes["STEPS"] == 1


def lanes_of_a_warp(asm: str, words: list[int], levels: np.ndarray) -> list[list[float]]:
    """What PTX's definitions of the few instructions of `levels_of` give in each of 32 lanes for its word."""
    lines = [line.strip(" ;\n") for line in asm.strip(" {}\n").split(";")]
    state: list[dict] = [{"$8": word, "$9": 0} for word in words]
    for line in filter(None, lines):
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        to, *of = [part.strip() for part in rest.split(",")]
        before = [dict(lane) for lane in state]
        for number, lane in enumerate(state):
            value = lambda part, lane=lane: lane[part] if part in lane else int(part, 0)  # noqa: E731
            if name == "mov.u32":
                assert of == ["%laneid"]
                lane[to] = number
            elif name == "ld.global.nc.b32":
                lane[to] = float(levels[lane[of[0][1:-1]] // 4])
            elif name == "shfl.sync.idx.b32":
                clamp, kept = value(of[2]) & 31, value(of[2]) >> 8 & 31
                source = number & kept | value(of[1]) & 31 & ~kept
                assert source <= number & kept | clamp & ~kept and value(of[3]) == 2**32 - 1
                lane[to] = before[source][of[0]]
            else:
                operations = {
                    "and.b32": "__and__",
                    "mul.wide.u32": "__mul__",
                    "add.s64": "__add__",
                    "shr.u32": "__rshift__",
                }
                lane[to] = getattr(value(of[0]), operations[name])(value(of[1]))
    return [[lane[f"${number}"] for number in range(8)] for lane in state]


def test_a_shuffle_gives_the_level_of_every_code_in_the_order_of_columns():
    source = (ROOT / "kernels" / "dequantize" / "triton_kernels.py").read_text(encoding="utf-8")
    asm = re.search(r'inline_asm_elementwise\(\s*"""(.*?)"""', source, re.DOTALL)
    assert asm is not None
    packed = np.random.default_rng(0).integers(0, 256, (32, 4), np.uint8)
    levels = nf4_levels()
    got = lanes_of_a_warp(asm[1], packed.view("<u4")[:, 0].tolist(), levels)
    wanted = levels[np.stack([packed >> 4, packed & 15], axis=2).reshape(32, 8)]
    np.testing.assert_array_equal(np.float32(got), wanted)


@needs_triton
def test_the_interpreted_kernels_equal_the_reference():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "interpret_dequantize.py")], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 41


def test_the_kernel_refuses_a_dtype_that_it_cannot_write(monkeypatch):
    monkeypatch.setattr(gpu, "device_capability", lambda: 90)
    leaf = leaf_of("random, float32", "nf4")
    held = Held(leaf.codes, leaf.scales, leaf.nested, leaf.offset, None, (64, 128))
    with pytest.raises(NotImplementedError, match="dtype int32"):
        dequantize_nf4([held], block=64, dtype=jnp.int32, implementation="triton")


def test_weights_that_are_not_held_alike_are_not_made_dense_by_one_call():
    double = jax.jit(quantize_nf4)(jnp.ones((8, 64)))
    single = jax.jit(partial(quantize_nf4, double=False))(jnp.ones((8, 64)))
    both = [Held(one.codes, one.scales, one.nested, one.offset, None, (8, 64)) for one in (double, single)]
    with pytest.raises(ValueError, match="all have it, or none"):
        dequantize_nf4(both, block=64, dtype=jnp.float32)


def test_several_weights_are_made_dense_in_groups_that_are_held_alike(monkeypatch):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    nf4 = lambda *shape, **how: jax.jit(partial(quantize_nf4, **how))(draw(*shape))  # noqa: E731
    int8, plain = jax.jit(quantize, static_argnums=1)(draw(4, 64), "int8"), draw(3, 64)
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), nf4(8, 64), nf4(8, 64))
    one = dataclasses.replace(stack, layer=jnp.int32(1))
    weights = [nf4(16, 64), int8, plain, nf4(2, 64, block=32), one, nf4(5, 7, double=False), nf4(33, 35)]
    calls = []

    def record(held, **how):
        calls.append([one.shape for one in held])
        return dequantize_nf4(held, **how)

    wanted = [dense(weight, jnp.bfloat16) for weight in weights]
    monkeypatch.setattr(quant, "dequantize_nf4", record)
    found = dense_together(weights, jnp.bfloat16, after=plain)
    assert calls == [[(16, 64), (8, 64), (33, 35)], [(2, 64)], [(5, 7)]]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(got), np.float32(want))
    calls.clear()
    layers = dense_weights(tuple(map(Weights, weights[:3])), jnp.bfloat16)
    assert layers[2].weight is plain and calls == [[(16, 64)]]
    assert [layer.weight.shape for layer in layers] == [(16, 64), (4, 64), (3, 64)]
    assert dense_weights((Weights(plain),), jnp.bfloat16) == (Weights(plain),)
    with pytest.raises(ValueError, match="one layer at a time"):
        dense_together([weights[0], stack], jnp.bfloat16)


PRODUCT_REFUSED = {
    "17 rows: the kernel takes up to 16": (17, jnp.bfloat16, (64, 128), 90),
    "dtype int8": (1, jnp.int8, (64, 128), 90),
    "100 columns: needs a multiple of 32": (1, jnp.bfloat16, (64, 100), 90),
    "compute capability 7.5": (1, jnp.bfloat16, (64, 128), 75),
}


@pytest.mark.parametrize("reason", PRODUCT_REFUSED)
def test_the_product_says_what_it_does_not_serve(reason):
    with pytest.raises(NotImplementedError, match=reason):
        triton.check_product(*PRODUCT_REFUSED[reason])


def test_a_few_rows_are_multiplied_with_the_four_bits_and_many_with_the_dense_weight(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "device_capability", lambda: 90)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)

    def multiply(x, *rest, dtype):
        seen.append(rest[-1])
        return jnp.zeros((*x.shape[:-1], 64), x.dtype)

    monkeypatch.setattr(triton, "multiply_nf4", multiply)
    monkeypatch.setattr(triton, "dequantize_nf4", lambda *a: (seen.append("dense"), [jnp.zeros((64, 128), a[-2])])[1])
    leaf = describe_leaf("nf4", (64, 128), None, jnp.bfloat16)
    for rows, expected in ((1, 90), (16, 90), (17, "dense")):
        x = jax.ShapeDtypeStruct((rows, 1, 128), jnp.bfloat16)
        (y,) = jax.eval_shape(lambda x, leaf: linears(x, (Weights(leaf),)), x, leaf)
        assert seen.pop() == expected and not seen and y.shape == (rows, 1, 64)


def test_gate_and_up_are_made_dense_by_one_call_where_their_four_bits_are_not_read(monkeypatch):
    made = []
    monkeypatch.setattr(gpu, "device_capability", lambda: 90)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)

    def multiply(x, weight, block, capability, dtype):
        made.append(("4 bits", weight.shape))
        return jnp.zeros((*x.shape[:-1], weight.shape[0]), x.dtype)

    def dequantize(weights, after, block, dtype, capability):
        made.append(("dense", *[weight.shape for weight in weights]))
        return [jnp.zeros(weight.shape, dtype) for weight in weights]

    monkeypatch.setattr(triton, "multiply_nf4", multiply)
    monkeypatch.setattr(triton, "dequantize_nf4", dequantize)
    wide, down = (describe_leaf("nf4", shape, None, jnp.bfloat16) for shape in ((64, 32), (32, 64)))
    for rows, tiles in itertools.product((16, 17), (None, 1)):
        made.clear()
        run = lambda x, *leaves, tiles=tiles: mlp(  # noqa: E731
            x, *map(Weights, leaves), activation="silu", tiles=tiles, implementation="fused"
        )
        jax.eval_shape(run, jax.ShapeDtypeStruct((rows, 32), jnp.bfloat16), wide, wide, down)
        if rows == 16:
            assert made == [("4 bits", (64, 32)), ("4 bits", (64, 32)), ("4 bits", (32, 64))]
        else:
            assert made == [("dense", (64, 32), (64, 32)), ("dense", (32, 64))]


def test_the_product_by_the_reference_is_that_with_the_dense_weight():
    leaf, x = leaf_of("33 x 35, float32", "nf4"), jnp.asarray(bell((3, 35), 8, 1.0), jnp.float32)
    np.testing.assert_allclose(multiply(x, leaf), np.asarray(x) @ np.asarray(dense(leaf, jnp.float32)).T, atol=1e-6)
    with pytest.raises(ValueError, match=r"x has shape \(3, 34\), the weight \(O, I\) \(33, 35\)"):
        multiply(x[:, 1:], leaf)
