"""Several processes of one run: how they join, what the first alone does, and that all end when one does.

Every process runs the same program on the same settings and data; `jax.distributed` makes their devices one mesh. Each
puts its own rows of a batch on its own devices. What is said, and every file but the arrays of a checkpoint, is the
first process's; the output directory is shared between all.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft.errors import InputError, RunError
from jaxft.settings import TrainSettings

ENVIRONMENT = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}  # fmt: skip


def asked_for(settings: TrainSettings) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that flags or the environment give; flags win; {} for none.

    Raises InputError for a number that is none and for a process outside the count.
    """
    found: dict[str, Any] = {name: getattr(settings, name) for name in ENVIRONMENT}
    for name, variable in ENVIRONMENT.items():
        value = os.environ.get(variable)
        if found[name] is None and value:
            if name != "coordinator_address" and not value.isdecimal():
                raise InputError(f"{variable} is {value!r}; expected a whole number")
            found[name] = value if name == "coordinator_address" else int(value)
    given = {name: value for name, value in found.items() if value is not None}
    count, number = given.get("num_processes"), given.get("process_id")
    if count is not None and number is not None and number >= count:
        raise InputError(f"process_id is {number} of num_processes {count}; it counts from 0 to {count - 1}")
    address = str(given.get("coordinator_address", "host:1"))
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise InputError(f"coordinator_address is {address!r}; expected HOST:PORT of process 0, such as 10.0.0.1:1234")
    return given


@contextmanager
def joined(settings: TrainSettings) -> Iterator[None]:
    """Joins the other processes where the settings or the environment name any, and leaves them at the end.

    Before anything touches a device. On a cluster that JAX knows (SLURM, Open MPI, Kubernetes) what is not given is
    found. Raises InputError where it is not, RunError where the others cannot be reached.
    """
    given = asked_for(settings)
    if not given:
        yield
        return
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds)
    except ValueError as failure:
        missing = [name for name in ENVIRONMENT if name not in given]
        names = ", ".join(f"--{name}" for name in missing) + " or " + ", ".join(ENVIRONMENT[name] for name in missing)
        raise InputError(f"several processes: {failure}; give {names}") from failure
    except RuntimeError as failure:
        where = given.get("coordinator_address", "the address found")
        raise RunError(
            f"the other processes cannot be reached at {where}: {failure}; does process 0 run there?"
        ) from failure
    if jax.process_count() > 1 and settings.output_dir is None:
        raise InputError("several processes need --output_dir; name a directory that all of them share")
    try:
        yield
        meet("end")  # the first process may still be writing: it must not be missed
    except jax.errors.JaxRuntimeError as failure:
        raise RunError(
            f"a computation of all {jax.process_count()} processes failed: {failure}. Most likely another process "
            "died, and its own message says why; go on from the last checkpoint by --resume_from_checkpoint auto"
        ) from failure
    jax.distributed.shutdown()


def leave(code: int) -> int:
    """The exit code; but a process that failed among several ends here, for an orderly exit waits for the others."""
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_first() -> bool:
    """Whether this process says things and writes files; a run of one process is its first."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(text: str) -> None:
    """Everything but results goes to stderr; of several processes the first says it."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def several() -> bool:
    """Whether the run has several processes. One that was never joined to others is not asked for its devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def meet(name: str) -> None:
    """Waits until every process is here."""
    if several():
        multihost_utils.sync_global_devices(f"jaxft.{name}")


def largest(value: int) -> int:
    """The largest of all processes' values; every process must ask."""
    if not several():
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def on_first(action: Callable[[], object]) -> None:
    """Runs `action` in the first process while the others wait. Raises there what it raises, elsewhere RunError."""
    failure: Exception | None = None
    if is_first():
        try:
            action()
        except Exception as caught:
            failure = caught
    failed = largest(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise RunError("the first process failed; its own message says why")


def gathered(tree: Any) -> Any:
    """The tree with every array whole: as it is in one process, else as numpy arrays in each of them."""
    return multihost_utils.process_allgather(tree, tiled=True) if several() else tree
