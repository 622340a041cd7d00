"""`jaxft.convert merge`: the merged model is the adapter on its model, for PEFT, for transformers and bit by bit."""

import json
import os
import runpy
import subprocess
import sys
import textwrap
import time
import warnings
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft import LoraConfig, add_lora, describe_model, load_model, save_adapter, save_model
from jaxft.convert import __main__ as convert
from jaxft.convert import hf
from jaxft.errors import run_command
from jaxft.lora import branches, lora_shapes, with_lora
from jaxft.quant import dense
from tests.tiny_models import hf_config, nonzero_adapter, packed_batch
from tests.tiny_runs import make_tokenizer, write_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`"),  # PEFT's
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]
ROOT = Path(__file__).resolve().parents[1]
CONFIG = LoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 5})
MERGED = 4  # of two layers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ in bfloat16 with a tokenizer, adapter/ for it."""
    directory = tmp_path_factory.mktemp("merge")
    write_base(directory / "base", "llama2")
    model, params = load_model(directory / "base")
    save_model(directory / "base", model, params, dtype="bfloat16")
    (directory / "base" / "generation_config.json").write_text('{"eos_token_id": 257}')
    write_adapter(directory / "adapter", model, params)
    return directory


def write_adapter(directory, model, params, config=CONFIG):
    model, trainable, _ = add_lora(model, params, config, jax.random.key(0))
    save_adapter(directory, model, nonzero_adapter(trainable), config, "base")


def merge(capsys, *argv) -> dict:
    """What merging said: one line of JSON, alone on stdout."""
    assert run_command(convert.main, ["merge", *map(str, argv)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def expected_tensor(place, name, scale):
    """W + s B A of one linear layer, with numpy alone."""
    adapter = load_file(place / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    base = load_file(place / "base" / "model.safetensors")[f"{name}.weight"]
    return base.astype(np.float32) + np.float32(scale) * (b @ a)


Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def test_merged_weights_are_the_rounded_sums_and_all_others_keep_their_bits(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(hf, "CHUNK_BYTES", 1_000)  # a few rows at a time
    found = merge(capsys, place / "base", place / "adapter", tmp_path / "out")
    assert found["merged"] == MERGED and found["replaced"] == 0 and found["dtype"] == "bfloat16"
    assert 0 < found["largest_logit_difference"] < 0.05 * found["largest_logit"]  # 16-bit weights are rounded
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    merged = {
        name: array for file in (tmp_path / "out").glob("*.safetensors") for name, array in load_file(file).items()
    }
    base = load_file(place / "base" / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = [name for name in base if not np.array_equal(merged[name], base[name])]
    assert sorted(changed) == sorted(
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    for name, scale in ((Q, 6 / 3), (DOWN, 6 / 5)):
        assert merged[f"{name}.weight"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            merged[f"{name}.weight"], expected_tensor(place, name, scale).astype(ml_dtypes.bfloat16)
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "base" / name).read_bytes()
    assert str(place / "adapter") in (tmp_path / "out" / "README.md").read_text()


def test_merging_in_float32_differs_by_float32_rounding_alone(place, tmp_path, capsys):
    found = merge(capsys, place / "base", place / "adapter", tmp_path / "out", "--dtype", "float32")
    assert found["dtype"] == "float32" == json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert 0 < found["largest_logit_difference"] < 1e-5 * found["largest_logit"]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in merged.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(merged[f"{Q}.weight"], expected_tensor(place, Q, 6 / 3), rtol=1e-6, atol=1e-6)


BREAKS = {
    "scale forgotten": lambda branch: branch._replace(scale=1.0),
    "not merged": lambda branch: branch._replace(scale=0.0),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_wrong_merge_is_seen_in_the_logits_that_are_printed(broken, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "jaxft.convert.merge.branches",
        lambda model: {name: BREAKS[broken](branch) for name, branch in branches(model).items()},
    )
    found = merge(capsys, place / "base", place / "adapter", tmp_path / "out", "--dtype", "float32")
    assert found["largest_logit_difference"] > 1e-2


def test_adapter_of_a_quantised_base_merges_onto_what_it_is_given(place, tmp_path, capsys):
    """Onto the quantised model: its dequantised weights, said on stderr."""
    model, params = load_model(place / "base", quantization="int8")
    save_model(tmp_path / "eight", model, params, dtype="bfloat16")
    make_tokenizer().save_pretrained(tmp_path / "eight")
    argv = ["merge", str(tmp_path / "eight"), str(place / "adapter"), str(tmp_path / "out"), "--dtype=float32"]
    assert convert.main(argv) == 0
    said = capsys.readouterr()
    assert "is quantised (int8): merging onto its dequantised weights" in said.err
    found = json.loads(said.out)
    assert found["largest_logit_difference"] < 1e-5 * found["largest_logit"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    merged = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(tmp_path / "eight" / "model.safetensors")
    rows = (
        stored["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
        * stored["model.layers.1.mlp.up_proj.SCB"][:, None]
    )
    np.testing.assert_allclose(merged["model.layers.1.mlp.up_proj.weight"], rows / 127, rtol=1e-6)


def test_adapter_trained_over_four_bits_merges_onto_them_or_onto_the_16_bits_that_they_were_made_from(
    place, tmp_path, capsys
):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    base, four, adapter = write_base(tmp_path / "base", **sizes), tmp_path / "four", tmp_path / "adapter"
    save_model(base, *load_model(base), dtype="bfloat16")
    model, params = load_model(base, quantization="nf4")
    save_model(four, model, params)
    make_tokenizer().save_pretrained(four)
    write_adapter(adapter, model, params)
    merged, said = {}, {}
    for directory in (base, four):
        out = tmp_path / f"merged-{directory.name}"
        assert convert.main(["merge", str(directory), str(adapter), str(out), "--dtype=float32"]) == 0
        stdout, said[directory] = capsys.readouterr()
        found = json.loads(stdout)
        assert found["merged"] == MERGED and found["largest_logit_difference"] < 1e-5 * found["largest_logit"]
        merged[directory] = load_file(out / "model.safetensors")
    assert "is quantised (nf4): merging onto its dequantised weights" in said[four]
    assert "quantised" not in said[base]
    parts = load_file(adapter / "adapter_model.safetensors")
    for name, scale in ((Q, 6 / 3), (DOWN, 6 / 5)):
        a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        held = load_file(base / "model.safetensors")[f"{name}.weight"].astype(np.float32)
        made = np.asarray(dense(hf.quantize_matrix(jnp.asarray(held, jnp.bfloat16), "nf4"), jnp.float32))
        assert np.abs(made - held).max() > 0.01
        for directory, weight in ((base, held), (four, made)):
            expected = weight + np.float32(scale) * (b @ a)
            np.testing.assert_allclose(merged[directory][f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_nothing_half_made_is_left_where_a_merge_fails(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    whole, calls = hf.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("no space left on device")
        whole(*args, **kwargs)

    monkeypatch.setattr(hf, "save_file", full)
    assert run_command(convert.main, ["merge", str(place / "base"), str(place / "adapter"), str(tmp_path / "out")]) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(place, tmp_path, capsys):
    def refused(message, base=place / "base", adapter=place / "adapter", out=tmp_path / "out", *flags):
        assert run_command(convert.main, ["merge", str(base), str(adapter), str(out), *flags]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    refused("is not empty; name a new directory", out=tmp_path / "full")
    refused("is a file; name a new directory", out=tmp_path / "full" / "mine")
    refused("none does not exist", base="./none")
    refused("none does not exist", adapter="./none")
    refused("has no adapter_config.json", adapter=place / "base")
    wide = write_base(tmp_path / "wide", "llama2", intermediate_size=64)
    refused("is for another model", base=wide)
    deep = write_base(tmp_path / "deep", "llama2", num_hidden_layers=3)
    refused("is not an adapter for this model: 4 of its tensors are missing", base=deep)
    refused("invalid choice: 'int8'", place / "base", place / "adapter", tmp_path / "out", "--dtype=int8")
    big = load_model(place / "base", dtype=jnp.float32)
    save_model(tmp_path / "big", big[0], jax.tree.map(lambda leaf: leaf * 1e6, big[1]))
    refused("float16 cannot hold its values", tmp_path / "big", place / "adapter", tmp_path / "out", "--dtype=float16")
    assert run_command(convert.main, []) == 2 and "COMMAND" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_runs_as_a_module(place, tmp_path, capsys, monkeypatch):
    argv = ["merge", "--check=false", str(place / "base"), str(place / "adapter"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["jaxft.convert", *argv])
    with pytest.raises(SystemExit) as end, warnings.catch_warnings(action="ignore"):  # it is imported already
        runpy.run_module("jaxft.convert", run_name="__main__")
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["merged"] == MERGED and "largest_logit_difference" not in found


# against PEFT


@pytest.fixture(scope="module")
def made(hf_model, tmp_path_factory):
    pytest.importorskip("peft", reason="the reference is PEFT")
    from tests.tiny_adapters import make_adapter

    return cache(lambda option: make_adapter(hf_model, tmp_path_factory.mktemp("made"), option))


@pytest.mark.parametrize(
    "option",
    ["patterns", "embedding of a tied model", "tied model that stays tied", "everything"],
)
def test_merged_model_is_that_of_peft_s_merge_and_unload(option, made, tmp_path, capsys):
    directory, adapter = made(option)
    from scripts.compare_with_hf import reference_logits, reference_model

    found = merge(capsys, directory, adapter, tmp_path / "out")
    assert found["largest_logit_difference"] <= 1e-4
    reference = reference_model(directory, adapter)
    micro = {name: array[0] for name, array in packed_batch().items()}
    on_base = reference_logits(reference, micro)
    theirs = reference.merge_and_unload()
    ours = reference_model(tmp_path / "out")  # transformers loads it as it is
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    assert np.abs(reference_logits(ours, micro) - on_base).max() <= 1e-4
    peers = dict(theirs.named_parameters())
    assert peers.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        np.testing.assert_allclose(parameter.detach(), peers[name].detach(), rtol=0, atol=2e-6, err_msg=name)


# memory

MERGER = """
    import sys
    import jax, jax.numpy as jnp
    from pathlib import Path
    from jaxft.convert import hf
    from jaxft.convert.merge import merge
    jax.block_until_ready(jnp.zeros(8) + 1)
    hf.SHARD_BYTES = int(sys.argv[4])
    print("ready", flush=True)
    sys.stdin.readline()
    print(merge(sys.argv[1], sys.argv[2], Path(sys.argv[3]), None, print)["merged"], flush=True)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from Linux' /proc")
def test_merge_of_a_gigabyte_holds_one_shard_and_four_chunks(tmp_path):
    from tests.test_load import BIG, private_bytes, write_sparse_model

    weights, _ = write_sparse_model(tmp_path / "big")
    config, shard = LoraConfig(r=2), 300 << 20
    model = with_lora(describe_model(hf_config("llama2", **BIG)), config)
    trained = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), lora_shapes(model)[0])
    save_adapter(tmp_path / "adapter", model, trained, config, "big")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(MERGER), *(str(tmp_path / name) for name in ("big", "adapter", "out")),
         str(shard)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        before = peak = private_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        while not (line := process.stdout.readline()):
            assert process.poll() is None
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.002)
        assert int(line) == 7 * BIG["num_hidden_layers"]
        assert weights > 3 * shard
        assert 0.5 * shard < peak - before < shard + 4 * hf.CHUNK_BYTES
    finally:
        process.kill()
        process.wait()
