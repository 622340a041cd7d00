"""How jax's devices are started: with a cache of compiled programs, and for training while the package is imported.

A GPU takes more than a second to start, in which the interpreter has little to do, and the imports as long.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxft.without_torch import command

_early: list[Future[None]] = []


def compile_cache_directory() -> Path:
    """Where compiled programs are kept: `JAX_COMPILATION_CACHE_DIR`, or ~/.cache/jaxft/xla."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "jaxft" / "xla")


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, on accelerators; JAX_COMPILATION_CACHE_DIR says where else."""
    # a CPU program may not run on another CPU of the same name, and compiles in seconds anyway
    if jax.default_backend() == "cpu":
        return
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(compile_cache_directory()))
    # jax keeps what took a second to compile; a run begins with some twenty small programs that together take longer
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def start_devices() -> None:
    """Starts jax's devices and runs a first program, with which a GPU takes its memory."""
    use_compile_cache()
    jnp.zeros((), jnp.int32).block_until_ready()


def starting_devices() -> Future[None]:
    """`start_devices` in another thread: begun with the imports where that could be, else now."""
    return _early.pop() if _early else beside(start_devices)


def beside(function: Callable[[], None]) -> Future[None]:
    """Runs a function in a thread of its own."""
    pool = ThreadPoolExecutor(1, "starting devices")
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def wanted_now(words: list[str]) -> bool:
    """Whether a run of these words is going to start the devices, and before it does anything else to them.

    Not where it plans for a card that is not here or joins other processes first. Not where it is going to end sooner:
    with its flags, with an error in them, for the want of its model or data. What is wrong is said by the run itself.
    """
    from jaxft.config import parse
    from jaxft.processes import asked_for

    if any(word.startswith(("-h", "--help")) for word in words):
        return False
    try:
        settings, _ = parse("train", words)
        model, data = settings.model_name_or_path, [source.path for source in settings.sources]
        alone = not asked_for(settings)
    except (OSError, ValueError, RuntimeError):
        return False
    if settings.device or not alone:
        return False
    if model is None and not data:
        return True  # the embedded ones
    # a name of the hub takes longer than a device
    return model is not None and bool(data) and all(Path(name).expanduser().exists() for name in (model, *data))


if command() == "jaxft.train" and wanted_now(sys.argv[1:]):
    _early.append(beside(start_devices))
