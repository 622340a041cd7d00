"""Triton kernels compiled to PTX for every card without a GPU, what they ask of it, and what they compute, interpreted.

Needs triton, jax-triton and the small jax-cuda13-plugin wheel beside a CPU jaxlib. Compiling takes seconds a kernel, so
only one head size goes through every architecture; `-m "long or not long"` takes all sizes and dtypes.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxft.kernels.attention import triton

MISSING = [name for name in ("triton", "jax_triton", "jax_cuda13_plugin") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}, which [cuda] installs on Linux")

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may take
KERNELS = ["forward", "keys_backward", "queries_backward"]


def attention(q, k, v, first_key, dout, *, capability, softcap):
    """out, dq, dk, dv."""
    op = lambda q, k, v: triton.attention(  # noqa: E731
        q, k, v, first_key, scale=0.1, softcap=softcap, capability=capability
    )
    out, vjp = jax.vjp(op, q, k, v)
    return out, *vjp(dout)


def arrays(H: int, dtype, T: int = 2048):
    """q, k, v, first_key, dout as shapes."""
    q, k = (jax.ShapeDtypeStruct((2, T, heads, H), dtype) for heads in (8, 2))
    return q, k, k, jax.ShapeDtypeStruct((2, T), jnp.int32), q


def compiled(capability: int, H: int, dtype, *, T: int = 2048, softcap=None) -> dict[str, tuple[int, str]]:
    """Shared memory in bytes and PTX of each kernel by name."""
    from jax_triton import triton_lib

    found, compile_ptx = {}, triton_lib.compile_ttir_to_ptx_inplace

    def record(*arguments):
        result = compile_ptx(*arguments)
        found[result.name] = result.shared_mem_bytes, result.binary
        return result

    triton_lib._COMPILED_KERNEL_CACHE.clear()
    triton_lib.compile_ttir_to_ptx_inplace = record
    try:
        function = jax.jit(lambda *x: attention(*x, capability=capability, softcap=softcap))
        function.trace(*arrays(H, dtype, T)).lower(lowering_platforms=("cuda",))
    finally:
        triton_lib.compile_ttir_to_ptx_inplace = compile_ptx
    return found


def assemble(ptx: str, capability: int, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes spilled, from the ptxas that comes with triton."""
    from triton.backends.nvidia import compiler

    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    tool = compiler.get_ptxas(capability).path
    command = [tool, "-v", f"--gpu-name={target[1]}", str(file), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (re.search(p, report) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    assert registers is not None and spilled is not None, report
    return int(registers[1]), int(spilled[1])


def check(capability, H, dtype, folder, spill, **more):
    """Every kernel is there, fits the card's shared memory, and spills at most `spill` bytes a thread."""
    kernels = compiled(capability, H, dtype, **more)
    assert sorted(kernels) == KERNELS
    for name, (shared, ptx) in kernels.items():
        assert shared <= SHARED[capability] * 1024, name
        registers, spilled = assemble(ptx, capability, folder)
        assert registers <= 255 and spilled <= spill, (name, registers, spilled)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_compiles_for_every_card_and_fits_it(capability, tmp_path):
    check(capability, 128, jnp.bfloat16, tmp_path, spill=512)


def test_attention_compiles_with_softcap_odd_head_size_and_odd_length(tmp_path):
    check(89, 80, jnp.float16, tmp_path, spill=512, T=2047, softcap=50.0)


@pytest.mark.long
@pytest.mark.parametrize("H", [64, 96, 256])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_fits_every_card_at_every_head_size(capability, H, tmp_path):
    check(capability, H, jnp.bfloat16, tmp_path, spill=512)


@pytest.mark.long
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("capability", [89, 90])
def test_attention_in_float32_fits(capability, H, tmp_path):
    check(capability, H, jnp.float32, tmp_path, spill=4096)  # exact, not fast


def test_named_residuals_keep_the_backward_from_running_the_forward_kernel_again():
    q, k, v, first_key, _ = arrays(64, jnp.bfloat16)

    def kernels(policy) -> list[str]:
        def loss(q, k, v, first_key):
            layer = lambda q: triton.attention(  # noqa: E731
                jnp.sin(q), k, v, first_key, scale=0.1, softcap=None, capability=90
            )
            return jax.checkpoint(layer, policy=policy)(q).astype(jnp.float32).sum()

        program = str(jax.make_jaxpr(jax.grad(loss))(q, k, v, first_key))
        return sorted(re.findall(r"name=attention_(forward|queries_backward|keys_backward)", program))

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    assert kernels(names) == KERNELS
    assert kernels(jax.checkpoint_policies.nothing_saveable) == ["forward", *KERNELS]


def test_interpreted_attention_kernels_equal_the_reference_with_gradients():
    script = Path(__file__).with_name("interpret_attention.py")
    root = script.parents[1]
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 8
