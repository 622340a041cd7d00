"""`--chat_template`: our templates write what the real ones write, train what must be trained, and are saved."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from jaxft import describe_model, templates
from jaxft.chat import encode, render_conversation
from jaxft.config import parse
from jaxft.convert.merge import merge
from jaxft.errors import InputError
from jaxft.load import adapter_tokenizer
from jaxft.models import read_hf_config
from jaxft.output import write_result
from jaxft.prepare import prepare
from jaxft.stops import stop_token_ids
from jaxft.templates import FORMS, read_template, set_template, write_template
from tests.conftest import need_shared
from tests.tiny_runs import CHATML, flags, make_tokenizer, write_base

REAL = {  # the real template, and what it is told beside the messages
    "qwen-2.5": ("Qwen-Qwen2.5-7B-Instruct", {}),
    "qwen-3": ("Qwen-Qwen3-0.6B", {}),
    "gemma": ("google-gemma-2-2b-it", {}),
    "mistral": ("mistralai-Mistral-Nemo-Instruct-2407", {}),
    "phi-3": ("microsoft-Phi-3.5-mini-instruct", {}),
    "llama-3.1": ("meta-llama-Llama-3.1-8B-Instruct", {}),
    "llama-3.1 of 3.2": ("meta-llama-Llama-3.2-3B-Instruct", {"date_string": "26 Jul 2024"}),
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


QUESTION, ANSWER = turn("user", "  What is\n2 + 2? "), turn("assistant", "Four.\n")
MORE = [turn("user", "And 3 + 3?"), turn("assistant", "Six")]
SYSTEM = turn("system", "Answer shortly. ")
CONVERSATIONS = {
    "plain": [QUESTION, ANSWER],
    "several turns": [QUESTION, ANSWER, *MORE],
    "system": [SYSTEM, QUESTION, ANSWER],
    "system, several turns": [SYSTEM, QUESTION, ANSWER, *MORE],
    "question": [QUESTION],
    "system, question": [SYSTEM, QUESTION, ANSWER, MORE[0]],
}


@pytest.fixture
def tokenizer():
    """One token a byte, and every special token that a template of ours is made of."""
    made = make_tokenizer(None)
    names = dict.fromkeys(token for form in FORMS.values() for token in form.tokens)
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return made


def texts(tokenizer, messages, **settings):
    """A conversation as it is, and with the opening of the next answer."""
    return [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **settings)
        for prompt in (False, True)
    ]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", REAL)
def test_a_template_writes_what_the_real_one_writes(name, kind, tokenizer):
    file, settings = REAL[name]
    real = need_shared(f"tokenizers/chat_templates/{file}.jinja").read_text(encoding="utf-8")
    messages = CONVERSATIONS[kind]
    if name == "gemma" and kind.startswith("system"):
        pytest.skip("Gemma 2 refuses a system turn; that ours writes it as Gemma 3 does has a test of its own")
    set_template(tokenizer, name.split()[0])
    ours = texts(tokenizer, messages)
    tokenizer.chat_template = real
    assert ours == texts(tokenizer, messages, **settings)


@pytest.mark.parametrize("messages", [[QUESTION, turn("assistant", "<think>\nhm\n</think>\n\nFour"), *MORE],
                                      [QUESTION, turn("assistant", "Four", reasoning_content="2 and 2")]])  # fmt: skip
def test_qwen_3_keeps_and_drops_thoughts_as_the_real_one(messages, tokenizer):
    real = need_shared("tokenizers/chat_templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    set_template(tokenizer, "qwen-3")
    ours = [texts(tokenizer, messages), texts(tokenizer, messages[:1], enable_thinking=False)]
    tokenizer.chat_template = real
    assert ours == [texts(tokenizer, messages), texts(tokenizer, messages[:1], enable_thinking=False)]


def test_llama_3_is_llama_3_1_without_its_dates(tokenizer):
    real = need_shared("tokenizers/chat_templates/meta-llama-Llama-3.1-8B-Instruct.jinja").read_text(encoding="utf-8")
    messages = CONVERSATIONS["system, several turns"]
    set_template(tokenizer, "llama-3")
    ours = texts(tokenizer, messages)
    tokenizer.chat_template = real
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    assert ours == [text.replace(dates, "") for text in texts(tokenizer, messages)]
    assert "Date" not in ours[0] and ours[0].startswith("<bos><|start_header_id|>system")


WRITTEN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n",
    "llama-3": "<bos><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧",
    "gemma": "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n⟦A<end_of_turn>⟧\n",
    "mistral": "<bos>[INST]S\n\nQ[/INST]⟦A<eos>⟧",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n⟦A<|end|>\n<eos>⟧",
    "phi-4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant"
    "<|im_sep|>⟦A<|im_end|>⟧",
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\n⟦A<eos>⟧\n\n",
    "vicuna": "S USER: Q ASSISTANT:⟦ A<eos>⟧",
    "zephyr": "<|system|>\nS<eos>\n<|user|>\nQ<eos>\n<|assistant|>\n⟦A<eos>⟧\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_answer_and_what_ends_it_are_trained(name, tokenizer):
    end = set_template(tokenizer, name)
    messages = [turn("system", "S"), turn("user", "Q"), turn("assistant", "A")]
    (sample,) = render_conversation(tokenizer, messages)
    ((start, stop),) = sample.spans
    assert f"{sample.text[:start]}⟦{sample.text[start:stop]}⟧{sample.text[stop:]}" == WRITTEN[name]
    found = encode(tokenizer, sample)
    trained = found.input_ids[found.loss_weights > 0]
    assert end in tokenizer.decode(trained) and len(trained) == len(
        sample.text[start:stop].replace(end, "§").replace("<eos>", "§")
    )
    assert tokenizer.convert_tokens_to_ids(end) in stop_token_ids(tokenizer, Path("nowhere"))


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("qwen-3", "mistral", "phi-3")])
def test_a_conversation_of_several_turns_is_one_sample_that_trains_every_answer(name, tokenizer):
    end = set_template(tokenizer, name)
    messages = [turn("user", "Q1"), turn("assistant", "A1"), turn("user", "Q2"), turn("assistant", "A2")]
    (sample,) = render_conversation(tokenizer, messages)
    assert [sample.text[start:stop].lstrip() for start, stop in sample.spans] == [f"A1{end}", f"A2{end}"]


def test_every_template_of_the_registry_is_a_file_and_every_file_is_in_it():
    assert {path.stem for path in templates.DIRECTORY.glob("*.jinja")} == FORMS.keys()


def test_bos_stands_where_the_tokenizer_puts_one_itself(tokenizer):
    from tokenizers.processors import TemplateProcessing

    set_template(tokenizer, "chatml")
    assert texts(tokenizer, [turn("user", "Q")])[0] == "<|im_start|>user\nQ<|im_end|>\n"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    set_template(tokenizer, "chatml")
    assert texts(tokenizer, [turn("user", "Q")])[0] == "<bos><|im_start|>user\nQ<|im_end|>\n"


def test_missing_tokens_are_named_with_the_flag_that_adds_them(tmp_path):
    with pytest.raises(InputError, match=r"has not: <start_of_turn> <end_of_turn>; add them by --add_tokens "
                       "'<start_of_turn>,<end_of_turn>'.*needs none: alpaca, vicuna, zephyr"):  # fmt: skip
        set_template(make_tokenizer(None), "gemma")
    bare = make_tokenizer(None)
    bare.eos_token = None
    with pytest.raises(InputError, match="vicuna ends turns with the EOS token, and the tokenizer has none"):
        set_template(bare, "vicuna")


def test_a_template_may_be_a_file_and_what_is_none_is_refused(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(CHATML)
    assert read_template(str(path))[0] == CHATML
    path.write_text("{% for m in messages %}\n{% if %}")
    with pytest.raises(InputError, match=r"own.jinja, line 2: no Jinja"):
        read_template(str(path))
    with pytest.raises(InputError, match="'chatlm': there are chatml, llama-3"):
        read_template("chatlm")
    with pytest.raises(InputError, match=r"none\.jinja cannot be read"):
        read_template(str(tmp_path / "none.jinja"))


def test_a_saved_template_takes_the_place_of_every_older_one(tokenizer, tmp_path):
    tokenizer.chat_template = "old"
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "older"}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 257, "top_p": 0.9}')
    set_template(tokenizer, "chatml")
    write_template(tmp_path, tokenizer, [257, 259])
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [257, 259], "top_p": 0.9}


def test_an_adapter_carries_its_template_to_whoever_loads_it(tmp_path, capsys):
    base = write_base(tmp_path / "base", template=None)
    out = tmp_path / "run"
    settings, _ = parse("train", flags(model_name_or_path=base, max_length=64, lora_r=2, chat_template="chatml"))
    prepared = prepare(settings, str(base))
    write_result(out, prepared, prepared.trainable, settings, "card", "report")
    said = capsys.readouterr().err
    assert "chat template: chatml, turns end with <|im_end|>" in said
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.apply_chat_template([turn("user", "Q")], tokenize=False) == "<|im_start|>user\nQ<|im_end|>\n"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [257, 259]
    assert not (base / "chat_template.jinja").exists()
    merge(str(base), str(out), tmp_path / "merged", None, print)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == loaded.chat_template
    found, new = adapter_tokenizer(out, describe_model(read_hf_config(base)), make_tokenizer(None))
    assert found.chat_template == loaded.chat_template and new == ()


def test_missing_tokens_can_be_added_in_the_same_run(tmp_path, capsys):
    base, out = write_base(tmp_path / "base", template=None, name="llama3"), tmp_path / "run"
    settings, _ = parse("train", flags(
        model_name_or_path=base, max_length=64, lora_r=2, chat_template="gemma",
        add_tokens="<start_of_turn>,<end_of_turn>",
    ))  # fmt: skip
    prepared = prepare(settings, str(base))
    write_result(out, prepared, prepared.trainable, settings, "card", "report")
    loaded = AutoTokenizer.from_pretrained(out)
    text = loaded.apply_chat_template([turn("user", "Q"), turn("assistant", "A")], tokenize=False)
    assert text == "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    end = loaded.convert_tokens_to_ids("<end_of_turn>")
    assert ids.count(end) == 2 and end in json.loads((out / "generation_config.json").read_text())["eos_token_id"]
