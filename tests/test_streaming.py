"""A stream gives every row once a pass, packed and shuffled by seed, and goes on from any step as if never stopped."""

import collections
import json
import time

import datasets
import numpy as np
import pytest

from jaxft import train
from jaxft.data import tokenize_dataset
from jaxft.errors import InputError, run_command
from jaxft.files import load_rows, open_stream
from jaxft.streaming import StreamBatches
from tests.tiny_runs import flags, losses_of, make_tokenizer, same_tensors, sums, write_base, write_rows

ROWS = sums(23)
ORDER = {"packing": True, "shuffle": True}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def batches(path, **more):
    settings = {"max_length": 80, "vocab_size": 300, "batch_size": 2, "accumulation": 1, "total_steps": 99}
    settings |= {"buffer_size": 10, "seed": 0} | ORDER | more
    return StreamBatches(lambda: open_stream(str(path)), make_tokenizer(), **settings)


def documents(batch):
    """(tokens, weights) of every document of a batch, in order."""
    found = []
    arrays = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "segment_ids", "loss_weights"))
    for tokens, segments, weights in zip(*arrays, strict=True):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            found.append((tuple(tokens[at].tolist()), tuple(weights[at].tolist())))
    return found


def whole(path):
    rows = load_rows(str(path))
    samples, _ = tokenize_dataset(rows, make_tokenizer(), max_length=80, vocab_size=300)
    return [(tuple(sample.input_ids.tolist()), tuple(sample.loss_weights.tolist())) for sample in samples]


def take(stream, steps, first=0):
    return [stream.batch(step) for step in range(first, first + steps)]


def test_a_pass_holds_every_sample_of_the_set_once_and_the_next_pass_again(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    seen, stream, step = [], batches(path), 0
    while len(seen) < 2 * len(ROWS):
        seen += documents(stream.batch(step))
        step += 1
    passes = collections.Counter(seen[: len(ROWS)]), collections.Counter(seen[len(ROWS) : 2 * len(ROWS)])
    assert passes[0] == passes[1] == collections.Counter(whole(path))
    assert seen[: len(ROWS)] != seen[len(ROWS) : 2 * len(ROWS)]  # each pass has an order of its own
    assert max(len(documents(batch)) for batch in take(batches(path), 4)) > 2  # several share a row
    report = stream.report()
    assert report.format == "question/answer" and report.rows >= 2 * len(ROWS) and report.samples == report.rows


def test_without_shuffling_and_packing_the_order_of_the_file_is_kept(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    for packing in (True, False):
        stream = batches(path, shuffle=False, packing=packing)
        seen = [document for batch in take(stream, 11) for document in documents(batch)]
        assert seen[: len(ROWS)] == whole(path)[: len(seen)]


@pytest.mark.parametrize("more", [{}, {"shuffle": False}, {"buffer_size": 3}, {"batch_size": 7, "accumulation": 2}])
def test_a_stream_goes_on_from_any_step_with_the_same_batches(more, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    stream, steps = batches(path, **more), 14
    expected, places = [], []
    for step in range(steps):
        places.append(json.loads(json.dumps(stream.position(step))))  # as a checkpoint keeps it
        expected.append(stream.batch(step))
    for first in range(steps):
        again = batches(path, **more)
        again.go_on(first, *places[first])
        assert again.position(first) == tuple(places[first])
        for step, batch in enumerate(take(again, min(3, steps - first), first), first):
            for name, array in batch.items():
                assert np.array_equal(array, expected[step][name]), (first, step, name)


def test_orders_are_those_that_earlier_runs_drew(tmp_path):
    """Written down: a resumed run meets another order where a new version of jaxft or numpy draws another one."""
    path = write_rows(tmp_path / "a.jsonl", [{"input_ids": [number, number]} for number in range(12)])
    seen = [[tokens[0] for tokens, _ in documents(b)] for b in take(batches(path, max_length=4, buffer_size=8), 6)]
    assert seen == [[5, 1, 6, 2], [0, 3, 7, 4], [8, 11, 9, 10], [5, 1, 0, 3], [6, 2, 7, 4], [8, 11, 9, 10]]
    assert seen != [[tokens[0] for tokens, _ in documents(b)] for b in take(batches(path, max_length=4, seed=1), 6)]


def test_no_more_than_one_window_is_read_ahead(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", sums(400))
    read, whole = collections.defaultdict(list), StreamBatches._read

    def counted(self, epoch, first, table):
        read[id(self)].append(first)
        return whole(self, epoch, first, table)

    monkeypatch.setattr(StreamBatches, "_read", counted)
    stream, later = batches(path, buffer_size=20), batches(path, buffer_size=20)
    later.go_on(9, 0, [360, 0])
    assert read[id(stream)] == read[id(later)] == []
    stream.batch(0)
    later.batch(9)
    end = time.monotonic() + 20
    while min(len(read[id(stream)]), len(read[id(later)])) < 2 and time.monotonic() < end:
        time.sleep(0.01)  # the second ones are made in the background
    assert read[id(stream)] == [0, 20] and read[id(later)] == [360, 380]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "row 2: text is 3; must be a string"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "the stream cannot be read at its beginning: .*JSON parse error"),
        ("a.jsonl", '{"b": "a"}\n', r"no format has the columns seen \(b\)"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "the stream has no row to train on"),
        ("a.csv", "text\na\nb,c\n", r"a\.csv, line 3: 2 cells, the header has 1"),
    ],
)
def test_a_stream_that_cannot_be_read_says_where(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        batches(tmp_path / name).batch(0)


def test_a_fault_far_down_is_found_when_it_is_reached(tmp_path):
    rows = [{"text": f"row {number}"} for number in range(30)]
    rows[25]["text"] = None
    stream = batches(write_rows(tmp_path / "a.jsonl", rows), packing=False, shuffle=False)
    assert len(take(stream, 10)) == 10
    with pytest.raises(InputError, match="row 26: text is None"):
        take(stream, 5, 10)
    with pytest.raises(ValueError, match="a stream stands before step"):
        stream.batch(3)


def test_a_run_on_a_stream_that_was_stopped_and_resumed_is_the_run_that_was_not(tmp_path, capsys):
    base, path = write_base(tmp_path / "base"), write_rows(tmp_path / "train.jsonl", ROWS)
    common = flags(model_name_or_path=base, dataset=path, max_length=64, lora_r=2, learning_rate=0.01, streaming=True)
    common += flags(buffer_size=9, per_device_train_batch_size=2, gradient_checkpointing="none", save_steps=3)
    common += flags(lr_scheduler_type="constant")

    def start(name, **more):
        assert run_command(train.main, [*common, *flags(output_dir=tmp_path / name, **more)]) == 0
        return capsys.readouterr().err

    said = start("whole", max_steps=7)
    start("parts", max_steps=4)
    start("parts", max_steps=7, resume_from_checkpoint="auto")
    assert f"train: a stream of {path}, read while training" in said
    assert "train: format: question/answer (" in said and "targets" in said
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole") and len(losses_of(tmp_path / "whole")) == 7
    assert same_tensors(*(tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts")))
    write_rows(path, [*ROWS[:16], {"question": "q", "answer": None}, *ROWS[17:]])
    unsaved = flags(output_dir=tmp_path / "mended", max_steps=7, save_steps=0)
    assert run_command(train.main, [*common, *unsaved]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: row 17: answer is None; must be a string"
    done = len(losses_of(tmp_path / "mended"))  # the steps before the row are not lost
    write_rows(path, ROWS)
    said = start("mended", max_steps=7, save_steps=0, resume_from_checkpoint="auto")
    assert done > 0 and f"{done} of 7 steps done" in said
    assert losses_of(tmp_path / "mended") == losses_of(tmp_path / "whole")
    for words, argv in (
        ("--streaming does not know how long an epoch is; set --max_steps", []),
        ("--streaming reads one data set", ["--max_steps=2", "--dataset", str(path), str(path)]),
    ):
        assert run_command(train.main, [*common, *argv]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    more = flags(output_dir=tmp_path / "parts", max_steps=9, resume_from_checkpoint="auto", buffer_size=8)
    assert run_command(train.main, [*common, *more]) == 2
    assert "buffer_size was 9 and is 8" in capsys.readouterr().err.splitlines()[-1]
