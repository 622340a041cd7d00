"""Tokenised data sets kept on disk under a key of everything that makes their tokens, and memory-mapped from there."""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jaxft import chat, columns, formats, messages, samples
from jaxft.errors import RunError
from jaxft.samples import ARRAYS, Samples, from_directory

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_FACTS, _SEAL = "facts.json", "seal"
_MADE_BY = (
    chat,
    columns,
    formats,
    messages,
    samples,
)  # with jaxft.data, which asks: a changed line in any makes a new key


def default_directory() -> Path:
    """Where tokenised data sets are kept unless told: ~/.cache/jaxft/tokenized, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / "tokenized"


def key_of(rows: str, tokenizer: "PreTrainedTokenizerBase | None", code: Iterable[Path], **settings: Any) -> str:
    """32 hexadecimal digits that stand for the content of rows, tokenizer, code, library versions and settings.

    rows: what stands for their content, such as `rows_digest` of the columns that are read. tokenizer: None where the
    rows are tokenised already.
    """
    parts: dict[str, Any] = {
        "rows": rows,
        "code": [_digest(Path(str(file)).read_bytes()) for file in (*code, *(module.__file__ for module in _MADE_BY))],
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        "settings": settings,
    }
    if tokenizer is not None:
        core = getattr(tokenizer, "backend_tokenizer", None)
        parts["tokenizer"] = [type(tokenizer).__name__, _digest(core.to_str().encode()) if core else ""]
        parts["special"] = [tokenizer.special_tokens_map, tokenizer.all_special_ids]
        parts["template"] = tokenizer.chat_template
        if writes_date(tokenizer):
            parts["date"] = datetime.date.today().isoformat()
    return _digest(json.dumps(parts, sort_keys=True, default=str).encode())


def writes_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template may write the day on which it is rendered."""
    return "strftime_now" in json.dumps(tokenizer.chat_template or "")


def fetch(directory: Path, key: str) -> tuple[Samples, dict[str, Any]] | None:
    """The set and the facts that were stored under `key`; None where there is none or where a byte of it is wrong."""
    entry = directory / key
    try:
        text = (entry / _FACTS).read_bytes()
        if (entry / _SEAL).read_bytes() != _digest(text).encode():
            return None
        facts = json.loads(text)
        for name in ARRAYS:
            with (entry / name).open("rb") as stream:
                if hashlib.file_digest(stream, _hash).hexdigest() != facts["digests"][name]:
                    return None
        return from_directory(entry), facts["report"]
    except OSError:
        return None  # where it is a disk that does not work, `store` will say so


def store(directory: Path, key: str, make: Callable[[Mapping[str, IO[bytes]]], dict[str, Any]]) -> None:
    """Stores what `make(streams)` writes, and the facts that it returns, under `key`: whole or not at all.

    The files are written under another name and the directory renamed at the end, so two processes at once do the work
    twice and the first one's result stays. Raises RunError where the disk does not take it.
    """
    entry = directory / key
    building: Path | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"building-{key[:8]}-", dir=directory))
        with contextlib.ExitStack() as stack:
            streams = {name: stack.enter_context((building / name).open("wb")) for name in ARRAYS}
            report = make(streams)
        digests = {}
        for name in ARRAYS:
            with (building / name).open("rb") as stream:
                digests[name] = hashlib.file_digest(stream, _hash).hexdigest()
        text = json.dumps({"report": report, "digests": digests}).encode()
        (building / _FACTS).write_bytes(text)
        (building / _SEAL).write_text(_digest(text))
        if entry.exists() and fetch(directory, key) is None:
            _remove(entry)
        try:
            building.rename(entry)
        except OSError:
            if not entry.exists():  # else another process was faster, and its entry is as good
                raise
    except OSError as failure:
        raise RunError(
            f"the tokenised data could not be kept in {directory}: {failure}; make room, name another --dataset_cache, "
            "or keep them in memory with --dataset_cache none"
        ) from failure
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def name_too(directory: Path, name: str, key: str) -> None:
    """Has `fetch` find under `name`, which is a key as well, what is stored under `key`; later names win.

    A disk that does not take it is no failure: the set is then looked for under its key.
    """
    with contextlib.suppress(OSError):
        new = directory / f"{name}-{os.getpid()}"
        new.symlink_to(key)
        new.replace(directory / name)


def _remove(entry: Path) -> None:
    """Removes a damaged entry, so that nobody meets half of it."""
    aside = Path(tempfile.mkdtemp(prefix="damaged-", dir=entry.parent))
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        entry.rename(aside / entry.name)
    shutil.rmtree(aside, ignore_errors=True)


def rows_digest(rows: "datasets.Dataset") -> str:
    """Of the rows' types and values, whatever file they came from, and however that was cut into pieces."""
    import pyarrow

    content = _hash()
    content.update(str(rows.features).encode())
    with pyarrow.PythonFile(_Sink(content), "w") as sink:
        for table in rows.with_format("arrow").iter(10_000):
            with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table.combine_chunks())
    return content.hexdigest()


class _Sink:
    """A file that only hashes what is written to it."""

    closed = False

    def __init__(self, content: Any) -> None:
        self._content = content

    def write(self, data: bytes) -> int:
        self._content.update(data)
        return len(data)

    def flush(self) -> None: ...
    def close(self) -> None: ...


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _digest(data: bytes) -> str:
    content = _hash()
    content.update(data)
    return str(content.hexdigest())
