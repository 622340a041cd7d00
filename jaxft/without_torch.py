"""A command does not import PyTorch, where it is installed: transformers would, and nothing here uses it.

It is a third of a process's modules, and on a slow disk most of its start. transformers asks once whether PyTorch is
there, so a command lets it ask before anything else, while it does not find it; Triton imports it when it sees a
process's first argument, and is shown one while it is hidden, too (`kernels/launch.py`). A metric of the user's own
may use PyTorch through transformers: where one may be asked for, all is left as it is, and so it is in a process that
is no command of ours. Whoever imports PyTorch itself gets it in any case.
"""

import gc
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

_METRIC = re.compile(r"eval[-_]metric")
_SILENT = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def may_need_torch(words: Sequence[str]) -> bool:
    """Whether a command line, or the file of its `--config`, names a metric."""
    texts = list(words)
    for word, after in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        file = Path(value or after).expanduser()
        if name == "--config" and file.is_file():
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
    return any(_METRIC.search(text) for text in texts)


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """The module `name` is not found meanwhile; where it is imported already, nothing is changed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # which Python takes for: there is none
    try:
        yield
    finally:
        del sys.modules[name]


def import_transformers() -> None:
    """transformers as it is without PyTorch, and without its advice to install it."""
    before = os.environ.get(_SILENT)
    os.environ[_SILENT] = "1"
    try:
        with hidden("torch"):
            import transformers.configuration_utils  # noqa: F401
    finally:
        if before is None:
            del os.environ[_SILENT]
        else:
            os.environ[_SILENT] = before


def command() -> str | None:
    """The module of a process `python -m jaxft.…`, which calls itself "-m" while Python looks for the module."""
    name = next((after for word, after in itertools.pairwise(sys.orig_argv) if word == "-m"), "")
    return name if sys.argv[:1] == ["-m"] and name.partition(".")[0] == "jaxft" else None


def unseen() -> AbstractContextManager[None]:
    """`hidden("torch")` in a command that goes without it; in any other process nothing."""
    return hidden("torch") if _going_without else nullcontext()


_going_without = bool(command()) and not may_need_torch(sys.argv[1:])
if command():
    gc.disable()  # until the package is imported, of which nothing is garbage; to look for it takes a tenth of that
    if _going_without:
        import_transformers()
