"""Column templates: any columns become questions and answers, optional parts go, and rows join into conversations."""

import datasets
import pytest

from jaxft.columns import Columns, parse_template
from jaxft.config import parse
from jaxft.data import split_rows, tokenize_dataset
from jaxft.errors import InputError
from jaxft.packing import permutation
from tests.tiny_runs import V, make_tokenizer

ROWS = [
    {"topic": "sums", "task": "1 + 1", "hint": "count", "result": 2},
    {"topic": "sums", "task": "2 + 2", "hint": "", "result": 4},
    {"topic": "sums", "task": "3 + 3", "hint": None, "result": 6},
]


def texts(rows, tokenizer=None, **asked):
    """The texts of all samples, and those of their trained parts."""
    tokenizer = tokenizer or make_tokenizer()
    settings, _ = parse("train", [f"--{name}={value}" for name, value in asked.items()])
    samples, report = tokenize_dataset(
        datasets.Dataset.from_list(rows), tokenizer, max_length=200, vocab_size=V, columns=settings.columns
    )
    whole = [tokenizer.decode(sample.input_ids) for sample in samples]
    return whole, [tokenizer.decode(s.input_ids[s.loss_weights > 0]) for s in samples], report


def chatml(asked, answer):
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def test_a_template_merges_columns_and_leaves_empty_optional_parts_out():
    whole, trained, report = texts(
        ROWS, template=r"{topic}: {task}?[[\nHint: {hint} ({topic})]] {{x}}", response_template="= {result}"
    )
    assert whole == [
        chatml("sums: 1 + 1?\nHint: count (sums) {x}", "= 2"),
        chatml("sums: 2 + 2? {x}", "= 4"),
        chatml("sums: 3 + 3? {x}", "= 6"),
    ]
    assert trained == ["= 2<|im_end|>", "= 4<|im_end|>", "= 6<|im_end|>"]
    assert (report.format, report.rows) == ("template", 3)


def test_without_a_chat_template_both_texts_stand_side_by_side_and_eos_ends_them():
    whole, trained, _ = texts(ROWS[:1], make_tokenizer(None), template="Q: {task}\n", response_template="A: {result}")
    assert whole == ["Q: 1 + 1\nA: 2<eos>"] and trained == ["A: 2<eos>"]


def test_the_answer_of_a_known_format_need_not_be_named():
    rows = [{"question": "Q", "answer": "A", "source": "S"}]
    assert texts(rows, template="({source}) {question}")[0] == [chatml("(S) Q", "A")]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"template": "{tusk}", "response_template": "{result}"},
         "--template names tusk; the columns are topic, task, hint, result"),
        ({"template": "{task}", "response_template": "{answer}"},
         "--response_template names answer; the columns are topic, task, hint, result"),
        ({"template": "{task}"}, "--response_template is missing: it says what is answered"),
        ({"template": "{task} {hint}", "response_template": "{result}"}, r"row 3: hint is empty; put .* into \[\["),
        ({"template": "no column", "response_template": "{result}"}, "'no column' names no column"),
        ({"template": "{task}", "response_template": "### Answer:"}, "'### Answer:' names no column"),
        ({"template": "a [[b]] {task}", "response_template": "{result}"}, r"that ends at .* has no \{column\}"),
        ({"template": "{task} [[ {hint}", "response_template": "{result}"}, r"a part \[\[ is not closed"),
        ({"template": "{task} ]]", "response_template": "{result}"}, r"\]\] at character 8 has no \[\[ before it"),
        ({"template": "[[{task} [[{hint}]]]]", "response_template": "{result}"}, "never nested"),
        ({"template": "{task", "response_template": "{result}"}, r"\{ at character 1 stands alone; write \{\{"),
        ({"template": "{task} {}", "response_template": "{result}"}, "names no column; write {{}}"),
        ({"response_template": "{result}"}, "--template is missing: it says what is asked"),
        ({"conversation_extension": 0}, "conversation_extension is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_template_is_said(asked, said):
    with pytest.raises(InputError, match=said):
        texts(ROWS, **asked)


def test_a_cell_that_is_no_text_is_refused_with_its_row():
    rows = [{"task": ["a"], "result": "b"}]
    with pytest.raises(InputError, match=r"row 1: task is \['a'\]; a template takes text and numbers"):
        texts(rows, template="{task}", response_template="{result}")


NUMBERED = [{"question": f"Q{number}", "answer": f"A{number}"} for number in range(7)]


def test_rows_join_into_conversations_in_which_each_row_stands_once():
    whole, trained, report = texts(NUMBERED, conversation_extension=3, seed=5)
    order = permutation(7, 5, 5)
    expected = ["".join(chatml(f"Q{n}", f"A{n}") for n in order[at : at + 3]) for at in (0, 3, 6)]
    assert whole == expected and sorted(order) == list(range(7))
    assert trained[0] == "".join(f"A{n}<|im_end|>" for n in order[:3])
    assert (report.rows, report.samples) == (7, 3) and "3 rows a conversation" in report.layout
    assert texts(NUMBERED, conversation_extension=3, seed=5)[0] == whole
    assert texts(NUMBERED, conversation_extension=3, seed=6)[0] != whole


def test_conversations_do_not_break_where_a_chunk_of_rows_ends(monkeypatch):
    whole, _, _ = texts(NUMBERED, conversation_extension=3)
    monkeypatch.setattr("jaxft.data.CHUNK", 2)
    assert texts(NUMBERED, conversation_extension=3)[0] == whole


def test_a_bad_row_of_a_conversation_is_named_by_its_place_in_the_file():
    rows = [*NUMBERED[:5], {"question": "Q", "answer": None}, *NUMBERED[5:]]
    with pytest.raises(InputError, match=r"^row 6: answer is None"):
        texts(rows, conversation_extension=2, seed=3)


def test_only_rows_of_one_question_join_and_only_by_a_chat_template():
    with pytest.raises(InputError, match="these are text; leave it out"):
        texts([{"text": "a"}], conversation_extension=2)
    with pytest.raises(InputError, match="needs a chat template; choose one with --chat_template"):
        texts(NUMBERED, make_tokenizer(None), conversation_extension=2)


def test_templates_and_seed_are_part_of_the_key_of_kept_data(tmp_path):
    def entries(**asked):
        settings, _ = parse("train", [f"--{name}={value}" for name, value in asked.items()])
        tokenize_dataset(
            datasets.Dataset.from_list(NUMBERED), make_tokenizer(), max_length=100, vocab_size=V, cache=tmp_path,
            columns=settings.columns,
        )  # fmt: skip
        return len(list(tmp_path.iterdir()))

    assert entries() == entries(seed=1) == 1  # one row a conversation: no seed in it
    assert entries(template="{question}") == 2
    assert entries(template="{question}!") == 3
    assert entries(conversation_extension=2) == 4
    assert entries(conversation_extension=2, seed=1) == 5


@pytest.mark.parametrize(("held_out", "count"), [(0.05, 5), (0.004, 1), (0.5, 50), (7.0, 7)])
def test_a_split_holds_out_exactly_what_is_asked_and_loses_no_row(held_out, count):
    rows = datasets.Dataset.from_list([{"n": number} for number in range(100)])
    train, heldout = split_rows(rows, held_out, seed=3)
    assert len(heldout) == count and sorted([*train["n"], *heldout["n"]]) == list(range(100))
    assert train["n"][:] == sorted(train["n"]) and heldout["n"][:] == sorted(heldout["n"])
    assert split_rows(rows, held_out, seed=3)[1]["n"][:] == heldout["n"][:]
    if count > 1:
        assert split_rows(rows, held_out, seed=4)[1]["n"][:] != heldout["n"][:]


def test_a_split_that_leaves_nothing_or_contradicts_is_refused():
    rows = datasets.Dataset.from_list(NUMBERED)
    with pytest.raises(InputError, match="holds out 7 of 7 rows, and leaves none"):
        split_rows(rows, 7, seed=0)
    for asked, said in (
        (["--eval_split", "0.1", "--eval_dataset", "x.jsonl"], "--eval_split and --eval_dataset contradict"),
        (["--eval_split", "0.1", "--streaming", "--max_steps", "3"], "--eval_split and --streaming contradict"),
        (["--eval_split", "1.5"], "a share between 0 and 1, or a whole number of rows"),
        (["--eval_split", "0"], "a share between 0 and 1"),
        (["--eval_split", "20", "--dataset", "a.jsonl", "b.jsonl"], "there are 2 data sets; give a share"),
        (["--conversation_extension", "2", "--streaming", "--max_steps", "3"], "draws from the whole set"),
    ):
        with pytest.raises(InputError, match=said):
            parse("train", asked)


def test_columns_without_templates_change_nothing():
    assert Columns().fitted(["text"]) == Columns()
    assert parse_template("{a}[[ {b}]]", "--template").columns == ("a", "b")
