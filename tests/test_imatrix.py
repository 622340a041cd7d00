"""`jaxft.convert imatrix`: the mean squares of what the layers read, in the files that llama.cpp writes and reads."""

import json
import os
import struct

import numpy as np
import pytest

from jaxft import load_model, load_tokenizer
from jaxft.activations import collect_activations
from jaxft.convert import __main__ as convert
from jaxft.convert.imatrix import gguf_means, read_imatrix, write_imatrix
from jaxft.data import load_rows, tokenize_dataset
from jaxft.errors import InputError, run_command
from jaxft.packing import eval_batches
from tests.test_merge import write_adapter
from tests.tiny_runs import sums, write_base, write_rows

gguf = pytest.importorskip("gguf", reason="the peer's reader is gguf's")
LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NAMES = {f"blk.{i}.{layer}.weight" for i in range(2) for layer in LAYERS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ with a head of its own, and rows.jsonl."""
    directory = tmp_path_factory.mktemp("imatrix")
    write_base(directory / "base", "llama3")
    write_rows(directory / "rows.jsonl", sums(12))
    return directory


def run(capsys, *argv) -> dict:
    assert run_command(convert.main, ["imatrix", *map(str, argv)]) == 0, capsys.readouterr().err
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_file_holds_the_mean_squares_of_every_layer_under_its_gguf_name(place, tmp_path, capsys):
    out = tmp_path / "im.gguf"
    found = run(capsys, place / "base", place / "rows.jsonl", out, "--max_length=64", "--dataset_cache=none")
    model, params = load_model(place / "base")
    rows = load_rows(str(place / "rows.jsonl"))
    samples, _ = tokenize_dataset(
        rows, load_tokenizer(place / "base"), max_length=64, vocab_size=model.config.vocab_size, train_on="all"
    )
    batches = eval_batches(samples, max_length=64, batch_size=8)
    expected = gguf_means(model, collect_activations(model, (params,), batches), head=False)
    assert found == {"out": str(out), "entries": 14, "tokens": sum(map(len, samples)), "chunks": batches.rows}
    means = read_imatrix(out)
    assert means.keys() == NAMES == expected.keys()
    for name, mean in means.items():
        np.testing.assert_allclose(mean, expected[name], rtol=2e-5, err_msg=name)
    q, k = (means[f"blk.0.attn_{which}.weight"] for which in "qk")
    assert np.array_equal(q, k) and not np.allclose(q, means["blk.1.attn_q.weight"])
    peer = gguf.GGUFReader(out)
    assert peer.get_field("general.type").contents() == "imatrix" and not peer.get_field("general.architecture")
    assert peer.get_field("imatrix.datasets").contents() == [str(place / "rows.jsonl")]
    assert peer.get_field("imatrix.chunk_size").contents() == 64
    assert peer.get_field("imatrix.chunk_count").contents() == batches.rows
    tensors = {tensor.name: tensor for tensor in peer.tensors}
    down = tensors["blk.1.ffn_down.weight.in_sum2"]
    assert down.shape.tolist() == [48, 1] and down.tensor_type.name == "F32"
    assert tensors["blk.1.ffn_down.weight.counts"].data.tolist() == [[found["tokens"]]]
    np.testing.assert_allclose(down.data[0] / found["tokens"], expected["blk.1.ffn_down.weight"], rtol=2e-5)


def test_text_files_adapters_chunks_and_the_head_are_taken(place, tmp_path, capsys):
    (tmp_path / "wiki.txt").write_text("Seven trains leave at noon. 火车。\n" * 40, encoding="utf-8")
    common = ("--max_length=32", "--dataset_cache=none", "--per_device_eval_batch_size=2")
    base = place / "base"
    found = run(capsys, base, tmp_path / "wiki.txt", tmp_path / "a.gguf", *common, "--chunks=3", "--process_output")
    assert found["entries"] == 15 and found["chunks"] == 3 and found["tokens"] == 96
    plain = read_imatrix(tmp_path / "a.gguf")
    assert plain.keys() == NAMES | {"output.weight"}
    model, params = load_model(base)
    write_adapter(tmp_path / "adapter", model, params)
    adapter = ("--adapter", tmp_path / "adapter")
    run(capsys, base, tmp_path / "wiki.txt", tmp_path / "b.gguf", *common, "--chunks=3", *adapter)
    tuned = read_imatrix(tmp_path / "b.gguf")
    np.testing.assert_allclose(tuned["blk.0.attn_q.weight"], plain["blk.0.attn_q.weight"], rtol=1e-5)
    assert np.abs(tuned["blk.1.ffn_down.weight"] / plain["blk.1.ffn_down.weight"] - 1).max() > 0.1


def dat(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    """llama.cpp's older file: values are means times calls."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    return data + tail


def test_rows_are_read_as_every_command_reads_them_by_templates_and_once(place, tmp_path, capsys, monkeypatch):
    argv = [place / "base", place / "rows.jsonl", "--max_length=64", f"--dataset_cache={tmp_path / 'kept'}"]
    whole = run(capsys, *argv[:2], tmp_path / "whole.gguf", *argv[2:])
    templates = ["--template={question}{question}", "--response_template={answer}"]
    twice = run(capsys, *argv[:2], tmp_path / "twice.gguf", *argv[2:], *templates)
    assert twice["tokens"] == whole["tokens"] + sum(len(row["question"]) for row in sums(12))
    monkeypatch.setattr("jaxft.files._build", lambda *_: pytest.fail("the rows are read again"))
    assert run(capsys, *argv[:2], tmp_path / "again.gguf", *argv[2:]) == whole | {"out": str(tmp_path / "again.gguf")}


def test_older_files_are_read_with_and_without_their_tail(tmp_path):
    entries = {"blk.0.attn_q.weight": (4, [2.0, 8.0]), "blk.0.ffn_down.weight": (0, [3.0, 5.0, 7.0])}
    for tail in (b"", struct.pack("<ii", 4, 3) + b"a.b"):
        (tmp_path / "old.dat").write_bytes(dat(entries, tail))
        found = read_imatrix(tmp_path / "old.dat")
        assert {name: values.tolist() for name, values in found.items()} == {
            "blk.0.attn_q.weight": [0.5, 2.0],
            "blk.0.ffn_down.weight": [3.0, 5.0, 7.0],
        }
        assert all(values.dtype == np.float32 for values in found.values())


def write_gguf(path, tensors: dict[str, np.ndarray], kind: str = "imatrix"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", kind)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_experts_stand_one_after_the_other_and_one_without_tokens_is_one(tmp_path):
    summed = np.array([[2.0, 4.0], [9.0, 9.0], [3.0, 6.0]], np.float32)
    counts = np.array([[2.0], [0.0], [3.0]], np.float32)
    path = write_gguf(tmp_path / "moe.gguf", {"e.weight.in_sum2": summed, "e.weight.counts": counts})
    assert read_imatrix(path)["e.weight"].tolist() == [1.0, 2.0, 1.0, 1.0, 1.0, 2.0]


def test_what_is_no_importance_matrix_is_refused(place, tmp_path, capsys):
    one = {"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.ones((1, 1), np.float32)}
    cases = {
        "general.type is 'model'": write_gguf(tmp_path / "model.gguf", one, "model"),
        "a.counts is missing": write_gguf(tmp_path / "half.gguf", {"a.in_sum2": one["a.in_sum2"]}),
        "a.in_sum2 is missing": write_gguf(tmp_path / "other.gguf", {"a.counts": one["a.counts"]}),
        "belongs to no importance matrix": write_gguf(tmp_path / "w.gguf", one | {"w": np.ones((1, 4), np.float32)}),
        "sums of 1 matrices and counts of 2": write_gguf(
            tmp_path / "two.gguf", one | {"a.counts": np.ones((2, 1), np.float32)}
        ),
        "f16, not f32": write_gguf(tmp_path / "f16.gguf", one | {"a.in_sum2": np.ones((1, 4), np.float16)}),
        "no mean squares": write_gguf(tmp_path / "neg.gguf", one | {"a.in_sum2": -np.ones((1, 4), np.float32)}),
        "there is no matrix": write_gguf(tmp_path / "none.gguf", {}),
        "said to hold 0 entries": tmp_path / "zero.dat",
        "there should be 4 more": tmp_path / "empty.dat",
        "stands twice": tmp_path / "twice.dat",
        "has -1 columns": tmp_path / "minus.dat",
        "cannot be read": tmp_path / "absent.dat",
    }
    (tmp_path / "zero.dat").write_bytes(struct.pack("<i", 0))
    (tmp_path / "empty.dat").write_bytes(b"")
    (tmp_path / "twice.dat").write_bytes(struct.pack("<i", 2) + 2 * dat({"a": (1, [1.0])})[4:])
    (tmp_path / "minus.dat").write_bytes(struct.pack("<iicii", 1, 1, b"a", 1, -1))
    for said, path in cases.items():
        with pytest.raises(InputError, match=said):
            read_imatrix(path)


def test_files_cut_anywhere_are_an_error_and_never_a_matrix(tmp_path):
    write_imatrix(tmp_path / "whole.gguf", {"a": np.ones(8, np.float32)}, 3, datasets=["d"], chunks=1, chunk_size=8)
    assert read_imatrix(tmp_path / "whole.gguf")["a"].tolist() == [1.0] * 8
    wholes = ((tmp_path / "whole.gguf").read_bytes().rstrip(b"\0"), dat({"a": (1, [1.0] * 8), "b": (2, [2.0])}))
    for whole in wholes:
        for length in range(0, len(whole), 7):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(InputError):
                read_imatrix(tmp_path / "cut")


def test_calibration_that_cannot_be_done_is_refused_and_leaves_nothing(place, tmp_path, capsys, monkeypatch):
    def refused(said, *argv, code=2):
        assert run_command(convert.main, ["imatrix", *map(str, argv)]) == code
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and said in error

    base, rows, out = place / "base", place / "rows.jsonl", tmp_path / "out.gguf"
    refused("--chunks 0: it must be 1 or more", base, rows, out, "--chunks=0")
    refused("unknown flag --depth", base, rows, out, "--depth=3")
    refused("exists already; name a new file", base, rows, tmp_path)
    kept = rows.read_bytes()
    refused("exists already; name a new file", base, out, rows)  # in the wrong order
    refused("MODEL DATA OUT", base, out, "--dataset", rows)
    assert rows.read_bytes() == kept
    refused("does not exist", base, rows, tmp_path / "no" / "out.gguf")
    refused("there is no such file", base, "./none.jsonl", out)
    refused("cannot be read as text", base, "./none.txt", out)
    (tmp_path / "empty.txt").write_text(" \n")
    refused("there is no text in it", base, tmp_path / "empty.txt", out)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    refused("no space left", base, rows, out, "--dataset_cache=none", "--max_length=64", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]
