"""The Triton kernels of a run's step, compiled while its data are tokenised.

The step's shapes follow from the flags. What only the data tell is how many documents a row holds, and it can decide
between cuDNN and Triton for attention: Triton is taken for the guess, and where that was wrong its kernels are kept on
disk for another run. The step itself is traced and lowered as ever, and finds its kernels compiled or being compiled.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import jax

from jaxft.cards import is_absent
from jaxft.kernels.compiled import keeps
from jaxft.kernels.gpu import check_installed, compiling_for, rehearsing
from jaxft.kernels.launch import begin_compiling
from jaxft.memory import step_shapes
from jaxft.prepare import Prepared
from jaxft.settings import TrainSettings
from jaxft.step import make_train_step

PADDED = 2  # documents in a row that is not packed: one, and its padding


@contextmanager
def kernels_ahead(
    settings: TrainSettings, prepared: Prepared, optimizer: Callable[[Prepared], Any]
) -> Iterator[Callable[[], None]]:
    """Gives a function that begins to compile the step's kernels in other threads; a second call does nothing.

    It does nothing at all where nothing would be gained (`pays`). The run is what it is without: what fails here is
    met again where the step is lowered, and nothing is said. Whoever leaves the block waits for nothing; what has not
    begun by then is not begun. optimizer: makes the run's, for any number of steps.
    """
    over, begun = threading.Event(), threading.Event()
    kernels: list[Future[None]] = []
    pool = ThreadPoolExecutor(1, "kernels ahead")

    def compile_them() -> None:
        traced = trace(settings, prepared, optimizer(prepared))
        if not over.is_set():
            kernels.extend(begin_compiling(traced.jaxpr.jaxpr))
        if over.is_set():
            stop()

    def stop() -> None:
        for kernel in kernels:
            kernel.cancel()

    def begin() -> None:
        if not begun.is_set() and pays(settings, prepared):
            pool.submit(compile_them)
        begun.set()

    try:
        yield begin
    finally:
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        stop()


def pays(settings: TrainSettings, prepared: Prepared) -> bool:
    """Whether the step has kernels that can be compiled before it is known, and somebody waits for it.

    Not on a mesh of several devices, which they do not serve; not where a budget is going to choose how the step is
    made; not in a dry run, which leaves on disk what its own step needs.
    """
    if settings.dry_run or settings.memory_budget or not keeps():
        return False
    if prepared.mesh.size > 1 or prepared.mesh.devices.flat[0].platform != "gpu":
        return False
    try:
        check_installed()
    except NotImplementedError:
        return False
    return True


def trace(settings: TrainSettings, prepared: Prepared, optimizer: Any) -> jax.stages.Traced:
    """The run's step traced from shapes, as `memory.plan` does it, under a name of its own."""
    step = make_train_step(
        prepared.model, optimizer=optimizer, gradient_checkpointing=settings.gradient_checkpointing,
        dtype=prepared.compute_dtype, mlp_tiles=settings.mlp_tiles, kept_layers=settings.kept_layers,
        max_documents=None if settings.packing or settings.streaming else PADDED,
    )  # fmt: skip

    def kernels_of_step(*arrays):
        return step(*arrays)

    shapes, device = step_shapes(settings, prepared, optimizer), prepared.mesh.devices.flat[0]
    with rehearsing(), compiling_for(device) if is_absent(device) else nullcontext(), jax.set_mesh(prepared.mesh):
        return jax.jit(kernels_of_step).trace(*shapes)
