"""The cache of tokenised sets gives back what tokenising gives, and misses nothing that changes tokens."""

import json
import os
import signal
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest

import jaxft.cache
import jaxft.data
from jaxft import train
from jaxft.cache import default_directory, fetch, store
from jaxft.data import tokenize_dataset
from jaxft.errors import RunError, run_command
from jaxft.files import load_rows
from tests.tiny_runs import CHATML, flags, losses_of, make_tokenizer, sums, write_base, write_rows

ROWS = sums(6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def tokens(samples):
    return [(sample.input_ids.tolist(), sample.loss_weights.tolist()) for sample in samples]


def run(cache, rows=ROWS, template=CHATML, tokenizer=None, **more):
    """(tokens, whether they came from the cache)"""
    dataset = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    settings = {"max_length": 64, "vocab_size": 300} | more
    samples, report = tokenize_dataset(dataset, tokenizer or make_tokenizer(template), cache=cache, **settings)
    return tokens(samples), report.reused


def test_what_comes_from_the_cache_is_what_tokenising_gives(tmp_path):
    dataset, tokenizer = datasets.Dataset.from_list(ROWS), make_tokenizer()
    settings = {"max_length": 30, "vocab_size": 300}
    plain, bare = tokenize_dataset(dataset, tokenizer, **settings)
    first, made = tokenize_dataset(dataset, tokenizer, cache=tmp_path, **settings)
    second, found = tokenize_dataset(dataset, tokenizer, cache=tmp_path, **settings)
    assert tokens(plain) == tokens(first) == tokens(second) and len(plain) > 1
    assert plain.lengths.tolist() == second.lengths.tolist() == [len(sample) for sample in plain]
    assert plain.checksum() == second.checksum()
    assert not made.reused and found.reused
    assert bare.lines() == made.lines()[:-1] == found.lines()[:-1] and bare.truncated > 0
    [entry] = tmp_path.iterdir()
    assert made.lines()[-1] == f"tokenised, and kept in {entry}"
    assert found.lines()[-1] == f"taken, tokenised before, from {entry}"
    assert isinstance(second._ids, np.memmap)


def other_answer(rows):
    return [*rows[:-1], rows[-1] | {"answer": rows[-1]["answer"] + "."}]


def with_token():
    made = make_tokenizer()
    made.add_tokens(["+ "])
    return made


@pytest.mark.parametrize(
    "change",
    [
        {"rows": other_answer(ROWS)},
        {"rows": ROWS[::-1]},
        {"rows": ROWS[:-1]},
        {"template": CHATML.replace("|im_end|>\n", "|im_end|>\n\n")},
        {"template": None},
        {"tokenizer": with_token()},
        {"max_length": 33},
        {"train_on": "all"},
        {"train_on": "last"},
        {"vocab_size": 264},
        {"template_kwargs": {"enable_thinking": False}},
    ],
    ids=lambda change: "-".join(change) + str(next(iter(change.values())))[:12],
)
def test_whatever_changes_tokens_makes_a_new_entry(change, tmp_path):
    assert not run(tmp_path)[1] and run(tmp_path)[1]
    expected = run(None, **change)[0]
    assert run(tmp_path, **change) == (expected, False)
    assert run(tmp_path, **change) == (expected, True)
    assert len(list(tmp_path.iterdir())) == 2


def test_one_byte_of_a_file_makes_a_new_entry_and_its_name_or_time_does_not(tmp_path):
    cache, path = tmp_path / "kept", write_rows(tmp_path / "a.jsonl", ROWS)
    stat = path.stat()
    before = run(cache, load_rows(str(path)))
    text = path.read_bytes()
    path.write_bytes(text.replace(b"?", b"!", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = run(cache, load_rows(str(path)))
    assert not before[1] and not after[1] and before[0] != after[0]
    (tmp_path / "b.jsonl").write_bytes(text)
    assert run(cache, load_rows(str(tmp_path / "b.jsonl"))) == (before[0], True)
    unused = datasets.Dataset.from_list([row | {"id": number} for number, row in enumerate(ROWS)])
    assert run(cache, unused) == (before[0], True)  # a column that no sample is made of
    assert run(cache, datasets.Dataset.from_list(ROWS[::-1]).select(range(5, -1, -1)))[0] == before[0]


def test_rows_of_mixed_types_deep_inside_are_told_apart(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ (m.tool_calls or []) | tojson }}{% endfor %}"

    def rows(*values):
        calls = [[{"name": "f", "arguments": {"x": value}}] for value in values]
        talks = [[{"role": "assistant", "content": "a", "tool_calls": call}] for call in calls]
        path = write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
        return load_rows(str(path))

    cache, more = tmp_path / "kept", {"template": template, "max_length": 200}
    first = run(cache, rows(1, "one", None), **more)
    assert run(cache, rows(1, "one", None), **more) == (first[0], True)
    for values in ((2, "one", None), (1, "two", None), (1, "one", 0), ("1", "one", None)):
        found = run(cache, rows(*values), **more)
        assert not found[1] and found[0] != first[0] and found[0] == run(None, rows(*values), **more)[0]


def test_new_code_new_libraries_and_a_new_day_make_new_entries(tmp_path, monkeypatch):
    dated = CHATML.replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1)
    for template in (CHATML, dated):
        run(tmp_path, template=template)
        assert run(tmp_path, template=template)[1]
    code = tmp_path / "chat.py"
    code.write_bytes(Path(jaxft.cache.chat.__file__).read_bytes() + b"#")
    with monkeypatch.context() as patch:
        patch.setattr(jaxft.cache.chat, "__file__", str(code))
        assert not run(tmp_path / "kept")[1] and not run(tmp_path)[1]
    with monkeypatch.context() as patch:
        patch.setattr(jaxft.cache, "version", lambda name: "0")
        assert not run(tmp_path)[1]

    class Tomorrow(jaxft.cache.datetime.date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    monkeypatch.setattr(jaxft.cache.datetime, "date", Tomorrow)
    assert run(tmp_path, template=CHATML)[1] and not run(tmp_path, template=dated)[1]


def test_a_template_that_writes_the_date_is_said_aloud():
    dated = CHATML.replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1)
    dataset = datasets.Dataset.from_list(ROWS)
    said = "the chat template may write today's date, so tomorrow's tokens may be others"
    for template, expected in ((dated, True), (CHATML, False)):
        _, report = tokenize_dataset(dataset, make_tokenizer(template), max_length=64, vocab_size=300)
        assert (said in report.lines()) == expected


@pytest.mark.parametrize("name", ["ids", "trained", "bounds", "facts.json", "seal"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_entry_is_made_anew(name, damage, tmp_path):
    expected, _ = run(tmp_path)
    [entry] = tmp_path.iterdir()
    content = (entry / name).read_bytes()
    if damage == "gone":
        (entry / name).unlink()
    else:
        broken = bytes([content[0] ^ 1]) + content[1:] if damage == "flip" else content[:-1]
        (entry / name).write_bytes(broken)
    assert run(tmp_path) == (expected, False)
    assert run(tmp_path) == (expected, True)
    assert list(tmp_path.iterdir()) == [entry] and (entry / name).read_bytes() == content


def test_a_run_that_fails_or_is_killed_leaves_no_entry(tmp_path):
    rows = [*ROWS, {"question": "q", "answer": None}]
    with pytest.raises(ValueError, match="row 7: answer is None"):
        run(tmp_path, rows)
    assert list(tmp_path.iterdir()) == []

    def killed(streams):
        streams["ids"].write(b"half")
        streams["ids"].flush()
        os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that JAX's threads are not in the child, which needs none of them
        child = os.fork()
    if child == 0:
        store(tmp_path, "a" * 32, killed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith("building-") and fetch(tmp_path, "a" * 32) is None


def test_two_at_once_make_one_whole_entry(tmp_path):
    gate = threading.Barrier(3)

    def make(streams):
        streams["bounds"].write(np.array([0, 2]).tobytes())
        gate.wait()  # all write at the same time
        streams["ids"].write(np.array([5, 6], np.int32).tobytes())
        streams["trained"].write(bytes([0, 1]))
        return {"rows": 1}

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(store, tmp_path, "b" * 32, make) for _ in range(3)]:
            done.result()
    assert [entry.name for entry in tmp_path.iterdir()] == ["b" * 32]
    samples, report = fetch(tmp_path, "b" * 32)
    assert tokens(samples) == [([5, 6], [0.0, 1.0])] and report == {"rows": 1}


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"could not be kept in .*/file/x: .*; make room, name another --data"):
        run(tmp_path / "file" / "x")


def test_a_run_uses_the_cache_says_so_and_learns_the_same(tmp_path, capsys, monkeypatch):
    base, path = write_base(tmp_path / "base"), write_rows(tmp_path / "train.jsonl", ROWS)
    common = flags(model_name_or_path=base, dataset=path, max_length=64, max_steps=1, per_device_train_batch_size=1)
    common += flags(gradient_checkpointing="none", lora_r=2)

    def start(name, **more):
        assert run_command(train.main, [*common, *flags(output_dir=tmp_path / name, **more)]) == 0
        return capsys.readouterr().err

    kept = tmp_path / "kept"
    assert f"train: tokenised, and kept in {kept}/" in start("one", dataset_cache=kept)
    monkeypatch.setattr(jaxft.data, "write", lambda *_: pytest.fail("tokenised again"))
    assert f"train: taken, tokenised before, from {kept}/" in start("two", dataset_cache=kept)
    monkeypatch.undo()
    assert "kept in" not in start("three", dataset_cache="none")
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "two") == losses_of(tmp_path / "three")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert f"train: tokenised, and kept in {default_directory()}/" in start("four")
    assert default_directory() == tmp_path / "home" / "jaxft" / "tokenized"
    assert len(json.loads((next(default_directory().iterdir()) / "facts.json").read_text())["digests"]) == 3
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == Path.home() / ".cache" / "jaxft" / "tokenized"


def peak(count, cache):
    rows = datasets.Dataset.from_list([{"text": chr(97 + number % 26) * 300} for number in range(count)])
    tracemalloc.start()
    samples, _ = tokenize_dataset(rows, make_tokenizer(None), max_length=512, vocab_size=300, cache=cache)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples.lengths.sum() == 301 * count
    return found


def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxft.data, "CHUNK", 10)
    peak(20, tmp_path / "warm")
    small, large = (peak(count, tmp_path / str(count)) for count in (100, 700))
    assert large < small + 100_000  # bytes; the arrays alone are 5 · 301 · 600 = 903,000 larger
    assert peak(700, None) > peak(100, None) + 900_000
