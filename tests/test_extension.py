"""Rows longer than a model's positions: how each rope is extended, and that what is exported computes the same."""

import json

import numpy as np
import pytest

from jaxft import evaluate, generate, load_adapter, load_model, train
from jaxft.errors import InputError
from jaxft.load import base_changes
from jaxft.models import describe_model
from jaxft.models.extension import describe_changes, extend_positions, with_changes
from tests.tiny_models import CONFIGS, LONGROPE, OLD_LLAMA3, YARN, hf_config
from tests.tiny_runs import V, flags, lines_of, sums, write_base, write_rows

FULL = {"rope_type": "default", "rope_theta": 1e4}
ASKED = 160  # positions of the tiny models: 64
CASES = {
    # name of the model, other fields, the rope or full layers' rope that comes out, in words
    "plain": ("llama2", {}, {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}, "linear, factor 2.5"),
    "rounded up": ("llama2", {"max_position_embeddings": 90}, {"factor": 1.778}, "linear, factor 1.778"),
    "linear": ("llama_linear_tied", {}, {"rope_type": "linear", "factor": 7.5}, "linear, factor 7.5"),
    "yarn": ("mistral_yarn", {}, YARN | {"factor": 10.0}, "yarn, factor 10.0"),
    "yarn that reaches so far": ("mistral_yarn", {"rope_parameters": YARN | {"factor": 16.0}}, {"factor": 16.0}, None),
    "windows of all layers": ("mistral", {}, FULL, "left as it is: no layer looks back further than its window"),
    "windows of some layers": ("gemma2", {}, {"rope_type": "linear", "factor": 2.5}, "linear, factor 2.5"),
    "a window beyond the positions": ("mistral", {"sliding_window": 100}, {"factor": 2.5}, "linear, factor 2.5"),
    "global layers alone": ("gemma3", {}, {"rope_type": "linear", "factor": 10.0}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_rope_is_extended_as_its_type_and_windows_ask(case):
    name, fields, expected, words = CASES[case]
    config = hf_config(name, **fields)
    changes = extend_positions(config, ASKED)
    assert changes["max_position_embeddings"] == ASKED
    rope = changes["rope_parameters"]
    if name == "gemma3":
        assert rope["sliding_attention"] == config.rope_parameters["sliding_attention"]
        rope = rope["full_attention"]
    assert rope | expected == rope
    assert words is None or describe_changes(changes) == words
    longer = with_changes(config, changes)
    assert describe_model(longer).config.max_position_embeddings == ASKED
    assert config.max_position_embeddings < ASKED  # the configuration that was given is as it was
    assert json.loads(json.dumps(longer.to_diff_dict()))["rope_parameters"] == changes["rope_parameters"]


def test_extended_gemma_that_sees_changes_its_text_model():
    from transformers import AutoConfig

    text = {name: value for name, value in CONFIGS["gemma3"].items() if name != "model_type"}
    config = AutoConfig.for_model("gemma3", text_config=text)
    longer = describe_model(with_changes(config, extend_positions(config, ASKED))).config
    assert longer.max_position_embeddings == ASKED
    kinds = [longer.layer_rope[i] for i in (0, 1)]
    before = describe_model(config).config.ropes
    assert longer.ropes[kinds[0]] == before[kinds[0]]
    np.testing.assert_allclose(longer.ropes[kinds[1]].frequencies, np.array(before[kinds[1]].frequencies) / 2.5)


def test_nothing_changes_where_nothing_has_to():
    assert extend_positions(hf_config("llama2"), 64) == {}
    assert extend_positions(hf_config("llama_dynamic"), ASKED) == {}  # by each document's length


@pytest.mark.parametrize(
    ("name", "fields"), [("llama3", OLD_LLAMA3), ("llama_longrope", {"rope_parameters": LONGROPE})]
)
def test_rope_without_a_rule_is_refused_with_what_to_do(name, fields):
    with pytest.raises(InputError, match="cannot be extended by a rule: set --max_length 64 or less, or give a copy"):
        extend_positions(hf_config(name, **fields), ASKED)


# the commands

LONG = 96
RUN = flags(per_device_train_batch_size=2, learning_rate=0.01, max_steps=3, gradient_checkpointing="none")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("longer")
    write_base(directory / "base", max_position_embeddings=40)
    write_rows(directory / "rows.jsonl", sums(30))
    write_rows(directory / "held.jsonl", sums(8, 30))
    return directory


def named(place, **more):
    return flags(model_name_or_path=place / "base", dataset=place / "rows.jsonl", **more)


def held_out_loss(place, capsys, **settings):
    capsys.readouterr()
    assert evaluate.main(flags(dataset=place / "held.jsonl", **settings)) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1])["loss"], printed.err


@pytest.fixture(scope="module")
def adapter(place):
    """An adapter trained on rows of LONG tokens over a base of 40 positions."""
    out = place / "adapter"
    assert train.main([*named(place, output_dir=out, max_length=LONG, eval_dataset=place / "held.jsonl"), *RUN]) == 0
    return out


CHANGES = {
    "max_position_embeddings": LONG,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.4},
}


def test_longer_rows_train_with_a_warning_and_say_what_the_base_needs(place, capsys):
    argv = [*named(place, output_dir=place / "said", max_length=LONG), *RUN]
    assert train.main(argv) == 0
    said = capsys.readouterr().err
    assert "warning: max_length 96 is longer than the model's 40 positions; its rope becomes linear, factor 2.4" in said
    assert "the adapter is right only on a base whose configuration has" in said
    assert base_changes(place / "said") == CHANGES


def test_evaluate_and_generate_read_what_the_adapter_was_trained_with(place, adapter, capsys):
    trained = [line["eval_loss"] for line in lines_of(adapter) if "eval_loss" in line][-1]
    model = {"model_name_or_path": place / "base", "adapter": adapter}
    for length in (LONG, 40):  # a shorter one does not take the scaling away
        loss, said = held_out_loss(place, capsys, **model, max_length=length)
        assert loss == pytest.approx(trained, rel=1e-6)
        assert "was trained for 96 positions: the base's rope is linear, factor 2.4" in said
    (adapter / "base_config.json").rename(adapter / "hidden")
    unscaled, _ = held_out_loss(place, capsys, **model, max_length=40)
    (adapter / "hidden").rename(adapter / "base_config.json")
    assert abs(unscaled - trained) > 1e-3
    assert generate.main(flags(**model, prompt="1" * 60, max_new_tokens=8)) == 0  # more than the base has positions


def test_adapters_card_loads_it_in_peft_with_the_same_logits(place, adapter):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "| rope of the base | linear, factor 2.4 |" in card
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_DIRECTORY", str(adapter))
    names: dict = {}
    exec(code, names)
    tokens = np.random.default_rng(0).integers(3, V, (1, 80)).astype(np.int32)
    with torch.no_grad():
        expected = names["model"].eval().float()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    base, params = load_model(place / "base", changes=base_changes(adapter))
    model, trainable, frozen, _ = load_adapter(adapter, base, params)
    decoder = model.bind(trainable, frozen)
    ours = decoder.logits(decoder(tokens, np.ones_like(tokens), np.arange(80, dtype=np.int32)[None]))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    from scripts.compare_with_hf import reference_model  # the script finds the same model by itself

    assert reference_model(place / "base", adapter).config.rope_parameters == CHANGES["rope_parameters"]
    with pytest.raises(InputError, match=r"was trained on a base whose configuration has .*changes=base_changes"):
        load_adapter(adapter, *load_model(place / "base"))


def test_dynamic_rope_takes_longer_rows_by_each_documents_length(place, tmp_path, capsys):
    base = write_base(tmp_path / "dynamic", "llama_dynamic", max_position_embeddings=20)
    settings = {"model_name_or_path": base, "max_length": LONG}
    packed, said = held_out_loss(place, capsys, **settings)
    assert "longer than the model's 20 positions; its rope scales by each document's length" in said
    assert packed == pytest.approx(held_out_loss(place, capsys, **settings, packing=False)[0], rel=1e-5)
    write_base(tmp_path / "plain", "llama_dynamic", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert abs(held_out_loss(place, capsys, model_name_or_path=tmp_path / "plain", max_length=LONG)[0] - packed) > 1e-3


def test_full_model_carries_its_rope_in_its_config(place, capsys):
    out = place / "full"
    argv = [*named(place, output_dir=out, max_length=LONG, eval_dataset=place / "held.jsonl"), *RUN]
    assert train.main([*argv, "--full_finetuning"]) == 0
    written = json.loads((out / "config.json").read_text())
    assert {name: written[name] for name in CHANGES} == CHANGES
    assert not (out / "base_config.json").exists()
    trained = [line["eval_loss"] for line in lines_of(out) if "eval_loss" in line][-1]
    loss, said = held_out_loss(place, capsys, model_name_or_path=out, max_length=LONG)
    assert loss == pytest.approx(trained, rel=1e-6) and "warning" not in said


def test_lengths_that_contradict_are_refused(place, adapter):
    held = {"dataset": place / "held.jsonl", "model_name_or_path": place / "base"}
    with pytest.raises(InputError, match=r"longer than the model's 96 positions, for which .* was trained"):
        evaluate.main(flags(**held, adapter=adapter, max_length=97))
    with pytest.raises(
        InputError, match="max_length 1024 is longer than the model's 40 positions; set --max_length 40"
    ):
        evaluate.main(flags(**held))  # nobody asked for 1024
    for damaged in ("no", "[]", '{"max_position_embeddings": 96}'):
        (adapter / "base_config.json").write_text(damaged)
        with pytest.raises(InputError, match=r"base_config\.json is no JSON object with what the base needs"):
            evaluate.main(flags(**held, adapter=adapter, max_length=LONG))
