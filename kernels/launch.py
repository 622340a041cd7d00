"""How a Triton kernel is launched: through jax-triton, as a call that XLA may record into a CUDA graph.

jax-triton 0.3.1 writes the older form of the custom call, which XLA launches from the host each time and which ends
every graph that it makes of a loop's body. jaxlib has the newer form too (`triton_kernel_call_ffi`, XLA's typed FFI,
marked as one that a graph can hold): same kernel, same arguments. So the call that jax-triton writes is written over
with that form. Where a step is bound by launches, as four bits at 2,048 tokens are, it decides the speed
(docs/log.md). jax-triton is imported when a kernel is lowered and not before: it clears TRITON_CACHE_DIR.
"""

import contextlib
import functools
import os
import threading
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.interpreters import mlir, xla
from jaxlib.mlir import ir

from jaxft.kernels.compiled import kept, place
from jaxft.without_torch import unseen

T = TypeVar("T")
THREADS = 8  # that compile kernels
LEGACY, TYPED = "triton_kernel_call", "triton_kernel_call_ffi"
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


@dataclass(frozen=True)
class _Launch:
    """The parts of a launch that are known when it is traced: options are those of `jax_triton.triton_call`."""

    kernel: Any
    out: tuple[jax.ShapeDtypeStruct, ...]
    options: tuple[tuple[str, Any], ...]


_compiling: dict[Path, Future[None]] = {}  # by the file that each will be
_lock = threading.Lock()  # of `_compiling`
_meeting = threading.Lock()  # of `_met`
_met = False

_launch_p = Primitive("triton_launch")
_launch_p.multiple_results = True
_launch_p.def_impl(functools.partial(xla.apply_primitive, _launch_p))
_launch_p.def_abstract_eval(lambda *_, launch: [jax.core.ShapedArray(like.shape, like.dtype) for like in launch.out])


def triton_call(*arrays: jax.Array, kernel: Any, out_shape: Any, **options: Any) -> Any:
    """`jax_triton.triton_call` of these arrays; what it returns has out_shape's structure.

    options: its own; input_output_aliases is a tuple of (input, output) pairs.
    """
    leaves, treedef = jax.tree.flatten(out_shape)
    launch = _Launch(kernel, tuple(leaves), tuple(sorted(options.items())))
    return jax.tree.unflatten(treedef, _launch_p.bind(*arrays, launch=launch))


def _lower(ctx: Any, *operands: Any, launch: _Launch) -> Any:
    aliases = dict(dict(launch.options).get("input_output_aliases", ()))

    def call(*arrays):
        import jax_triton

        options = dict(launch.options) | {"input_output_aliases": aliases}
        return jax_triton.triton_call(*arrays, kernel=launch.kernel, out_shape=launch.out, **options)

    def compiled() -> bytes:
        _meet_triton()
        (result, *_) = mlir.lower_fun(call, multiple_results=True)(ctx, *operands)
        attributes = result.owner.attributes
        assert ir.StringAttr(attributes["call_target_name"]).value == LEGACY, "jax-triton writes another call"
        opaque = ir.StringAttr(attributes["backend_config"]).value_bytes
        result.owner.erase()  # the module must not tell which kernels were known: it is what XLA knows a program by
        return opaque

    opaque = kept(launch.kernel, _decides(ctx.avals_in, launch), compiled)
    form: dict[str, Any] = dict(call_target_name=LEGACY, api_version=2, backend_config=opaque)
    if typed_calls():
        form = dict(call_target_name=TYPED, api_version=4, backend_config={"opaque": ir.StringAttr.get(opaque)})
    return jax.ffi.ffi_lowering(**form, operand_output_aliases=aliases)(ctx, *operands)


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
    """What decides a compiled call beside its kernel."""
    return [(aval.shape, aval.dtype.name) for aval in avals], launch.out, launch.options


def compile_ahead(jaxpr: Jaxpr) -> None:
    """Compiles the kernels of a traced program side by side that are not on disk yet (`kept`). Lowering the program
    would compile them one after the other; it finds them there. What fails here fails there with its reason."""
    wait(begin_compiling(jaxpr))


def begin_compiling(jaxpr: Jaxpr) -> list[Future[None]]:
    """`compile_ahead` without waiting: what compiles each kernel, whoever asked for it first."""
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
    for eqn in jaxpr.eqns:
        if eqn.primitive is _launch_p:
            yield eqn
        for leaf in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr)):
            if isinstance(leaf, Jaxpr | ClosedJaxpr):
                yield from _launches(leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf)


@functools.cache
def typed_calls() -> bool:
    """Whether jaxlib has the newer form of the call."""
    from jaxlib import gpu_triton

    return gpu_triton._cuda_triton is not None and TYPED in gpu_triton._cuda_triton.registrations()
