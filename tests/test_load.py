"""Model directories: read back as written, in little memory, and refused with a plain word where they are damaged."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import describe_model, load_model, load_tokenizer, save_model
from jaxft.convert import hf
from jaxft.errors import InputError
from jaxft.trees import flatten
from tests.tiny_models import CONFIGS, hf_config, micro_logits, tiny_model

ROOT = Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path):
    """A tiny Llama in float32, in one file."""
    save_model(tmp_path / "model", *tiny_model("llama2"))
    return tmp_path / "model"


def assert_same_parameters(ours, theirs):
    ours, theirs = dict(flatten(ours)), dict(flatten(theirs))
    assert list(ours) == list(theirs)
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


# round trips


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_loads_bit_for_bit(name, tmp_path):
    model, params = tiny_model(name)
    save_model(tmp_path, model, params)
    again, loaded = load_model(tmp_path)
    assert again.config == model.config
    assert_same_parameters(loaded, params)


def test_model_in_shards_loads_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(hf, "CHUNK_BYTES", 1_000)  # a few rows at a time
    model, params = tiny_model("llama_bias")
    save_model(tmp_path, model, params)
    files = sorted(file.name for file in tmp_path.iterdir())
    shards = [file for file in files if file.startswith("model-")]
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for _, leaf in flatten(params))
    assert_same_parameters(load_model(tmp_path)[1], params)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_weights_of_any_float_type_are_cast_once(stored, asked, tmp_path):
    model, params = tiny_model("qwen2_tied")
    save_model(tmp_path, model, params, dtype=stored)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == stored
    _, loaded = load_model(tmp_path, dtype=jnp.dtype(asked))
    for path, leaf in flatten(loaded):
        assert leaf.dtype == asked
        expected = dict(flatten(params))[path].astype(stored).astype(asked)
        np.testing.assert_array_equal(leaf, expected, err_msg=path)


@pytest.mark.parametrize("name", ["llama_bias", "qwen2_tied", "qwen3_window_bias", "mistral_yarn", "gemma2", "gemma3"])
def test_transformers_loads_what_is_saved_with_equal_logits(name, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the reference needs torch")
    from scripts.compare_with_hf import reference_logits, reference_model

    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    model, params = tiny_model(name)
    save_model(tmp_path, model, params)
    logits, micro = micro_logits(model, params)
    assert np.abs(logits - reference_logits(reference_model(tmp_path), micro)).max() <= 1e-4


def test_tied_head_that_was_written_all_the_same_is_read_over(tmp_path):
    model, params = tiny_model("qwen2_tied")
    save_model(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    assert_same_parameters(load_model(tmp_path)[1], params)


def test_buffers_of_older_checkpoints_are_read_over(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, directory / "model.safetensors")
    assert_same_parameters(load_model(directory)[1], tiny_model("llama2")[1])


def test_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path / "model", *tiny_model("llama2"))
    assert list(tmp_path.iterdir()) == []


# bad input


def edit_config(directory, **fields):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def index_of(directory, text):
    (directory / INDEX).write_text(text)


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not a JSON object"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "config is not UTF-8": (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "is not a JSON object"),
    "unknown model_type": (
        lambda d: edit_config(d, model_type="mamba"),
        "model_type 'mamba' is not supported; supported: gemma, gemma2, ",
    ),
    "no model_type": (lambda d: edit_config(d, model_type=...), "model_type None is not supported"),
    "unsupported rope": (
        lambda d: edit_config(
            d, rope_parameters={"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}
        ),
        "rope type 'proportional' is not supported; supported: default, linear, llama3",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "empty weights": (lambda d: cut(d / "model.safetensors", 0), "is not a whole safetensors file"),
    "cut header": (lambda d: cut(d / "model.safetensors", 50), "is not a whole safetensors file"),
    "cut weights": (lambda d: cut(d / "model.safetensors", 40_000), "is not a whole safetensors file"),
    "garbage": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 5000), "is not a whole safetensors file"),
    "weights are a page of the web": (
        lambda d: (d / "model.safetensors").write_text("<!DOCTYPE html><html>Not found</html>"),
        "is not a whole safetensors file",
    ),
    "missing tensor": (
        lambda d: edit_tensors(d, lambda t: t.pop(Q)), f"1 tensors are missing, e.g. {Q}"
    ),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[Q]})),
        "1 tensors belong to no part of this model, e.g. model.layers.3.mlp.up_proj.weight",
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({Q: t[Q][:16].copy()})),
        rf"{Q} has shape \(16, 32\), config.json says \(32, 32\)",
    ),
    "wrong type": (
        lambda d: edit_tensors(d, lambda t: t.update({Q: t[Q].astype(np.int16)})), f"{Q} is I16; only F32, F16 and BF16"
    ),
    "fewer layers in the config": (lambda d: edit_config(d, num_hidden_layers=2), "9 tensors belong to no part"),
    "more layers in the config": (lambda d: edit_config(d, num_hidden_layers=4), "9 tensors are missing"),
    "index is not JSON": (lambda d: index_of(d, "{"), "is no index of shards"),
    "index without a map": (lambda d: index_of(d, "{}"), "is no index of shards"),
    "index names a missing file": (
        lambda d: index_of(d, json.dumps({"weight_map": {Q: "model-00001-of-00002.safetensors"}})),
        "names 1 files that are not there: model-00001-of-00002.safetensors",
    ),
    "tensor in two files": (
        lambda d: (
            shutil.copy(d / "model.safetensors", d / "b.safetensors"),
            index_of(d, json.dumps({"weight_map": {"x": "model.safetensors", "y": "b.safetensors"}})),
        ),
        "stands in another file too",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_damaged_directory_is_refused_with_what_was_seen(damage, directory):
    harm, message = BAD[damage]
    harm(directory)
    with pytest.raises(InputError, match=message):
        load_model(directory)


def test_names_that_are_nothing_are_refused(tmp_path):
    for name in (tmp_path / "gone", "./gone", "~/gone"):
        with pytest.raises(InputError, match="gone does not exist"):
            load_model(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"is a file; a model directory or a \.gguf file is needed"):
        load_model(tmp_path / "file")
    with pytest.raises(InputError, match="neither a directory here nor a name the hub could have"):
        load_model("a b/c")
    with pytest.raises(InputError, match="is no directory here, and the hub did not give it"):
        load_model("nobody/nothing")  # HF_HUB_OFFLINE is set: nothing is asked of the network


def test_directory_without_a_tokenizer_is_refused(directory):
    with pytest.raises(InputError, match="has no tokenizer that transformers can read"):
        load_tokenizer(directory)


# memory


BIG = {
    "vocab_size": 65_536,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
    "tie_word_embeddings": True,
}
LOADER = """
    import sys, time
    import jax, jax.numpy as jnp
    from jaxft import load_model
    jax.block_until_ready(jnp.zeros(8) + 1)
    print("ready", flush=True)
    sys.stdin.readline()
    model, params = load_model(sys.argv[1], dtype=jnp.dtype(sys.argv[2]))
    jax.block_until_ready(params)
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), flush=True)
    sys.stdin.readline()
"""


def write_sparse_model(directory: Path) -> tuple[int, int]:
    """A directory of 1 GB in bfloat16 zeros that takes no disk: (bytes of weights, bytes of the largest tensor)."""
    config = hf_config("llama2", **BIG)
    directory.mkdir()
    config.save_pretrained(directory)
    model = describe_model(config)
    header, at, largest = {}, 0, 0
    for name, shape in hf.expected_tensors(model.family.names, model.shapes).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at, largest = at + size, max(largest, size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at, largest


def private_bytes(pid: int) -> int:
    """Host memory that only this process holds; pages of mapped files do not count."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from Linux' /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_load_of_a_gigabyte_holds_little_beside_what_stays(dtype, tmp_path):
    weights, largest = write_sparse_model(tmp_path / "big")
    assert weights >= 1 << 30
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOADER), str(tmp_path / "big"), dtype],
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
        resident = int(line)
        assert resident == weights * jnp.dtype(dtype).itemsize // 2
        # on a CPU the parameters themselves are private memory
        assert peak - before < resident + 1.2 * largest
        assert private_bytes(process.pid) - before >= 0.9 * resident  # the measurement does see them
    finally:
        process.kill()
        process.wait()
