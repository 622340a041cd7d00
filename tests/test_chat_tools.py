"""Tool calls, thinking and template settings: what is trained equals transformers' own masks and the golden spans."""

import importlib.util
import json
from pathlib import Path

import datasets
import pytest

from jaxft.chat import left_out, render_conversation, trained_tokens
from jaxft.data import tokenize_dataset
from jaxft.errors import InputError
from tests.conftest import need_shared
from tests.tiny_runs import make_tokenizer

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("make_golden_chat", ROOT / "scripts" / "make_golden_chat.py")
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)
SPANS = json.loads(golden.GOLDEN.read_text(encoding="utf-8"))

BODY = (
    "{% if m.reasoning_content and (KEEP) %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
)
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    + BODY
    + "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEEPS = TEMPLATE.replace("KEEP", "true")  # every thought stays
DROPS = TEMPLATE.replace("KEEP", "loop.index0 > ns.last")  # thoughts before the newest question go


def theirs(tokenizer, messages, tools=None, **settings):
    """(ids, mask) as transformers finds them with the template's own {% generation %} marks."""
    found = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        **settings,
    )  # fmt: skip
    return found["input_ids"], found["assistant_masks"]


def ours(tokenizer, messages, *arguments, **more):
    samples = render_conversation(tokenizer, messages, *arguments, **more)
    return [(ids.tolist(), trained.astype(int).tolist()) for ids, trained in trained_tokens(tokenizer, samples)]


def last_run(mask):
    """The mask with its last run of ones alone."""
    stop = len(mask) - mask[::-1].index(1)
    start = stop - [*mask[:stop][::-1], 0].index(0)
    return [int(start <= at < stop) for at in range(len(mask))]


def test_tool_and_thinking_turns_equal_the_generation_mask_of_transformers():
    tokenizer = make_tokenizer(KEEPS)
    for talk in (golden.CONVERSATION, golden.CONVERSATION[:2], golden.PLAIN):
        ids, mask = theirs(tokenizer, talk, golden.TOOLS)
        assert ours(tokenizer, talk, "responses", golden.TOOLS) == [(ids, mask)]
        assert ours(tokenizer, talk, "last", golden.TOOLS) == [(ids, last_run(mask))]
    [(ids, mask)] = ours(tokenizer, golden.CONVERSATION, "responses", golden.TOOLS)
    shown = tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on])
    assert shown == (
        '<think>first thought</think><call>add_up{"x": 1, "y": 2}</call><|im_end|>'
        "<think>second thought</think>first answer<|im_end|><think>third thought</think>second answer<|im_end|>"
    )


def test_a_template_that_drops_thoughts_gives_each_question_the_mask_that_transformers_gives_it():
    tokenizer = make_tokenizer(DROPS)
    talk = golden.CONVERSATION
    first, second = theirs(tokenizer, talk[:4], golden.TOOLS), theirs(tokenizer, talk, golden.TOOLS)
    assert sum(first[1]) > sum(last_run(first[1]))  # the call and the answer to the first question share a sample
    found = ours(tokenizer, talk, "responses", golden.TOOLS)
    length = len(first[0])
    assert [(ids[:length], mask[:length]) for ids, mask in found[:1]] == [first]
    assert found[1:] == [(second[0], last_run(second[1]))]
    assert ours(tokenizer, talk, "last", golden.TOOLS) == found[1:]
    assert "first thought" not in tokenizer.decode(found[1][0])


# where real templates write a finished turn, and the same with its words between the marks of transformers
MARKED = {
    "Qwen-Qwen2.5-7B-Instruct": (
        r"{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}",
        r"{{- '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}{% generation %}"
        r"{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}"
        r"{% endif %}{{ '\n' }}",
    ),
    "meta-llama-Llama-3.1-8B-Instruct": (
        r"""'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}""",
        r"""'<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}{% generation %}"""
        r"""{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"""
        r"""{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}""",
    ),
    "google-gemma-2-2b-it": (
        "' + message['content'] | trim + '<end_of_turn>\n' }}",
        "' }}{% if role == 'model' %}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}",
    ),
    "mistralai-Mistral-Nemo-Instruct-2407": (
        '{{- message["content"] + eos_token}}',
        '{% generation %}{{- message["content"] + eos_token}}{% endgeneration %}',
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_masks_of_real_templates_are_those_that_transformers_finds_with_its_marks_in_them(name):
    template = need_shared(f"tokenizers/chat_templates/{name}.jinja").read_text(encoding="utf-8")
    plain, marks = MARKED[name]
    assert template.count(plain) == 1
    tokenizer, reference = make_tokenizer(template), make_tokenizer(template.replace(plain, marks))
    words = ["q", "a", "second question\n", "an answer\nof two lines", "第三", "é✓"]
    for count in (2, 4, 6):
        talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(words[:count])]
        ids, mask = theirs(reference, talk, date_string="D")
        assert sum(mask) > 1 and ours(tokenizer, talk, template_kwargs={"date_string": "D"}) == [(ids, mask)]


def test_template_settings_reach_every_rendering_and_a_rows_own_win():
    switch = KEEPS.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n{{ mark }}{% endif %}")
    tokenizer = make_tokenizer(switch.replace("{% generation %}", "{{ mark }}{% generation %}"))
    row = {"messages": golden.PLAIN}
    rows = datasets.Dataset.from_list([row | {"chat_template_kwargs": {"mark": "own"}}, row])
    samples, _ = tokenize_dataset(
        rows, tokenizer, max_length=400, vocab_size=300, template_kwargs={"mark": "flag"}, train_on="responses"
    )
    own, flag = (tokenizer.decode(sample.input_ids) for sample in samples)
    assert own.count("assistant\nown<think>") == flag.count("assistant\nflag<think>") == 2
    for sample, mark in zip(samples, ("own", "flag"), strict=True):  # a part of the prompt, so it is not trained
        ids, mask = theirs(tokenizer, golden.PLAIN, mark=mark)
        assert (sample.input_ids.tolist(), sample.loss_weights.astype(int).tolist()) == (ids, mask)


@pytest.mark.parametrize("name", SPANS)
def test_trained_parts_of_real_templates_are_the_golden_ones(name):
    tokenizer = make_tokenizer(need_shared(f"tokenizers/chat_templates/{name}.jinja").read_text(encoding="utf-8"))
    for case, expected in SPANS[name].items():
        assert golden.trained_parts(tokenizer, case) == expected, case


def test_golden_spans_hold_what_the_messages_say():
    """The golden file itself: every answer is trained under every template, and nothing that the model is told."""
    assert len(SPANS) == 10
    for cases in SPANS.values():
        for case, found in cases.items():
            text = "\n".join(part for parts in found.get("trained", []) for part in parts)
            assert ("second answer" in text) == ("trained" in found)
            assert ("first answer" in text) == ("trained" in found and "last" not in case)
            assert "question" not in text and "three" not in text


def test_arguments_as_json_text_render_as_the_object_they_are():
    tokenizer = make_tokenizer(KEEPS)
    text = json.loads(json.dumps(golden.CONVERSATION))
    text[1]["tool_calls"][0]["function"]["arguments"] = '{"x": 1, "y": 2}'
    assert ours(tokenizer, text, "responses", golden.TOOLS) == ours(
        tokenizer, golden.CONVERSATION, "responses", golden.TOOLS
    )
    wants_text = KEEPS.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    [(ids, _)] = ours(make_tokenizer(wants_text), golden.CONVERSATION)
    assert '<call>add_up{"x": 1, "y": 2}</call>' in tokenizer.decode(ids)


def test_tools_in_a_table_lose_the_keys_that_only_other_rows_have():
    tools = [{"name": "f", "parameters": {"x": 1}}], [{"name": "f", "parameters": {"y": 1}}]
    features = datasets.Features(
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        tools=[{"name": datasets.Value("string"), "parameters": {k: datasets.Value("int64") for k in "xy"}}],
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    filled = [[t[0] | {"parameters": {"x": None, "y": None} | t[0]["parameters"]}] for t in tools]
    rows = datasets.Dataset.from_list([{"messages": talk, "tools": t} for t in filled], features=features)
    tokenizer = make_tokenizer(KEEPS)
    samples, _ = tokenize_dataset(rows, tokenizer, max_length=400, vocab_size=300)
    for sample, given in zip(samples, tools, strict=True):
        assert tokenizer.decode(sample.input_ids).startswith(f"<tools>{json.dumps(given)}</tools>")


def test_calls_and_tools_that_the_template_does_not_know_are_counted_and_no_empty_turn_is_trained():
    blind = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(blind)
    [sample] = render_conversation(tokenizer, golden.CONVERSATION, "responses", golden.TOOLS)
    assert [sample.text[start:stop] for start, stop in sample.spans] == [
        "first answer<|im_end|>",
        "second answer<|im_end|>",
    ]
    assert left_out(golden.CONVERSATION, [sample]) == 3
    calls = json.dumps(golden.CALLS)
    talk = [golden.CONVERSATION[0], {"role": "assistant", "content": None, "tool_calls": json.loads(calls)}]
    rows = datasets.Dataset.from_list([{"messages": golden.PLAIN, "tools": json.dumps(golden.TOOLS)}])
    _, report = tokenize_dataset(rows, tokenizer, max_length=400, vocab_size=300)
    assert "1 rows with tools that the chat template does not show" in report.lines()
    assert "2 messages that the chat template does not show in full (thinking, for example)" in report.lines()
    with pytest.raises(InputError, match="none of the 1 rows is left to train on: in 1 all labels are masked"):
        tokenize_dataset(datasets.Dataset.from_list([{"messages": talk}]), tokenizer, max_length=400, vocab_size=300)


def test_calls_without_a_name_are_refused():
    talk = [golden.CONVERSATION[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"n": 1}}]}]
    with pytest.raises(InputError, match=r"message 2 has tool_calls \[\{'function': \{'n': 1\}\}\]; must be a list of"):
        render_conversation(make_tokenizer(KEEPS), talk)
