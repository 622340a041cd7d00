"""The check against the real llama.cpp, where it is built: a wrong file is seen, a right one passes."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import need_shared

pytest.importorskip("gguf", reason="the files are written with it")

MODEL = "llama_linear_tied"


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """`scripts/check_llama_cpp.py`'s main with the Python that has llama.cpp."""
    python = os.environ.get("JAXFT_LLAMA_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("JAXFT_LLAMA_PYTHON names no Python with llama-cpp-python; scripts/check_llama_cpp.sh builds one")
    os.environ["JAXFT_TOKENIZERS"] = str(need_shared("tokenizers"))
    from scripts import check_llama_cpp

    out = tmp_path_factory.mktemp("llama") / "page.md"

    def run(*argv: str) -> tuple[int, str]:
        flags = ["--llama_python", python, "--threads=1", "--out", str(out), "--parts", "models", "--models", MODEL]
        return check_llama_cpp.main([*flags, *argv]), out.read_text(encoding="utf-8")

    return run


@pytest.mark.long
def test_a_right_file_passes_and_a_wrong_one_is_seen(check, monkeypatch):
    code, page = check()
    assert code == 0 and f"| {MODEL} | llama-spm | yes (" in page and "0 of the checks failed" in page
    from jaxft.convert.gguf import write

    rows = write.stored_rows  # heads' rows left in Hugging Face's order: llama.cpp rotates other pairs
    monkeypatch.setattr(write, "stored_rows", lambda index, *shape: np.sort(rows(index, *shape)))
    code, page = check()
    assert code == 1 and "f32 logits differ" in page and "**NO**" in page
