"""Kernels that were compiled or lowered before, kept on disk beside XLA's programs.

jax-triton compiles each kernel again in every process, while a step is lowered, and Pallas lowers each of Mosaic's:
seconds before XLA can look whether it knows the program. What is kept is the bytes of a finished call, under a hash of
all that decides them. A file that is damaged is as good as none, and one that cannot be written is no error.
"""

import functools
import hashlib
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

DIGEST = hashlib.sha256().digest_size
PACKAGES = ("triton", "jax-triton", "jax", "jaxlib")  # whose versions decide the bytes


def kept(kernel: Any, decides: Any, make: Callable[[], bytes]) -> bytes:
    """What `make` returned for this kernel before, or returns now.

    kernel: its `cache_key` is of the source that decides what is made, beside `decides`, by its repr. Nothing is kept
    where jax keeps no programs (`jax_compilation_cache_dir`, `jax_enable_compilation_cache`).
    """
    path = place(kernel, decides)
    if path is None:
        return make()
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


def keeps() -> bool:
    """Whether anything is kept."""
    return bool(jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache)  # type: ignore[attr-defined]


def place(kernel: Any, decides: Any) -> Path | None:
    """The file that `kept` reads or writes; None where nothing is kept."""
    if not keeps():
        return None
    directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    about = repr((kernel.cache_key, decides, _versions()))
    return Path(directory) / "kernels" / hashlib.sha256(about.encode()).hexdigest()


@functools.cache
def _versions() -> list[str]:
    return [version(package) for package in PACKAGES]


def _read(path: Path) -> bytes | None:
    """The bytes of a file that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, found = content[:DIGEST], content[DIGEST:]
    return found if hashlib.sha256(found).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: other processes read and write the same folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            part = Path(temporary) / path.name
            part.write_bytes(hashlib.sha256(content).digest() + content)
            part.replace(path)
    except OSError:
        pass
