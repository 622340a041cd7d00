"""Many prompts: answered in batches as each would be alone, cut at stop strings, read from and written to JSONL."""

import json
import os
import resource
import signal

import jax
import numpy as np
import pytest

import jaxft
from jaxft import decode, prompts
from jaxft import generate as command
from jaxft.decode import generate
from jaxft.errors import InputError, RunError
from jaxft.generate import Completion, write_answers
from jaxft.lora import LoraConfig, add_lora
from jaxft.prompts import Asked
from jaxft.sampling import prompt_keys
from jaxft.settings import GenerateSettings
from jaxft.stops import cut_at_stop, stop_token_ids
from jaxft.typed import JsonObject
from tests.tiny_models import V as V_TINY
from tests.tiny_models import nonzero_adapter, tiny_model
from tests.tiny_runs import flags, make_tokenizer, write_base, write_rows

LENGTHS = (3, 11, 1, 20, 5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("prompts") / "base")


def asked(seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, V_TINY, length).tolist() for length in LENGTHS]


def answers(model, params, some, **options):
    if options.get("temperature"):
        options["keys"] = prompt_keys(jax.random.key(3), some)
    return generate(model, (params,), some, max_new_tokens=40, stop_ids=range(3, 8), **options)


# Batches


def test_an_answer_depends_on_no_neighbour_and_no_batch_size():
    model, params = tiny_model("qwen3")
    options = {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2}
    alone = [answers(model, params, [prompt], **options)[0] for prompt in asked()]
    assert answers(model, params, asked(), **options) == alone
    assert answers(model, params, asked()[::-1], batch_size=3, **options) == alone[::-1]
    assert len({len(tokens) for tokens in alone}) > 2 and len({tuple(tokens) for tokens in alone}) == len(alone)


def test_the_same_prompt_asked_again_is_drawn_anew():
    model, params = tiny_model("qwen3")
    same = answers(model, params, [asked()[0]] * 4, temperature=1.5)
    assert len({tuple(tokens) for tokens in same}) == 4
    assert same[0] == answers(model, params, [asked()[0]], temperature=1.5)[0]


def test_few_programs_are_compiled_and_the_longest_prompts_come_first(monkeypatch):
    shapes = []
    monkeypatch.setattr(decode, "_prefill", lambda *a, **_: shapes.append(a[2].shape) or {})
    monkeypatch.setattr(
        decode, "_decode", lambda *a, **_: {"out": np.full((len(a[3]), 1), -1), "done": np.ones(len(a[3]), bool)}
    )
    some = [[1] * (1 + number * 37 % 500) for number in range(203)]
    generate(None, (), some, max_new_tokens=1, stop_ids=[], batch_size=8)
    assert len(shapes) == 26 and shapes[-1] == (4, 64) and shapes[0] == (8, 512)
    assert set(shapes) == {(8, size) for size in (64, 96, 128, 192, 256, 384, 512)} | {(4, 64)}


@pytest.mark.long
def test_the_repetition_penalty_is_that_of_transformers(hf_model):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import AutoModelForCausalLM

    directory = hf_model("qwen3")
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = asked()[3]
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, eos_token_id=None, pad_token_id=0,
        repetition_penalty=1.8,
    )  # fmt: skip
    model, params = jaxft.load_model(directory)
    options = {"max_new_tokens": 30, "stop_ids": []}
    found = generate(model, (params,), [prompt, [4]], repetition_penalty=1.8, **options)[0]
    assert found == out[0, len(prompt) :].tolist() != generate(model, (params,), [prompt], **options)[0]


# Stop strings


def test_the_text_ends_exactly_before_the_first_stop_string_that_was_whole():
    tokenizer = make_tokenizer()

    def cut(text, *stops):
        tokens = tokenizer.encode(text, add_special_tokens=False)  # a token a byte: every stop string spans several
        return cut_at_stop(tokens, stops, lambda some: tokenizer.decode(some, skip_special_tokens=True))

    assert cut("one\n\ntwo\n\nthree", "\n\n") == ("one", 5)
    assert cut("ab中文d", "文") == ("ab中", 8) and cut("ab中文d", "中文d", "x") == ("ab", 9)
    assert cut("naïve", "ï", "v") == ("na", 4)
    assert cut("a\nUser: b", "User:", "b") == ("a\n", 7)
    assert cut("abcd", "bcd", "c") == ("ab", 3)  # "c" was whole first
    assert cut("abcd", "x") == ("abcd", None) and cut("abcd") == ("abcd", None) and cut("", "x") == ("", None)
    assert cut("xab", "x") == ("", 1)
    assert cut_at_stop([0], ["bcd", "c"], lambda some: "abcd" if some else "") == ("a", 1)  # both in one token


def command_answer(capsys, *argv, **settings) -> str:
    assert command.main([*argv, *flags(**settings)]) == 0
    return capsys.readouterr().out


def test_the_command_stops_at_a_string_or_special_token_and_generates_no_further(base, capsys, monkeypatch):
    monkeypatch.setattr(command, "stop_token_ids", lambda *a: sorted({*stop_token_ids(*a)} - {*stop_token_ids(*a[:2])}))
    settings = {"model_name_or_path": base, "prompt": "Tell", "max_new_tokens": 200, "temperature": 2.5}
    whole = command_answer(capsys, **settings)
    pairs = (whole[at : at + 2] for at in range(10, 60))
    stop = next(pair for pair in pairs if pair.isascii() and pair.isprintable())
    calls, decoded = [], decode._decode
    monkeypatch.setattr(decode, "_decode", lambda *a, **k: calls.append(a[5]) or decoded(*a, **k))
    cut = command_answer(capsys, "--stop", "nowhere", stop, **settings)
    assert cut == whole[: whole.index(stop)] and len(calls) <= 3  # of seven, 32 tokens each
    assert command_answer(capsys, "--stop=nowhere", f"--stop={stop}", **settings) == cut
    assert command_answer(capsys, "--stop=nowhere", **settings) == whole
    shorter = command_answer(capsys, "--stop", "<bos>", "<eos>", "<|im_start|>", **settings)
    assert whole.startswith(shorter.rstrip("\ufffd")) and len(shorter) < len(whole)


# The files

NEW = 24
# one way of drawing for all commands, so that they share compiled programs
DRAWN = {"max_new_tokens": NEW, "temperature": 0.8, "top_k": 20, "seed": 3}
ROWS = [
    {"id": 7, "prompt": "Hello, "},
    {"messages": [{"role": "user", "content": "Hi"}], "id": None, "nested": {"中": [1, 2.5]}},
    {"prompt": "A longer prompt than the others, so it stands first"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"prompt": "x", "seed": "kept"},
]


@pytest.mark.parametrize("size", [2, pytest.param(8, marks=pytest.mark.long)])
def test_every_row_comes_back_in_order_with_its_fields_and_the_answer_it_gets_alone(size, base, capsys, tmp_path):
    settings = DRAWN | {"model_name_or_path": base}
    rows = {"prompts": write_rows(tmp_path / "in.jsonl", ROWS), "output": tmp_path / "out"}
    assert command_answer(capsys, **settings, **rows, per_device_eval_batch_size=size) == ""
    written = [json.loads(line) for line in rows["output"].read_text(encoding="utf-8").splitlines()]
    assert [{name: row[name] for name in given} for row, given in zip(written, ROWS, strict=True)] == ROWS
    for row, given in zip(written, ROWS, strict=True):
        assert row.keys() - given.keys() == set(prompts.ANSWER_FIELDS)
        assert row["finish_reason"] == ("stop" if row["completion_tokens"] < NEW else "length")
    for row in (written[0], written[4]):
        assert row["completion"] == command_answer(capsys, **settings, prompt=row["prompt"])
        assert row["prompt_tokens"] == len(row["prompt"])
    (tmp_path / "m.json").write_text(json.dumps(ROWS[1]["messages"]))
    assert written[1]["completion"] == command_answer(capsys, **settings, messages=tmp_path / "m.json")
    assert len({row["completion"] for row in written}) >= 4


def test_chat_makes_each_prompt_a_users_turn_and_without_output_the_rows_go_to_stdout(base, capsys, tmp_path):
    settings = DRAWN | {"model_name_or_path": base}
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "Hi"}, {"messages": ROWS[1]["messages"]}])
    one, two = map(json.loads, command_answer(capsys, "--chat", prompts=rows, **settings).splitlines())
    assert one["completion"] == command_answer(capsys, "--chat", prompt="Hi", **settings) != two["completion"]
    assert one["prompt_tokens"] == two["prompt_tokens"] == 21


def test_the_chat_template_is_given_the_flags_settings_and_a_rows_own_win():
    tokenizer = make_tokenizer(template="{{ messages[0]['content'] }}{{ style | default('none') }}")

    def asked(row: dict, **given) -> str:
        settings = GenerateSettings(prompt="a", chat=True, **given)
        return tokenizer.decode(prompts.prompt_tokens(Asked("here", row), tokenizer, settings))

    assert asked({"prompt": "Hi "}) == "Hi none"
    plain = {"chat_template_kwargs": JsonObject({"style": "plain"})}
    assert asked({"prompt": "Hi "}, **plain) == "Hi plain"
    assert asked({"prompt": "Hi ", "chat_template_kwargs": {"style": "rich"}}, **plain) == "Hi rich"
    with pytest.raises(InputError, match="here: chat_template_kwargs is 7; must be an object"):
        asked({"prompt": "Hi ", "chat_template_kwargs": 7})


@pytest.mark.long
@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_on_a_quantised_base_answers_a_file_as_it_answers_one_prompt(quantised, base, capsys, tmp_path):
    model, params = jaxft.load_model(base)
    lora = LoraConfig(r=4, lora_alpha=8)
    model, trainable, _ = add_lora(model, params, lora, jax.random.key(0))
    jaxft.save_adapter(tmp_path / "adapter", model, nonzero_adapter(trainable), lora, str(base))
    settings = {"model_name_or_path": base, "max_new_tokens": NEW, quantised: True}
    rows = write_rows(tmp_path / "in.jsonl", ROWS[:1])
    with_adapter = command_answer(capsys, prompts=rows, adapter=tmp_path / "adapter", **settings)
    found = [json.loads(line)["completion"] for line in with_adapter.splitlines()]
    assert found[0] == command_answer(capsys, prompt="Hello, ", adapter=tmp_path / "adapter", **settings)
    assert found[0] != command_answer(capsys, prompt="Hello, ", **settings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"in\.jsonl cannot be read: No such file"),
        (b"\n \n", r"in\.jsonl: there is no line in it"),
        (b'{"prompt": "a"}\n\n{"prompt": \n', r"line 3, column 11: malformed JSON: .*every line is one JSON object"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"line 2: not UTF-8 \(byte 12 of the line\)"),
        (b'["a"]', r"line 1: a row must be a JSON object, this one is \['a'\]"),
        (b'{"text": "a", "id": 1}', r"line 1: fields text, id found; a row has one of"),
        (b'{"prompt": "a", "messages": []}', "line 1: both prompt and messages found"),
        (b'{"prompt": "a", "completion": "b"}', "line 1: the field completion is one that the answer is written into"),
        (b'{"prompt": 7}', "line 1: prompt is 7; must be a string, or a list of messages"),
        (b'{"messages": []}', r"line 1: messages is \[\]; a list of objects with role and content is needed"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "line 1: .* ends"),
        (b'{"messages": [{"role": "user", "content": 7}]}', "line 1: the chat template refuses the conversation"),
        (b'{"prompt": "a"}\n{"prompt": ""}', "line 2: the prompt has no token to continue"),
        (b'{"prompt": "a\\ud800"}', "line 1: character 1 is half a character; write it whole"),
        (
            b'{"prompt": "a"}\n{"prompt": "' + b"a" * 250 + b'"}',
            "line 2: the prompt's 250 tokens and --max_new_tokens 9 are more than the model's 256 positions",
        ),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_file_that_cannot_be_answered_is_refused_with_its_line_and_nothing_is_written(content, words, base, tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        command.main(flags(model_name_or_path=base, prompts=path, output=out, max_new_tokens=9))
    assert not out.exists()


def test_flags_of_generation_that_make_no_sense_are_refused(base, capsys, tmp_path):
    (tmp_path / "there").write_text("")
    rows = write_rows(tmp_path / "in", [{"prompt": "a"}])
    for settings, words in (
        ({"prompt": "a", "top_k": -1}, "--top_k is -1; it must be at least 0"),
        ({"prompt": "a", "top_p": 0}, "--top_p is 0.0; it must be above 0 and at most 1"),
        ({"prompt": "a", "repetition_penalty": 0}, "--repetition_penalty is 0.0; it must be above 0"),
        ({"prompt": "a", "temperature": -1}, "--temperature is -1.0; it must be at least 0"),
        ({"prompt": "a", "stop": ""}, "--stop is empty"),
        ({"prompt": "a", "output": "b"}, "--output is for the answers to --prompts"),
        ({"prompt": "a", "prompts": rows}, "--prompt and --prompts contradict each other"),
        ({"prompts": rows, "output": tmp_path / "there"}, "there exists already; name a new file"),
        ({"prompts": rows, "output": tmp_path / "no" / "out"}, "there is no directory"),
    ):
        with pytest.raises(InputError, match=words):
            command.main(flags(model_name_or_path=base, **settings))
    with pytest.raises(InputError, match="none cannot be read"):
        command.main(flags(model_name_or_path=base, prompts=tmp_path / "none", top_p=0.5, top_k=3))
    assert "temperature 0 is greedy: top_k, top_p have no effect" in capsys.readouterr().err


def test_a_full_disk_leaves_whole_lines_and_is_a_run_error(tmp_path):
    out = tmp_path / "out.jsonl"
    some = [Asked("", {"prompt": "中" * 200})] * 6
    batches = [[Completion("文" * 100, 1, "stop")] * 2 for _ in range(3)]
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        with pytest.raises(
            RunError, match=r"out\.jsonl cannot be written after 2 of 6 answers: .*File too large.* Make r"
        ):
            write_answers(out, some, [[1]] * 6, batches)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [json.loads(line)["completion"] for line in out.read_text().splitlines()] == ["文" * 100] * 2
    assert os.path.getsize(out) < 3000
