"""What an own kernel asks of the device before it serves: one NVIDIA GPU, which one, and the packages that compile."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
# compute capability -> the kind of card that tables of tiles go by; what is not here is a consumer card
CARDS = {80: "a100", 87: "a100", 90: "hopper", 100: "blackwell", 103: "blackwell", 110: "blackwell"}

_target: ContextVar[jax.Device | None] = ContextVar("target", default=None)
_held_back: ContextVar[list[Callable[[], None]] | None] = ContextVar("held_back", default=None)
_taken: ContextVar[dict[str, list[str]] | None] = ContextVar("taken", default=None)


@contextmanager
def _held(variable: ContextVar[T | None], value: T) -> Iterator[T]:
    before = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(before)


def compiling_for(device: jax.Device) -> AbstractContextManager[jax.Device]:
    """Kernels traced inside are chosen and compiled for an NVIDIA GPU that may not be here."""
    return _held(_target, device)


def holding_back() -> AbstractContextManager[list[Callable[[], None]]]:
    """What is traced inside may never be run: which ways it took is not said. Gives what says it, to be called."""
    return _held(_held_back, [])


def ways_taken() -> AbstractContextManager[dict[str, list[str]]]:
    """Which ways each op takes in what is traced inside, as {"attention": ["mosaic"], "mlp": ["triton"], …}; "xla" with
    the reason where no kernel serves."""
    return _held(_taken, {})


def took(op: str, way: str, refusals: tuple[str, ...] = (), level: int = logging.INFO) -> None:
    """Notes the way that an op takes, and why not one before it: for `ways_taken`, and once in the log; inside of
    `holding_back` the latter is kept."""
    reasons = f" ({'; '.join(refusals)})" if refusals else ""
    ways = _taken.get()
    if ways is not None and way + reasons not in ways.setdefault(op, []):
        ways[op].append(way + reasons)
    line = functools.partial(_log_once, level, f"{op}: {way}{reasons}")
    held = _held_back.get()
    if held is None:
        line()
    else:
        held.append(line)


@functools.cache
def _log_once(level: int, line: str) -> None:
    logging.getLogger("jaxft").log(level, "%s", line)


def device_capability() -> int:
    """The compute capability of the first local GPU, 90 for 9.0; of `compiling_for`'s device inside of that.

    Raises NotImplementedError where there is none.
    """
    device = _target.get()
    if device is None:
        device = jax.local_devices()[0]
        if "cuda" not in device.client.platform_version.lower():
            raise NotImplementedError(f"{device.platform} device: needs an NVIDIA GPU")
    if device.platform != "gpu":
        raise NotImplementedError(f"{device.platform} device: needs an NVIDIA GPU")
    major, minor = str(device.compute_capability).split(".")
    return 10 * int(major) + int(minor)


def one_device() -> bool:
    """Whether arrays are whole here: kernels that XLA cannot split serve no mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def one_gpu() -> bool:
    """Whether what is traced runs on one NVIDIA GPU."""
    try:
        return one_device() and device_capability() > 0
    except NotImplementedError:
        return False


def check_16_bits(dtype: jnp.dtype, capability: int) -> None:
    """Raises NotImplementedError where a kernel's products are not of 16-bit numbers on tensor cores."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtype {dtype}: needs bfloat16 or float16")
    if capability < 80:
        raise NotImplementedError(f"compute capability {capability / 10}: needs 8.0 (tensor cores through Triton)")


def check_installed() -> None:
    """Raises NotImplementedError with the package that is missing."""
    for module in ("triton", "jax_triton"):
        if find_spec(module) is None:
            raise NotImplementedError(f"{module} is not installed: pip install 'jaxft[cuda]'")


def serving(op: str, check: Callable[[int], None], implementation: str | None) -> int | None:
    """The compute capability that the Triton kernels of `op` are compiled for; None where they cannot serve.

    check: raises NotImplementedError where they do not serve the case on a capability. That is raised again where
    implementation is "triton": what was asked for by name fails loudly.
    """
    try:
        if not one_device():
            raise NotImplementedError("a mesh of several devices: the kernels have no rule to be split")
        capability = device_capability()
        check(capability)
    except NotImplementedError as refusal:
        if implementation == "triton":
            raise NotImplementedError(f"{op} by triton: {refusal}") from None
        took(op, "xla", (str(refusal),))
        return None
    took(op, "triton")
    return capability
