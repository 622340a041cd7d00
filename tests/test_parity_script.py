"""scripts/parity.py: full rows without padding, equal losses of both programs at a tiny size, a verdict that fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft import load_tokenizer
from jaxft.errors import InputError
from jaxft.load import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
DATASET, STEPS, ROWS, LENGTH = EMBEDDED / "problems_train.jsonl", 5, 2, 48
TINY = {
    "model_type": "qwen3", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip


@pytest.fixture(scope="module")
def parity():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import parity

        # five steps in which the losses fall by more than any tolerance below
        patch.setattr(parity, "TRAINING", parity.Training(learning_rate=2e-2, warmup_steps=2, max_grad_norm=0.1))
        yield parity


@pytest.fixture(scope="module")
def batches(parity, tmp_path_factory):
    """A directory with batches alone."""
    out = tmp_path_factory.mktemp("batches")
    (out / "tiny.json").write_text(json.dumps(TINY))
    argv = ["prepare", str(out / "prepared"), "--config", str(out / "tiny.json"), "--batches_only"]
    argv += ["--dataset", str(DATASET), "--tokenizer", str(EMBEDDED / "base"), "--steps", str(STEPS)]
    assert parity.main([*argv, "--rows", str(ROWS), "--length", str(LENGTH)]) == 0
    return out / "prepared"


@pytest.fixture(scope="module")
def prepared(parity, batches):
    """The same with a model and an adapter, made as on a machine that has no data."""
    torch = pytest.importorskip("torch", reason="prepare draws weights with torch")
    pytest.importorskip("peft", reason="prepare writes the adapter with peft")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products are slower on two
    out = batches.parent / "whole"
    given = ["--config", str(batches.parent / "tiny.json"), "--batches", str(batches / "batches.npz")]
    assert parity.main(["prepare", str(out), *given]) == 0
    yield out
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def losses(parity, prepared):
    """(program, dtype, seed) -> the losses of a run, made when first asked for."""
    made = {}

    def run(*what):
        if what not in made:
            program, dtype, seed = what
            file = prepared.parent / f"{program}-{dtype}-{seed}.json"
            argv = ["run", program, str(prepared), str(file), "--dtype", dtype, "--seed", str(seed)]
            assert parity.main(argv) == 0
            made[what] = np.array(json.loads(file.read_text())["losses"])
        return made[what]

    return run


def test_prepared_batches_are_full_rows_of_rendered_text_without_padding(batches):
    with np.load(batches / "batches.npz") as held:
        tokens, labels = held["tokens"], held["labels"]
    assert tokens.shape == (STEPS, ROWS, LENGTH) and tokens.dtype == labels.dtype == np.int32
    np.testing.assert_array_equal(tokens, labels)  # none is masked
    tokenizer = load_tokenizer(EMBEDDED / "base")
    assert tokenizer.pad_token_id is not None and not np.any(tokens == tokenizer.pad_token_id)
    rows = [json.loads(line) for line in DATASET.read_text(encoding="utf-8").splitlines()]
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    rendered = {str(tokenizer.apply_chat_template(turn, tokenize=False)) for turn in turns}
    begin = str(tokenizer.apply_chat_template([{"role": "user", "content": "|"}], tokenize=False)).split("|<")[0]
    text = tokenizer.decode(tokens.ravel())
    documents = [begin + part for part in text.split(begin)[1:]]
    assert text.startswith(begin) and len(documents) > 3
    assert set(documents[:-1]) <= rendered and len(set(documents)) == len(documents)
    assert any(one.startswith(documents[-1]) for one in rendered)  # cut by the last row's end


def test_batches_carried_to_a_machine_without_data_stay_the_same(batches, prepared):
    with np.load(batches / "batches.npz") as one, np.load(prepared / "batches.npz") as other:
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    about = json.loads((prepared / "prepared.json").read_text())
    assert about.pop("digest") and about == {
        "config": "tiny", "dataset": "embedded/problems_train.jsonl", "tokenizer": "base", "rows": ROWS,
        "length": LENGTH, "steps": STEPS, "seed": 0,
    }  # fmt: skip


def test_the_prepared_adapter_is_peft_s_first_one_in_float32(prepared):
    from safetensors.numpy import load_file

    tensors = load_file(prepared / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * TINY["num_hidden_layers"]
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert tensor.shape[0] == 16 and 0.97 * bound < np.abs(tensor).max() < 1.01 * bound


@pytest.mark.parametrize(
    ("dtype", "within"), [("float32", 1e-5), pytest.param("bfloat16", 1e-3, marks=pytest.mark.long)]
)
def test_both_programs_have_the_same_losses(losses, dtype, within):
    ours, theirs = losses("jaxft", dtype, 0), losses("hf", dtype, 0)
    assert np.ptp(theirs) > 0.1  # they learn
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=within)


@pytest.mark.parametrize("program", ["jaxft", "hf"])
@pytest.mark.parametrize(
    ("dtype", "within"), [("float32", 1e-5), pytest.param("bfloat16", 1e-3, marks=pytest.mark.long)]
)
def test_another_seed_changes_rounding_alone(parity, losses, program, dtype, within):
    orders = [tuple(parity.row_order(1, step, ROWS)) for step in range(STEPS)]
    assert set(orders) == {(0, 1), (1, 0)} and parity.first_position(1, LENGTH) > 0
    assert parity.first_position(0, LENGTH) == 0 and list(parity.row_order(0, 3, 4)) == [0, 1, 2, 3]
    once, again = losses(program, dtype, 0), losses(program, dtype, 1)
    np.testing.assert_allclose(once, again, rtol=0, atol=within)
    if dtype == "bfloat16":
        assert once[0] != again[0]  # the rows begin elsewhere


def test_an_adapter_is_put_into_a_model_by_name_or_not_at_all(parity, prepared):
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(prepared / "model", dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=16, target_modules=list(parity.TARGETS)), autocast_adapter_dtype=False)
    tensors = load_file(prepared / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A"
    ours = dict(model.named_parameters())[f"{name}.default.weight"]
    before = ours.detach().clone()
    for broken in ({f"{name}.weight": tensors[f"{name}.weight"][:8]}, {"another": tensors[f"{name}.weight"]}):
        with pytest.raises(RuntimeError, match="differ in 1"):
            parity.put_adapter(model, tensors | broken)
    assert torch.equal(ours, before)
    parity.put_adapter(model, tensors)
    assert ours.dtype == torch.float32 and torch.equal(ours, tensors[f"{name}.weight"])


UNSLOTH = """
import sys

assert not sys.modules.keys() & {"transformers", "torch", "peft", "jax"}, "something was imported before Unsloth"
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


class FastLanguageModel:
    def from_pretrained(name, *, max_seq_length, dtype, load_in_4bit, local_files_only):
        assert not load_in_4bit and local_files_only
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), None

    def get_peft_model(model, *, use_gradient_checkpointing, random_state, **lora):
        return get_peft_model(model, LoraConfig(**lora), autocast_adapter_dtype=False)

    def for_training(model):
        model.train()
"""


@pytest.mark.long
def test_unsloth_is_imported_first_and_trains_the_prepared_adapter(prepared, losses, tmp_path):
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    for name in ("unsloth", "unsloth_zoo"):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
    command = [sys.executable, ROOT / "scripts" / "parity.py", "run", "unsloth", prepared, tmp_path / "unsloth.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    found = json.loads((tmp_path / "unsloth.json").read_text())
    assert found["versions"]["unsloth"] == "1.0" and len(found["losses"]) == STEPS
    assert abs(found["losses"][0] - losses("hf", "bfloat16", 0)[0]) < 1e-3


# the report


def write_results(parity, directory, curves, **changes):
    """A result file for each (program, seed) of curves: 200 losses, (first, offset after it, noise)."""
    falling = 4 + 8 * np.exp(-np.arange(200) / 40)
    files = []
    for (program, seed), (first, offset, noise) in curves.items():
        losses = falling + offset + noise * np.random.default_rng([seed, len(program)]).standard_normal(200)
        losses[0] = first
        found = parity.Result(
            program, seed, "bfloat16", {
                "config": "qwen3-4b", "dataset": "gsm8k/train.jsonl", "tokenizer": "qwen2.gguf", "rows": 2,
                "length": 1024, "steps": 200, "seed": 0, "digest": "0" * 16,
            },
            parity.asdict(parity.TRAINING), list(losses), 1234.5, 3 << 30, "a card", {program: "1.0"},
        )  # fmt: skip
        files.append(directory / f"{program}-{seed}.json")
        files[-1].write_text(json.dumps(parity.asdict(found) | changes.get(program, {})))
    return files


AGREEING = {
    ("hf", 0): (12.0, 0, 1e-3), ("hf", 1): (12.0, 0, 1e-3), ("jaxft", 0): (12.001, 0, 1e-3),
    ("jaxft", 1): (12.001, 0, 1e-3), ("unsloth", 0): (11.999, 0, 1e-3),
}  # fmt: skip
VERDICTS = {
    "agree": ({}, 0, "**holds**: the first step's losses lie within 2.0e-03 of each other (at most 1e-02)"),
    "noise of its own": ({("jaxft", 1): (12.0, 0, 2e-2)}, 1, "**FAILS**: jaxft, seed 1 and jaxft differ by 1.5e-02"),
    "first step": ({("unsloth", 0): (12.012, 0, 1e-3)}, 1, "**FAILS**: the first step's losses lie within 1.2e-02"),
    "not a number": (
        {("unsloth", 0): (float("nan"), float("nan"), 1e-3)},
        3,
        "**FAILS**: the first step's losses lie within nan",
    ),
    "curve": (
        {("jaxft", seed): (12.0, 0.01, 1e-3) for seed in (0, 1)},
        2,
        "**FAILS**: jaxft and transformers + PEFT differ by 1.0e-02",
    ),
    "no seeds": ({("jaxft", 1): None, ("hf", 1): None}, 1, "**FAILS**: the run-to-run noise was not measured"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_report_names_what_fails(parity, tmp_path, capsys, case):
    pytest.importorskip("matplotlib", reason="the report draws its picture with matplotlib")
    changes, fails, sentence = VERDICTS[case]
    curves = {key: curve for key, curve in (AGREEING | changes).items() if curve}
    files = write_results(parity, tmp_path, curves)
    assert parity.main(["report", *map(str, files), "--out", str(tmp_path / "parity.md")]) == bool(fails)
    text = (tmp_path / "parity.md").read_text(encoding="utf-8")
    assert sentence in text and text.count("**FAILS**") == fails
    assert capsys.readouterr().out.count("FAIL") == fails
    assert "| jaxft | 12.00" in text and "e-03 | 3.00 |" in text and "(parity.png)" in text
    assert "--rows 2 --length 1024 --steps 200 --seed 0" in text and "run unsloth parity unsloth-0.json\n" in text
    assert max(map(len, text.splitlines())) < 260
    assert 10_000 < (tmp_path / "parity.png").stat().st_size < 150_000


def test_the_report_says_how_far_rounding_moved_each_from_float32(parity, tmp_path):
    pytest.importorskip("matplotlib", reason="the report draws its picture with matplotlib")
    (tmp_path / "exact").mkdir()

    def report(noise, **changes):
        files = write_results(parity, tmp_path, AGREEING | {("jaxft", 0): (12.0, 0, noise)})
        (hf,) = write_results(parity, tmp_path / "exact", {("hf", 0): (12.0, 0, 0)}, hf={"dtype": "float32"} | changes)
        argv = ["report", *map(str, files), "--exact", str(hf), "--out", str(tmp_path / "parity.md")]
        return parity.main(argv), (tmp_path / "parity.md").read_text(encoding="utf-8")

    code, text = report(5e-4)
    moved = 5e-4 * np.abs(np.random.default_rng([0, len("jaxft")]).standard_normal(200))
    moved[0] = 0
    assert f" | {moved.mean():.1e} | {moved[:10].mean():.1e} | 3.00 |" in text
    assert (
        code == 0 and "| to float32, mean | to float32, first 10 steps |" in text and "--exact hf-float32.json" in text
    )
    assert re.search(r"holds\*\*: from a run in float32 .*: transformers \+ PEFT 8\.\de-04, jaxft 4\.\de-04", text)
    code, text = report(1.5e-3)
    assert code == 1 and "**FAILS**: from a run in float32" in text  # jaxft is the farthest
    with pytest.raises(InputError, match="is a run in bfloat16"):
        report(5e-4, dtype="bfloat16")
    with pytest.raises(InputError, match="has prepared"):
        report(5e-4, prepared={"digest": "1"})


@pytest.mark.parametrize("apart, fails", [(1e-5, 0), (5e-4, 1)])
def test_the_report_holds_programs_in_float32_against_each_other(parity, tmp_path, capsys, apart, fails):
    pytest.importorskip("matplotlib", reason="the report draws its picture with matplotlib")
    (tmp_path / "exact").mkdir()
    curves = {("jaxft", 0): (12.0, apart, 0), ("hf", 0): (12.0, 0, 0)}
    wide = write_results(parity, tmp_path / "exact", curves, jaxft={"dtype": "float32"}, hf={"dtype": "float32"})
    rounded = write_results(parity, tmp_path, AGREEING | {("jaxft", 0): (12.0, 0, 5e-4)})
    argv = ["report", *map(str, rounded), "--exact", *map(str, wide)]
    assert parity.main([*argv, "--out", str(tmp_path / "parity.md")]) == fails
    text, said = (tmp_path / "parity.md").read_text(encoding="utf-8"), capsys.readouterr().out
    verdict = ("holds", "FAILS")[fails]
    assert f"- **{verdict}**: in float32 jaxft and transformers + PEFT differ by" in text
    assert "run jaxft parity jaxft-float32.json --dtype float32\n" in text
    assert "--exact hf-float32.json jaxft-float32.json\n" in text and said.count("FAIL") == fails


def test_results_that_cannot_be_compared_are_refused(parity, tmp_path):
    def refused(files, match):
        with pytest.raises(InputError, match=match):
            parity.main(["report", *map(str, files), "--out", str(tmp_path / "parity.md")])

    refused(
        write_results(parity, tmp_path, AGREEING, unsloth={"prepared": {"digest": "1"}}), "unsloth-0.json has prepared"
    )
    refused(write_results(parity, tmp_path, AGREEING, jaxft={"dtype": "float32"}), "jaxft-0.json has dtype float32")
    files = write_results(parity, tmp_path, AGREEING)
    refused([*files, files[0]], "two results of one program and seed")
    refused(files[1:], "no result of `run hf` with seed 0")


def test_what_cannot_be_prepared_or_run_is_said(parity, batches, tmp_path):
    out, tiny = str(tmp_path / "out"), str(batches.parent / "tiny.json")
    text = ["--dataset", str(DATASET), "--tokenizer", str(EMBEDDED / "base")]
    for argv, match in (
        ([str(batches), "--config", tiny, *text], "exists already"),
        ([out, "--config", "qwen9", *text], "neither a file nor one of qwen3-4b, "),
        ([out, "--config", tiny], "--dataset and --tokenizer, or --batches"),
        ([out, "--config", tiny, "--batches", f"{batches}/batches.npz", "--steps", "9"], "has its own steps"),
        ([out, "--config", tiny, *text, "--steps", "9000"], "tokens, 9000 steps of 2 rows of 1024 need 18432000"),
    ):
        with pytest.raises(InputError, match=match):
            parity.main(["prepare", *argv])
    (tmp_path / "small.json").write_text(json.dumps(TINY | {"vocab_size": 300}))
    with pytest.raises(InputError, match="a vocabulary of 300"):
        parity.main(["prepare", out, "--config", str(tmp_path / "small.json"), "--batches", f"{batches}/batches.npz"])
    with pytest.raises(FileNotFoundError, match=r"prepared\.json is not there"):
        parity.main(["run", "hf", out, str(tmp_path / "hf.json")])
