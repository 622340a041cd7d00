"""docs/: what pages name exists, what they type is accepted, what they show of it comes, and the site builds."""

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.config import parse
from jaxft.settings import GROUPS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = r"`((?:jaxft|kernels|convert|scripts|docs|tests|recipes|notebooks)/[\w/.-]+)`"


def script(name):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


follow_docs = script("follow_docs")


def commands(text):
    """(module, arguments) of every `python -m jaxft.…` in the code of a page, without pipes and redirections."""
    typed = [step.command for step in follow_docs.steps(text)]
    typed += re.findall(r"^(python -m jaxft.*)$", text, re.MULTILINE)
    typed += [inline for inline in re.findall(r"`(python -m jaxft[^`]*)`", text)]
    for command in typed:
        words = shlex.split(re.split(r" (?:2?>|\|) ?", command)[0], comments=True)
        if words[:2] == ["python", "-m"]:
            yield words[2], words[3:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_accepted_and_every_path_exists(page):
    text = page.read_text(encoding="utf-8")
    for module, arguments in commands(text):
        assert importlib.util.find_spec(module) is not None, module
        name = module.rpartition(".")[2]
        if name in GROUPS and "--help" not in arguments and "[…]" not in arguments:
            arguments = list(itertools.dropwhile(lambda word: not word.startswith("-"), arguments))  # data sets
            words = [str(ROOT / word) if word.startswith("recipes/") else word for word in arguments]
            if "run.yaml" not in words and "…" not in " ".join(words):
                parse(name, words)
    for path in re.findall(NAMED, text):
        assert (ROOT / path).exists() or "<" in path, path
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / link).exists(), link


def test_errors_that_troubleshooting_quotes_are_those_of_the_source():
    errors = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").replace("\\", "")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("## ")[0]
    quoted = [
        text
        for line in page.splitlines()
        if line.startswith("| `")
        for text in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]
    assert len(quoted) >= 8
    for text in quoted:
        assert re.sub(r"\s", "", text) in re.sub(r"[\s|]", "", errors), text


def test_tables_of_other_libraries_settings_are_up_to_date():
    listing = script("list_arguments")
    for page in listing.PAGES:
        assert (ROOT / "docs" / page).read_text(encoding="utf-8") == listing.with_tables(page), (
            "run python scripts/list_arguments.py"
        )


def test_pages_with_commands_are_followed_literally_before_a_change_lands():
    (line,) = [
        line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if "follow_docs" in line
    ]
    followed = {"README", *re.findall(r"[\w-]+", line.partition("docs/{")[2].partition("}")[0])}
    assert "README.md docs/{" in line
    pages = ("README", "index", "quick-start", "recipes", "adapters", "four-bits", "gguf", "from-trl", "from-unsloth")
    assert followed >= set(pages)
    for name in followed - {"README"}:
        assert list(follow_docs.steps((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))), name


def test_a_line_that_is_shown_and_does_not_come_is_found():
    printed = "read a.jsonl\nloss 2.5  12 tokens/s\nadapter written to runs/x\n"
    assert follow_docs.missing(["loss 3.25 1,100 tokens/s", "adapter written to runs/x"], printed) is None
    assert follow_docs.missing(["adapter written to runs/x", "read a.jsonl"], printed) == "read a.jsonl"
    assert follow_docs.missing(["adapter written to runs/y"], printed) == "adapter written to runs/y"
    (one, two) = follow_docs.steps("x\n```console\n$ a b \\\n      --c\n[…]\nout\n$ d\n```\n")
    assert one == ("a b --c", ["out"]) and two == ("d", [])


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the site needs mkdocs-material")
    pytest.importorskip("mkdocstrings", reason="the reference needs mkdocstrings-python")
    config = ROOT / "docs" / "site" / "mkdocs.yml"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(tmp_path / "site")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert {page.stem for page in PAGES[1:]} <= {made.stem for made in (tmp_path / "site").glob("*.html")}
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert "Σ weight · nll" in reference and 'id="jaxft.make_train_step"' in reference
    settings = (tmp_path / "site" / "settings.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in settings for name in ("lora_r", "memory_budget", "top_p"))
