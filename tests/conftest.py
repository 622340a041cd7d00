"""Shared by all tests: strict promotion of dtypes and ranks, one compile cache, tiny Hugging Face models."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: the suite needs no network
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

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
