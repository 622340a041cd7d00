"""How a kernel is launched: one custom call, whose bytes are made once and kept on disk (`compiled.py`).

Triton's go through jax-triton, as a call that XLA may record into a CUDA graph. jax-triton 0.3.1 writes the older form
of the custom call, which XLA launches from the host each time and which ends every graph that it makes of a loop's
body. jaxlib has the newer form too (`triton_kernel_call_ffi`, XLA's typed FFI, marked as one that a graph can hold):
same kernel, same arguments. So the call that jax-triton writes is written over with that form. Where a step is bound
by launches, as four bits at 2,048 tokens are, it decides the speed (docs/log.md). jax-triton is imported when a kernel
is lowered and not before: it clears TRITON_CACHE_DIR.

Mosaic's go through Pallas, which takes half a second a kernel to trace and lower it in every process. Their call holds
the lowered module, which XLA compiles.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import threading
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import mlir, xla
from jaxlib.mlir import ir

from jaxft.kernels.compiled import kept, place
from jaxft.programs import equations_in
from jaxft.without_torch import unseen

T = TypeVar("T")
THREADS = 8  # that compile kernels
LEGACY, TYPED = "triton_kernel_call", "triton_kernel_call_ffi"
MOSAIC = "mosaic_gpu_v2"
MOSAIC_FLAGS = {"use_custom_barrier", "skip_device_barrier", "uses_xla_collective_metadata"}  # that no kernel here sets
GRID = 65535  # the most programs along any axis of a grid but the first


def padded(rank: int) -> int:
    """The columns that a tensor core's product takes for so many: a power of two from 16."""
    return max(16, 1 << (rank - 1).bit_length())


def filled(items: Sequence[T], count: int) -> list[T]:
    """So many: what is missing is stood for by the first, of the arrays of a kernel that takes several of a kind."""
    return [*items, *[items[0]] * (count - len(items))]


def fitting(count: int, tile: int) -> int:
    """A tile of at least `tile`, doubled until `GRID` of them hold `count`."""
    while -(-count // tile) > GRID:
        tile *= 2
    return tile


class _Kernel(Protocol):
    """What a launch knows of its kernel."""

    @property
    def cache_key(self) -> str:
        """Of all source that decides what it is compiled to."""

    def call(self, launch: "_Launch", arrays: Sequence[jax.Array]) -> Any:
        """Traces the launch, without what is kept."""

    def opaque(self, operation: ir.Operation) -> bytes:
        """What is kept of the custom call that lowering `call` wrote."""

    def form(self, opaque: bytes) -> dict[str, Any]:
        """The custom call of what was kept, as `jax.ffi.ffi_lowering` takes it."""


@dataclass(frozen=True)
class _Triton:
    """fn: a `triton.jit` function."""

    fn: Any

    @property
    def cache_key(self) -> str:
        return self.fn.cache_key

    def call(self, launch, arrays):
        _meet_triton()
        import jax_triton

        options = dict(launch.options) | {"input_output_aliases": launch.aliases}
        return jax_triton.triton_call(*arrays, kernel=self.fn, out_shape=launch.out, **options)

    def opaque(self, operation):
        attributes = operation.attributes
        assert ir.StringAttr(attributes["call_target_name"]).value == LEGACY, "jax-triton writes another call"
        return ir.StringAttr(attributes["backend_config"]).value_bytes

    def form(self, opaque):
        if typed_calls():
            return dict(call_target_name=TYPED, api_version=4, backend_config={"opaque": ir.StringAttr.get(opaque)})
        return dict(call_target_name=LEGACY, api_version=2, backend_config=opaque)


@dataclass(frozen=True)
class _Mosaic:
    """The function `name` of a module, which is imported when nothing is kept: Pallas takes a quarter of a second.

    reads: other modules whose source decides what it does, without importing them either; arguments: the structure in
    which it takes its arrays."""

    module: str
    name: str
    reads: tuple[str, ...]
    arguments: Any

    @property
    def cache_key(self) -> str:
        return f"{_source((self.module, *self.reads))} {self.name} {self.arguments}"

    def call(self, launch, arrays):
        function = getattr(importlib.import_module(self.module), self.name)
        return function(*jax.tree.unflatten(self.arguments, arrays), **dict(launch.options))

    def opaque(self, operation):
        attributes = operation.attributes
        assert ir.StringAttr(attributes["call_target_name"]).value == MOSAIC, "Pallas writes another call"
        found: dict[str, Any] = {one.name: one.attr for one in ir.DictAttr(attributes["mhlo.backend_config"])}  # type: ignore[attr-defined]
        module = ir.StringAttr(found.pop("module")).value_bytes
        digest = ir.StringAttr(found.pop("kernel_hash")).value_bytes
        assert digest == hashlib.sha256(module).digest(), "Pallas writes another call"
        assert found == dict.fromkeys(MOSAIC_FLAGS, ir.BoolAttr.get(False)), "Pallas writes another call"
        return module

    def form(self, opaque):
        import jax.experimental.mosaic.gpu.core  # noqa: F401  # tells XLA's compiler of Mosaic where its runtime lies

        config = dict.fromkeys(MOSAIC_FLAGS, ir.BoolAttr.get(False)) | {
            "kernel_hash": ir.StringAttr.get(hashlib.sha256(opaque).digest()), "module": ir.StringAttr.get(opaque),
        }  # fmt: skip
        return dict(call_target_name=MOSAIC, api_version=4, backend_config=config)


@functools.cache
def _source(modules: tuple[str, ...]) -> str:
    """A hash of the modules' files."""
    found = hashlib.sha256()
    for module in modules:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        found.update(hashlib.sha256(Path(spec.origin).read_bytes()).digest())
    return found.hexdigest()


@dataclass(frozen=True)
class _Launch:
    """The parts of a launch that are known when it is traced: options are the kernel's own."""

    kernel: _Kernel
    out: tuple[jax.ShapeDtypeStruct, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def aliases(self) -> dict[int, int]:
        return dict(dict(self.options).get("input_output_aliases", ()))


_compiling: dict[Path, Future[None]] = {}  # by the file that each will be
_lock = threading.Lock()  # of `_compiling`
_meeting = threading.Lock()  # of `_met`
_met = False

_launch_p = Primitive("kernel_launch")
_launch_p.multiple_results = True
_launch_p.def_impl(functools.partial(xla.apply_primitive, _launch_p))
_launch_p.def_abstract_eval(lambda *_, launch: [jax.core.ShapedArray(like.shape, like.dtype) for like in launch.out])


def triton_call(*arrays: jax.Array, kernel: Any, out_shape: Any, **options: Any) -> Any:
    """`jax_triton.triton_call` of these arrays; what it returns has out_shape's structure.

    options: its own; input_output_aliases is a tuple of (input, output) pairs.
    """
    return _bind(arrays, _Triton(kernel), out_shape, options)


def mosaic_call(*arrays: Any, module: str, name: str, reads: tuple[str, ...], out_shape: Any, **options: Any) -> Any:
    """The function `name` of a module, called with these trees of arrays and these options: one kernel of Mosaic GPU
    and nothing beside it, which gives what out_shape describes. reads: other modules whose source decides what it
    does."""
    leaves, arguments = jax.tree.flatten(arrays)
    return _bind(leaves, _Mosaic(module, name, reads, arguments), out_shape, options)


def _bind(arrays: Sequence[jax.Array], kernel: _Kernel, out_shape: Any, options: dict[str, Any]) -> Any:
    leaves, treedef = jax.tree.flatten(out_shape)
    launch = _Launch(kernel, tuple(leaves), tuple(sorted(options.items())))
    return jax.tree.unflatten(treedef, _launch_p.bind(*arrays, launch=launch))


def _lower(ctx: Any, *operands: Any, launch: _Launch) -> Any:
    def compiled() -> bytes:
        call = mlir.lower_fun(lambda *arrays: launch.kernel.call(launch, arrays), multiple_results=True)
        (result, *_) = call(ctx, *operands)
        opaque = launch.kernel.opaque(result.owner)
        result.owner.erase()  # the module must not tell which kernels were known: it is what XLA knows a program by
        return opaque

    opaque = kept(launch.kernel, _decides(ctx.avals_in, launch), compiled)
    form = launch.kernel.form(opaque)
    return jax.ffi.ffi_lowering(**form, operand_output_aliases=launch.aliases)(ctx, *operands)


mlir.register_lowering(_launch_p, _lower, platform="cuda")


def _meet_triton() -> None:
    """Triton looks for PyTorch when it sees a process's first argument, to know its tensors, and importing it takes
    seconds, in which no other thread runs. A command that goes without PyTorch shows Triton one while it is hidden."""
    global _met
    # another Triton may have no such function; what else is wrong is said where a kernel is compiled
    with _meeting, contextlib.suppress(ImportError, AttributeError, TypeError):
        if _met:
            return
        _met = True
        from triton._C.libtriton import native_specialize_impl  # type: ignore[import-not-found]
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend

        argument = types.SimpleNamespace(data_ptr=lambda: 16, dtype="bf16")
        with unseen():
            native_specialize_impl(CUDABackend(GPUTarget("cuda", 80, 32)), argument, False, True, True)


def _decides(avals: Sequence[Any], launch: _Launch) -> Any:
    """What decides a call's bytes beside its kernel."""
    return [(aval.shape, aval.dtype.name) for aval in avals], launch.out, launch.options


def begin_compiling(jaxpr: Jaxpr) -> list[Future[None]]:
    """Begins to compile, side by side, the kernels of a traced program that are not on disk yet (`kept`).

    Returns what compiles each, whoever asked for it first. Lowering the program would compile them one after the other;
    it finds them there. What fails here fails there with its reason.
    """
    found: dict[Path, Future[None]] = {}
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "compiling kernels")
    for eqn in _launches(jaxpr):
        launch, avals = eqn.params["launch"], [variable.aval for variable in eqn.invars]
        path = place(launch.kernel, _decides(avals, launch))
        if path is None or path in found:
            continue
        with _lock:
            known = _compiling.get(path)
            if known is not None and not known.done():
                found[path] = known
            elif not path.exists():
                found[path] = _compiling[path] = pool.submit(_compile, launch, avals)
    pool.shutdown(wait=False)  # its threads end with what was submitted
    return list(found.values())


def _compile(launch: _Launch, avals: Sequence[Any]) -> None:
    like = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    with contextlib.suppress(Exception):
        traced = jax.jit(functools.partial(_launch_p.bind, launch=launch)).trace(*like)
        traced.lower(lowering_platforms=("cuda",))


def _launches(jaxpr: Jaxpr) -> Iterator[Any]:
    """The launches of a program and of the programs in it."""
    return (eqn for eqn in equations_in(jaxpr) if eqn.primitive is _launch_p)


@functools.cache
def typed_calls() -> bool:
    """Whether jaxlib has the newer form of the call."""
    from jaxlib import gpu_triton

    return gpu_triton._cuda_triton is not None and TYPED in gpu_triton._cuda_triton.registrations()
