"""Kernels on disk: compiled once, known by all that decides them, compiled again where a file is damaged."""

import importlib
import linecache
import sys
from concurrent.futures import wait
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxft.kernels import compiled
from jaxft.kernels.compiled import kept
from tests.ptx import MISSING, NEEDED


@pytest.fixture
def directory(tmp_path):
    """Where jax keeps programs, which is new."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), True), strict=True):
        jax.config.update(name, value)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def versions(monkeypatch):
    """The packages that compile, which need not be installed to keep what they made."""
    found = ["3.6.0", "0.3.1", "0.11.2", "0.11.2"]
    monkeypatch.setattr(compiled, "_versions", lambda: found)
    return found


def refuse_to_compile(monkeypatch):
    import jax_triton

    def refused(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr(jax_triton, "triton_call", refused)


class Counted:
    """A kernel, and how often it was compiled."""

    def __init__(self):
        self.times = 0

    def __call__(self, source="a", decides=("float32", 128)):
        def make():
            self.times += 1
            return f"{source} {decides}".encode()

        return kept(SimpleNamespace(cache_key=source), decides, make)


def test_a_kernel_is_compiled_once_and_again_for_another_source_argument_or_version(directory, versions):
    compile = Counted()
    assert [compile(), compile()] == [b"a ('float32', 128)"] * 2 and compile.times == 1
    assert compile("b") == b"b ('float32', 128)" and compile.times == 2
    assert compile(decides=("float32", 64)) == b"a ('float32', 64)" and compile.times == 3
    versions[0] = "3.7.0"
    assert compile() == b"a ('float32', 128)" and compile.times == 4
    assert len(list((directory / "kernels").iterdir())) == 4


@pytest.mark.skipif(bool(MISSING), reason=NEEDED)
def test_a_kernel_is_another_one_where_a_function_of_another_module_is_that_it_calls(directory, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    head = "import triton\n\n"
    (tmp_path / "outer.py").write_text(
        head + "from inner import changed\n\n\n@triton.jit\ndef kernel(x):\n    return changed(x)\n"
    )

    def place(body: str):
        (tmp_path / "inner.py").write_text(head + f"@triton.jit\ndef changed(x):\n    return {body}\n")
        importlib.invalidate_caches()
        for name in ("outer", "inner"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        linecache.clearcache()
        return compiled.place(importlib.import_module("outer").kernel, None)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert place("x + 1") == place("x + 1") != place("x - 1")


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: whole[:-1] + b"?"])
def test_a_damaged_file_is_compiled_again_and_mended(directory, versions, damage):
    compile = Counted()
    want = compile()
    (path,) = (directory / "kernels").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert compile() == want and compile.times == 2
    assert compile() == want and compile.times == 2


def test_what_cannot_be_kept_is_compiled_all_the_same(directory, versions):
    compile = Counted()
    (directory / "kernels").write_text("a file where the folder should be")
    assert compile() == compile() and compile.times == 2
    (directory / "kernels").unlink()
    for name, value in (("jax_enable_compilation_cache", False), ("jax_compilation_cache_dir", None)):
        jax.config.update(name, value)
        compile()
        assert not list(directory.iterdir())


@pytest.mark.skipif(bool(MISSING), reason=NEEDED)
def test_a_kernel_that_is_kept_gives_the_same_module_without_a_compiler(directory, monkeypatch):
    from jaxft.kernels.mlp import triton as mlp

    e = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)

    def lowered() -> str:
        def both(e, v):
            h = mlp.product(e, v, "silu", 90, in_place=True)
            return h, mlp.product_backward(e, v, h, "silu", 90)

        return jax.jit(both).trace(e, e).lower(lowering_platforms=("cuda",)).as_text()

    cold = lowered()
    assert cold.count("custom_call @triton_kernel_call") == 2  # what was compiled just now is called once
    jax.clear_caches()

    refuse_to_compile(monkeypatch)
    assert lowered() == cold


@pytest.mark.skipif("jax_cuda13_plugin" in MISSING, reason=NEEDED)
@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels are written for jax 0.11.2 and later")
def test_a_kernel_of_mosaic_that_is_kept_gives_the_same_module_without_pallas(directory, monkeypatch):
    from jaxft.kernels import launch
    from jaxft.kernels.attention import mosaic

    q, k = (jax.ShapeDtypeStruct((1, 512, heads, 64), jnp.bfloat16) for heads in (4, 2))
    lse = jax.ShapeDtypeStruct((1, 4, 512), jnp.float32)

    def lowered(heads=2) -> str:
        def gradients(q, k, lse):
            return mosaic.run_backward(q, k, k, None, q, lse, q, scale=0.1, heads=heads)

        return jax.jit(gradients).trace(q, k, lse).lower(lowering_platforms=("cuda",)).as_text()

    cold = lowered()
    assert cold.count("custom_call @mosaic_gpu_v2") == 2
    jax.clear_caches()

    def refused(module):
        raise AssertionError(f"{module} imported to lower it again")

    monkeypatch.setattr(launch.importlib, "import_module", refused)
    assert lowered() == cold
    with pytest.raises(AssertionError, match="mosaic_kernels imported"):
        lowered(heads=1)  # another kernel


def test_a_kernel_of_mosaic_is_another_one_where_a_module_that_it_reads_is(directory, versions, tmp_path, monkeypatch):
    from jaxft.kernels import launch

    monkeypatch.syspath_prepend(tmp_path)

    def place(one: str, other: str, name: str = "kernel"):
        for module, body in (("kernels_of_a_test", one), ("numbers_of_a_test", other)):
            (tmp_path / f"{module}.py").write_text(body)
        importlib.invalidate_caches()
        launch._source.cache_clear()
        return compiled.place(launch._Mosaic("kernels_of_a_test", name, ("numbers_of_a_test",), None), None)

    first = place("A = 1", "B = 1")
    assert first == place("A = 1", "B = 1")
    assert len({first, place("A = 2", "B = 1"), place("A = 1", "B = 2"), place("A = 1", "B = 1", "other")}) == 4


@pytest.mark.skipif(bool(MISSING), reason=NEEDED)
def test_the_kernels_of_a_program_are_compiled_before_it_is_lowered(directory, monkeypatch):
    from jaxft.kernels.launch import begin_compiling
    from jaxft.kernels.mlp import triton as mlp

    def program(e, v):
        def layer(e, v):
            h = mlp.product(e, v, "silu", 90)
            return jax.lax.cond(h[0, 0] > 0, lambda: mlp.product(h, v, "gelu_pytorch_tanh", 90), lambda: h), None

        e, _ = jax.lax.scan(layer, e, v)
        return mlp.product(e, v[0], "silu", 90)

    e, v = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), jax.ShapeDtypeStruct((3, 256, 512), jnp.bfloat16)
    traced = jax.jit(program).trace(e, v)
    wait(begin_compiling(traced.jaxpr.jaxpr))
    assert len(list((directory / "kernels").iterdir())) == 2  # one of an activation, wherever it is launched

    refuse_to_compile(monkeypatch)
    traced.lower(lowering_platforms=("cuda",))
    assert not begin_compiling(traced.jaxpr.jaxpr)  # known: no compiler is asked
