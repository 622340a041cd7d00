"""Generation: transformers' tokens one for one, the cache, stopping, sampling, and what the command prints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

import jaxft
from jaxft import evaluate, train
from jaxft import generate as command
from jaxft.errors import InputError
from jaxft.generate import generate
from jaxft.sampling import prompt_keys
from jaxft.stops import stop_token_ids
from tests.tiny_models import V as V_TINY
from tests.tiny_models import tiny_model
from tests.tiny_runs import END_OF_TURN, EOS, flags, make_tokenizer, write_base, write_rows

LENGTHS = (1, 3, 11, 20)
NEW = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("generate") / "base")


def prompts(seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, V_TINY, length).tolist() for length in LENGTHS]


def recomputed(model, params, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache: the whole text through the training forward pass for each of them."""

    @jax.jit
    def logits(tokens, length):
        at = jnp.arange(tokens.shape[1])[None]
        hidden = model.bind(params)(tokens, (at < length).astype(jnp.int32), at)
        return model.bind(params).logits(hidden[0, length - 1])

    text = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(text)] = text
        text.append(int(np.argmax(logits(padded, len(text)))))
    return text[len(prompt) :]


# Against transformers


@pytest.mark.parametrize(
    "name", ["llama3", "llama_linear_tied", "qwen2_window", "qwen3", "llama_dynamic", "gemma2", "gemma3"]
)
def test_greedy_tokens_are_those_of_transformers(name, hf_model):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import AutoModelForCausalLM

    from scripts.compare_with_hf import forget_lengths

    directory = hf_model(name)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = []
    for prompt in prompts():
        forget_lengths(reference)
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    model, params = jaxft.load_model(directory)
    assert generate(model, (params,), prompts(), max_new_tokens=NEW, stop_ids=[]) == expected
    said = {token for tokens in expected for token in tokens}
    assert len(said) > 15  # no loop of a few tokens, which anything would get right


# The cache


@pytest.mark.parametrize("name", ["llama3", "qwen2_tied", "qwen3_window_bias"])
def test_cached_decoding_equals_computing_everything_anew(name):
    model, params = tiny_model(name)
    found = generate(model, (params,), prompts()[:3], max_new_tokens=12, stop_ids=[])
    assert found == [recomputed(model, params, prompt, 12) for prompt in prompts()[:3]]


def test_prompts_of_different_lengths_together_are_each_answered_as_alone():
    model, params = tiny_model("qwen3")
    together = generate(model, (params,), prompts(), max_new_tokens=NEW, stop_ids=[7])
    alone = [generate(model, (params,), [prompt], max_new_tokens=NEW, stop_ids=[7])[0] for prompt in prompts()]
    assert together == alone
    longer = [*prompts(), np.random.default_rng(5).integers(3, V_TINY, 70).tolist()]  # another bucket of slots
    assert generate(model, (params,), longer, max_new_tokens=NEW, stop_ids=[7])[:-1] == alone


def test_a_prompt_without_tokens_is_refused():
    model, params = tiny_model("qwen3")
    with pytest.raises(InputError, match="no token to continue"):
        generate(model, (params,), [[1], []], max_new_tokens=1, stop_ids=[])


# Stopping


def test_generation_ends_before_the_first_stop_token_and_the_others_go_on():
    model, params = tiny_model("llama3")
    free = generate(model, (params,), prompts(), max_new_tokens=NEW, stop_ids=[])
    stop = [free[0][5], free[1][9]]
    found = generate(model, (params,), prompts(), max_new_tokens=NEW, stop_ids=stop)
    cut = [tokens[: next((at for at, token in enumerate(tokens) if token in stop), NEW)] for tokens in free]
    assert found == cut and len(found[0]) <= 5 and len({len(tokens) for tokens in found}) > 2


def test_stop_tokens_are_eos_the_generation_configs_and_the_templates_end_of_turn(tmp_path):
    tokenizer = make_tokenizer()
    assert stop_token_ids(tokenizer, tmp_path) == [EOS, END_OF_TURN]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, EOS]}))
    assert stop_token_ids(tokenizer, tmp_path) == [5, EOS, END_OF_TURN]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 6}))
    assert stop_token_ids(make_tokenizer(template=None), tmp_path) == [6, EOS]
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 1}))
    assert stop_token_ids(make_tokenizer(template=None), tmp_path) == [EOS]


# Sampling


def test_sampling_depends_on_the_seed_alone_and_greedy_on_nothing():
    model, params = tiny_model("qwen3")

    def drawn(seed, temperature=1.5):
        return generate(
            model, (params,), prompts(), max_new_tokens=20, stop_ids=[], temperature=temperature, top_p=0.9,
            keys=prompt_keys(jax.random.key(seed), prompts()),
        )  # fmt: skip

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, temperature=0.0) == drawn(1, temperature=0.0)


# The command


def said(capsys, *argv, **settings) -> str:
    assert command.main([*argv, *flags(**settings)]) == 0
    return capsys.readouterr().out


def expected_text(base, prompt: list[int], count: int) -> str:
    model, params = jaxft.load_model(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    (new,) = generate(model, (params,), [prompt], max_new_tokens=count, stop_ids=[EOS, END_OF_TURN])
    return tokenizer.decode(new, skip_special_tokens=True)


def test_stdout_is_exactly_the_decoded_new_tokens(base, capsys):
    text = said(capsys, model_name_or_path=base, prompt="Hello, ", max_new_tokens=30)
    assert text == expected_text(base, make_tokenizer().encode("Hello, "), 30) and len(text) > 5
    assert text == said(capsys, model_name_or_path=base, prompt="Hello, ", max_new_tokens=30)


def test_chat_and_messages_render_the_template_up_to_the_assistants_turn(base, capsys, tmp_path):
    turns = [{"role": "user", "content": "Hi"}]
    ids = make_tokenizer().encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    expected = expected_text(base, ids, 20)
    assert said(capsys, "--chat", model_name_or_path=base, prompt="Hi", max_new_tokens=20) == expected
    for content in (turns, {"messages": turns}):
        (tmp_path / "m.json").write_text(json.dumps(content))
        assert said(capsys, model_name_or_path=base, messages=tmp_path / "m.json", max_new_tokens=20) == expected
    raw = said(capsys, model_name_or_path=base, prompt="Hi", max_new_tokens=20)
    assert raw == expected_text(base, make_tokenizer().encode("Hi"), 20) != expected


def test_an_adapter_answers_what_it_was_trained_to(base, capsys, tmp_path):
    row = {"question": "What is it?", "answer": "a tiny model."}
    data = write_rows(tmp_path / "one.jsonl", [row] * 4)
    out = tmp_path / "tuned"
    settings = flags(model_name_or_path=base, dataset=data, output_dir=out, max_length=64, learning_rate=0.03)
    settings += flags(max_steps=30, per_device_train_batch_size=2, lora_r=8, sample_prompts=0)
    assert train.main(settings) == 0
    capsys.readouterr()
    asked = {"model_name_or_path": base, "prompt": row["question"], "max_new_tokens": 30}
    assert said(capsys, "--chat", adapter=out, **asked) == row["answer"]
    assert said(capsys, "--chat", **asked) != row["answer"]
    # without a model's name it is the adapter's base
    del asked["model_name_or_path"]
    assert said(capsys, "--chat", adapter=out, **asked) == row["answer"]
    assert evaluate.main(flags(adapter=out, dataset=data, max_length=64)) == 0
    assert json.loads(capsys.readouterr().out)["loss"] < 2  # the base alone has above 5
    with pytest.raises(InputError, match=r"--dataset is missing: the base of .*tuned is not the embedded one"):
        evaluate.main(flags(adapter=out))
    config = out / "adapter_config.json"
    named = json.loads(config.read_text())
    config.write_text(json.dumps(named | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=r"was trained over .*gone, which is not here; give its base as"):
        command.main(flags(adapter=out, prompt="a"))
    config.write_text(json.dumps(named | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base; give it as --model_name_or_path"):
        command.main(flags(adapter=out, prompt="a"))


def test_the_seed_decides_what_is_sampled(base, capsys):
    drawn = [
        said(capsys, model_name_or_path=base, prompt="x", max_new_tokens=20, temperature=1, top_p=0.95, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_continued_is_refused(base, tmp_path):
    plain = write_base(tmp_path / "plain", template=None)
    bad = tmp_path / "bad.json"
    for argv, words in (
        (flags(model_name_or_path=base), "nothing to continue: give --prompt TEXT, or --messages FILE"),
        (
            [*flags(model_name_or_path=plain, prompt="x"), "--chat"],
            "no chat template; choose one with --chat_template, or use --prompt without --chat",
        ),
        (
            flags(model_name_or_path=base, prompt="x" * 250, max_new_tokens=7),
            "250 tokens and --max_new_tokens 7 are more",
        ),
        (flags(model_name_or_path=base, messages=tmp_path / "none.json"), "none.json cannot be read as JSON"),
        (flags(model_name_or_path=base, messages=bad), "a list of objects with role and content is needed"),
    ):
        bad.write_text(json.dumps({"messages": "Hi"}))
        with pytest.raises(InputError, match=words.replace(".", r"\.")):
            command.main(argv)
    bad.write_text(json.dumps([{"role": "user", "content": 7}]))
    with pytest.raises(InputError, match="the chat template refuses the conversation"):
        command.main(flags(model_name_or_path=base, messages=bad))


def test_max_length_is_no_matter_of_generation(base, capsys):
    assert "256" in (base / "config.json").read_text()  # positions, fewer than the default max_length of 1024
    assert said(capsys, model_name_or_path=base, prompt="x", max_new_tokens=3)


def test_dynamic_rope_goes_on_beyond_the_positions(tmp_path):
    endless = write_base(tmp_path / "base", "llama_dynamic", max_position_embeddings=40)
    assert command.main(flags(model_name_or_path=endless, prompt="x" * 60, max_new_tokens=3)) == 0
