"""Rows whose tokens are kept are not read again, and nothing that changes their tokens is missed for it."""

import gzip
import shutil

import datasets
import pytest

import jaxft.data
import jaxft.files
from jaxft.columns import Columns, parse_template
from jaxft.data import split_known, split_rows, tokenize_dataset
from jaxft.errors import InputError
from jaxft.files import load_rows, open_rows
from tests.tiny_runs import make_tokenizer, sums, write_rows

ROWS = sums(8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


def tokens(samples):
    return [(sample.input_ids.tolist(), sample.loss_weights.tolist()) for sample in samples]


def run(rows, cache, **more):
    """(tokens, report, whether the table was read)"""
    settings = {"max_length": 64, "vocab_size": 300} | more
    samples, report = tokenize_dataset(rows, make_tokenizer(), cache=cache, **settings)
    return tokens(samples), report, "table" in vars(rows)


def test_kept_tokens_are_found_without_reading_the_rows(file, kept):
    expected, whole = tokenize_dataset(load_rows(str(file)), make_tokenizer(), max_length=64, vocab_size=300)
    first, made, read = run(open_rows(str(file)), kept)
    again, found, read_again = run(open_rows(str(file)), kept)
    assert (read, read_again) == (True, False)
    assert first == again == tokens(expected)
    assert not made.reused and found.reused and found.kept_in == made.kept_in and found.rows_read == 8
    assert whole.lines() == made.lines()[:-1] == found.lines()[:-1]


@pytest.mark.parametrize("change", ["content", "order", "name", "max_length", "columns"])
def test_what_changes_tokens_has_the_rows_read(change, file, kept, tmp_path):
    run(open_rows(str(file)), kept)
    more = {}
    if change == "content":
        file.write_text(file.read_text().replace("?", "!", 1))
    elif change == "order":
        write_rows(file, ROWS[::-1])
    elif change == "name":
        shutil.move(file, tmp_path / "rows.json")
        file = tmp_path / "rows.json"
    elif change == "max_length":
        more = {"max_length": 40}
    else:
        more = {"columns": Columns(answer=parse_template("{question}", "--response_template"))}
    found, _, read = run(open_rows(str(file)), kept, **more)
    settings = {"max_length": 64, "vocab_size": 300} | more
    expected, _ = tokenize_dataset(load_rows(str(file)), make_tokenizer(), **settings)
    assert read and found == tokens(expected)


def test_new_code_or_libraries_have_the_rows_read(file, kept, monkeypatch):
    run(open_rows(str(file)), kept)
    with monkeypatch.context() as patch:
        patch.setattr(jaxft.files, "version", lambda library: "0")
        assert run(open_rows(str(file)), kept)[2]
    code = file.parent / "files.py"
    code.write_text("# other code")
    with monkeypatch.context() as patch:
        patch.setattr(jaxft.files, "__file__", str(code))
        assert run(open_rows(str(file)), kept)[2]
    assert not run(open_rows(str(file)), kept)[2]


def test_the_same_content_packed_or_elsewhere_is_one_entry(file, kept, tmp_path):
    first, made, _ = run(open_rows(str(file)), kept)
    packed = tmp_path / "other.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    shutil.copy(file, tmp_path / "copy.jsonl")
    assert not run(open_rows(str(tmp_path / "copy.jsonl")), kept)[2]
    again, found, read = run(open_rows(str(packed)), kept)
    assert read and again == first and found.kept_in == made.kept_in  # another reader, and the same rows
    assert not run(open_rows(str(packed)), kept)[2]
    assert len([entry for entry in kept.iterdir() if not entry.is_symlink()]) == 1


@pytest.mark.parametrize("damage", ["byte", "gone", "name"])
def test_a_damaged_entry_is_made_anew_and_found_again(damage, file, kept):
    expected, made, _ = run(open_rows(str(file)), kept)
    [entry], [name] = ([e for e in kept.iterdir() if e.is_symlink() == named] for named in (False, True))
    if damage == "byte":
        (entry / "ids").write_bytes(b"\7" + (entry / "ids").read_bytes()[1:])
    elif damage == "gone":
        shutil.rmtree(entry)
    else:
        name.unlink()
        name.write_text("no directory")
    found, _, read = run(open_rows(str(file)), kept)
    assert read and found == expected
    again, report, read = run(open_rows(str(file)), kept)
    assert not read and again == expected and report.kept_in == made.kept_in


def test_a_disk_without_links_keeps_tokens_too(file, kept, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    expected, _, _ = run(open_rows(str(file)), kept)
    found, report, read = run(open_rows(str(file)), kept)
    assert read and report.reused and found == expected


def test_parts_of_a_split_are_known_apart(file, kept):
    for held_out, seed in ((2, 0), (3, 0), (2, 1)):
        for at in (0, 1):
            part = split_known(open_rows(str(file)), held_out, seed)[at]
            found, report, read = run(part, kept)
            table = split_rows(load_rows(str(file)), held_out, seed)[at]
            assert read and found == tokens(tokenize_dataset(table, make_tokenizer(), max_length=64, vocab_size=300)[0])
            assert report.rows_read == len(table) == (held_out if at else 8 - held_out)
            part = split_known(open_rows(str(file)), held_out, seed)[at]
            again, _, read = run(part, kept)
            assert not read and again == found
    with pytest.raises(InputError, match="holds out 8 of 8 rows"):
        run(split_known(open_rows(str(file)), 8, 0)[0], kept)


def test_both_parts_of_a_split_are_of_one_draw(file, monkeypatch):
    draws = []
    monkeypatch.setattr(jaxft.data, "split_rows", lambda *given: draws.append(given[1:]) or split_rows(*given))
    train, held_out = split_known(open_rows(str(file)), 3, 7)
    assert not draws  # before anybody looks
    assert (len(train.table), len(held_out.table)) == (5, 3) and draws == [(3, 7)]


def test_what_is_wrong_in_a_file_is_said_when_its_rows_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(InputError, match=r"line 2, column \d+: malformed JSON"):
        run(open_rows(str(file)), None)
    with pytest.raises(InputError, match="no such file"):
        open_rows(str(tmp_path / "none.jsonl"))
    file.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match="line 1: not UTF-8"):
        open_rows(str(file))
