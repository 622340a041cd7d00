"""Triton kernels compiled to PTX for every card without a GPU, what they ask of it, and what they compute, interpreted.

Needs triton, jax-triton and the small jax-cuda13-plugin wheel beside a CPU jaxlib. Compiling takes seconds a kernel, so
one size goes through every architecture, and `-m "long or not long"` takes all sizes and dtypes through some.
"""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxft.cards import COMPILER_OPTIONS, absent_card
from jaxft.errors import InputError
from jaxft.kernels import launch
from jaxft.kernels.attention import triton
from jaxft.kernels.gpu import compiling_for
from jaxft.kernels.linear import triton as linear
from jaxft.kernels.linear_cross_entropy import tiled
from jaxft.kernels.linear_cross_entropy import triton as cross_entropy
from jaxft.kernels.mlp import triton as mlp
from jaxft.kernels.norm_rope import triton as norm_rope
from jaxft.kernels.rms_norm import triton as rms_norm
from tests.ptx import CAPABILITIES, MISSING, NEEDED, SHARED, assemble, compiled

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=NEEDED), pytest.mark.lowering]
S = jax.ShapeDtypeStruct
# cards that have tiles of their own (`kernels.gpu.CARDS`), and of the others one; those have the least shared memory
KINDS = (80, 89, 90, 100)
KERNELS = ["forward", "keys_backward", "queries_backward"]


def with_pull(op, arrays: int):
    """Outputs of op and the gradients of its first arguments; the upstream gradients are the last arguments."""

    def run(*arguments):
        out, pull = jax.vjp(lambda *some: op(*some), *arguments[:arrays])
        upstream = arguments[arrays:]
        return out, pull(upstream if len(upstream) > 1 else upstream[0])

    return run


def attention(q, k, v, first_key, dout, *, capability, softcap):
    """out, dq, dk, dv."""
    op = lambda q, k, v: triton.attention(  # noqa: E731
        q, k, v, first_key, scale=0.1, softcap=softcap, capability=capability
    )
    out, vjp = jax.vjp(op, q, k, v)
    return out, *vjp(dout)


def arrays(H: int, dtype, T: int = 2048):
    """q, k, v, first_key, dout as shapes."""
    q, k = (S((2, T, heads, H), dtype) for heads in (8, 2))
    return q, k, k, S((2, T), jnp.int32), q


def fits(kernels, names, capability, folder, spill):
    """Every kernel is there, fits the card's shared memory, and spills at most `spill` bytes a thread."""
    assert sorted(kernels) == sorted(names)
    for name, (shared, ptx) in kernels.items():
        assert shared <= SHARED[capability] * 1024, name
        registers, spilled = assemble(ptx, capability, folder)
        assert registers <= 255 and spilled <= spill, (name, registers, spilled)


def check(capability, H, dtype, folder, spill, T=2048, softcap=None):
    function = lambda *x: attention(*x, capability=capability, softcap=softcap)  # noqa: E731
    fits(compiled(function, *arrays(H, dtype, T)), KERNELS, capability, folder, spill)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_compiles_for_every_card_and_fits_it(capability, tmp_path):
    check(capability, 128, jnp.bfloat16, tmp_path, spill=512)


def test_attention_compiles_with_softcap_odd_head_size_and_odd_length(tmp_path):
    check(89, 80, jnp.float16, tmp_path, spill=512, T=2047, softcap=50.0)


@pytest.mark.long
@pytest.mark.parametrize("H", [64, 96, 256])
@pytest.mark.parametrize("capability", KINDS)
def test_attention_fits_every_kind_of_card_at_every_head_size(capability, H, tmp_path):
    check(capability, H, jnp.bfloat16, tmp_path, spill=512)


@pytest.mark.long
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("capability", [89, 90])
def test_attention_in_float32_fits(capability, H, tmp_path):
    check(capability, H, jnp.float32, tmp_path, spill=4096)  # exact, not fast


def check_mlp(capability, rank, folder, *, T=4096, F=9728, dtype=jnp.bfloat16, activation="silu"):
    """Both kernels of the MLP with all ranks equal."""
    e, u, b, a = S((T, F), dtype), S((T, rank), dtype), S((F, rank), dtype), S((rank, F), dtype)

    def both(e, u, b, a):
        joint = jnp.concatenate([u, u], axis=1)
        forward = mlp.forward(e, e, joint, (b, b), a, activation, capability)
        plain = mlp.product(e, e, activation, capability), mlp.product_backward(e, e, e, activation, capability)
        return plain, forward, mlp.backward(e, e, e, joint, u, (b, b), a, activation, capability)

    names = ["product", "product_backward", "forward", "backward"]
    fits(compiled(both, e, u, b, a), names, capability, folder, spill=128)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_mlp_kernels_compile_for_every_card_and_fit_it(capability, tmp_path):
    check_mlp(capability, 16, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("rank", [8, 32, 40, 128])
@pytest.mark.parametrize("capability", [89, 90])
def test_the_mlp_kernels_fit_at_every_rank(capability, rank, tmp_path):
    check_mlp(capability, rank, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("capability", [89, 90])
def test_the_mlp_kernels_fit_at_odd_sizes_in_float16(capability, tmp_path):
    check_mlp(capability, 24, tmp_path, T=1537, F=2720, dtype=jnp.float16, activation="gelu_pytorch_tanh")


def check_norms(capability, folder, *, H=128, D=2560, dtype=jnp.bfloat16, spill=0):
    """Forward and backward of both norms, each with the gradient of its weight."""
    x, w, angle = S((2, 512, 8, H), dtype), S((H,), jnp.float32), S((2, 512, H // 2), jnp.float32)

    def rotated(x, w, cos, dy):
        return with_pull(lambda x, w: norm_rope.norm_rope(x, w, cos, cos, 1e-6, capability), 2)(x, w, dy)

    def normed(x, w, more, dy):
        return with_pull(lambda x, w: rms_norm.residual_rms_norm(x, w, 1e-6, capability), 2)(x, w, more, dy)

    fits(compiled(rotated, x, w, angle, x), ["forward", "backward"], capability, folder, spill)
    x, w = S((2, 512, D), dtype), S((D,), jnp.float32)
    fits(compiled(normed, x, w, x, x), ["forward", "backward"], capability, folder, spill)


@pytest.mark.parametrize("rank, H", [(16, 128), (128, 256)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_adds_low_rank_parts_compiles_for_every_card_and_fits_it(capability, rank, H, tmp_path):
    dtype = jnp.bfloat16
    x, u, b = S((2, 8192, 8, H), dtype), S((16384, 2 * rank), dtype), S((8 * H, rank), dtype)
    angle, w, y = S((2, 8192, H // 2), jnp.float32), S((H,), dtype), S((16384, 8 * H), dtype)

    def run(x, u, b, w, cos, dy, product, add, bias):
        low = norm_rope.LowRank(u, b, rank)
        rotated = norm_rope.rotated(x, low, w, cos, cos, 1e-6, capability)
        back = norm_rope.rotated_backward(x, low, w, cos, cos, dy, 1e-6, capability, rank > 16)
        return rotated, back, linear.summed(product, u, b, capability, start=rank, bias=bias, add=add)

    product = S(y.shape, jnp.float32)
    fits(
        compiled(run, x, u, b, w, angle, x, product, y, S((8 * H,), dtype)),
        ["backward", "forward", "summed"],
        capability,
        tmp_path,
        spill=256,
    )


def check_thin(capability, ranks, folder, T=2048):
    """The kernels of thin products as the layers that read one x launch them."""
    dtype, sizes = jnp.bfloat16, (4096, 1024, 1024)
    x, u, dys = S((T, 2560), dtype), S((T, sum(ranks)), dtype), [S((T, size), dtype) for size in sizes]
    bs = [S(shape, dtype) for shape in zip(sizes, ranks, strict=True)]

    def backward(x, u, dys, bs):
        starts = [sum(ranks[:number]) for number in range(len(ranks))]
        products = [linear.Thin(*one, False) for one in zip(dys, [u] * 3, starts, ranks, strict=True)]
        g = linear.side_by_side(dys, bs, capability)
        own = linear.Thin(x, g, 0, min(sum(ranks), linear.LARGEST_RANK), True)
        return linear.over_tokens([*products, own], capability)

    fits(compiled(backward, x, u, dys, bs), ["over_tokens", "side_by_side"], capability, folder, spill=16)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_of_thin_products_compile_for_every_card_and_fit_it(capability, tmp_path):
    check_thin(capability, (16, 16, 16), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "ranks, T", [((40, 40, 40), 16384), ((8, 4, 8), 1537), ((32, 32, 64), 4096), ((128, 128, 128), 2048)]
)
@pytest.mark.parametrize("capability", [89, 90])
def test_the_kernels_of_thin_products_fit_at_every_rank(capability, ranks, T, tmp_path):
    check_thin(capability, ranks, tmp_path, T)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("softcap, dtype", [(None, jnp.bfloat16), (30.0, jnp.float32)])
def test_cross_entropy_compiles_for_every_card_and_fits_it(capability, softcap, dtype, tmp_path):
    def run(scores, targets, weights, dz, first):
        alone = cross_entropy.losses(scores, targets, weights, softcap, dtype, True, capability)
        return alone, cross_entropy.losses(scores, targets, weights, softcap, dtype, True, capability, (dz, first))

    rows = S((384, 151936), jnp.float32), S((384,), jnp.int32), S((384,), jnp.float32)
    kernels = compiled(run, *rows, S((1536, 151936), dtype), S((), jnp.int32))
    fits(kernels, ["rows", "rows_into"], capability, tmp_path, spill=256)  # 1,024 threads: 64 registers each


@pytest.mark.parametrize("of, name", [((0,), "rows"), ((1,), "rows_into"), ((0, 1), "rows_into")])
def test_one_kernel_serves_every_tile_of_cross_entropy(of, name):
    def loss(hidden, head, targets, weights):
        return tiled.linear_cross_entropy(hidden, head, targets, weights, None, 8, 1, 90)

    arrays = S((75, 16), jnp.bfloat16), S((300, 16), jnp.bfloat16), S((75,), jnp.int32), S((75,), jnp.float32)
    launches = list(launch._launches(jax.make_jaxpr(jax.grad(loss, of))(*arrays).jaxpr))
    assert len(launches) == 2  # in a whole block, and in the one with the tiles that are left
    (kernel,) = {one.params["launch"] for one in launches}
    assert kernel.kernel.fn.fn.__name__ == name
    assert len({tuple(variable.aval for variable in one.invars) for one in launches}) == 1


@pytest.mark.parametrize("of, dz", [((0,), 1), ((0, 1), tiled.SHARED)])
def test_on_a_card_a_block_of_tiles_needs_the_logits_of_one_and_no_copy_of_dz(of, dz):
    try:
        device = absent_card("h200")
    except InputError as refusal:
        pytest.skip(str(refusal))
    M, V, D, tile = 8192, 2**16, 64, 512
    place = jax.sharding.SingleDeviceSharding(device)
    likes = ((M, D), jnp.bfloat16), ((V, D), jnp.bfloat16), ((M,), jnp.int32), ((M,), jnp.float32)
    arrays = [S(*like, sharding=place) for like in likes]

    def loss(hidden, head, targets, weights):
        return tiled.linear_cross_entropy(hidden, head, targets, weights, None, tile, 1, 90)

    with compiling_for(device):
        step = jax.jit(jax.grad(loss, of), compiler_options=COMPILER_OPTIONS).lower(*arrays).compile()
    logits, rest = 4 * tile * V, 32 << 20  # what has D columns, beside the gradients
    assert step.memory_analysis().temp_size_in_bytes < logits + dz * logits // 2 + rest


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_norms_compile_for_every_card_and_fit_it(capability, tmp_path):
    check_norms(capability, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize(
    "H, D, dtype, spill",
    [
        (32, 128, jnp.float16, 0),
        (256, 5376, jnp.bfloat16, 0),
        (512, 8192, jnp.float32, 0),
        (64, 2**14, jnp.bfloat16, 256),
    ],
)
def test_the_norms_fit_at_every_size(capability, H, D, dtype, spill, tmp_path):
    check_norms(capability, tmp_path, H=H, D=D, dtype=dtype, spill=spill)


def test_named_residuals_keep_the_backward_from_running_the_forward_kernel_again():
    q, k, v, first_key, _ = arrays(64, jnp.bfloat16)

    def kernels(policy) -> list[str]:
        def loss(q, k, v, first_key):
            layer = lambda q: triton.attention(  # noqa: E731
                jnp.sin(q), k, v, first_key, scale=0.1, softcap=None, capability=90
            )
            return jax.checkpoint(layer, policy=policy)(q).astype(jnp.float32).sum()

        program = str(jax.make_jaxpr(jax.grad(loss))(q, k, v, first_key))
        return sorted(re.findall(r"'name', 'attention_(forward|queries_backward|keys_backward)'", program))

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    assert kernels(names) == KERNELS
    assert kernels(jax.checkpoint_policies.nothing_saveable) == ["forward", *KERNELS]


@pytest.mark.parametrize("script, cases", [("interpret_attention.py", 10), ("interpret_blocks.py", 53)])
def test_interpreted_kernels_equal_the_reference_with_gradients(script, cases):
    path = Path(__file__).with_name(script)
    root = path.parents[1]
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == cases
