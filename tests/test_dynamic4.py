"""`quantize`: what it writes transformers loads, what --dynamic keeps is worth it, and bad input is refused by name."""

import json
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import load_model, load_tokenizer, save_model
from jaxft.convert import dynamic, hf
from jaxft.convert.__main__ import main
from jaxft.convert.calibration import read_calibration
from jaxft.convert.dynamic import Score
from jaxft.errors import InputError, RunError
from jaxft.load import EMBEDDED
from jaxft.loss import sft_loss
from jaxft.models.quantized import linear_weights
from jaxft.quant import is_quantized
from jaxft.trees import flatten
from tests.tiny_models import tiny_model
from tests.tiny_runs import sums, write_base, write_rows

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
CALIBRATION = str(EMBEDDED / "problems_train.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model directory in float32 with a tokenizer, and calibration rows beside it."""
    directory = write_base(tmp_path_factory.mktemp("dynamic") / "base", **SIZES)
    write_rows(directory.parent / "calibration.jsonl", sums(60))
    return directory


def quantized(base: Path, name: str, *argv: str) -> Path:
    out = base.parent / name
    assert main(["quantize", str(base), str(out), *argv]) == 0
    return out


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("bits, kind", [(4, "nf4"), (8, "int8")])
def test_plain_quantisation_writes_what_saving_a_quantised_model_writes(bits, kind, base, tmp_path, capsys):
    out = quantized(base, f"plain{bits}", "--bits", str(bits), "--dtype", "float32")
    save_model(tmp_path / "saved", *load_model(base, quantization=kind))
    ours, saved = tensors_of(out), tensors_of(tmp_path / "saved")
    assert ours.keys() == saved.keys()
    assert all(np.array_equal(ours[name], saved[name]) for name in saved)
    config, expected = (json.loads((d / "config.json").read_text()) for d in (out, tmp_path / "saved"))
    assert config == expected
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    state = sum(a.nbytes for name, a in ours.items() if "quant_state" in name)
    assert found["bytes_plain"] == sum(a.nbytes for a in ours.values()) - state


def test_a_dynamic_directory_keeps_within_its_budget_and_loads_with_its_choice(base, capsys):
    calibration = base.parent / "calibration.jsonl"
    out = quantized(base, "dynamic", "--dynamic", "--calibration", str(calibration), "--budget", "+30%")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["bytes"] - found["bytes_plain"] <= found["budget"] == int(0.3 * found["bytes_plain"])
    model, params = load_model(out, dtype=jnp.bfloat16)
    record = json.loads((out / "quantization.json").read_text(encoding="utf-8"))
    kept = {row["module"] for row in record["linear_layers"] if row["kept"]}
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert kept == set(skipped) - {"lm_head"} and len(kept) == found["kept"] > 0
    assert all(row[score] > 0 for row in record["linear_layers"] for score in dynamic.SCORES)
    leaves, where = dict(flatten(params)), hf.places(model.family.names, model.shapes)
    for name in linear_weights(model):
        assert is_quantized(leaves[where[name].path]) == (name.removesuffix(".weight") not in kept)
    table = (out / "quantization.md").read_text(encoding="utf-8").splitlines()
    assert sum("| 16 bits |" in line for line in table) == len(kept)
    assert len([line for line in table if line.startswith("| model.layers.")]) == len(record["linear_layers"]) == 14
    if find_spec("matplotlib"):
        assert (out / "quantization.png").read_bytes()[1:4] == b"PNG"
    assert (out / "tokenizer.json").is_file() and "16 bits" not in (out / "README.md").read_text()


def test_transformers_with_bitsandbytes_loads_it_and_computes_the_same(base, capsys):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    pytest.importorskip("bitsandbytes", reason="the reference needs bitsandbytes")
    from transformers import AutoModelForCausalLM

    argv = ["--dynamic", "--budget", "+30%", "--dtype", "float32"]
    out = quantized(base, "for-transformers", *argv)
    assert 0 < json.loads(capsys.readouterr().out.splitlines()[-1])["kept"] < 14
    # bitsandbytes computes evaluation on a CPU in bfloat16 where the CPU can; there is no dropout in these models
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).train()
    kinds = {type(module).__name__ for name, module in theirs.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear", "Linear4bit"}
    tokens = np.arange(3, 27, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()
    model, params = load_model(out)
    decoder = model.bind(params)
    ours = decoder.logits(decoder(tokens, np.ones_like(tokens), np.arange(24, dtype=np.int32)[None]))
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def planted(target: Path) -> Path:
    """The embedded base with outlier channels: some values ×40, and what they are multiplied with / 40, so that the
    function is the same; four columns of every block of 64 in the first layer's o_proj."""
    tensors = {name: array.astype(np.float32) for name, array in tensors_of(EMBEDDED / "base").items()}
    down = "model.layers.0.self_attn.o_proj.weight"
    up = "model.layers.0.self_attn.v_proj.weight"
    channels = np.arange(5, 64, 16)  # of each head, of which two read the same values
    columns = np.concatenate([64 * head + channels for head in range(4)])
    tensors[down][:, columns] *= 40
    tensors[up][np.concatenate([64 * head + channels for head in range(2)])] /= 40
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((EMBEDDED / "base" / name).read_bytes())
    return target


@pytest.mark.long  # predictions of fourteen models, and three losses
def test_on_planted_outliers_a_tenth_more_bytes_closes_most_of_the_held_out_loss_that_plain_loses(tmp_path, capsys):
    directory = planted(tmp_path / "planted")
    quantized(directory, "plain")
    dynamic = quantized(directory, "dynamic", "--dynamic", "--calibration", CALIBRATION, "--budget", "+10%")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "dynamic")]
    assert sizes[1] <= 1.1 * sizes[0]
    batches, _ = read_calibration(
        str(EMBEDDED / "problems_heldout.jsonl"), load_tokenizer(directory), positions=1024, vocab_size=1024
    )

    def loss(name: str) -> float:
        model, params = load_model(tmp_path / name)
        run = jax.jit(lambda params, batch: sft_loss(model.bind(params), batch, None))
        sums = [run(params, {key: array[0] for key, array in batch.items()}) for batch in batches]
        total, weight = np.sum(sums, axis=0)
        return float(total / weight)

    exact, plain, kept = (loss(name) for name in ("planted", "plain", "dynamic"))
    assert plain - exact > 0.02  # the outliers cost something
    assert plain - kept >= 0.6 * (plain - exact)
    assert found["kept"] >= 1 and dynamic.is_dir()


@pytest.fixture
def most_alive(monkeypatch):
    """The bytes of arrays on the device whenever a tensor is read, quantised or put in its place; what was before."""
    earlier, seen = jax.live_arrays(), [0]  # held here: what other tests left is not collected meanwhile
    before = sum(array.nbytes for array in earlier)

    def watched(function):
        def run(*arguments):
            result = jax.block_until_ready(function(*arguments))
            seen.append(sum(array.nbytes for array in jax.live_arrays()) - before)
            return result

        return run

    for name in ("write_rows", "quantize_matrix", "_write_leaf"):
        monkeypatch.setattr(hf, name, watched(getattr(hf, name)))
    yield seen
    del earlier


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loading_holds_the_quantised_model_and_at_most_two_tensors(kind, base, most_alive):
    _, params = load_model(base, quantization=kind)
    held = sum(array.nbytes for array in jax.tree.leaves(params))
    largest = max(array.nbytes for array in tensors_of(base).values())
    assert held - 1000 < most_alive[-1] and max(most_alive) <= held + 2 * largest
    assert len(most_alive) > 3 * 14


def test_quantising_files_holds_at_most_two_tensors(base, most_alive):
    quantized(base, "watched", "--dynamic")
    largest = max(array.nbytes for array in tensors_of(base).values())
    assert 0 < max(most_alive) <= 2 * largest


def scores(values: list[float], sizes: list[int]) -> list[Score]:
    return [Score(f"{i}", value, None, None, size) for i, (value, size) in enumerate(zip(values, sizes, strict=True))]


def test_the_choice_is_the_best_subset_that_fits():
    random = np.random.default_rng(0)
    for budget in (0, 40, 100, 173):
        few = scores(random.uniform(0.1, 1, 8).tolist(), random.integers(5, 60, 8).tolist())
        subsets = [[few[i] for i in range(8) if bits >> i & 1] for bits in range(256)]
        fitting = [part for part in subsets if sum(score.bytes for score in part) <= budget]
        best = max(sum(score.weight for score in part) for part in fitting)
        kept = dynamic.choose(few, budget, "weight")
        chosen = [score for score in few if score.name in kept]
        assert sum(score.bytes for score in chosen) <= budget
        assert sum(score.weight for score in chosen) == pytest.approx(best)
    assert dynamic.choose(scores([1.0, 0.0], [7, 1]), 10**9, "weight") == ("0",)  # what loses nothing is not kept


@pytest.mark.parametrize("text, expected", [("+10%", 100), ("12.5 %", 125), ("+2KiB", 2048), ("1.5MB", 1_500_000)])
def test_a_budget_is_a_share_or_bytes(text, expected):
    assert dynamic.parse_budget(text, 1000) == expected


BAD = {
    "--budget 'ten': expected a share such as +10%": ["--dynamic", "--budget", "ten"],
    "--budget has a meaning with --dynamic only": ["--budget", "+10%"],
    "--by output needs --calibration": ["--dynamic", "--by", "output"],
    "is too short: 36 tokens, at least 1024": ["--dynamic", "--calibration", "SHORT"],
    "cannot be read as text": ["--dynamic", "--calibration", "BINARY"],
    "no-such.jsonl": ["--dynamic", "--calibration", "./no-such.jsonl"],
    "all linear layers fit the budget": ["--dynamic", "--budget", "+900%"],
    "invalid choice: 3": ["--bits", "3"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name_and_leaves_nothing(message, base, tmp_path):
    (tmp_path / "short.txt").write_text("Too few words to say anything here.", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    names = {"SHORT": str(tmp_path / "short.txt"), "BINARY": str(tmp_path / "binary.txt")}
    with pytest.raises(InputError) as refusal:
        main(["quantize", str(base), str(tmp_path / "out"), *(names.get(word, word) for word in BAD[message])])
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_quantised_model_a_full_directory_and_values_that_are_not_finite_are_refused(base, tmp_path):
    four = quantized(base, "again")
    with pytest.raises(InputError, match="quantised already; name the model in 16 or 32 bits"):
        main(["quantize", str(four), str(tmp_path / "out")])
    with pytest.raises(InputError, match="is not empty; name a new directory"):
        main(["quantize", str(base), str(four)])
    model, params = tiny_model("llama2", **SIZES)
    params["layers"]["0"]["mlp"]["up_proj"]["weight"] *= jnp.nan
    save_model(tmp_path / "nan", model, params)
    with pytest.raises(RunError, match=r"up_proj.weight: its weight error in nf4 is nan"):
        main(["quantize", str(tmp_path / "nan"), str(tmp_path / "out"), "--dynamic"])
