"""Rendered conversations: what is trained is what the model will have to write, under every real template at hand."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxft.chat import Rendered, encode, left_out, render_conversation, trained_tokens
from jaxft.errors import InputError

TEMPLATES = Path(__file__).resolve().parents[1] / ".." / "shared" / "tokenizers" / "chat_templates"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of single bytes and a few merges, so that tokens can straddle the bounds of spans."""
    names = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "n"), ("Ċ", "Ċ"), ("s", "s"), ("ĊĊ", "Ċ")]
    for left, right in merges:
        names[left + right] = len(names)
    core = Tokenizer(models.BPE(names, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def marked(rendered):
    """The text with its trained spans in ⟦ ⟧."""
    text = rendered.text
    for start, stop in reversed(rendered.spans):
        text = f"{text[:start]}⟦{text[start:stop]}⟧{text[stop:]}"
    return text


def render(tokenizer, template, messages, **more):
    tokenizer.chat_template = template
    return [marked(sample) for sample in render_conversation(tokenizer, messages, **more)]


def real(name):
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists() and os.environ.get("JAXFT_REQUIRE_SHARED") != "1":
        pytest.skip(f"needs the real chat templates in {TEMPLATES}")
    return path.read_text(encoding="utf-8")


TWO_TURNS = [system("S"), user("q1"), assistant("a1"), user("q2"), assistant("a2")]
THINKING = [user("q1"), assistant("<think>\nt1\n</think>\n\na1"), user("q2"), assistant("<think>\nt2\n</think>\n\na2")]
LLAMA_HEAD = (
    "<bos><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: D\n\n"
)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


LLAMA = (
    f"{LLAMA_HEAD}S<|eot_id|>{header('user')}q1<|eot_id|>{header('assistant')}⟦a1<|eot_id|>⟧"
    f"{header('user')}q2<|eot_id|>{header('assistant')}⟦a2<|eot_id|>⟧"
)
IM = "<|im_end|>\n<|im_start|>"

GOLDEN = [
    ("meta-llama-Llama-3.1-8B-Instruct", TWO_TURNS, {"date_string": "D"}, [LLAMA]),
    ("meta-llama-Llama-3.2-3B-Instruct", TWO_TURNS, {"date_string": "D"}, [LLAMA]),
    (
        "Qwen-Qwen2.5-7B-Instruct",
        TWO_TURNS,
        {},
        [
            f"<|im_start|>system\nS{IM}user\nq1{IM}assistant\n⟦a1<|im_end|>⟧\n<|im_start|>user\nq2{IM}assistant\n⟦a2<|im_end|>⟧\n"
        ],
    ),
    (  # A finished last turn shows an empty thought that an earlier one does not: one sample a turn.
        "Qwen-Qwen3-0.6B",
        TWO_TURNS,
        {},
        [
            f"<|im_start|>system\nS{IM}user\nq1{IM}assistant\n⟦<think>\n\n</think>\n\na1<|im_end|>⟧\n",
            f"<|im_start|>system\nS{IM}user\nq1{IM}assistant\na1{IM}user\nq2{IM}assistant\n"
            "⟦<think>\n\n</think>\n\na2<|im_end|>⟧\n",
        ],
    ),
    (  # The empty thought is part of the generation prompt then, so it is not trained.
        "Qwen-Qwen3-0.6B",
        TWO_TURNS[:3],
        {"enable_thinking": False},
        [f"<|im_start|>system\nS{IM}user\nq1{IM}assistant\n<think>\n\n</think>\n\n⟦a1<|im_end|>⟧\n"],
    ),
    (
        "Qwen-Qwen3-0.6B",
        THINKING,
        {},
        [
            f"<|im_start|>user\nq1{IM}assistant\n⟦<think>\nt1\n</think>\n\na1<|im_end|>⟧\n",
            f"<|im_start|>user\nq1{IM}assistant\na1{IM}user\nq2{IM}assistant\n⟦<think>\nt2\n</think>\n\na2<|im_end|>⟧\n",
        ],
    ),
    (  # The prompt holds a whole empty thought, the turn a full one: they agree up to "<think>\n".
        "Qwen-Qwen3-0.6B",
        THINKING[:2],
        {"enable_thinking": False},
        [f"<|im_start|>user\nq1{IM}assistant\n<think>\n⟦t1\n</think>\n\na1<|im_end|>⟧\n"],
    ),
    (
        "Qwen3.5-4B",
        THINKING,
        {},
        [
            f"<|im_start|>user\nq1{IM}assistant\n<think>\n⟦t1\n</think>\n\na1<|im_end|>⟧\n",
            f"<|im_start|>user\nq1{IM}assistant\na1{IM}user\nq2{IM}assistant\n<think>\n⟦t2\n</think>\n\na2<|im_end|>⟧\n",
        ],
    ),
    (
        "google-gemma-2-2b-it",
        TWO_TURNS[1:],
        {},
        [
            "<bos><start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n⟦a1<end_of_turn>⟧\n"
            "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n⟦a2<end_of_turn>⟧\n"
        ],
    ),
    (  # The generation prompt adds an empty thought that a finished turn does not show.
        "google-gemma-4-31B-it",
        TWO_TURNS,
        {},
        [
            "<bos><|turn>system\nS<turn|>\n<|turn>user\nq1<turn|>\n<|turn>model\n⟦a1<turn|>⟧\n"
            "<|turn>user\nq2<turn|>\n<|turn>model\n⟦a2<turn|>⟧\n"
        ],
    ),
    (  # The system message stands beside the newest question only, and must not get lost with it.
        "mistralai-Mistral-Nemo-Instruct-2407",
        TWO_TURNS,
        {},
        ["<bos>[INST]S\n\nq1[/INST]⟦a1<eos>⟧", "<bos>[INST]q1[/INST]a1<eos>[INST]S\n\nq2[/INST]⟦a2<eos>⟧"],
    ),
    (
        "mistralai-Mistral-Nemo-Instruct-2407",
        TWO_TURNS[1:],
        {},
        ["<bos>[INST]q1[/INST]⟦a1<eos>⟧[INST]q2[/INST]⟦a2<eos>⟧"],
    ),
    (  # Every finished rendering ends with EOS, so no one begins with the one before.
        "microsoft-Phi-3.5-mini-instruct",
        TWO_TURNS[1:],
        {},
        [
            "<|user|>\nq1<|end|>\n<|assistant|>\n⟦a1<|end|>\n<eos>⟧",
            "<|user|>\nq1<|end|>\n<|assistant|>\na1<|end|>\n<|user|>\nq2<|end|>\n<|assistant|>\n⟦a2<|end|>\n<eos>⟧",
        ],
    ),
    (  # The prompt opens a thought; an answer that begins with the same "<" is trained whole all the same.
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        [user("q1"), assistant("<b>a1"), user("q2"), assistant("a2")],
        {},
        [
            "<bos><｜User｜>q1<｜Assistant｜>⟦<b>a1<｜end▁of▁sentence｜>⟧"
            "<｜User｜>q2<｜Assistant｜>⟦a2<｜end▁of▁sentence｜>⟧"
        ],
    ),
]


@pytest.mark.parametrize(
    ("name", "messages", "settings", "expected"), GOLDEN, ids=[f"{i}-{case[0][:24]}" for i, case in enumerate(GOLDEN)]
)
def test_trained_spans_of_real_templates(tokenizer, name, messages, settings, expected):
    assert render(tokenizer, real(name), messages, template_kwargs=settings) == expected


def test_template_that_refuses_the_system_role_says_so(tokenizer):
    tokenizer.chat_template = real("google-gemma-2-2b-it")
    with pytest.raises(InputError, match=r"refuses the conversation \(system, user, assistant\): System role not supp"):
        render_conversation(tokenizer, TWO_TURNS)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
        ("Qwen-Qwen3-0.6B", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
        ("meta-llama-Llama-3.1-8B-Instruct", '{"name": "f", "parameters": {"x": 1}}'),
        (
            "mistralai-Mistral-Nemo-Instruct-2407",
            '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]',
        ),
    ],
)
def test_turn_of_tool_calls_without_content_is_trained(tokenizer, name, call):
    called = assistant(
        None, tool_calls=[{"id": "123456789", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}]
    )
    [text] = render(tokenizer, real(name), [user("q"), called])
    assert call in text[text.index("⟦") : text.index("⟧")]


def test_trained_tokens_equal_the_generation_mask_of_transformers(tokenizer):
    tokenizer.chat_template = CHATML
    for texts in (["an\n", "\nan", "é✓", "ss"], ["", "\n\n\n"], ["a", "字\n", "b", "<|im_end|>", "c", " n "]):
        messages = [user(text) if number % 2 == 0 else assistant(text) for number, text in enumerate(texts)]
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
        )
        [rendered] = render_conversation(tokenizer, messages)
        [(ids, trained)] = trained_tokens(tokenizer, [rendered])
        assert ids.tolist() == theirs["input_ids"]
        assert trained.astype(int).tolist() == theirs["assistant_masks"]
        assert encode(tokenizer, rendered).loss_weights.tolist() == theirs["assistant_masks"]


def test_token_that_overlaps_a_trained_span_is_trained(tokenizer):
    # "ss" is one token, of which only the second half is in the span; so is "é", of two tokens.
    [(ids, trained)] = trained_tokens(tokenizer, [Rendered("assné.", [(2, 5)])])
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["a", "ss", "n", "Ã", "©", "."]
    assert trained.tolist() == [False, True, True, True, True, False]


def test_rendered_text_gets_no_second_bos(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    [rendered] = render_conversation(tokenizer, [user("q"), assistant("a")])
    assert encode(tokenizer, rendered).input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_conversation_that_begins_with_the_assistant_trains_its_words_only(tokenizer):
    expected = (
        "<|im_start|>assistant\n⟦0 hi<|im_end|>⟧\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
    )
    assert render(tokenizer, CHATML, [assistant("0 hi"), user("q"), assistant("a")]) == [expected]


def test_train_on_all_trains_every_character_once(tokenizer):
    assert render(tokenizer, CHATML, [user("q"), assistant("a"), user("r")], train_on="all") == [
        "⟦<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n⟧"
    ]
    assert render(tokenizer, CHATML, [user("q")], train_on="all") == ["⟦<|im_start|>user\nq<|im_end|>\n⟧"]
    drops = (  # earlier thoughts are dropped
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% else %}A"
        "{{ m.content if loop.last else m.content.split('|')[-1] }}.{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    talk = [user("1"), assistant("t|2"), user("3"), assistant("t|4")]
    assert render(tokenizer, drops, talk, train_on="all") == ["⟦U1At|2.⟧", "U1A⟦2.U3At|4.⟧"]
    assert render(tokenizer, drops, talk) == ["U1A⟦t|2.⟧", "U1A2.U3A⟦t|4.⟧"]


def test_turns_before_first_trained_and_conversations_without_answers_train_nothing(tokenizer):
    talk = [user("q"), assistant("a"), user("r"), assistant("b")]
    [text] = render(tokenizer, CHATML, talk, first_trained=2)
    assert text.count("⟦") == 1 and "⟦b<|im_end|>⟧" in text
    assert render(tokenizer, CHATML, [user("q")]) == ["<|im_start|>user\nq<|im_end|>\n"]


def test_messages_that_the_template_does_not_show_are_counted(tokenizer):
    tokenizer.chat_template = real("deepseek-ai-DeepSeek-R1-Distill-Llama-8B")
    assert left_out(THINKING, render_conversation(tokenizer, THINKING)) == 2
    tokenizer.chat_template = real("Qwen-Qwen3-0.6B")
    squeezed = [user("q"), assistant("<think>t</think>a")]
    assert left_out(squeezed, render_conversation(tokenizer, squeezed)) == 0
    assert left_out(THINKING, render_conversation(tokenizer, THINKING)) == 0


def test_keys_without_a_value_do_not_reach_the_template(tokenizer):
    template = "{% for m in messages %}{{ m.content }}{{ 'tool_calls' in m }}{{ m.extra }}{% endfor %}"
    messages = [{"role": "assistant", "content": "a", "tool_calls": None, "extra": {"x": None, "y": 1}}]
    assert render(tokenizer, template, messages, train_on="all") == ["⟦aFalse{'y': 1}⟧"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "messages is 'hello'; must be a list"),
        ([], "messages is"),
        (["hello"], "message 1 is 'hello'; must be an object with a role"),
        ([{"content": "x"}], "message 1 is"),
        ([user("q"), assistant(None)], r"message 2 \(assistant\) has content None; must be a string"),
        ([user([{"type": "image", "url": "u"}])], r"message 1 \(user\) has content \[\{"),
    ],
)
def test_messages_of_a_wrong_form_are_refused(tokenizer, messages, said):
    tokenizer.chat_template = CHATML
    with pytest.raises(InputError, match=said):
        render_conversation(tokenizer, messages)


def test_parts_of_text_are_one_text(tokenizer):
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "1"}]
    assert render(tokenizer, CHATML, [user(parts), assistant("a")]) == render(
        tokenizer, CHATML, [user("q1"), assistant("a")]
    )


def test_no_template_and_unknown_train_on_are_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render_conversation(tokenizer, [user("q"), assistant("a")])
    with pytest.raises(InputError, match="train_on is 'answers'; understood: responses, last, all"):
        render_conversation(tokenizer, [user("q"), assistant("a")], train_on="answers")
