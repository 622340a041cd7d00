"""Reads rows from JSON, CSV and Parquet files, directories of them, or the hub, and says where a file is malformed."""

import codecs
import csv
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jaxft.errors import InputError
from jaxft.messages import shown
from jaxft.rows import Rows

if TYPE_CHECKING:
    import datasets

# what a file name ends with, and the builder of `datasets` that reads it
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_BUILDERS |= {f"{suffix}.gz": _BUILDERS[suffix] for suffix in (".json", ".jsonl", ".csv", ".tsv")}
UNDERSTOOD = ".json, .jsonl, .csv, .tsv (each also .gz), .parquet and .arrow"
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what `datasets` writes


def find_files(path: Path, split: str | None = None) -> list[Path]:
    """The data files that a local path stands for, by name.

    In a directory (or its `data/`, where it has no data file itself): those of the split, that is those called
    `SPLIT.…`, `SPLIT-…` or `SPLIT_…`, or all of a directory called `SPLIT`; without a split those of "train", or all
    where none is called so. Raises InputError where there is none, and where files of two kinds would be mixed.
    """
    if not path.exists():
        raise InputError(f"data set {path}: there is no such file or directory")
    if not path.is_dir():
        if _suffix(path) is None:
            raise InputError(f"data set {path}: understood are {UNDERSTOOD} files, and directories of them")
        if split not in (None, "train"):
            raise InputError(f"data set {path}: a file has no split {split!r}; name the file of that split instead")
        return [path]
    files = _listed(path)
    named = _of_split(path, split or "train")
    there = [file.name for file in files] or [f"{d.name}/" for d in sorted(path.iterdir()) if d.is_dir() and _listed(d)]
    if not files and not named and not (split and there):
        raise InputError(f"data set {path}: the directory has no data file; understood are {UNDERSTOOD}")
    if split and not named:
        raise InputError(f"data set {path}: no file of split {split!r} among {', '.join(there)}")
    chosen = named or files
    kinds = sorted({_BUILDERS[_suffix(file) or ""] for file in chosen})
    if len(kinds) > 1:
        raise InputError(f"data set {path}: holds {' and '.join(kinds)} files; is one the other's copy? Name one file")
    return chosen


def has_split(path: Path, split: str) -> bool:
    """Whether a directory has a data file of that split's name."""
    return bool(_of_split(path, split))


def load_rows(name: str, split: str | None = None, config: str | None = None) -> "datasets.Dataset":
    """The rows of a data file, of a directory of them (see `find_files`), or of a hub data set.

    Only a name that neither exists on disk nor begins with `/`, `.` or `~` nor ends as a data file does is asked of
    the hub, where `split` is "train" unless given. All cells of a CSV file are strings. The rows lie memory-mapped in
    the cache of `datasets`, under the content of the files. Raises InputError, with file and line where the content
    of a file is at fault.
    """
    return open_rows(name, split, config).table


def open_rows(name: str, split: str | None = None, config: str | None = None) -> Rows:
    """The rows that `load_rows` gives, of files not before they are looked at.

    Files are read once here, for a digest of their content, and checked as far as that tells: they are there, and text
    is UTF-8. What else is wrong in them is an InputError when they are looked at. A hub data set is read at once.
    """
    if is_hub_name(name):
        table = from_hub(name, split, config)
        return Rows(None, lambda: table)
    files = find_files(Path(name).expanduser(), split)
    content = hashlib.blake2b(digest_size=16)
    for file in files:
        if not file.stat().st_size:
            raise InputError(f"{file}: the file is empty")
        content.update(_scan(file))

    def read() -> "datasets.Dataset":
        rows = _build(files, content.hexdigest())
        if not len(rows):
            raise InputError(f"data set {name}: there is no row in it")
        return rows

    kinds = " ".join(_suffix(file) or "" for file in files)
    made_by = " ".join(f"{library} {version(library)}" for library in ("datasets", "pyarrow", "pandas"))
    code = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).hexdigest()
    return Rows(f"{kinds} {content.hexdigest()} by {made_by} and {code}", read)


def open_stream(name: str, split: str | None = None, config: str | None = None) -> "datasets.IterableDataset":
    """The rows that `load_rows` gives, in their order, but read one after the other and kept nowhere.

    What is wrong inside a file is found when its row is reached.
    """
    import datasets

    if is_hub_name(name):
        return from_hub(name, split, config, streaming=True)
    files = find_files(Path(name).expanduser(), split)
    builder = _BUILDERS[_suffix(files[0]) or ""]
    options = _csv_options(files) if builder == "csv" else {}
    with _quiet():
        paths = [str(file.resolve()) for file in files]
        return datasets.load_dataset(builder, data_files=paths, split="train", streaming=True, **options)


def is_hub_name(name: str) -> bool:
    """Whether the hub, not the disk, is meant."""
    path = Path(name).expanduser()
    return not path.exists() and not name.startswith(("/", ".", "~")) and _suffix(path) is None


def from_hub(name: str, split: str | None, config: str | None, **options: Any) -> Any:
    """A split of a hub data set through `datasets`; InputError says why the hub does not give it, and what helps."""
    import datasets  # here because it takes a second, and pure steps need none of it
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(name, config, split=split or "train", **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as failure:
        text = f"data set {name!r} is no file here, and the hub does not give it: {failure}"
        if isinstance(failure, ConnectionError):
            text += f". Where there is a network, `hf download {name} --repo-type dataset --local-dir DIR` fetches it; "
            text += "then name DIR"
        raise InputError(text) from failure


def _suffix(path: Path) -> str | None:
    """The ending by which a data file is known; None for other files."""
    return next((suffix for suffix in sorted(_BUILDERS, key=len) if path.name.endswith(suffix)), None)


def _listed(directory: Path) -> list[Path]:
    """The data files of a directory by name, or of its `data/`, where the hub keeps them."""
    for place in (directory, directory / "data"):
        entries = sorted(place.iterdir()) if place.is_dir() else []
        if files := [f for f in entries if f.is_file() and _suffix(f) and f.name not in _METADATA]:
            return files
    return []


def _of_split(directory: Path, split: str) -> list[Path]:
    """The data files of a split: those that bear its name, or those of a directory that does."""
    name = re.compile(rf"{re.escape(split)}([-_.].*)?")
    named = [file for file in _listed(directory) if name.fullmatch(file.name.removesuffix(_suffix(file) or ""))]
    return named or _listed(directory / split)


def _build(files: list[Path], content: str) -> "datasets.Dataset":
    """The rows through a builder of `datasets`; JSON through our own reading where that one fails."""
    import datasets
    from datasets.exceptions import DatasetsError

    builder = _BUILDERS[_suffix(files[0]) or ""]
    options = _csv_options(files) if builder == "csv" else {}
    cause: BaseException = ValueError("a column of dates")
    try:
        with _quiet():
            # `datasets` knows a file by its path and time; named by its content, its cache cannot be out of date
            built = datasets.load_dataset(
                builder, f"jaxft-{content}", data_files=[str(f.resolve()) for f in files], split="train", **options
            )
        # The JSON builder takes a column of strings that all look like dates for dates.
        if builder != "json" or "timestamp" not in str(built.features):
            return built
    except (OSError, ValueError, StopIteration, DatasetsError) as failure:
        cause = failure.__cause__ or failure
    if builder != "json" and "corresponds to no data" not in str(cause):
        raise InputError(f"{', '.join(map(str, files))}: cannot be read as {builder}: {cause}") from cause
    rows = [] if builder != "json" else [row for file in files for row in _parse(file)]
    if not rows:
        raise InputError(f"{', '.join(map(str, files))}: there is no row in it")
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OSError) as failure:
        text = f"{', '.join(map(str, files))}: the rows do not agree on their columns: {cause}; {failure}"
        raise InputError(text) from failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps `datasets` from drawing bars, and from saying what will be said once, with its line."""
    import datasets

    hidden, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()


def _csv_options(files: list[Path]) -> dict[str, Any]:
    """Every cell as the string it is ("NA" and "007" too); the files share one header, and fill it in every row."""
    import datasets

    separator = "\t" if ".tsv" in files[0].name else ","
    headers = [_csv_header(file, separator) for file in files]
    for file, header in zip(files, headers, strict=True):
        if header != headers[0]:
            raise InputError(f"{file}: its columns ({', '.join(header)}) are not those of {files[0]}")
    columns = [column or f"Unnamed: {at}" for at, column in enumerate(headers[0])]  # pandas' name for an index
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"features": features, "keep_default_na": False, "sep": separator, "encoding": "utf-8-sig"}


def _csv_header(file: Path, separator: str) -> list[str]:
    """The names of a file's columns. The builder fills short rows up, so they are looked for here."""
    limit = csv.field_size_limit(sys.maxsize)  # of the whole process; a document may be longer than its 131,072
    try:
        with _opened(file) as stream:
            lines = csv.reader(codecs.getreader("utf-8-sig")(stream), delimiter=separator)
            header = next(lines, [])
            if not any(header):
                raise InputError(f"{file}: the first line must name the columns, it is empty")
            if twice := [column for column in header if column and header.count(column) > 1]:
                raise InputError(f"{file}: the column {twice[0]!r} stands twice in the header")
            for row in lines:
                if row and len(row) != len(header):
                    cells = f"{len(row)} cells, the header has {len(header)}"
                    raise InputError(f"{file}, line {lines.line_num}: {cells}; a cell with a comma needs quotes")
    finally:
        csv.field_size_limit(limit)
    return header


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where it is .gz."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (gzip.BadGzipFile, zlib.error, EOFError) as failure:
        raise InputError(f"{file}: not a whole gzip file ({failure}); copy it again") from failure


def _scan(file: Path) -> bytes:
    """A digest of the content, checked on the way: text must be UTF-8, Parquet must have its footer.

    The builders take any bytes inside a string, and only a much later reading of the row fails.
    """
    content = hashlib.blake2b(digest_size=16)
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as failure:
            raise InputError(f"{file}: not a whole Parquet file ({failure}); copy it again") from failure
        if not rows:
            raise InputError(f"{file}: there is no row in it")
    if file.suffix in (".parquet", ".arrow"):
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: content).digest()
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, before = 1, 0
    with _opened(file) as stream:
        while block := stream.read(1 << 24):
            content.update(block)
            held = len(decoder.getstate()[0])  # the bytes of a character that began in the block before
            try:
                decoder.decode(block)
            except UnicodeDecodeError as failure:
                at = failure.start - held
                line += block.count(b"\n", 0, max(at, 0))
                where = f"byte {before + at} of the file is 0x{failure.object[failure.start]:02x}"
                raise InputError(f"{file}, line {line}: not UTF-8 ({where}); save the file as UTF-8") from failure
            line, before = line + block.count(b"\n"), before + len(block)
    if decoder.getstate()[0]:
        raise InputError(f"{file}, line {line}: not UTF-8 (the file ends inside a character); is it whole?")
    return content.digest()


def _parse(file: Path) -> list[dict[str, Any]]:
    """The objects of a file by Python's own reader, which can say where it is malformed."""
    with _opened(file) as stream:
        text = stream.read().decode("utf-8-sig")
    if _suffix(file) in (".json", ".json.gz") or text.lstrip().startswith("["):
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
