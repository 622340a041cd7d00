"""Shared by all tests: strict promotion of dtypes and ranks, no network, tiny Hugging Face models made once."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: the suite needs no network
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The same program in several tests, workers and processes is compiled once, and without XLA's expensive optimisations:
# most programs here run only a few times.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxft-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# jaxlib 0.10, the newest on Python 3.11, still has XLA's older way to make CPU kernels of fusions: a step compiles in a
# third of the time. Later ones know no such flag, so on a newer Python the tests take the way of every run.
if version("jaxlib").startswith("0.10.") and "fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".lstrip()
if "JAXFT_TESTS_CACHE" not in os.environ:  # tokenised data of tests stay out of the user's cache
    os.environ["JAXFT_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxft-tests-")
    atexit.register(shutil.rmtree, os.environ["JAXFT_TESTS_CACHE"], ignore_errors=True)

import jax
import pytest

from tests.tiny_models import write_hf_model

SHARED = Path(__file__).resolve().parents[2] / "shared"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def need_shared(path: str) -> Path:
    """A file of ../shared; skips where it is absent, unless JAXFT_REQUIRE_SHARED=1 says that it must be there."""
    found = SHARED / path
    if not found.exists():
        if os.environ.get("JAXFT_REQUIRE_SHARED") == "1":
            pytest.fail(f"{found} is required and missing")
        pytest.skip(f"{found} is not on this machine")
    return found


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of `tiny_models.CONFIGS` by name, written by transformers when first asked for."""
    pytest.importorskip("torch", reason="the reference needs torch")
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = write_hf_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return directory
