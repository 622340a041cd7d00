"""The embedded default: its size and shapes, its tokenizer and template, and problems whose answers are right."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jinja2
import numpy as np
import pytest
from safetensors import safe_open

import jaxft
from jaxft.packing import Sample, eval_batches

ROOT = Path(__file__).parent.parent
EMBEDDED = Path(jaxft.__file__).parent / "embedded"
BASE = EMBEDDED / "base"
EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")
COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@pytest.fixture(scope="module")
def text():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import embedded_text

        yield embedded_text


@pytest.fixture(scope="module")
def tokenizer():
    return jaxft.load_tokenizer(BASE)


def read_problems(name):
    return [json.loads(line) for line in (EMBEDDED / f"problems_{name}.jsonl").read_text("utf-8").splitlines()]


def wrong_equations(text):
    return [m[0] for m in EQUATION.finditer(text) if COMPUTE[m[2]](int(m[1]), int(m[3])) != int(m[4])]


def test_base_and_tokenizer_take_at_most_three_megabytes():
    files = {path.name: path.stat().st_size for path in BASE.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) <= 3_000_000


def test_every_linear_reads_a_multiple_of_256_numbers_in_bfloat16():
    linears = 0
    with safe_open(BASE / "model.safetensors", framework="np") as weights:
        for name in weights.keys():  # noqa: SIM118  not a dict
            view = weights.get_slice(name)
            assert view.get_dtype() == "BF16", name
            if len(view.get_shape()) == 2:
                linears += 1
                assert view.get_shape()[1] % 256 == 0, name
    assert linears == 1 + 2 * 7  # the tied embedding, and seven a layer


def test_base_is_a_tied_qwen3_whose_vocabulary_is_the_tokenizers(tokenizer):
    config = json.loads((BASE / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["tie_word_embeddings"]) == ("qwen3", True)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["vocab_size"] == len(tokenizer) == 1024
    generation = json.loads((BASE / "generation_config.json").read_text("utf-8"))
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.pad_token_id
    assert generation["eos_token_id"] == [config["eos_token_id"], config["pad_token_id"]]


@pytest.mark.parametrize(
    "sentence",
    [
        "Tom has 12 + 7 = 19 apples.\n#### 19",
        "小明有12个苹果，又买了7个。小明有 12 + 7 = 19 个苹果。\n#### 19",
        "  two spaces,\ttabs\r\nand 1234567 digits",
        "not in the text: Ærøskøbing, 龘, Ελλάδα, 🦊",
    ],
)
def test_tokenizer_gives_back_what_it_read(tokenizer, sentence):
    ids = tokenizer(sentence)["input_ids"]
    assert max(ids) < 1024 and min(ids) >= 3  # no special token comes from plain text
    assert tokenizer.decode(ids) == sentence


def test_every_number_below_a_hundred_is_one_token_in_both_languages(tokenizer):
    for number in range(100):
        (token,) = tokenizer(str(number))["input_ids"]
        assert token in tokenizer(f"has {number} apples")["input_ids"]
        assert token in tokenizer(f"有{number}个")["input_ids"]


def test_chat_template_renders_turns_and_the_generation_prompt(tokenizer):
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "你好！"},
        {"role": "assistant", "content": "Hello!\n"},
        {"role": "user", "content": " 1 + 1?"},
    ]
    expected = (
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\n你好！<|im_end|>\n"
        "<|im_start|>assistant\nHello!\n<|im_end|>\n<|im_start|>user\n 1 + 1?<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"
    ids = tokenizer(prompt)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    with pytest.raises(jinja2.TemplateError, match="unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "beep"}], tokenize=False)


@pytest.mark.parametrize(("name", "count"), [("train", 2000), ("heldout", 200)])
def test_every_answer_is_right_and_ends_like_gsm8k(name, count):
    rows = read_problems(name)
    assert len(rows) == count
    assert sum(bool(re.search("[一-龥]", row["question"])) for row in rows) == count // 2
    for row in rows:
        worked, last = row["answer"].split("\n")
        equations = list(EQUATION.finditer(worked))
        assert equations and not wrong_equations(worked), row
        assert last == f"#### {equations[-1][4]}", row
        asked = re.findall(r"\d+", row["question"])
        made = {m[4] for m in equations[:-1]}  # what a first step made, the second uses
        used = [n for m in equations for n in (m[1], m[3])]
        assert set(asked) <= set(used) <= set(asked) | made, row


def test_shipped_problems_are_the_scripts_and_none_is_in_both_sets(text):
    train, held_out = text.problems(0, 2000, 200)
    for name, problems in (("train", train), ("heldout", held_out)):
        assert read_problems(name) == [{"question": p.question, "answer": p.answer} for p in problems]
    keys = [(p.template, p.numbers) for p in train + held_out]
    assert len(set(keys)) == 2200
    assert {p.template for p in held_out} == set(range(len(text.SITUATIONS)))


def test_generated_text_depends_on_the_seed_and_on_nothing_else(text):
    def documents(seed):
        return list(itertools.islice(text.documents(seed), 300))

    assert documents(0) == documents(0) != documents(1)
    script = "import embedded_text as t, itertools; print(list(itertools.islice(t.documents(0), 300)))"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "scripts"),
        "PYTHONHASHSEED": "7",
        "PYTHONIOENCODING": "utf-8",
    }
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert other.stdout.decode("utf-8").strip() == str(documents(0))


def test_generated_text_has_right_sums_and_never_the_answers_form(text):
    whole = "\n".join(itertools.islice(text.documents(0), 5000))
    assert len(EQUATION.findall(whole)) > 5000
    assert wrong_equations(whole) == []
    assert not re.search(r"#### \d", whole)
    assert text.number_word(42, "en") == "forty-two" and text.number_word(42, "zh") == "四十二"
    assert text.number_word(10, "zh") == "十" and text.number_word(0, "zh") == "零"


def test_base_has_learned_the_text(text, tokenizer):
    samples = []
    for document in itertools.islice(text.documents(1), 100):
        ids = np.array([*tokenizer(document)["input_ids"], tokenizer.pad_token_id], np.int32)
        weights = np.ones(len(ids), np.float32)
        weights[0] = 0
        samples.append(Sample(ids, weights))
    model, params = jaxft.load_model(BASE)
    step = jax.jit(jaxft.make_eval_step(model))
    sums = [step({}, params, batch) for batch in eval_batches(samples, max_length=256, batch_size=8)]
    loss = sum(float(s["loss_sum"]) for s in sums) / sum(float(s["weight"]) for s in sums)
    assert loss < 0.6  # random weights give 6.9; names and numbers that cannot be foreseen leave about 0.5
