"""Whatever is wrong with the input: one plain line says what was seen and what to do, and nothing is left behind."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import evaluate, generate, train
from jaxft.checkpoint import Checkpoints
from jaxft.errors import run_command
from tests.tiny_runs import flags, losses_of, sums, write_base, write_rows

ROOT = Path(__file__).parent.parent
RUN = flags(max_length=64, per_device_train_batch_size=4, max_steps=3, lora_r=4, learning_rate=0.01, save_steps=2)
RUN += flags(gradient_checkpointing="none")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bad")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(12))
    return directory


@pytest.fixture
def refused(place, tmp_path, monkeypatch, capsys):
    """refused(words, **settings): jaxft.train exits with `code`, says `words` in one line and writes nothing at all."""

    def run(words, *argv, code=2, command=train, **settings):
        (tmp_path / "cwd").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "cwd")
        named = {"model_name_or_path": place / "base"}
        named |= {"dataset": place / "train.jsonl"} if command is not generate else {}
        named |= {"output_dir": "out"} if command is train else {}
        given = [*(RUN if command is train else []), *flags(**(named | settings)), *argv]
        assert run_command(command.main, given) == code
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0], captured.err
        assert re.search(words, errors[0]), errors[0]
        assert "Traceback" not in captured.err and captured.out == ""
        assert not any((tmp_path / "cwd").iterdir()), "something was left behind"
        return errors[0]

    return run


# Data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"data set .*d\.jsonl: there is no such file or directory"),
        (b"", r"d\.jsonl: the file is empty"),
        (b"\n\n", r"d\.jsonl: there is no row in it"),
        (
            b'{"question": "a", "answer": "b"}\n{"question": "a", "answer"',
            r"d\.jsonl, line 2, column \d+: malformed JSON",
        ),
        (b'{"question": "a", "answer": "b"}\n7\n', r"d\.jsonl, line 2: a row must be a JSON object, this one is 7"),
        (b'{"question": "\xff", "answer": "b"}\n', r"d\.jsonl, line 1: not UTF-8 \(byte 14 of the file is 0xff\)"),
        (b'{"query": "a", "reply": "b"}\n', r"columns seen \(query, reply\); understood: .*question, answer"),
        (b'{"question": "a", "answer": null}\n', r"row 1: answer is None; must be a string"),
        (b'{"input_ids": [1, 264, 2]}\n', r"row 1: token id 264 is outside the model's vocabulary of 264 \(0 to 263\)"),
        (b'{"input_ids": [1, -1, 2]}\n', r"row 1: token id -1 is outside the model's vocabulary"),
        (
            b'{"input_ids": [1, 2], "labels": [-100, -100]}\n',
            r"none of the 1 rows is left to train on: in 1 all labels",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', r"none of the 1 rows is left to train on"),
        (b'{"conversations": [{"from": "x", "value": "a"}]}\n', r"row 1: message 1 is from 'x'; understood: human, us"),
        (b'{"messages": "a"}\n', r"row 1: messages is 'a'; must be a list of objects with role and content"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_with_its_file_and_place(content, words, refused, tmp_path):
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_bytes(content)
    refused(words, dataset=path)
    refused(words, eval_dataset=path)
    if content is None or b"labels" not in content:
        refused(words, command=evaluate, dataset=path, max_length=64)


def test_messages_without_a_chat_template_are_refused(refused, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    plain = write_base(tmp_path / "plain", template=None)
    words = "row 1: the tokenizer has no chat template, which messages need; choose one with --chat_template"
    refused(words, model_name_or_path=plain, dataset=write_rows(tmp_path / "d.jsonl", rows))


def test_a_name_that_is_nowhere_is_refused_without_the_network(refused):
    refused(r"data set 'no/such-data' is no file here, and the hub does not give it", dataset="no/such-data")
    refused(r"'no/such-model' is no directory here, and the hub did not give it", model_name_or_path="no/such-model")
    refused(r"'a b c' is neither a directory here nor a name the hub could have", model_name_or_path="a b c")
    refused(r"\./no-such-model does not exist", model_name_or_path="./no-such-model")


# Flags


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learningrate=1"], "unknown flag --learningrate; did you mean --learning_rate?"),
        (["--temperature=1"], r"unknown flag --temperature; it belongs to jaxft\.generate"),
        (["stray"], "'stray' stands alone; settings are written --name VALUE"),
        (["--lora_r=many"], "--lora_r is 'many'; expected a whole number"),
        (["--packing=perhaps"], "--packing is 'perhaps'; expected true or false"),
        (["--lora_dropout=1"], "--lora_dropout is 1.0; it must be at least 0 and below 1"),
        (["--lr_scheduler_type=saw"], "--lr_scheduler_type is 'saw'; expected one of linear, constant"),
        (
            ["--lora_target_modules=q_proj,banana"],
            "'banana' is no linear layer of this qwen3 model; its linear layers are",
        ),
        (["--mesh=data=3"], "--mesh data=3,fsdp=1,tensor=1 needs 3 devices, this run has 1"),
        (["--config=none.yaml"], "--config none.yaml cannot be read"),
        (["--output_dir=" + __file__], "is a file"),
        (["--dataset_train_split=dev"], "a file has no split 'dev'"),
    ],
    ids=lambda value: value[0].split("/")[0] if isinstance(value, list) else "",
)
def test_a_flag_that_makes_no_sense_is_refused_with_what_would(argv, words, refused):
    refused(words, *argv)


def test_a_traceback_is_shown_with_debug_alone(place, capsys):
    assert run_command(train.main, ["--nonsense", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith("error: unknown flag --nonsense")


def test_a_model_without_data_and_data_without_a_model_are_refused(place, capsys):
    assert run_command(train.main, flags(model_name_or_path=place / "base")) == 2
    assert "error: --dataset is missing; name both a model and a data set, or neither" in capsys.readouterr().err
    for command in (train, evaluate):
        assert run_command(command.main, flags(dataset=place / "train.jsonl")) == 2
        assert "--model_name_or_path" in capsys.readouterr().err.splitlines()[-1]


# Models


def broken(place: Path, tmp_path: Path, change) -> Path:
    """A copy of the base that `change(directory)` has broken."""
    directory = tmp_path / "broken"
    shutil.copytree(place / "base", directory)
    change(directory)
    return directory


def tensors(change):
    """A change of the model's tensors, `change(tensors)` in place."""

    def apply(directory):
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})

    return apply


def rewrite(name, function):
    """A change of one file's bytes."""
    return lambda directory: (directory / name).write_bytes(function((directory / name).read_bytes()))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: (d / "config.json").unlink(), r"has no config\.json; a Hugging Face model directory is needed"),
        (rewrite("config.json", lambda _: b"{"), r"config\.json is not a JSON object"),
        (
            rewrite("config.json", lambda b: b.replace(b'"qwen3"', b'"mamba"')),
            r"config\.json: model_type 'mamba' is not supported; supported: gemma, gemma2, ",
        ),
        (lambda d: (d / "model.safetensors").unlink(), r"has no weights: neither model\.safetensors nor"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer that transformers can read"),
        (rewrite("tokenizer.json", lambda _: b"{}"), "has no tokenizer that transformers can read"),
        (rewrite("model.safetensors", lambda b: b[: len(b) // 2]), r"is not a whole safetensors file.*copy it again"),
        (rewrite("model.safetensors", lambda b: b[:4]), "is not a whole safetensors file"),
        (rewrite("model.safetensors", lambda b: b"garbage" * 9), "is not a whole safetensors file"),
        (
            lambda d: (d / "model.safetensors").rename(d / "part")
            and (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
            r"names 1 files that are not there: model-1\.safetensors",
        ),
        (tensors(lambda t: t.pop(Q)), rf"1 tensors are missing, e\.g\. {re.escape(Q)}"),
        (
            tensors(lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[Q].copy()})),
            r"1 tensors belong to no part of this model, e\.g\. model\.layers\.2\.mlp",
        ),
        (
            tensors(lambda t: t.update({Q: t[Q][:-1].copy()})),
            rf"{re.escape(Q)} has shape \(47, 32\), config\.json says \(48, 32\)",
        ),
        (tensors(lambda t: t.update({Q: t[Q].astype(np.int32)})), rf"{re.escape(Q)} is I32; only F32, F16 and BF16"),
    ],
)  # fmt: skip
def test_a_model_directory_that_is_not_whole_is_refused_with_what_is_wrong(change, words, refused, place, tmp_path):
    directory = broken(place, tmp_path, change)
    refused(words, model_name_or_path=directory)


# Adapters


@pytest.fixture(scope="module")
def adapter(place):
    out = place / "tuned"
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=out)
    assert train.main([*RUN, *named]) == 0
    return out


@pytest.mark.parametrize("command", [train, evaluate, generate], ids=["train", "evaluate", "generate"])
def test_an_adapter_that_is_missing_broken_or_for_another_model_is_refused(command, adapter, refused, place, tmp_path):
    shared = {"command": command} | ({"max_length": 64} if command is evaluate else {})
    shared |= {"prompt": "x", "max_new_tokens": 5} if command is generate else {}
    refused(r"\./none does not exist", adapter="./none", **shared)
    refused(r"base has no adapter_config\.json; a PEFT adapter directory is needed", adapter=place / "base", **shared)
    other = write_base(tmp_path / "wide", intermediate_size=64)
    refused(r"is for another model: .* has shape", adapter=adapter, model_name_or_path=other, **shared)
    deep = write_base(tmp_path / "deep", num_hidden_layers=3)
    missing = "is not an adapter for this model: 14 of its tensors are missing"
    refused(missing, adapter=adapter, model_name_or_path=deep, **shared)
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    for change, words in (
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only LORA and ADALORA adapters are"),
        ({"lora_bias": True}, "lora_bias = True is not supported yet"),
        ({"modules_to_save": ["norm"]}, "modules_to_save: 'norm' is not supported; expected embed_tokens or lm_head"),
        ({"r": "many"}, "must be numbers"),
    ):
        (copy / "adapter_config.json").write_text(json.dumps(config | change))
        refused(words, adapter=copy, **shared)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    weights = (copy / "adapter_model.safetensors").read_bytes()
    (copy / "adapter_model.safetensors").write_bytes(weights[:-10])
    refused(r"adapter_model\.safetensors is not a whole safetensors file", adapter=copy, **shared)


# The output directory


def test_a_directory_that_holds_another_run_is_refused_and_stays_as_it_is(adapter, place, capsys):
    before = {path: path.stat().st_mtime_ns for path in adapter.rglob("*")}
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=adapter)
    assert run_command(train.main, [*RUN, *named]) == 2
    assert re.search(
        r"error: --output_dir .*tuned is not empty; name a new one, or go on .* by --resume_from_checkpoint auto",
        capsys.readouterr().err,
    )
    assert {path: path.stat().st_mtime_ns for path in adapter.rglob("*")} == before


# The run itself


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint_and_the_batch(
    place, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=out)
    whole = tmp_path / "whole"
    # a rate of 1e30 at the end of a long warm-up: the first update is 0, the second throws the weights away
    argv = [*RUN, *named, *flags(learning_rate=1e30, warmup_steps=1, max_steps=9, save_steps=1, max_grad_norm=0)]
    assert run_command(train.main, argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    step = int(re.search(r"error: step (\d+): loss (nan|inf), grad_norm \S+, one of them not finite", error)[1])
    assert f"its batch is in {out / f'non_finite_step_{step}.npz'}; the checkpoint of step {step - 1} is whole" in error
    assert "A lower --learning_rate" in error
    assert Checkpoints(out / "checkpoints").steps() == list(range(1, step))
    assert len(losses_of(out)) == step - 1 and all(math.isfinite(loss) for loss in losses_of(out))
    assert not (out / "adapter_model.safetensors").exists() and not (out / "config.yaml").exists()
    with np.load(out / f"non_finite_step_{step}.npz") as batch:
        assert batch["tokens"].shape == (1, 4, 64) and batch["loss_weights"].sum() > 0
    assert not whole.exists()


def test_weights_with_an_infinity_stop_training_at_the_first_step_and_evaluation_at_once(place, tmp_path, capsys):
    directory = broken(place, tmp_path, tensors(lambda t: t[Q].__setitem__((0, 0), np.inf)))
    named = flags(model_name_or_path=directory, dataset=place / "train.jsonl")
    assert run_command(train.main, [*RUN, *named, *flags(output_dir=tmp_path / "out")]) == 1
    assert re.search(r"error: step 1: loss nan, .*; there is no checkpoint yet", capsys.readouterr().err)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["non_finite_step_1.npz"]
    assert run_command(evaluate.main, [*named, "--max_length=64"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "error: the loss is nan" in captured.err


FULL_DISK = """
import resource, signal, sys
from jaxft import output, train
from jaxft.errors import run_command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk
whole = output.write_result
def full(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    return whole(*arguments)
train.write_result = full
sys.exit(run_command(train.main))
"""


def test_a_full_disk_at_the_end_costs_nothing_but_the_time_to_resume(place, tmp_path, adapter):
    out = tmp_path / "out"
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=out)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *RUN, *named],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert re.search(
        r"error: the result could not be written to .*out: .*File too large.*The last checkpoint is whole: make room, "
        r"then go on with --output_dir .*out --resume_from_checkpoint auto",
        done.stderr.splitlines()[-1],
    )
    assert {entry.name for entry in out.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert train.main([*RUN, *named, "--resume_from_checkpoint=auto"]) == 0
    assert (
        load_file(out / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    )
    assert losses_of(out) == pytest.approx(losses_of(adapter), rel=1e-6)
