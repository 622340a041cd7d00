"""notebooks/*.ipynb run as they are on a CPU within two minutes each, and are kept without outputs."""

import json
import os
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["convert_and_serve", "first_fine_tune", "inside_a_lora", "own_loss"]
PLOTS = {"first_fine_tune": 1, "inside_a_lora": 2}
PRINTED = {
    "convert_and_serve": "6 of 6 answers are the same",
    "first_fine_tune": "  after:",
    "inside_a_lora": "effective rank",
    "own_loss": "right answer more probable than the wrong one",
}


def test_notebooks_are_kept_without_outputs_and_their_code_is_python():
    assert [path.stem for path in NOTEBOOKS] == NAMES
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
        for cell in cells:
            if cell["cell_type"] == "code":
                assert not cell["outputs"] and cell["execution_count"] is None, path.name
                compile("".join(cell["source"]), path.name, "exec")


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_within_two_minutes(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="it runs notebooks")
    nbformat = pytest.importorskip("nbformat", reason="it reads notebooks")
    pytest.importorskip("ipykernel", reason="it is the kernel")
    pytest.importorskip("matplotlib", reason="two of the notebooks plot")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # as who reads it has it: the same few programs run often
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    book = nbformat.read(path, as_version=4)
    began = time.monotonic()
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    seconds = time.monotonic() - began
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    assert PRINTED[path.stem] in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PLOTS.get(path.stem, 0)
    assert seconds < 120 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)), f"{seconds:.0f} s"
