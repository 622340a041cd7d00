"""Every way rows come in: ShareGPT's turns, CSV, Parquet, packed files, directories, the hub; each read as JSON is."""

import csv
import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxft.data import tokenize_dataset
from jaxft.errors import InputError
from jaxft.evaluate import held_out_split
from jaxft.files import find_files, load_rows, open_stream
from jaxft.settings import EvaluateSettings
from tests.tiny_runs import CHATML, make_tokenizer, write_rows

PAIRS = [{"question": "1 + 1", "answer": "2"}, {"question": 'say "a, b"\nnow', "answer": "NA"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def pack(path):
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


WRITERS = {
    "json": lambda d, rows: write_rows(d / "a.jsonl", rows),
    "csv": lambda d, rows: write_csv(d / "a.csv", rows),
    "tsv": lambda d, rows: write_csv(d / "a.tsv", rows, "\t"),
    "parquet": lambda d, rows: write_parquet(d / "a.parquet", rows),
    "jsonl.gz": lambda d, rows: pack(write_rows(d / "a.jsonl", rows)),
    "csv.gz": lambda d, rows: pack(write_csv(d / "a.csv", rows)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_rows_come_out_of_every_kind_of_file(kind, tmp_path):
    path = WRITERS[kind](tmp_path, PAIRS)
    assert load_rows(str(path)).to_list() == PAIRS
    assert load_rows(str(tmp_path)).to_list() == PAIRS


def test_cells_of_a_csv_file_are_the_strings_they_are(tmp_path):
    rows = [{"question": "007", "answer": "NA"}, {"question": "1.50", "answer": ""}, {"question": "x", "answer": "nan"}]
    path = write_csv(tmp_path / "a.csv", rows)
    assert load_rows(str(path)).to_list() == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert load_rows(str(path)).to_list() == rows
    (tmp_path / "b.csv").write_text(",question,answer\n0,q,a\n")  # as pandas saves it, with its index
    assert load_rows(str(tmp_path / "b.csv")).to_list() == [{"Unnamed: 0": "0", "question": "q", "answer": "a"}]


def test_conversations_in_a_cell_of_csv_are_read_as_json(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_csv(tmp_path / "a.csv", [{"messages": json.dumps(talk), "tools": ""}])
    assert decoded(load_rows(str(path))) == decoded(datasets.Dataset.from_list([{"messages": talk}]))


def test_a_directory_gives_its_split_in_every_kind_and_as_the_hub_lays_it_out(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", [{"text": name}])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    assert load_rows(str(tmp_path))["text"][:] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert held_out_split(str(tmp_path), EvaluateSettings()) == "test"
    assert load_rows(str(tmp_path), "test")["text"][:] == ["test-00000-of-00001"]
    write_csv(tmp_path / "train.csv", PAIRS)  # nearer files win
    assert [file.name for file in find_files(tmp_path)] == ["train.csv"]
    write_rows(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(InputError, match=r"holds csv and json files; is one the other's copy\? Name one file"):
        find_files(tmp_path)


def test_what_datasets_saved_to_disk_is_read_split_by_split(tmp_path):
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one")).to_list() == PAIRS
    splits = {"train": datasets.Dataset.from_list(PAIRS), "test": datasets.Dataset.from_list(PAIRS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert load_rows(str(tmp_path / "both")).to_list() == PAIRS
    assert held_out_split(str(tmp_path / "both"), EvaluateSettings()) == "test"
    assert load_rows(str(tmp_path / "both"), "test").to_list() == PAIRS[:1]
    with pytest.raises(InputError, match="both: no file of split 'dev'"):
        load_rows(str(tmp_path / "both"), "dev")
    [arrow] = (tmp_path / "one").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(InputError, match=r"\.arrow: cannot be read as arrow"):
        load_rows(str(tmp_path / "one"))


def test_a_changed_file_is_read_anew_even_if_its_time_and_size_stay(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}])
    time = path.stat().st_mtime_ns
    assert load_rows(str(path))["text"][:] == ["one"]
    write_rows(path, [{"text": "two"}])
    os.utime(path, ns=(time, time))
    assert load_rows(str(path))["text"][:] == ["two"]


# ShareGPT


def decoded(dataset, template=CHATML, **more):
    """Each sample's text, with its trained part in ⟦ ⟧."""
    tokenizer = make_tokenizer(template)
    found = []
    for sample in tokenize_dataset(dataset, tokenizer, max_length=400, vocab_size=300, **more)[0]:
        text, inside = "", False
        for token, weight in zip(sample.input_ids.tolist(), sample.loss_weights.tolist(), strict=True):
            if bool(weight) != inside:
                text, inside = text + ("⟦" if weight else "⟧"), bool(weight)
            text += tokenizer.decode([token])
        found.append(text + "⟧" * inside)
    return found


def says(speaker, value):
    return {"from": speaker, "value": value}


def test_sharegpt_turns_are_messages_of_the_same_roles(tmp_path):
    turns = [says("system", "S"), says("human", "q"), says("gpt", "a"), says("user", "r"), says("chatgpt", "b")]
    path = write_rows(tmp_path / "a.jsonl", [{"conversations": turns, "id": 3}])
    messages = [
        {"role": role, "content": turn["value"]}
        for role, turn in zip(["system", "user", "assistant", "user", "assistant"], turns, strict=True)
    ]
    expected = decoded(datasets.Dataset.from_list([{"messages": messages}]))
    assert expected[0].count("⟦") == 2
    assert decoded(load_rows(str(path))) == expected
    both = {"conversations": turns, "system": "T"}  # the one in the conversation is its own
    for row in (both, {"conversations": turns[1:], "system": "S"}, {"conversations": messages}, {"messages": turns}):
        assert decoded(datasets.Dataset.from_list([row])) == expected
    _, report = tokenize_dataset(load_rows(str(path)), make_tokenizer(), max_length=400, vocab_size=300)
    assert report.lines()[0] == "format: ShareGPT (1 rows), rendered with the chat template"


TOOLS = (
    "{% if tools %}{% for t in tools %}<{{ t.function.name }}>{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}/{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_sharegpt_calls_and_observations_are_tool_turns():
    call = json.dumps({"name": "f", "arguments": {"x": None}})
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    turns = [says("human", "q"), says("function_call", call), says("observation", "3"), says("gpt", "a")]
    [text] = decoded(datasets.Dataset.from_list([{"conversations": turns, "tools": tools}]), TOOLS)
    assert text == '<f>user:q/assistant:⟦f{"x": null}/⟧tool:3/assistant:⟦a/⟧'
    [last] = decoded(datasets.Dataset.from_list([{"conversations": turns, "tools": tools}]), TOOLS, train_on="last")
    assert last == '<f>user:q/assistant:f{"x": null}/tool:3/assistant:⟦a/⟧'


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [says("alien", "q")]}, "row 1: message 1 is from 'alien'; understood: human, user, gpt"),
        ({"conversations": [says("human", None)]}, r"row 1: message 1 \(from human\) has value None; must be a string"),
        ({"conversations": "hi"}, "row 1: conversations is 'hi'; must be a list of objects with from and value"),
        ({"conversations": "[{"}, "row 1: conversations is no JSON"),
        ({"conversations": []}, r"row 1: messages is \[\]; must be a list"),
        ({"conversations": [says("function_call", "f(x)")]}, r"from function_call\) has value 'f\(x\)'; must"),
        ({"conversations": [says("function_call", "{f")]}, r"message 1 \(from function_call\) is no JSON"),
        ({"conversations": [says("gpt", "a")], "tools": '{"a": 1}'}, r"row 1: tools is \{'a': 1\}; must be a list"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": "x"}, "chat_template_kwargs is 'x'"),
    ],
)  # fmt: skip
def test_sharegpt_rows_of_a_wrong_form_are_named(row, said):
    with pytest.raises(InputError, match=said):
        decoded(datasets.Dataset.from_list([row]))


# Bad files


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", b"", r"d\.csv: the file is empty"),
        ("d.csv", b"\nq,a\n", r"d\.csv: the first line must name the columns, it is empty"),
        ("d.csv", b"question,answer\n", r"d\.csv: there is no row in it"),
        ("d.csv", b"question;answer\n1;2\n", r"columns seen \(question;answer\); understood: .*question, answer"),
        ("d.csv", b"question,reply\n1,2\n", r"columns seen \(question, reply\); understood"),
        ("d.csv", b"question,answer,answer\n1,2,3\n", r"d\.csv: the column 'answer' stands twice in the header"),
        ("d.csv", b"question,answer\n1,2\n1,2,3\n", r"d\.csv, line 3: 3 cells, the header has 2; a cell with a comma"),
        ("d.csv", b'question,answer\n"1\n",2\n1\n', r"d\.csv, line 4: 1 cells, the header has 2"),
        ("d.csv", b'question,answer\n1,2\n1,"2\n', r"d\.csv: cannot be read as csv: .*EOF inside string"),
        ("d.csv", b"question,answer\n1,\xff\n", r"d\.csv, line 2: not UTF-8 \(byte 18 of the file is 0xff\)"),
        ("d.parquet", b"PAR1 and no more", r"d\.parquet: not a whole Parquet file"),
        ("d.jsonl.gz", b"plain text", r"d\.jsonl\.gz: not a whole gzip file \(Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"d\.jsonl\.gz: not a whole gzip file"),
        ("d.jsonl.gz", gzip.compress(b'{"text": \n', mtime=0), r"d\.jsonl\.gz, line 1, column \d+: malformed JSON"),
        ("d.jsonl", b'{"conversations": [{"from": "x", "value": "a"}]}\n', r"row 1: message 1 is from 'x'; understood"),
        ("d.jsonl", b'{"conversations": 3}\n', r"row 1: conversations is 3; must be a list"),
        ("d.jsonl", b'{"conversations": [{"from": "human", "value": "a"}]}\n', r"none of the 1 rows is left"),
        ("d.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"row 2: text is 3; must be a string"),
        ("d.parquet", [{"text": 3}], r"row 1: text is 3; must be a string"),
        ("d.parquet", [], r"d\.parquet: there is no row in it"),
    ],
)
def test_a_broken_file_of_any_kind_is_refused_with_its_place(name, content, words, tmp_path):
    path = tmp_path / name
    if isinstance(content, list):
        write_parquet(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        decoded(load_rows(str(path)))


def test_csv_files_of_one_directory_must_share_their_columns(tmp_path):
    write_csv(tmp_path / "a.csv", PAIRS)
    write_csv(tmp_path / "b.csv", [{"question": "q", "reply": "a"}])
    with pytest.raises(InputError, match=r"b\.csv: its columns \(question, reply\) are not those of .*a\.csv"):
        load_rows(str(tmp_path))


# The hub, stood in for by a directory


def test_a_hub_name_is_asked_of_the_hub_with_its_configuration_and_split(tmp_path, monkeypatch):
    place = tmp_path / "hub" / "data"
    place.mkdir(parents=True)
    for split in ("train", "test"):
        write_parquet(place / f"{split}-00000-of-00001.parquet", [{"text": split}])
    real, asked = datasets.load_dataset, []

    def hub(name, config=None, **options):
        asked.append((name, config, options))
        return real(str(tmp_path / "hub"), config, **options)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_rows("some/set")["text"][:] == ["train"]
    assert load_rows("some/set", "test", "default")["text"][:] == ["test"]
    assert asked == [("some/set", None, {"split": "train"}), ("some/set", "default", {"split": "test"})]
    stream = open_stream("some/set", "test")
    assert [row["text"] for row in stream] == ["test"] and asked.pop()[2] == {"split": "test", "streaming": True}
    with pytest.raises(InputError, match=r"'some/set' .* Unknown split \"dev\". Should be one of \['train', 'test'\]"):
        load_rows("some/set", "dev")
    with pytest.raises(InputError, match=r"'some/set' .* BuilderConfig 'other' not found. Available: \['default'\]"):
        load_rows("some/set", config="other")


def test_without_a_network_a_hub_name_says_how_to_fetch_the_set():
    with pytest.raises(InputError, match=r"'no/set' is no file here.*`hf download no/set --repo-type dataset --local"):
        load_rows("no/set")
