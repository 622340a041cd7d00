"""The step, compiled while its data are tokenised.

Its shapes follow from the flags, and how many steps there are is no part of it (`jaxft.schedules`). What only the data
tell is how many documents a row holds, which can decide between cuDNN and Triton for attention: the step is planned for
a guess, as a run plans it, and taken where the data's answer makes the same one. Where it does not, the run plans its
own as ever, and the kernels that both have are found on disk, or while they are compiled.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxft.kernels.gpu import holding_back
from jaxft.loop import Run
from jaxft.memory import Plan, plan_of
from jaxft.models.decoder import documents_read
from jaxft.prepare import Prepared
from jaxft.settings import TrainSettings

PADDED = 2  # documents in a row that is not packed: one, and its padding


class Ahead(NamedTuple):
    """begin() plans the step in another thread; a second call does nothing, nor does one where nobody gains (`pays`).

    take(run, prepared) is that plan, which it waits for, where the run's own would be the same; else, and where it
    failed, None: what failed is met again by the run's own plan.
    """

    begin: Callable[[], None]
    take: Callable[[Run, Prepared], Plan | None]


@contextmanager
def step_ahead(settings: TrainSettings, prepared: Prepared, optimizer: Callable[[Prepared], Any]) -> Iterator[Ahead]:
    """Gives the two ends of a plan that is made beside the block's own work.

    optimizer: makes the run's, for any number of steps. Where AdaLoRA's is part of its program, prepared has the one
    that is guessed. Whoever leaves the block waits for nothing; the part of the plan that has begun by then is ended,
    and no other begun: tracing, each kernel, lowering, XLA.
    """
    over, begun = threading.Event(), threading.Event()
    kernels: list[Future[None]] = []
    planned: list[Future[tuple[Plan, list[Callable[[], None]]]]] = []
    pool = ThreadPoolExecutor(1, "step ahead")

    def between(compiling: Sequence[Future[None]] = ()) -> None:
        kernels.extend(compiling)
        if over.is_set():
            stop()
            raise CancelledError

    def stop() -> None:
        for kernel in kernels:
            kernel.cancel()

    def plan() -> tuple[Plan, list[Callable[[], None]]]:
        with holding_back() as said:
            return plan_of(settings, prepared, optimizer(prepared), guess(settings), between=between), said

    def begin() -> None:
        if not begun.is_set() and pays(settings, prepared):
            planned.append(pool.submit(plan))
        begun.set()

    def take(run: Run, now: Prepared) -> Plan | None:
        if not planned:
            return None
        if not is_same(settings, prepared, now, run.batches.max_documents):
            over.set()
            return None
        if planned[0].exception() is not None:
            return None
        found, said = planned[0].result()
        for line in said:
            line()
        return found

    try:
        yield Ahead(begin, take)
    finally:
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
        planned.clear()  # a program that nobody takes holds memory of the device


def pays(settings: TrainSettings, prepared: Prepared) -> bool:
    """Whether the step can be compiled before its data are known, and somebody waits for it.

    Not where a budget is going to choose how the step is made; not in a dry run, which reads the plan alone; not on a
    mesh of several devices, whose processes compile together, and one of which may find its tokens kept.
    """
    if settings.dry_run or settings.memory_budget:
        return False
    return prepared.mesh.size == 1 and prepared.mesh.devices.flat[0].platform == "gpu"


def guess(settings: TrainSettings) -> int | None:
    """How many documents a row is taken to hold at most: packed ones more than any kernel asks for."""
    return None if settings.packing or settings.streaming else PADDED


def is_same(settings: TrainSettings, guessed: Prepared, prepared: Prepared, max_documents: int | None) -> bool:
    """Whether the step that was guessed is the run's, by what the data told."""

    def read(most: int | None) -> int | None:
        return documents_read(prepared.model.config, most, settings.max_length, prepared.compute_dtype)

    return guessed.lora == prepared.lora and read(guess(settings)) == read(max_documents)
