"""docs/errors.md is what scripts/list_errors.py makes of the source, and the script sees every error."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "list_errors.py"


def load():
    spec = importlib.util.spec_from_file_location("list_errors", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["list_errors"] = module
    spec.loader.exec_module(module)
    return module


def test_the_committed_list_is_up_to_date():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_error_of_the_source_is_listed_with_its_words(tmp_path, monkeypatch):
    listing = load()
    source = """
CONFIG, COUNT = "adapter.json", 3
def fail(path, settings, names):
    where = f"{path}, line {settings.line}"
    if path:
        raise InputError(f"{where}: {len(names)} of {CONFIG!r}, {', '.join(names)}" f"; choose one")
    raise RunError("disk " + f"{path / 'a'} is full. Make room") from None
def made():
    return InputError("either" if CONFIG else f"or {settings['kind']}, e.g. {COUNT + 1}")
raise ValueError("not ours")
"""
    (tmp_path / "jaxft").mkdir()
    (tmp_path / "jaxft" / "data.py").write_text(source)
    monkeypatch.setattr(listing, "ROOT", tmp_path)
    found = list(listing.errors_in(tmp_path / "jaxft" / "data.py"))
    assert [(error.kind, error.message) for error in found] == [
        ("InputError", "{path}, line {line}: {names} of adapter.json, {names}; choose one"),
        ("RunError", "disk {path / 'a'} is full. Make room"),
        ("InputError", "either / or {kind}, e.g. {COUNT + 1}"),
    ]
    assert {error.group for error in found} == {"Reading data"}
    assert [listing.advice(error.message)[1] for error in found] == ["choose one", "Make room", ""]
    page = listing.page()
    assert page.count("| `jaxft/data.py` |") == 3 and "| Make room | 1 |" in page


def test_the_list_has_as_many_rows_as_the_source_has_errors():
    sources = [path for folder in ("jaxft", "convert", "kernels") for path in (ROOT / folder).glob("**/*.py")]
    calls = [
        node for path in {path.resolve() for path in sources} for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("InputError", "RunError")
    ]  # fmt: skip
    rows = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.endswith("` |")]
    assert len(rows) == len(calls) > 150
