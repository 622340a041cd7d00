"""The header of a GGUF file, read with bounds: nothing in it is believed before the file is long enough for it."""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.convert.ggml import TYPES
from jaxft.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
LONGEST_NAME = 1 << 16  # of keys and tensors, in bytes
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BY_NUMBER = {int(kind.gguf): kind for kind in TYPES.values()}


class TensorInfo(NamedTuple):
    """Where a tensor lies: ggml's type by name, rows first as numpy has shapes, the first byte in the file, bytes."""

    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What stands before the data. metadata: key -> number, bool, text, or list of them (numpy for numbers)."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """Reads little-endian values of a file in order; every length is held against what is left of the file."""

    def __init__(self, path: Path, data: mmap.mmap | bytes):
        self.path, self.data, self.at = path, data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def fail(self, said: str) -> InputError:
        return InputError(f"{self.path} is not a whole GGUF file: {said}; download or write it again")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left():
            raise self.fail(f"{what} needs {count} bytes at byte {self.at}, of which {self.left()} are there")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        length = self.number("Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise self.fail(f"{what} is said to be {length} bytes long")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(f"the value of {key}")
        if kind in SCALARS:
            return self.number(SCALARS[kind], f"the value of {key}")
        if kind == ARRAY:
            return self.array(key)
        raise self.fail(f"{key} has a value of type {kind}, which is unknown")

    def array(self, key: str) -> Any:
        kind, count = self.number("I", f"the type of {key}"), self.number("Q", f"the length of {key}")
        if kind == STRING:
            if count > self.left() // 8:
                raise self.fail(f"{key} is said to hold {count} texts")
            return self.texts(count, key)
        if kind not in SCALARS:
            raise self.fail(f"{key} is a list of type {kind}, which is not read")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        if count > self.left() // dtype.itemsize:
            raise self.fail(f"{key} is said to hold {count} numbers")
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)

    def texts(self, count: int, key: str) -> list[str]:
        """`text` for each of many, of which a vocabulary has hundreds of thousands."""
        found, data, at, end = [], self.data, self.at, len(self.data)
        length_of = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            if start > end or (at := start + length_of(data, at)[0]) > end:
                raise self.fail(f"a text of {key} ends behind the end of the file")
            try:
                found.append(data[start:at].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self.fail(f"a text of {key} is not UTF-8") from error
        self.at = at
        return found


def read_header(path: Path) -> Header:
    """Everything but the tensors' data, all of it checked against the file's length.

    Raises InputError for what is no GGUF file, of another version or byte order, cut short, or contradicts itself:
    names that stand twice, types that are unknown, tensors outside the file or over each other.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    cursor = _Cursor(path, data)
    if size < 4 or cursor.take(4, "the magic") != MAGIC:
        raise InputError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
    version = cursor.number("I", "the version")
    if version and not version & 0xFFFF:
        raise InputError(f"{path} is a big-endian GGUF file; only little-endian ones are read: convert it first")
    if version not in VERSIONS:
        raise InputError(f"{path} is GGUF version {version}; {' and '.join(map(str, VERSIONS))} are read")
    tensor_count, key_count = cursor.number("Q", "the count of tensors"), cursor.number("Q", "the count of keys")
    for count, least, what in ((tensor_count, 24, "tensors"), (key_count, 13, "keys")):
        if count > cursor.left() // least:
            raise cursor.fail(f"it is said to hold {count} {what}")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("the name of a key", LONGEST_NAME)
        if key in metadata:
            raise cursor.fail(f"the key {key} stands twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key}"), key)
    found = {}
    for _ in range(tensor_count):
        name, info = _tensor(cursor)
        if name in found:
            raise cursor.fail(f"the tensor {name} stands twice")
        found[name] = info
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"its alignment is {alignment}; a power of two is needed")
    start = -(-cursor.at // alignment) * alignment
    return Header(path, version, metadata, _placed(cursor, found, start, alignment))


def _tensor(cursor: _Cursor) -> tuple[str, TensorInfo]:
    """The next tensor's entry; its offset is from the start of the data."""
    name = cursor.text("the name of a tensor", LONGEST_NAME)
    dimensions = cursor.number("I", f"the dimensions of {name}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"{name} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    sizes = [cursor.number("Q", f"a size of {name}") for _ in range(dimensions)]
    number, offset = cursor.number("I", f"the type of {name}"), cursor.number("Q", f"the offset of {name}")
    if number not in BY_NUMBER:
        known = ", ".join(kind.name for kind in BY_NUMBER.values())
        raise InputError(f"{cursor.path}: {name} is of ggml's type {number}, which is not read; these are: {known}")
    kind = BY_NUMBER[number]
    if min(sizes) < 1 or sizes[0] % kind.block:
        raise cursor.fail(f"{name} has the sizes {sizes}, and {kind.name} holds {kind.block} values a block")
    return name, TensorInfo(kind.name, tuple(reversed(sizes)), offset, math.prod(sizes) // kind.block * kind.bytes)


def _placed(cursor: _Cursor, tensors: dict[str, TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors with offsets from the start of the file, none outside of it or over another."""
    placed, end, last = {}, start, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        at = start + info.offset
        if info.offset % alignment:
            raise cursor.fail(f"{name} begins at {info.offset}, which {alignment} does not divide")
        if at + info.size > len(cursor.data):
            raise cursor.fail(f"{name} ends at byte {at + info.size}, the file at {len(cursor.data)}")
        if at < end:
            raise cursor.fail(f"{name} lies over {last}")
        placed[name], end, last = info._replace(offset=at), at + info.size, name
    return {name: placed[name] for name in tensors}
