"""Models as GGUF files and back: exact where nothing is quantised, and refused where llama.cpp computes otherwise."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft import LoraConfig, add_lora, describe_model, load_model, save_adapter, save_model
from jaxft import generate as generate_command
from jaxft.convert import __main__ as convert
from jaxft.convert import hf
from jaxft.convert.ggml import QUANTS
from jaxft.convert.gguf.read import read_header
from jaxft.convert.gguf.tensors import RESIDUALS, less_norm, more_norm
from jaxft.convert.gguf.write import open_origin, write_files
from jaxft.errors import InputError, run_command
from jaxft.load import EMBEDDED, find_directory
from jaxft.lora import branches
from jaxft.models import read_hf_config
from jaxft.quant import dense
from tests.tiny_models import CONFIGS, hf_config, nonzero_adapter, tiny_model
from tests.tiny_runs import CHATML, V, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
# where llama.cpp has one way only: what the tiny models have otherwise
SAYABLE = {
    "llama_bias": {"hidden_act": "silu"},
    "gemma2": {"query_pre_attn_scalar": 12, "tie_word_embeddings": True},
    "gemma3": {"query_pre_attn_scalar": 12},
}
REST = [quant for quant in QUANTS if quant not in ("f32", "f16", "q8_0", "q5_1")]
EXPORTED = [name for name in CONFIGS if name != "qwen3_window_bias"]


def write_model(directory: Path, name: str, dtype: str = "float32", **changes) -> Path:
    """A tiny model that GGUF can say, in a directory."""
    model, params = tiny_model(name, dtype=dtype, **(SAYABLE.get(name, {}) | changes))
    save_model(directory, model, params)
    return directory


def export(directory: Path, out: Path, *quants: str) -> list[str]:
    """Writes OUT for each quant, without tokenizer; returns what was said."""
    said: list[str] = []
    files = {quant: out.with_name(out.name.replace("{quant}", quant)) for quant in quants}
    write_files(open_origin(str(directory), None), files, None, said.append)
    return said


def command(capsys, *argv) -> dict:
    """What a command of jaxft.convert said: one line of JSON, alone on stdout."""
    assert run_command(convert.main, [*map(str, argv)]) == 0, capsys.readouterr().err
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def fails(capsys, *argv) -> str:
    assert run_command(convert.main, [*map(str, argv)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXPORTED)
def test_tensors_come_back_byte_for_byte_and_constants_as_they_were(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "CHUNK_BYTES", 2_000)  # a few rows at a time
    directory = write_model(tmp_path / "model", name, dtype)
    export(directory, tmp_path / "m.gguf", {"float32": "f32", "bfloat16": "bf16"}[dtype])
    again = find_directory(str(tmp_path / "m.gguf"))
    there, back = load_file(directory / "model.safetensors"), hf.open_model(again)
    assert there.keys() == back.keys()
    for tensor, array in there.items():
        found = back[tensor].get_tensor(tensor)
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes(), tensor
        rows = back[tensor].get_slice(tensor)[1:4]
        assert rows.tobytes() == array[1:4].tobytes(), tensor
    was, now = (describe_model(read_hf_config(one)).config for one in (directory, again))
    # a window-less Mistral is a Llama; a dynamic rope is plain up to the positions; llama3's is one of factors
    otherwise = {"ropes", "layer_rope"} if name in ("llama3", "llama_dynamic", "llama_longrope") else set()
    for field in set(vars(was)) - otherwise - {"model_type"}:
        assert getattr(was, field) == getattr(now, field), field
    assert (was.model_type, now.model_type) in {(was.model_type, was.model_type), ("mistral", "llama")}
    if name != "llama_dynamic":
        for one, other in zip(was.ropes, now.ropes, strict=True):
            np.testing.assert_allclose(one.frequencies, other.frequencies, rtol=2e-7)
            np.testing.assert_allclose(one.scaling, other.scaling, rtol=1e-6)


def test_what_llama_cpp_does_otherwise_is_said(tmp_path):
    for name, part in (
        ("mistral", "up to 5 tokens"),
        ("llama_dynamic", "up to 8 tokens"),
        ("llama_longrope", "context"),
    ):
        said = export(write_model(tmp_path / name, name), tmp_path / f"{name}.gguf", "f32")
        assert any(part in text for text in said if text.startswith("warning: ")), said
    assert "tokenizer" in " ".join(export(write_model(tmp_path / "q", "qwen3"), tmp_path / "q.gguf", "f32"))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama2", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("qwen3", {"attention_bias": True}, "have a bias"),
        ("gemma2", {"tie_word_embeddings": False}, "the head is not the embedding"),
        ("gemma3", {"query_pre_attn_scalar": 20}, "scores are multiplied by 0.223607"),
        ("qwen3", {"rope_parameters": CONFIGS["llama_longrope"]["rope_parameters"], "head_dim": 8}, "no tensors"),
        (
            "mistral_yarn",
            {"rope_parameters": CONFIGS["mistral_yarn"]["rope_parameters"] | {"beta_fast": 16}},
            "beta_fast",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(name, changes, said, tmp_path):
    directory = write_model(tmp_path / "model", name, **changes)
    with pytest.raises(InputError, match=said):
        export(directory, tmp_path / "m.gguf", "f32")
    assert [*tmp_path.iterdir()] == [directory]


def test_released_llama3_factors_come_back_as_llama3(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    export(
        write_model(tmp_path / "m", "llama2", rope_parameters=rope, max_position_embeddings=131072, head_dim=128),
        tmp_path / "m.gguf", "f32",
    )  # fmt: skip
    assert read_hf_config(find_directory(str(tmp_path / "m.gguf"))).rope_parameters == rope


def test_one_plus_weight_is_undone_exactly_even_where_it_is_rounded():
    weights = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    weights[:5] = [0.0, 1e-9, -1.0, 3e-5, -1e-30]
    stored, residual = more_norm(weights, 1.0)
    assert stored.dtype == np.float32 and residual is not None
    np.testing.assert_array_equal(stored, weights + np.float32(1))
    assert less_norm(stored, 1.0, residual).tobytes() == weights.tobytes()
    rounded = weights.astype(ml_dtypes.bfloat16).astype(np.float32)[5:]
    exact = more_norm(rounded[abs(rounded) > 2**-15], 1.0)[1]
    assert exact is None  # bfloat16 weights of usual sizes need no residual


def test_quantised_files_of_one_pass_load_and_generate(tmp_path, capsys):
    found = command(
        capsys, "gguf", EMBEDDED / "base", tmp_path / "m-{quant}.gguf", "--quant", "f16,q8_0,q4_0", "--modelfile",
        "--pre_tokenizer", "gpt-2",
    )["files"]  # fmt: skip
    assert [*found] == ["f16", "q8_0", "q4_0"]
    distances = [found[quant]["kl_divergence"] for quant in found]
    assert 0 <= distances[0] < 1e-6 < distances[1] < 2e-3 < distances[2] < 0.2
    assert found["f16"]["same_top_token"] == 1.0 and found["q4_0"]["same_top_token"] > 0.8
    assert found["f16"]["bytes"] > found["q8_0"]["bytes"] > found["q4_0"]["bytes"]
    capsys.readouterr()
    answers = []
    for name in (EMBEDDED / "base", found["q8_0"]["file"]):
        argv = ["--model_name_or_path", str(name), "--chat", "--prompt", "7 + 8 = ?", "--max_new_tokens", "12"]
        assert run_command(generate_command.main, [*argv, "--temperature", "0"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize(
    "quant", ["f32", "f16", "q8_0", "q5_1", *(pytest.param(q, marks=pytest.mark.long) for q in REST)]
)
def test_every_quantisation_is_written_and_read_with_fallbacks_where_blocks_do_not_fit(quant, tmp_path):
    directory = write_model(tmp_path / "m", "llama2", hidden_size=256, intermediate_size=96, num_hidden_layers=1)
    export(directory, tmp_path / "m.gguf", quant)
    header, where = read_header(tmp_path / "m.gguf"), hf.open_model(find_directory(str(tmp_path / "m.gguf")))
    assert header.tensors["blk.0.attn_norm.weight"].type == "f32"
    for name, array in load_file(directory / "model.safetensors").items():
        found = where[name].get_tensor(name).astype(np.float32)
        error = np.linalg.norm(found - array) / np.linalg.norm(array)
        assert error < {"f32": 1e-9, "f16": 1e-3, "bf16": 1e-2, "q2_k": 0.4}.get(quant, 0.25), (name, error)


def test_an_adapter_is_merged_in_float32_and_alone_is_a_pair_for_each_layer(tmp_path, capsys):
    directory = write_model(tmp_path / "m", "llama3", "bfloat16")
    model, params = load_model(directory)
    config = LoraConfig(r=3, lora_alpha=6, rank_pattern={"down_proj": 5}, use_rslora=True)
    model, trainable, _ = add_lora(model, params, config, jax.random.key(0))
    save_adapter(tmp_path / "a", model, nonzero_adapter(trainable), config, "base")
    found = command(capsys, "gguf", directory, tmp_path / "m.gguf", "--quant", "f32", "--adapter", tmp_path / "a")
    assert found["files"]["f32"]["kl_divergence"] < 1e-5
    command(capsys, "merge", directory, tmp_path / "a", tmp_path / "merged", "--dtype", "float32", "--check", "false")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    where = hf.open_model(find_directory(str(tmp_path / "m.gguf")))
    for name, array in merged.items():
        assert where[name].get_tensor(name).tobytes() == array.tobytes(), name

    found = command(capsys, "gguf-lora", directory, tmp_path / "a", tmp_path / "a.gguf")
    assert found["layers"] == len(branches(model)) == 21
    header = read_header(tmp_path / "a.gguf")
    assert header.metadata["general.type"] == "adapter" and header.metadata["adapter.type"] == "lora"
    assert header.metadata["general.architecture"] == "llama" and header.metadata["adapter.lora.alpha"] == 6

    def array(name):
        info = header.tensors[name]
        return np.memmap(header.path, np.float32, "r", info.offset, info.shape)

    names = {"blk.1.attn_q.weight": "self_attn.q_proj", "blk.1.ffn_down.weight": "mlp.down_proj"}
    adapter = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for stored, module in names.items():
        a, b = (adapter[f"base_model.model.model.layers.1.{module}.lora_{part}.weight"] for part in "AB")
        rank = len(a)
        delta = (6 / np.sqrt(rank)) * b @ a
        if "q_proj" in module:  # two halves of a head become neighbours
            delta = delta.reshape(4, 2, 4, -1).swapaxes(1, 2).reshape(delta.shape)
        np.testing.assert_allclose(
            6 / rank * array(f"{stored}.lora_b") @ array(f"{stored}.lora_a"), delta, rtol=1e-5, atol=1e-6
        )


def test_an_adapter_with_more_than_a_and_b_cannot_stand_alone(tmp_path, capsys):
    directory = write_model(tmp_path / "m", "qwen3")
    model, params = load_model(directory)
    config = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",))
    model, trainable, _ = add_lora(model, params, config, jax.random.key(0))
    save_adapter(tmp_path / "a", model, trainable, config, "base")
    assert "merge it" in fails(capsys, "gguf-lora", directory, tmp_path / "a", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_hf_writes_a_directory_that_is_the_file(tmp_path, capsys):
    directory = write_model(tmp_path / "m", "gemma3", "bfloat16", vocab_size=V)
    make_tokenizer().save_pretrained(directory)
    command(capsys, "gguf", directory, tmp_path / "m.gguf", "--quant", "bf16", "--check", "false")
    found = command(capsys, "hf", tmp_path / "m.gguf", tmp_path / "out")
    assert found["kl_divergence"] == 0 and found["same_top_token"] == 1 and found["dtype"] == "bfloat16"
    assert found["texts"] > 15 and found["texts_that_differ"] == 0
    was, now = (load_file(one / "model.safetensors") for one in (directory, tmp_path / "out"))
    assert {name: array.tobytes() for name, array in was.items()} == {n: array.tobytes() for n, array in now.items()}
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHATML and tokenizer.eos_token == "<eos>"
    assert read_hf_config(tmp_path / "out").layer_types == hf_config("gemma3").layer_types


def test_four_bit_models_are_sources_too(tmp_path):
    directory = tmp_path / "m"
    whole = write_model(tmp_path / "whole", "qwen3", num_hidden_layers=1)
    model, params = load_model(whole, quantization="nf4")
    save_model(directory, model, params, dtype="bfloat16")
    assert "dequantised" in export(directory, tmp_path / "m.gguf", "f32")[0]
    name = "model.layers.0.self_attn.v_proj.weight"
    back = hf.open_model(find_directory(str(tmp_path / "m.gguf")))[name].get_tensor(name)
    weight = params["layers"]["0"]["self_attn"]["v_proj"]["weight"][0]
    np.testing.assert_array_equal(back, np.asarray(dense(weight, np.float32)))
    assert 0 < np.abs(back - load_file(whole / "model.safetensors")[name]).max() < 0.2  # not the weights from before


def test_an_importance_matrix_is_held_against_the_model(tmp_path):
    origin = open_origin(str(write_model(tmp_path / "m", "llama2", num_hidden_layers=1)), None)
    said: list[str] = []
    weights = {"blk.0.ffn_up.weight": np.linspace(0, 9, 32, dtype=np.float32), "output.weight": np.ones(32, np.float32)}
    for name, importance in (("plain", None), ("weighted", weights)):
        write_files(origin, {"q4_0": tmp_path / f"{name}.gguf"}, None, said.append, importance)
    assert any("nothing of 6 of 9 matrices" in text for text in said)

    def data(file, tensor):
        info = read_header(tmp_path / f"{file}.gguf").tensors[tensor]
        return (tmp_path / f"{file}.gguf").read_bytes()[info.offset : info.offset + info.size]

    assert data("plain", "blk.0.ffn_gate.weight") == data("weighted", "blk.0.ffn_gate.weight")
    assert data("plain", "blk.0.ffn_up.weight") != data("weighted", "blk.0.ffn_up.weight")
    for wrong in ({"blk.0.ffn_up.weight": np.ones(7, np.float32)}, {"blk.9.ffn_up.weight": np.ones(32, np.float32)}):
        with pytest.raises(InputError, match="another model's"):
            write_files(origin, {"q4_0": tmp_path / "x.gguf"}, None, said.append, wrong)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--quant", "q9"], "q9"),
        (["--quant", "f32,f16"], "{quant} in it"),
        (["--quant", ","], "nothing is none of f32"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_read(argv, said, tmp_path, capsys):
    assert said in fails(capsys, "gguf", "/no/such/model", tmp_path / "m.gguf", *argv)


def test_nothing_is_overwritten_and_nothing_half_written_is_left(tmp_path, capsys, monkeypatch):
    directory = write_model(tmp_path / "m", "llama2")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    assert "exists already" in fails(capsys, "gguf", directory, tmp_path / "there.gguf", "--quant", "f32")
    assert "no directory" in fails(capsys, "gguf", directory, tmp_path / "no" / "m.gguf", "--quant", "f32")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = np.nan
    hf.write_tensors(directory / "model.safetensors", tensors)
    assert "not finite" in fails(capsys, "gguf", directory, tmp_path / "m.gguf", "--quant", "q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "there.gguf"]
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"


def test_residuals_are_in_the_file_only_where_they_are_needed(tmp_path):
    for name, dtype, needed in (("gemma", "float32", True), ("llama2", "float32", False)):
        export(write_model(tmp_path / name, name, dtype), tmp_path / f"{name}.gguf", "f32")
        keys = [key for key in read_header(tmp_path / f"{name}.gguf").metadata if key.startswith(RESIDUALS)]
        assert bool(keys) == needed


# memory

EXPORTER = """
    import sys
    import jax, jax.numpy as jnp
    from pathlib import Path
    from jaxft.convert.gguf.write import open_origin, write_files
    jax.block_until_ready(jnp.zeros(8) + 1)
    origin = open_origin(sys.argv[1], None)
    print("ready", flush=True)
    sys.stdin.readline()
    files = {quant: Path(sys.argv[2]) / f"{quant}.gguf" for quant in ("f16", "q8_0")}
    write_files(origin, files, None, lambda said: None)
    print("done", flush=True)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from Linux' /proc")
def test_export_of_a_gigabyte_holds_a_few_chunks(tmp_path):
    from tests.test_load import private_bytes, write_sparse_model

    weights, _ = write_sparse_model(tmp_path / "big")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(EXPORTER), str(tmp_path / "big"), str(tmp_path)],
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
        assert line == "done\n" and weights > 10 * hf.CHUNK_BYTES
        assert peak - before < 4 * hf.CHUNK_BYTES
    finally:
        process.kill()
        process.wait()
