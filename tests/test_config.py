"""Flags, YAML and defaults become one settings object, and every mistake in them is named."""

import pytest
import yaml

from jaxft.config import describe, parse, to_yaml
from jaxft.errors import InputError, run_command


def refused(argv: list[str], *words: str, command: str = "train") -> None:
    with pytest.raises(InputError) as failure:
        parse(command, argv)  # type: ignore[call-overload]
    for word in words:
        assert word in str(failure.value)


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_options_of_lora_survive_a_written_config(tmp_path):
    argv = [
        r"--lora_target_modules=.*\.(q|v)_proj{1,2}", '--rank_pattern={"q_proj": 2}', '--alpha_pattern={"v": 0.5}',
        "--modules_to_save", "embed_tokens", "lm_head", "--embedding_learning_rate=1e-5", "--add_tokens=<a>,b c",
        "--ensure_weight_tying",
    ]  # fmt: skip
    settings, _ = parse("train", argv)
    assert settings.lora_targets == r".*\.(q|v)_proj{1,2}"
    assert settings.saved_modules == ("embed_tokens", "lm_head") and settings.add_tokens == "<a>,b c"
    again, _ = parse("train", ["--config", write(tmp_path, to_yaml(settings))])
    assert again == settings
    assert parse("train", ["--layers_to_transform", "3", "1,2"])[0].lora_layers == (1, 2, 3)
    lists = "layers_to_transform: [1, 0]\nrank_pattern: {q_proj: 4}\nlora_target_modules: [k_proj, v_proj]\n"
    settings, _ = parse("train", ["--config", write(tmp_path, lists)])
    assert (settings.lora_layers, settings.rank_pattern) == ((0, 1), {"q_proj": 4})
    assert settings.lora_targets == ("k_proj", "v_proj")


def test_defaults_are_those_of_the_design():
    settings, provenance = parse("train", [])
    expected = dict(
        max_length=1024, packing=True, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=2e-4,
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, max_grad_norm=1.0, lora_r=16, lora_alpha=16, lora_dropout=0.0, lora_targets="all-linear",
        num_train_epochs=3.0, max_steps=-1, logging_steps=1, save_steps=500, seed=0, train_on="responses",
        model_name_or_path=None, dataset=None, output_dir=None, dtype=None, bf16=None, fp16=None, optim="adamw",
        shuffle_dataset=True, eval_steps=0, save_total_limit=None, lr_scheduler_kwargs={}, mesh_axes=None,
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    assert provenance == {} and settings.settings_given == frozenset()
    assert parse("train", ["--full_finetuning"])[0].learning_rate == 2e-5
    assert parse("train", ["--full_finetuning", "--learning_rate", "3e-4"])[0].learning_rate == 3e-4
    generate, _ = parse("generate", [])
    assert (generate.max_new_tokens, generate.temperature, generate.top_p, generate.seed) == (128, 0.0, 1.0, 0)


@pytest.mark.parametrize(
    ("argv", "value"),
    [([], True), (["--packing"], True), (["--packing", "true"], True), (["--packing", "false"], False)],
)
def test_booleans_take_no_value_true_and_false(argv, value):
    assert parse("train", argv)[0].packing is value
    assert parse("train", [word.replace("packing", "bf16") for word in argv])[0].bf16 is (value if argv else None)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write(tmp_path, "learning_rate: 1e-3\nlora_r: 8\nseed: 0\nlr_scheduler_kwargs: {min_lr: 1e-6}\n")
    settings, provenance = parse("train", ["--config", path, "--lora_r", "4", "--dataset", "d.jsonl"])
    assert (settings.learning_rate, settings.lora_r, settings.lora_alpha) == (1e-3, 4, 16)
    assert settings.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert provenance == {"learning_rate": path, "lora_r": "flag", "dataset": "flag", "lr_scheduler_kwargs": path}
    assert settings.settings_given == {"learning_rate", "lora_r", "seed", "lr_scheduler_kwargs", "dataset"}
    assert f"learning_rate = 0.001 ({path})" in describe(settings, provenance)
    assert "lora_r = 4 (flag)" in describe(settings, provenance)


@pytest.mark.parametrize("words", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj, v_proj"], ["q_proj v_proj"]])
def test_target_modules_are_separated_by_commas_or_spaces(words, tmp_path):
    assert parse("train", ["--lora_target_modules", *words])[0].lora_targets == ("q_proj", "v_proj")
    path = write(tmp_path, f"lora_target_modules: {words}\n")
    assert parse("train", ["--config", path])[0].lora_targets == ("q_proj", "v_proj")
    refused(["--lora_target_modules", "all-linear,q_proj"], "--lora_target_modules")
    refused(["--lora_target_modules", ","], "--lora_target_modules")


@pytest.mark.parametrize(
    ("argv", "value"),
    [([], "full"), (["", ""], "full"), (["true"], "full"), (["false"], "none"), (["none"], "none"), (["full"], "full")],
)
def test_gradient_checkpointing_takes_its_own_names_and_true_false(argv, value):
    words = ["--gradient_checkpointing", *(word for word in argv if word)] if argv else []
    assert parse("train", words)[0].gradient_checkpointing == value
    assert parse("train", ["--optim", "adamw_torch"])[0].optim == "adamw"


def test_an_unknown_name_is_refused_with_the_closest_known_one(tmp_path):
    refused(["--lerning_rate", "1"], "--lerning_rate", "did you mean --learning_rate?")
    refused(["--learning_rat=1"], "--learning_rat", "--learning_rate?")
    refused(["--temperature", "1"], "--temperature", "belongs to jaxft.generate")
    refused(["--lora", "1"], "--lora")  # no abbreviations
    refused(["data.jsonl"], "'data.jsonl'")
    path = write(tmp_path, "lora_rank: 8\n")
    refused(["--config", path], path, "lora_rank", "did you mean lora_r")
    refused(["--config", path], path, "lora_rank", command="generate")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lora_r", "x", "whole number"), ("lora_r", "1.5", "whole number"), ("lora_r", "0", "at least 1"),
        ("learning_rate", "fast", "a number"), ("learning_rate", "-1", "at least 0"), ("learning_rate", "nan", "at le"),
        ("learning_rate", "inf", "at least 0"), ("packing", "maybe", "true or false"), ("optim", "sgd", "adamw"),
        ("per_device_train_batch_size", "0", "at least 1"), ("gradient_accumulation_steps", "-2", "at least 1"),
        ("lora_dropout", "1", "below 1"), ("num_train_epochs", "0", "above 0"), ("max_steps", "0", "at least 1"),
        ("max_length", "1", "at least 2"), ("seed", "4294967296", "4294967295"), ("warmup_ratio", "2", "from 0 to 1"),
        ("lr_scheduler_type", "cosin", "cosine_with_min_lr"), ("lr_scheduler_kwargs", "[1]", "JSON"),
        ("train_on", "some", "responses, last, all"), ("mesh", "data=2,pipe=2", "fsdp"),
        ("mesh", "data=0", "data=2,fsdp=4"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_name_the_value_and_what_was_expected(name, value, expected, tmp_path):
    refused([f"--{name}", value], f"--{name}", expected, value)
    refused(["--config", write(tmp_path, f"{name}: {value}\n")], name, expected)


def test_a_flag_without_its_value_is_refused():
    refused(["--lora_r"], "--lora_r", "expected one argument")
    refused(["--lora_target_modules"], "--lora_target_modules")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_r: 8\nlora_r: 9\n", ["lora_r", "twice"]), ("- lora_r\n", ["list"]), ("lora_r: [\n", ["cannot be read"]),
        ("dataset: 5\n", ["dataset", "text"]), ("dataset: yes\n", ["dataset", "text"]), ("lora_r: true\n", ["lora_r"]),
        ("lora_r: null\n", ["lora_r", "None"]), ("dataset: [a, 5]\n", ["dataset", "5"]), ("seed: {a: 1}\n", ["seed"]),
        ("seed: 2024-13-45\n", ["cannot be read"]), ("settings_given: 3\n", ["settings_given"]),
        ("1: 2\n", ["unknown key 1"]),
    ],
)  # fmt: skip
def test_a_config_that_is_not_plain_settings_is_refused(text, words, tmp_path):
    path = write(tmp_path, text)
    refused(["--config", path], path, *words)


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    refused(["--config", str(tmp_path / "none.yaml")], "none.yaml", "No such file")
    refused(["--config", str(tmp_path)], str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"dataset: caf\xe9\n")
    refused(["--config", str(tmp_path / "latin.yaml")], "latin.yaml", "utf-8")
    assert parse("train", ["--config", write(tmp_path, "")]) == parse("train", [])


@pytest.mark.parametrize(
    ("argv", "cpu", "gpu"),
    [
        ("", ("float32", "float32"), ("bfloat16", "bfloat16")),
        ("--bf16", ("bfloat16", "bfloat16"), ("bfloat16", "bfloat16")),
        ("--bf16 false", ("float32", "float32"), ("float32", "float32")),
        ("--fp16", ("float16", "float16"), ("float16", "float16")),
        ("--fp16 false", ("float32", "float32"), ("bfloat16", "bfloat16")),
        ("--dtype float32", ("float32", "float32"), ("float32", "float32")),
        ("--dtype bfloat16 --bf16 true", ("bfloat16", "bfloat16"), ("bfloat16", "bfloat16")),
        ("--dtype float32 --bf16", ("float32", "bfloat16"), ("float32", "bfloat16")),
        ("--dtype float32 --fp16", ("float32", "float16"), ("float32", "float16")),
    ],
)
def test_dtype_bf16_and_fp16_decide_what_is_held_and_what_is_computed(argv, cpu, gpu):
    for command in ("train", "evaluate", "generate"):
        settings, _ = parse(command, argv.split())  # type: ignore[call-overload]
        assert (settings.param_dtype("float32"), settings.compute_dtype("float32")) == cpu
        assert (settings.param_dtype("bfloat16"), settings.compute_dtype("bfloat16")) == gpu


@pytest.mark.parametrize(
    "argv",
    ["--bf16 --fp16", "--dtype bfloat16 --bf16 false", "--dtype bfloat16 --fp16", "--dtype float16 --bf16",
     "--dtype float16 --fp16 false", "--warmup_steps 5 --warmup_ratio 0.1", "--full_finetuning --lora_r 8"],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(argv):
    refused(argv.split(), *(word for word in argv.split() if word.startswith("--")))


def test_written_yaml_reads_back_to_the_same_settings_and_choices(tmp_path):
    argv = (
        "--lora_r 16 --full_finetuning false --dataset 123 --output_dir null --mesh data=2,fsdp=4 --adam_epsilon 1e-7"
    )
    argv += " --lora_target_modules q_proj v_proj --save_total_limit 2 --gradient_checkpointing false --bf16 false"
    for words in (argv.split(), [*argv.split(), "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'], []):
        settings, provenance = parse("train", words)
        path = write(tmp_path, to_yaml(settings))
        again, source = parse("train", ["--config", path])
        assert again == settings
        assert again.settings_given == settings.settings_given
        assert source == dict.fromkeys(provenance, path)
        assert yaml.safe_load(to_yaml(settings)).keys() >= {"learning_rate", "seed", "packing", "settings_given"}
    generate, _ = parse("generate", ["--prompt", "a: 'b'\n# 中文 ", "--temperature", "0.7"])
    assert parse("generate", ["--config", write(tmp_path, to_yaml(generate))])[0] == generate


def test_a_default_in_written_yaml_is_a_choice_only_once_it_is_edited(tmp_path):
    path = write(tmp_path, to_yaml(parse("train", ["--dataset", "d"])[0]))
    assert parse("train", ["--config", path, "--full_finetuning"])[0].learning_rate == 2e-5
    text = to_yaml(parse("train", ["--dataset", "d"])[0]).replace("lora_r: 16", "lora_r: 32")
    settings, provenance = parse("train", ["--config", write(tmp_path, text)])
    assert settings.settings_given == {"dataset", "lora_r"} and settings.lora_r == 32 and provenance["lora_r"] == path


def test_the_config_of_a_training_run_serves_evaluate_and_generate(tmp_path):
    settings, _ = parse("train", ["--max_length", "256", "--lora_r", "8", "--adapter", "a", "--seed", "3"])
    path = write(tmp_path, to_yaml(settings))
    evaluate, provenance = parse("evaluate", ["--config", path])
    assert (evaluate.max_length, evaluate.adapter) == (256, "a") and "lora_r" in evaluate.settings_ignored
    assert provenance == {"max_length": path, "adapter": path}
    assert any("not used here" in line for line in describe(evaluate, provenance))
    generate, _ = parse("generate", ["--config", path, "--prompt", "x"])
    assert (generate.max_length, generate.seed, generate.prompt) == (256, 3, "x")


def test_help_prints_every_flag_and_a_mistake_exits_with_two_and_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("train", ["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(f"--{name}" in output for name in ("model_name_or_path", "lora_r", "dataset", "learning_rate", "config"))
    assert run_command(lambda argv: bool(parse("train", argv)) and None, ["--lora_r", "x"]) == 2
    assert capsys.readouterr().err == "error: --lora_r is 'x'; expected a whole number\n"
    refused(["--prompt", "a", "--messages", "b"], "--prompt", "--messages", command="generate")


def test_stop_strings_are_several_by_flag_and_by_yaml(tmp_path):
    assert parse("generate", [])[0].stop == []
    settings, _ = parse("generate", ["--prompt", "x", "--stop", "a b", ",", "--stop=-- "])
    assert settings.stop == ["a b", ",", "-- "]
    assert parse("generate", ["--config", write(tmp_path, to_yaml(settings))])[0] == settings
    assert parse("generate", ["--config", write(tmp_path, 'stop: ["\\n\\n", "中"]')])[0].stop == ["\n\n", "中"]
    assert parse("generate", ["--config", write(tmp_path, "stop: end")])[0].stop == ["end"]
    refused(["--config", write(tmp_path, "stop: [1]")], "stop is 1; expected text", command="generate")
