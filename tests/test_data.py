"""From files to samples: every format, every count of the report, and every kind of bad input by its message."""

import json
import os
import re
import time
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxft.data import detect_format, find_files, load_rows, tokenize_dataset
from jaxft.errors import InputError
from jaxft.packing import Batches, make_plan

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def make_tokenizer(template=None):
    """One token a byte, then the special ones from id 256 on; <bos> before a text as the tokenizer's own."""
    names = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(names, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"])
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer(CHATML)


def run(rows, tokenizer, max_length=200, vocab_size=300, **more):
    dataset = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    return tokenize_dataset(dataset, tokenizer, max_length=max_length, vocab_size=vocab_size, **more)


def marked(tokenizer, sample):
    """The sample's text with runs of trained tokens in ⟦ ⟧."""
    text, inside = "", False
    for token, weight in zip(sample.input_ids.tolist(), sample.loss_weights.tolist(), strict=True):
        if bool(weight) != inside:
            text += "⟦" if weight else "⟧"
            inside = bool(weight)
        text += tokenizer.decode([token])
    return text + "⟧" * inside


def texts(rows, tokenizer, **more):
    return [marked(tokenizer, sample) for sample in run(rows, tokenizer, **more)[0]]


USER_ASKED = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"question": "Q", "answer": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"instruction": "Q", "input": "", "output": "A", "text": "not this"},
        {"instruction": "Q", "output": "A"},
    ],
)
def test_conversations_of_every_format_render_with_the_chat_template(chat, row):
    assert texts([row], chat) == [USER_ASKED + "⟦A<|im_end|>⟧\n"]
    # The very first token has nothing before it, so "all" trains all but that.
    assert texts([row], chat, train_on="all") == ["<|im_start|>⟦" + USER_ASKED[12:] + "A<|im_end|>\n⟧"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Q", "answer": "A"}, "<bos>Q\n⟦A<eos>⟧"),
        ({"prompt": "P: ", "completion": "C"}, "<bos>P: ⟦C<eos>⟧"),
        ({"instruction": "I", "output": "O"}, "<bos>### Instruction:\nI\n\n### Response:\n⟦O<eos>⟧"),
        (
            {"instruction": "I", "input": "N", "output": "O"},
            "<bos>### Instruction:\nI\n\n### Input:\nN\n\n### Response:\n⟦O<eos>⟧",
        ),
        ({"text": "one"}, "<bos>⟦one<eos>⟧"),
        ({"text": "one<eos>"}, "<bos>⟦one<eos>⟧"),
    ],
)
def test_without_a_template_rows_are_plain_text_and_eos(plain, row, expected):
    assert texts([row], plain) == [expected]


def test_alpaca_input_stands_below_the_instruction_in_a_conversation(chat):
    [text] = texts([{"instruction": "I", "input": "N", "output": "O"}], chat)
    assert text == "<|im_start|>user\nI\n\nN<|im_end|>\n<|im_start|>assistant\n⟦O<|im_end|>⟧\n"


def test_only_the_completions_turns_of_message_lists_are_trained(chat):
    turns = [{"role": role, "content": text} for role, text in [("user", "1"), ("assistant", "2"), ("user", "3")]]
    [text] = texts([{"prompt": turns, "completion": [{"role": "assistant", "content": "4"}]}], chat)
    assert text.count("⟦") == 1 and "⟦4<|im_end|>⟧" in text


def test_text_rows_ignore_the_chat_template(chat):
    assert texts([{"text": "one"}], chat) == ["<bos>⟦one<eos>⟧"]


def test_tokenised_rows_are_taken_as_transformers_takes_them(plain):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "attention_mask": [1, 1, 1]},
        {"input_ids": [5, 6, 0], "labels": [5, 6, -100], "attention_mask": [1, 1, 0]},
    ]
    samples, report = run(rows, plain)
    assert [sample.input_ids.tolist() for sample in samples] == [[5, 6, 7], [5, 6]]
    assert [sample.loss_weights.tolist() for sample in samples] == [[0, 1, 0], [0, 1]]
    assert (report.padding_removed, report.target_tokens) == (1, 2)
    assert [s.loss_weights.tolist() for s in run([{"input_ids": [5, 6, 7]}], plain)[0]] == [[0, 1, 1]]


def test_long_documents_are_split_and_nothing_of_them_is_lost(plain):
    document = "abcdefghijklmnopqrstuvwxyz"
    for max_length in (2, 3, 7, 9, 27, 28, 29):
        samples, report = run([{"text": document}], plain, max_length=max_length)
        whole = "".join(plain.decode(sample.input_ids) for sample in samples)
        assert whole == f"<bos>{document}<eos>"
        assert all(1 < len(sample) <= max_length for sample in samples)
        assert report.split_documents == (max_length < 28) and report.truncated == 0
        assert report.target_tokens == 28 - len(samples)


@pytest.mark.parametrize("train_on", ["responses", "last", "all"])
def test_no_sample_is_without_a_target_and_every_token_of_a_text_is_kept_or_counted(plain, chat, train_on):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}] * 2
    rows = {
        "text": ["", "a", "ab", "abc", "abcdefg"],
        "messages": [talk, talk[:1], talk[:3]],
        "question": ["abc", "", "a"],
        "input_ids": [[1], [1, 2], [1, 2, 3], list(range(20))],
    }
    for column, values in rows.items():
        for tokenizer in (plain, chat) if column != "messages" else (chat,):
            for max_length in (2, 3, 5, 9, 30, 80):
                table = [{column: value} | ({"answer": "xyz"} if column == "question" else {}) for value in values]
                try:
                    samples, report = run(table, tokenizer, max_length=max_length, train_on=train_on)
                except InputError as failure:
                    assert "is left to train on" in str(failure)
                    continue
                assert all(sample.loss_weights[1:].any() and len(sample) <= max_length for sample in samples)
                assert report.target_tokens == sum((sample.loss_weights > 0).sum() for sample in samples)
                if column == "text":  # <bos>, the characters and <eos> of every row
                    assert sum(map(len, samples)) + report.truncated_tokens == sum(len(text) + 2 for text in values)
                    assert report.truncated_tokens == 0 or max_length == 2


def test_long_samples_of_other_formats_are_cut_at_their_end_and_counted(plain):
    rows = [{"prompt": "ab", "completion": "cdefg"}, {"prompt": "abcdefghij", "completion": "k"}]
    samples, report = run(rows, plain, max_length=6)
    assert [marked(plain, sample) for sample in samples] == ["<bos>ab⟦cde⟧"]
    assert (report.truncated, report.truncated_tokens, report.refused_after_truncation) == (2, 3 + 7, 1)
    assert "2 samples longer than max_length, cut at their end (10 tokens lost)" in report.lines()
    assert "1 samples refused: nothing to be learned was left after the cut" in report.lines()


def test_rows_with_all_labels_masked_are_refused_and_counted(plain):
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    samples, report = run(rows, plain)
    assert (len(samples), report.rows, report.refused) == (1, 2, 1)
    with pytest.raises(InputError, match="none of the 1 rows is left to train on: in 1 all labels are masked"):
        run(rows[:1], plain)
    # A label at the first position asks for a prediction from nothing.
    with pytest.raises(InputError, match="none of the 1 rows"):
        run([{"input_ids": [5, 6], "labels": [5, -100]}], plain)


def test_messages_of_a_role_that_may_be_a_slip_are_counted(chat):
    talk = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "asistant")]
    _, report = run([{"messages": talk}], chat)
    said = "messages of a role that is none of system, developer, user, assistant, tool: read, but not trained"
    assert f"1 {said}" in report.lines()
    assert not any(said in line for line in run([{"messages": talk[:3]}], chat)[1].lines())


def test_report_says_the_format_and_counts_tokens(chat):
    rows = [{"question": "Q", "answer": "A"}] * 3
    assert run(rows, chat)[1].lines() == [
        "format: question/answer (3 rows), rendered with the chat template",
        # <|im_start|> user ⏎ Q <|im_end|> ⏎ <|im_start|> assistant ⏎ A <|im_end|> ⏎ with a token a byte
        f"samples: 3, {3 * (1 + 4 + 1 + 1 + 1 + 1 + 1 + 9 + 1 + 1 + 1 + 1)} tokens, 6 of them targets",
        "2 samples whose tokens are exactly those of another one: they count twice",
    ]
    assert (
        run([{"text": "a"}], chat)[1].lines()[0]
        == "format: text (1 rows), as plain text, ended by EOS, all tokens trained"
    )


def test_chunks_keep_rows_and_numbers_in_order(plain, monkeypatch):
    monkeypatch.setattr("jaxft.data.CHUNK", 2)
    rows = [{"text": str(number)} for number in range(5)]
    assert texts(rows, plain) == [f"<bos>⟦{number}<eos>⟧" for number in range(5)]
    with pytest.raises(InputError, match="row 5: text is None"):
        run([*rows[:4], {"text": None}], plain)


def test_messages_survive_the_journey_through_a_table(tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(CHATML.replace("m.content +", "m.content + (m | tojson) +"))
    [first, second] = texts(load_rows(str(path)), tokenizer)
    assert '{"role": "assistant", "content": "a"}' in first and "null" not in first
    assert '"tool_calls": [{"name": "f", "arguments": {"x": 1}}]' in second


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hi"}, "row 2: messages is 'hi'"),
        ({"messages": [{"role": "user", "content": None}]}, r"row 2: message 1 \(user\) has content None"),
        ({"question": "q", "answer": None}, "row 2: answer is None; must be a string"),
        ({"instruction": "q", "output": 3}, "row 2: output is 3; must be a string"),
        ({"prompt": ["q"], "completion": "a"}, "row 2: prompt is"),
        ({"input_ids": "12"}, "row 2: input_ids is '12'; must be a list of integers"),
        ({"input_ids": [1.5]}, r"row 2: input_ids is \[1.5\]"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 2: input_ids, labels, attention_mask have 2, 1, 2"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, r"row 2: labels\[1\] is 3, input_ids\[1\] 2"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, r"row 2: labels\[1\] is 2"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "row 2: attention_mask holds 2"),
        ({"input_ids": [1, 300]}, r"row 2: token id 300 is outside the model's vocabulary of 300 \(0 to 299\)"),
        ({"input_ids": [1, -5]}, "row 2: token id -5 is outside"),
    ],
)
def test_row_of_a_wrong_form_is_named(chat, row, said):
    good = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "question": "q",
        "answer": "a",
        "instruction": "i",
        "output": "o",
        "prompt": "p",
        "completion": "c",
        "input_ids": [1, 2],
        "labels": [1, 2],
        "attention_mask": [1, 1],
    }

    class Table(list):
        """Rows as a data set hands them over; a real one could not hold two types in one column."""

        @property
        def column_names(self):
            return list(row)

        def select_columns(self, columns):
            return self

        def iter(self, size):
            yield {column: [one[column] for one in self] for column in row}

    with pytest.raises(InputError, match=said):
        run_table = Table([{column: good[column] for column in row}, row])
        tokenize_dataset(run_table, chat, max_length=200, vocab_size=300)


def test_messages_without_a_template_and_bad_settings_are_refused(plain):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    with pytest.raises(InputError, match="row 1: the tokenizer has no chat template"):
        run(rows, plain)
    with pytest.raises(InputError, match="train_on is 'x'"):
        run([{"text": "a"}], plain, train_on="x")
    with pytest.raises(InputError, match="max_length is 1"):
        run([{"text": "a"}], plain, max_length=1)


def test_missing_columns_say_what_was_seen_and_what_is_understood():
    with pytest.raises(
        InputError, match=re.escape("columns seen (question, reply); understood: input_ids, [labels], [at")
    ):
        detect_format(["question", "reply"])
    assert detect_format(["text", "output", "instruction"]).name == "Alpaca"
    assert detect_format(["text", "input_ids"]).name == "tokenised"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', "a.jsonl, line 2, column 10: malformed JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "a.jsonl, line 3, column 13: malformed JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', r"a.jsonl, line 2: a row must be a JSON object, this one is \[1, 2\]"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json, line 2: malformed JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl, line 2: not UTF-8 .byte 27 of the file is 0xe9"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "a.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\xc3', "a.jsonl, line 2: not UTF-8 .the file ends inside a character"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: there is no row in it"),
        ("a.json", b"[]", "a.json: there is no row in it"),
        ("a.txt", b"hello", "a.txt: understood are .json, .jsonl, .csv, .tsv .each also .gz., .parquet and .arrow"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["/no/such/file", "./no.jsonl", "~/no-such-file.json", "data/no-such.jsonl"])
def test_missing_file_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="there is no such file or directory"):
        load_rows(name)


def test_hub_name_that_cannot_be_had_is_an_input_error():
    with pytest.raises(InputError, match="data set 'no-such/set' is no file here, and the hub does not give it"):
        load_rows("no-such/set")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "2024-01-01"}\n{"text": "2024-01-02"}\n'),  # strings, not dates
        ("a.json", b'[{"text": "2024-01-01"}, {"text": "2024-01-02"}]'),
        ("a.json", b'{"text": "2024-01-01"}\n{"text": "2024-01-02"}\n'),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "2024-01-01"}\r\n\r\n{"text": "2024-01-02"}'),
    ],
)
def test_every_usual_writing_of_a_file_is_read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert load_rows(str(path))["text"][:] == ["2024-01-01", "2024-01-02"]


def test_directory_gives_the_files_of_its_split(tmp_path):
    for name in ("train-1.jsonl", "train-0.json", "test.jsonl", "training.md", "trainer.json"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert load_rows(str(tmp_path))["text"][:] == ["train-0.json", "train-1.jsonl"]
    assert load_rows(str(tmp_path), "test")["text"][:] == ["test.jsonl"]
    with pytest.raises(InputError, match=r"no file of split 'dev' among test\.jsonl, train-0"):
        load_rows(str(tmp_path), "dev")
    with pytest.raises(InputError, match="a file has no split 'dev'"):
        load_rows(str(tmp_path / "test.jsonl"), "dev")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"the directory has no data file"):
        load_rows(str(tmp_path / "other"))
    (tmp_path / "other" / "b.jsonl").write_text(json.dumps({"text": "b"}))
    assert [file.name for file in find_files(tmp_path / "other")] == ["b.jsonl"]


@pytest.mark.skipif(
    not SHARED.exists() and os.environ.get("JAXFT_REQUIRE_SHARED") != "1",
    reason="needs the real data beside the project",
)
def test_gsm8k_with_the_real_qwen_tokenizer():
    pytest.importorskip("torch", reason="transformers reads the vocabulary file with torch")
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "tokenizers"), gguf_file="ggml-vocab-qwen2.gguf")
    dataset = load_rows(str(SHARED / "data" / "gsm8k"))
    start = time.monotonic()
    samples, report = tokenize_dataset(dataset, tokenizer, max_length=1024, vocab_size=151936)
    assert time.monotonic() - start < 60
    assert report.lines() == [
        "format: question/answer (7473 rows), rendered with the chat template",
        "samples: 7473, 1505365 tokens, 917634 of them targets",
    ]
    answer = tokenizer.decode(samples[0].input_ids[samples[0].loss_weights > 0])
    assert answer == dataset[0]["answer"] + "<|im_end|>"
    plan = make_plan([len(sample) for sample in samples], 1024, packing=True, shuffle=True, seed=0)
    assert Batches(samples, plan, max_length=1024, batch_size=8).efficiency > 0.98
