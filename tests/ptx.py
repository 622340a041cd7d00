"""Triton kernels compiled to PTX without a GPU, and what ptxas says of them: for tests of lowering."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import jax

MISSING = [name for name in ("triton", "jax_triton", "jax_cuda13_plugin") if find_spec(name) is None]
NEEDED = f"needs {', '.join(MISSING)}, which [cuda] installs on Linux"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may take


@contextmanager
def nothing_kept() -> Iterator[None]:
    """What is compiled inside is neither read from jax's cache of programs nor kept in it."""
    keeps = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", keeps)


def compiled(function: Callable, *arrays: jax.ShapeDtypeStruct) -> dict[str, tuple[int, str]]:
    """Shared memory in bytes and PTX of each Triton kernel that a function launches, by name."""
    from jax_triton import triton_lib

    found, compile_ptx = {}, triton_lib.compile_ttir_to_ptx_inplace

    def record(*arguments):
        result = compile_ptx(*arguments)
        found[result.name] = result.shared_mem_bytes, result.binary
        return result

    triton_lib._COMPILED_KERNEL_CACHE.clear()
    triton_lib.compile_ttir_to_ptx_inplace = record
    try:
        with nothing_kept():
            jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
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
