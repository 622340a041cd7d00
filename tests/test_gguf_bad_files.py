"""GGUF files that are damaged, hostile or something else: one clear error, no crash, no large allocation."""

import struct
import tracemalloc

import numpy as np
import pytest

from jaxft.convert import __main__ as convert
from jaxft.convert import hf
from jaxft.convert.gguf.check import tokenizer_of
from jaxft.convert.gguf.directory import read_vocabulary
from jaxft.convert.gguf.read import read_header
from jaxft.errors import InputError, run_command
from jaxft.load import find_directory, load_model
from tests.test_gguf import write_model
from tests.tiny_runs import V, make_tokenizer

CASES = 400
HOSTILE = (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A small valid file."""
    place = tmp_path_factory.mktemp("gguf")
    directory = write_model(place / "m", "gemma3", num_hidden_layers=1, vocab_size=V)
    make_tokenizer().save_pretrained(directory)
    argv = ["gguf", str(directory), str(place / "m.gguf"), "--quant", "f32", "--check", "false"]
    assert run_command(convert.main, argv) == 0
    return (place / "m.gguf").read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file(keys: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 64, **changes) -> bytes:
    head = {"version": 3, "tensors": len(tensors), "keys": len(keys)} | changes
    start = b"GGUF" + struct.pack("<IQQ", head["version"], head["tensors"], head["keys"]) + b"".join(keys + tensors)
    return start + bytes(-len(start) % 32) + bytes(data)


HUGE = 1 << 62
BAD = {
    "nothing": (b"", "does not begin with GGUF"),
    "another format": (b"PK\x03\x04" + bytes(100), "does not begin with GGUF"),
    "a page of the web": (b"<!DOCTYPE html>" + bytes(100), "does not begin with GGUF"),
    "only the magic": (b"GGUF", "the version"),
    "version 1": (file(version=1), "version 1; 2 and 3 are read"),
    "version 9": (file(version=9), "version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors without end": (file(tensors=(), data=64) [:8] + struct.pack("<QQ", HUGE, 0), "is said to hold"),
    "keys without end": (file(keys=())[:8] + struct.pack("<QQ", 0, HUGE) + bytes(64), "is said to hold"),
    "a key as long as the sea": (file((struct.pack("<Q", HUGE),)), "bytes long"),
    "a text as long as the sea": (file((key("a", 8, struct.pack("<Q", HUGE)),)), "needs"),
    "a list without end": (file((key("a", 9, struct.pack("<IQ", 4, HUGE)),)), "numbers"),
    "texts without end": (file((key("a", 9, struct.pack("<IQ", 8, HUGE)),)), "texts"),
    "a list of lists": (file((key("a", 9, struct.pack("<IQ", 9, 1)),)), "list of type 9"),
    "an unknown value": (file((key("a", 77, b""),)), "type 77, which is unknown"),
    "a key twice": (file((key("a", 4, bytes(4)), key("a", 4, bytes(4)))), "key a stands twice"),
    "a key that is no text": (file((struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8),)), "not UTF-8"),
    "a tensor twice": (file(tensors=(tensor("a", (4,)), tensor("a", (4,), offset=32))), "tensor a stands twice"),
    "tensors over each other": (
        file(tensors=(tensor("a", (12,)), tensor("b", (4,), offset=32))), "b lies over a",
    ),
    "a tensor outside": (file(tensors=(tensor("a", (4,), offset=1 << 40),)), "ends at byte"),
    "a tensor beyond": (file(tensors=(tensor("a", (1000,)),)), "ends at byte"),
    "sizes that overflow": (file(tensors=(tensor("a", (1 << 32, 1 << 32, 1 << 32)),)), "ends at byte"),
    "a size of nothing": (file(tensors=(tensor("a", (0, 4)),)), "sizes"),
    "no dimensions": (file(tensors=(tensor("a", ()),)), "0 dimensions"),
    "too many dimensions": (file(tensors=(tensor("a", (1,) * 9),)), "9 dimensions"),
    "an unknown type": (file(tensors=(tensor("a", (32,), kind=999),)), "type 999, which is not read"),
    "a block cut short": (file(tensors=(tensor("a", (33,), kind=8),)), "32 values a block"),
    "an offset askew": (file(tensors=(tensor("a", (4,), offset=1),)), "does not divide"),
    "an alignment askew": (file((key("general.alignment", 4, struct.pack("<I", 3)),)), "power of two"),
    "an alignment that is a text": (file((key("general.alignment", 8, text("32")),)), "power of two"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_one_clear_error(name, tmp_path, capsys):
    content, said = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=said) as error:
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert run_command(convert.main, ["hf", str(path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ((), "architecture None"),
        ((key("general.architecture", 8, text("bert")),), "architecture 'bert'"),
        ((key("general.architecture", 8, text("qwen3")),), "lacks the key qwen3.block_count"),
        ((key("general.architecture", 8, text("qwen3")), key("qwen3.block_count", 8, text("two"))), "no model's"),
        ((key("general.type", 8, text("adapter")),), "'adapter', not a model"),
        ((key("split.count", 2, struct.pack("<H", 3)),), "one of 3 parts"),
    ],
)
def test_a_file_that_holds_no_model_is_refused(metadata, said, tmp_path):
    (tmp_path / "m.gguf").write_bytes(file(metadata))
    with pytest.raises(InputError, match=said):
        find_directory(str(tmp_path / "m.gguf"))


def test_every_cut_is_seen(whole, tmp_path):
    path = tmp_path / "cut.gguf"
    assert len(whole) > 20_000
    for length in [*range(0, 600, 7), *range(600, len(whole), 997), len(whole) - 32]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_header(path)


def test_changed_bytes_give_an_error_or_a_model_and_nothing_else(whole, tmp_path):
    """Seeded mutations of a valid file, whose header, constants, tokenizer and tensors are then read."""
    random = np.random.default_rng(0)
    path = tmp_path / "changed.gguf"
    path.write_bytes(whole)
    header = read_header(path)
    end = min(info.offset for info in header.tensors.values())  # of the header
    interesting = (0, 1, 0x7F, 0x80, 0xFF)
    outcomes = {"refused": 0, "read": 0}
    for case in range(CASES):
        changed = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(4, end))
            kind = random.integers(4)
            if kind == 0:
                changed[at] = random.choice(interesting)
            elif kind == 1:
                changed[at] ^= 1 << random.integers(8)
            elif kind == 2:
                changed[at : at + 8] = struct.pack("<Q", HOSTILE[random.integers(len(HOSTILE))])
            else:
                del changed[at : at + int(random.integers(1, 9))]
        path = tmp_path / f"{case}.gguf"
        path.write_bytes(changed)
        try:
            found = read_header(path)
            directory = find_directory(str(path))
            for name, one in hf.open_model(directory).items():
                one.get_tensor(name)
            outcomes["read"] += 1
            assert found.tensors.keys() <= header.tensors.keys() | found.tensors.keys()
        except InputError as error:
            assert len(str(error)) < 2_000
            outcomes["refused"] += 1
        path.unlink()
    assert outcomes["refused"] > CASES // 4 and outcomes["read"] > 0


def test_the_whole_file_is_read(whole, tmp_path):
    (tmp_path / "m.gguf").write_bytes(whole)
    model, _ = load_model(tmp_path / "m.gguf")
    assert model.config.model_type == "gemma3_text" and model.config.num_layers == 1
    assert tokenizer_of(read_vocabulary(read_header(tmp_path / "m.gguf"))).encode("ab") == [64, 65]


def test_a_tensor_that_is_missing_or_no_part_of_the_model_is_named(whole, tmp_path):
    for old, new in ((b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"), (b"output_norm.weight", b"output_nurm.weight")):
        (tmp_path / "m.gguf").write_bytes(whole.replace(old, new))
        with pytest.raises(InputError, match=new.decode()):
            load_model(tmp_path / "m.gguf")
