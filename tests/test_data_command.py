"""`python -m jaxft.data` shows what the trainer will see: the counts, the plan, and samples with what is trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft import inspection
from jaxft.data.__main__ import main
from jaxft.errors import InputError
from jaxft.load import EMBEDDED
from jaxft.packing import make_plan
from jaxft.samples import weighted
from tests.conftest import need_shared
from tests.tiny_runs import make_tokenizer, write_base, write_rows

ROOT = Path(__file__).parent.parent
ROWS = [
    {"question": "1 + 1?", "answer": "2"},
    {"question": "2 + 2?", "answer": "4" * 30},
    {"question": "1 + 1?", "answer": "2"},
    {"question": "3 + 3?", "answer": ""},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_base(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture
def rows(tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl", ROWS))


def facts(capsys, *words):
    assert main([*words, "--json", "--dataset_cache", "none"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_json_counts_what_the_trainer_will_see(rows, base, capsys):
    found = facts(capsys, rows, "--model_name_or_path", base, "--max_length", "52", "--show_samples", "2")
    (one,) = found["sets"]
    # <|im_start|>user⏎1 + 1?<|im_end|>⏎<|im_start|>assistant⏎2<|im_end|>⏎ is 28 tokens, an empty answer 27, and the one
    # of 30 digits 57
    assert (one["format"], one["rows"], one["samples"]) == ("question/answer", 4, 4)
    assert (one["truncated"], one["truncated_tokens"], one["duplicates"]) == (1, 5, 1)
    assert one["tokens"] == 28 + 52 + 28 + 27 and one["target_tokens"] == 2 + 27 + 2 + 1
    assert one["trained_share"] == pytest.approx(32 / 135)
    lengths = found["lengths"]
    assert (lengths["min"], lengths["median"], lengths["max"]) == (27, 28, 52)
    assert sum(bin["count"] for bin in lengths["histogram"]) == 4
    plan = found["plan"]
    assert (plan["rows"], plan["most_documents"], plan["unpacked"]["rows"]) == (4, 1, 4)
    assert plan["efficiency"] == pytest.approx(135 / (4 * 52)) and plan["steps_per_epoch"] == 1
    trained = [[part["text"] for part in sample if part["trained"]] for sample in found["first_samples"]]
    assert trained == [["2<|im_end|>"], ["4" * 27]]
    whole = "".join(part["text"] for part in found["first_samples"][0])
    assert whole == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"


def test_rows_without_a_trained_token_are_counted(tmp_path, base, capsys):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 2], "labels": [-100, -100]}]
    path = str(write_rows(tmp_path / "tokens.jsonl", rows))
    (one,) = facts(capsys, path, "--model_name_or_path", base)["sets"]
    assert (one["refused"], one["samples"], one["target_tokens"]) == (1, 1, 2)


def test_the_text_shows_the_same_and_marks_what_is_trained(rows, base, capsys):
    assert main([rows, "--model_name_or_path", base, "--max_length", "52", "--dataset_cache", "none"]) == 0
    said = capsys.readouterr().out
    for line in (
        "format: question/answer (4 rows), rendered with the chat template",
        "1 samples longer than max_length, cut at their end (5 tokens lost)",
        "1 samples whose tokens are exactly those of another one: they count twice",
        "23.7% of the tokens are trained",
        "4 rows of 52 tokens, 64.9% filled, 1.0 samples a row and 1 at most",
        "⟦2<|im_end|>⟧",
    ):
        assert line in said, said
    assert "█" in said and "\x1b[" not in said


def test_in_a_terminal_what_is_trained_is_coloured():
    parts = [("asked ", False), ("answer", True)]
    assert inspection.rendered(parts, colours=False).plain == "asked ⟦answer⟧"
    text = inspection.rendered(parts, colours=True)
    assert text.plain == "asked answer"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(6, 12, inspection.STYLE)]


def test_held_out_samples_that_are_trained_on_too_are_counted(rows, base, tmp_path, capsys):
    held = str(write_rows(tmp_path / "held.jsonl", [ROWS[0], {"question": "9 + 9?", "answer": "18"}]))
    found = facts(capsys, rows, "--model_name_or_path", base, "--eval_dataset", held)
    assert (found["held_out"]["samples"], found["held_out"]["also_trained"]) == (2, 1)
    found = facts(capsys, rows, "--model_name_or_path", base, "--eval_split", "2")
    assert (found["held_out"]["rows"], found["sets"][0]["rows"]) == (2, 2)


def test_a_training_command_can_be_looked_at_as_it_stands(rows, base, capsys):
    found = facts(
        capsys, "--dataset", rows, "--model_name_or_path", base, "--lora_r", "4", "--output_dir", "x",
        "--template", "{question} Now.", "--chat_template", "vicuna", "--per_device_train_batch_size", "1",
        "--gradient_accumulation_steps", "2", "--packing", "false",
    )  # fmt: skip
    assert found["sets"][0]["format"] == "template" and found["plan"]["steps_per_epoch"] == 2
    assert "".join(part["text"] for part in found["first_samples"][0]).endswith("USER: 1 + 1? Now. ASSISTANT: 2<eos>")


def test_what_is_missing_is_said(rows, base):
    for words, said in (
        ([rows], "--model_name_or_path is missing"),
        (["--model_name_or_path", base], "no data set is named"),
        ([rows, "--dataset", rows, "--model_name_or_path", base], "both name data"),
        ([rows, "--model_name_or_path", base, "--streaming", "--max_steps", "2"], "leave it out"),
        ([rows, "--model_name_or_path", base, "--max_lenght", "3"], "did you mean --max_length"),
    ):
        with pytest.raises(InputError, match=said):
            main(words)


def test_pieces_are_the_text_also_where_characters_lie_across_bounds():
    tokenizer = make_tokenizer()
    ids = np.asarray(tokenizer("é是 a")["input_ids"], np.int32)
    trained = np.zeros(len(ids), bool)
    trained[1:4] = True  # from the second byte of é to the second of 是
    found = inspection.pieces(tokenizer, weighted(ids, trained))
    assert [trained for _, trained in found] == [False, True, False]
    assert "".join(text for text, _ in found).endswith(" a")
    whole = inspection.pieces(tokenizer, weighted(ids, np.arange(len(ids)) >= 5))
    assert whole == [("é是", False), (" a", True)]


def test_a_histogram_has_round_bins_that_hold_every_sample():
    samples = [weighted(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (3, 4, 97, 98, 401)]
    found = inspection.length_facts(samples)
    bins = found["histogram"]
    assert [bins[0]["from"], bins[0]["to"], len(bins)] == [0, 49, 9]
    assert [bin["count"] for bin in bins] == [2, 2, 0, 0, 0, 0, 0, 0, 1]
    assert (found["median"], found["p95"], found["mean"]) == (97, 401, 120.6)
    lines = inspection.histogram_lines(found, 10)
    assert lines[0] == "  0 to  49  ██████████ 2" and lines[2] == "100 to 149   0" and lines[8].endswith("█████ 1")


def test_the_command_runs_as_it_is_typed(rows, base, tmp_path):
    run = [sys.executable, "-W", "error::RuntimeWarning", "-m", "jaxft.data", rows, "--model_name_or_path", base]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert found.returncode == 0, found.stderr
    assert rows in found.stdout and "sample 1" in found.stdout and "kept in" in found.stdout


@pytest.mark.long
def test_without_a_name_the_embedded_data_are_shown(capsys):
    (one,) = facts(capsys)["sets"]
    assert one["source"] == str(EMBEDDED / "problems_train.jsonl") and one["refused"] == 0


@pytest.mark.long
def test_gsm8k_is_seen_as_the_trainer_packs_it(capsys):
    path = str(need_shared("data/gsm8k/train.jsonl"))
    found = facts(capsys, path, "--model_name_or_path", str(EMBEDDED / "base"), "--eval_split", "0.05")
    assert found["sets"][0]["rows"] + found["held_out"]["rows"] == 7473 and found["held_out"]["rows"] == 374
    assert found["plan"]["efficiency"] > 0.98 and found["plan"]["unpacked"]["rows"] == 7099


def test_the_plan_is_the_one_of_the_run(base, rows, capsys):
    found = facts(capsys, rows, "--model_name_or_path", base, "--max_length", "113", "--seed", "3")
    plan = make_plan([28, 57, 28, 27], 113, packing=True, shuffle=True, seed=3)
    assert (found["plan"]["rows"], found["plan"]["most_documents"]) == (len(plan), max(map(len, plan)))
