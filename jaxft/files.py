"""Reads rows from JSON and JSONL files, directories of them, or the hub, and says where a file is malformed."""

import codecs
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.chat import shown
from jaxft.errors import InputError

if TYPE_CHECKING:
    import datasets

_SUFFIXES = (".json", ".jsonl")


def find_files(path: Path, split: str | None = None) -> list[Path]:
    """The data files that a local path stands for, by name.

    In a directory: the .json and .jsonl files of the split, that is those called `SPLIT.…`, `SPLIT-…` or `SPLIT_…`;
    without a split those of "train", or all files where none is called so. Raises InputError where there is none.
    """
    if not path.exists():
        raise InputError(f"data set {path}: there is no such file or directory")
    files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file()) if path.is_dir() else [path]
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise InputError(f"data set {path}: understood are {' and '.join(_SUFFIXES)} files, and directories of them")
    if not files:
        raise InputError(f"data set {path}: the directory has no {' or '.join(_SUFFIXES)} file")
    if path.is_file():
        if split not in (None, "train"):
            raise InputError(f"data set {path}: a file has no split {split!r}; name the file of that split instead")
        return files
    wanted = split or "train"
    named = [file for file in files if file.stem == wanted or file.stem.startswith((f"{wanted}-", f"{wanted}_"))]
    if split and not named:
        raise InputError(f"data set {path}: no file of split {split!r} among {', '.join(f.name for f in files)}")
    return named or files


def load_rows(name: str, split: str | None = None, config: str | None = None) -> "datasets.Dataset":
    """The rows of a .json or .jsonl file, of a directory of such files (see `find_files`), or of a hub data set.

    Only a name that neither exists on disk nor begins with `/`, `.` or `~` nor ends as a data file does is asked of
    the hub, where `split` is "train" unless given. Raises InputError, with
    file and line where the content of a file is at fault.
    """
    import datasets  # here because it takes a second, and pure steps need none of it
    from datasets.exceptions import DatasetsError

    path = Path(name).expanduser()
    if not path.exists() and not name.startswith(("/", ".", "~")) and path.suffix not in _SUFFIXES:
        try:
            return datasets.load_dataset(name, config, split=split or "train")
        except (OSError, ValueError, RuntimeError, DatasetsError) as failure:
            raise InputError(f"data set {name!r} is no file here, and the hub does not give it: {failure}") from failure
    files = find_files(path, split)
    for file in files:
        if not file.stat().st_size:
            raise InputError(f"{file}: the file is empty")
        _check_utf8(file)
    rows = _build(files)
    if not len(rows):
        raise InputError(f"data set {name}: there is no row in it")
    return rows


def _build(files: list[Path]) -> "datasets.Dataset":
    """The rows through the json builder of `datasets`, or through our own reading where that one fails."""
    import datasets
    from datasets.exceptions import DatasetsError

    hidden, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read is said once, with its line
    try:
        built = datasets.load_dataset("json", data_files=[str(file.resolve()) for file in files], split="train")
        # The builder takes a column of strings that all look like dates for dates.
        if "timestamp" not in str(built.features):
            return built
    except (OSError, ValueError, StopIteration, DatasetsError) as failure:
        rows = [row for file in files for row in _parse(file)]
        cause: BaseException = failure.__cause__ or failure
    else:
        rows, cause = [row for file in files for row in _parse(file)], ValueError("a column of dates")
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()
    if not rows:
        raise InputError(f"{', '.join(map(str, files))}: there is no row in it")
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OSError) as failure:
        text = f"{', '.join(map(str, files))}: the rows do not agree on their columns: {cause}; {failure}"
        raise InputError(text) from failure


def _check_utf8(file: Path) -> None:
    """The json builder takes any bytes inside a string, and only a much later reading of the row fails."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            held = len(decoder.getstate()[0])  # the bytes of a character that began in the block before
            try:
                decoder.decode(block)
            except UnicodeDecodeError as failure:
                at = failure.start - held
                line += block.count(b"\n", 0, max(at, 0))
                where = f"byte {stream.tell() - len(block) + at} of the file is 0x{failure.object[failure.start]:02x}"
                raise InputError(f"{file}, line {line}: not UTF-8 ({where}); save the file as UTF-8") from failure
            line += block.count(b"\n")
    if decoder.getstate()[0]:
        raise InputError(f"{file}, line {line}: not UTF-8 (the file ends inside a character); is it whole?")


def _parse(file: Path) -> list[dict[str, Any]]:
    """The objects of a file by Python's own reader, which can say where it is malformed."""
    text = file.read_bytes().decode("utf-8-sig")
    if file.suffix == ".json" or text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
            return _objects(file, [(1, row) for row in whole] if isinstance(whole, list) else [(1, whole)])
        except json.JSONDecodeError as failure:
            if text.lstrip().startswith("[") or failure.msg != "Extra data":
                raise InputError(f"{file}, line {failure.lineno}: malformed JSON: {failure.msg}") from failure
    parsed = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                parsed.append((number, json.loads(line)))
            except json.JSONDecodeError as failure:
                where = f"{file}, line {number}, column {failure.colno}"
                raise InputError(f"{where}: malformed JSON: {failure.msg}: {shown(line)}") from failure
    return _objects(file, parsed)


def _objects(file: Path, parsed: list[tuple[int, Any]]) -> list[dict[str, Any]]:
    for number, row in parsed:
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number}: a row must be a JSON object, this one is {shown(row)}")
    return [row for _, row in parsed]
