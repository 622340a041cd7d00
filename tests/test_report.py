"""report.html and jaxft.compare: what is on the page was computed in the run, nothing is asked of the network, and the
lines to copy work."""

import html
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft import compare, evaluate, generate, train
from jaxft.errors import InputError
from jaxft.plots import HEIGHT, MOST, Curve, chart, histogram, short, thinned, ticks
from jaxft.report import first_figures, written
from tests.tiny_runs import flags, lines_of, sums, write_base, write_rows

ROOT = Path(__file__).parent.parent
RUN = flags(
    max_length=64, per_device_train_batch_size=8, learning_rate=0.01, gradient_checkpointing="none", lora_r=4,
    max_steps=6, eval_steps=2, sample_prompts=2, eval_metric="gsm8k", eval_max_new_tokens=6, save_steps=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    write_base(directory / "base")
    write_rows(directory / "train.jsonl", sums(40))
    rows = sums(8, 40)
    rows[0]["question"] += " <b>&amp;"
    write_rows(directory / "held.jsonl", rows)
    return directory


def run(place, name, *argv, **settings) -> Path:
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", eval_dataset=place / "held.jsonl")
    assert train.main([*RUN, *named, f"--output_dir={place / name}", *argv, *flags(**settings)]) == 0
    return place / name


@pytest.fixture(scope="module")
def first(place) -> Path:
    return run(place, "first")


def page_of(directory: Path) -> str:
    return (directory / "report.html").read_text(encoding="utf-8")


def texts_of(page: str) -> str:
    """What a reader of the page sees."""
    return html.unescape(re.sub(r"<[^>]*>", "\n", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def assert_self_contained(page: str) -> None:
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|\bsrc=|\bhref=|url\(|@import|https?://", page)


def code_of(page: str, tool: str) -> str:
    (found,) = re.findall(rf'<pre data-tool="{re.escape(tool)}">(.*?)</pre>', page, re.DOTALL)
    return html.unescape(found)


# The report


def test_the_report_asks_nothing_of_the_network_and_shows_text_as_text(first):
    page = page_of(first)
    assert_self_contained(page)
    assert "&lt;b&gt;&amp;amp;" in page and "<b>&amp;" not in page


def test_the_report_tells_settings_data_samples_and_figures_of_this_run(first, place):
    page, seen = page_of(first), texts_of(page_of(first))
    lines = lines_of(first)
    evaluations, steps = ([line for line in lines if name in line] for name in ("eval_loss", "loss"))
    for words in (f"{evaluations[-1]['eval_loss']:.4f}", f"{evaluations[0]['eval_loss']:.4f} before",
                  f"{steps[-1]['loss']:.4f}", f"{sum(line['target_tokens'] for line in steps):,} targets"):  # fmt: skip
        assert words in seen, words
    assert "train: format: question/answer (40 rows)" in seen and "packed: " in seen
    for row in (
        'learning_rate</td><td class="value">0.01</td><td class="">flag',
        "eval_steps</td>",
        "weight_decay</td>",
    ):
        assert row in page, row
    samples = [json.loads(line) for line in (first / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [0, 2, 4, 6]
    for step in (0, -1):
        assert all(sample["answer"].strip() in seen for sample in samples[step]["samples"])
    assert page.count('class="sample"') == 2
    assert "MFU" not in seen and "GiB" not in seen  # a CPU tells neither


def test_every_curve_has_a_point_for_every_line_it_is_made_of(first):
    drawn = dict(re.findall(r'aria-label="([^"]*)">(.*?)</svg>', page_of(first), re.DOTALL))
    lines = {title: re.search(r'<polyline[^>]*points="([^"]*)"', svg) for title, svg in drawn.items()}
    counts = {title: len(found[1].split()) for title, found in lines.items() if found}
    assert counts == {
        "Loss": 6, "Answers: gsm8k": 4, "Held-out perplexity": 4, "Learning rate": 6,
        "Gradient norm, before clipping": 6, "Tokens a second": 6,
    }  # fmt: skip
    heights = [float(place.split(",")[1]) for place in re.search(r'points="([^"]*)"', drawn["Loss"])[1].split()]
    losses = [line["loss"] for line in lines_of(first) if "loss" in line]
    assert np.corrcoef(heights, losses)[0, 1] == pytest.approx(-1, abs=1e-3)  # higher is further up


@pytest.mark.long
def test_a_run_without_evaluations_has_a_report_of_what_there_is(place):
    argv = [*flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", output_dir=place / "bare")]
    assert train.main([*argv, *flags(max_length=64, max_steps=2, gradient_checkpointing="none", lora_r=4)]) == 0
    seen = texts_of(page_of(place / "bare"))
    assert "training loss" in seen and "held-out" not in seen and "Before and after" not in seen


def test_the_first_figures_are_those_of_the_result_and_no_other_step():
    steps = [{"step": n, "epoch": n / 4, "loss": 3.0 - n, "target_tokens": 5, "tokens_per_second": 10.0 * n,
              "step_seconds": 2.0, "mfu": 0.25, "peak_memory_bytes": n << 30} for n in (1, 2)]  # fmt: skip
    evaluations = [{"step": n, "eval_loss": loss, "eval_gsm8k": n / 10} for n, loss in ((0, 2.0), (1, 1.0), (2, 1.5))]
    assert first_figures(steps, evaluations, 1) == [
        ("held-out loss", "1.0000", "2.0000 before"), ("gsm8k", "0.1000", "0.0000 before"),
        ("training loss", "1.0000", "2.0000 at step 1"), ("steps", "2", "result of step 1"),
        ("time in steps", "0:04", "10 targets"), ("tokens a second", "15", "MFU 25.0%"),
        ("peak memory", "2.00 GiB", "of one device"),
    ]  # fmt: skip
    assert first_figures([], [], 0) == []


def test_settings_are_written_as_they_are_typed():
    assert [written(v) for v in (None, True, 2e-4, 0.1 + 0.2, {}, "x", 3)] == [
        "–", "true", "0.0002", "0.30000000000000004", "–", "x", "3",
    ]  # fmt: skip


def test_the_lines_for_peft_give_the_tuned_model(first, place, capsys):
    torch = pytest.importorskip("torch", reason="PEFT needs torch")
    pytest.importorskip("peft", reason="the lines are PEFT's")
    names: dict = {}
    exec(code_of(page_of(first), "PEFT"), names)
    model = names["model"].eval()
    rows = [json.loads(line) for line in (place / "held.jsonl").read_text().splitlines()]
    capsys.readouterr()
    named = flags(model_name_or_path=place / "base", adapter=first, dataset=place / "held.jsonl", max_length=64)
    assert evaluate.main(named) == 0
    expected = json.loads(capsys.readouterr().out)["loss"]
    assert expected == lines_of(first)[-1]["eval_loss"]
    from jaxft.data import load_rows, tokenize_dataset
    from tests.tiny_runs import V, make_tokenizer

    samples = tokenize_dataset(load_rows(str(place / "held.jsonl")), make_tokenizer(), max_length=64, vocab_size=V)[0]
    total = count = 0.0
    for sample in (samples[number] for number in range(len(rows))):
        ids = torch.tensor(sample.input_ids.astype(np.int64))[None]
        labels = torch.where(torch.tensor(sample.loss_weights)[None] != 0, ids, -100)
        targets = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * targets
        count += targets
    assert total / count == pytest.approx(expected, rel=1e-5)


def test_the_line_for_jaxft_answers(first, capsys):
    words = shlex.split(code_of(page_of(first), "jaxft"))
    assert words[:3] == ["python", "-m", "jaxft.generate"]
    capsys.readouterr()
    assert generate.main([*words[3:], "--max_new_tokens=8"]) == 0
    assert capsys.readouterr().out


@pytest.mark.long
def test_lines_for_other_tools_merge_first_where_they_cannot_take_the_adapter(first, place):
    page = page_of(first)
    base, out = place / "base", first
    assert code_of(page, "vLLM") == (f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules tuned={out}")
    gguf = f"python -m jaxft.convert gguf {base} {out.name}.gguf --quant q4_k_m --adapter {out}"
    assert code_of(page, "llama.cpp").splitlines()[0] == gguf
    saved = page_of(run(place, "saved", modules_to_save="lm_head", max_steps=1, eval_steps=0, eval_strategy="no"))
    assert code_of(saved, "vLLM").splitlines()[-1] == f"vllm serve {place / 'saved'}-merged"
    full = ["--full_finetuning", *flags(max_steps=1, gradient_checkpointing="none", max_length=64)]
    full += flags(model_name_or_path=base, dataset=place / "train.jsonl", output_dir=place / "full")
    assert train.main(full) == 0
    assert code_of(page_of(place / "full"), "vLLM") == f"vllm serve {place / 'full'}"
    assert "AutoModelForCausalLM" in code_of(page_of(place / "full"), "transformers")


@pytest.mark.long
def test_the_report_is_legible_in_a_real_browser_in_light_and_dark(first, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="the picture is read with Pillow")
    from scripts import screenshots

    if screenshots.browser() is None:
        pytest.skip("no chromium on this machine")
    for dark, back, curve in ((False, (255, 255, 255), (43, 108, 176)), (True, (21, 23, 27), (108, 171, 238))):
        picture = tmp_path / f"{dark}.png"
        screenshots.page(first / "report.html", picture, dark=dark, height=2000, colours=None)
        pixels = np.asarray(image.open(picture).convert("RGB"))
        assert pixels.shape[:2] == (2000, 1180)
        assert (pixels == back).all(-1).mean() > 0.8
        assert (np.abs(pixels.astype(int) - curve).max(-1) < 12).sum() > 300  # the first curve's colour
        rows = (pixels != back).any(-1).any(1)
        assert rows[:200].any() and rows[1200:].any()


# Plots


def test_ticks_are_round_numbers_inside_the_range():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(1.77, 2.9) == pytest.approx([1.8, 2.0, 2.2, 2.4, 2.6, 2.8])
    assert ticks(0, 88, 6) == [0, 20, 40, 60, 80] and ticks(3, 3) == [3]
    assert [short(v) for v in (0, 0.25, 1200, 81000, 2.5e6, 2e-5, 5e-4)] == [
        "0", "0.25", "1,200", "81k", "2.5M", "2e-05", "0.0005",
    ]  # fmt: skip


def test_long_curves_keep_their_extremes_and_their_mean():
    values = np.random.default_rng(0).normal(size=50 * MOST)
    rows, banded = thinned(list(enumerate(values)))
    assert banded and len(rows) == MOST
    assert (rows[:, 1].min(), rows[:, 3].max()) == (values.min(), values.max())
    assert rows[:, 2].mean() == pytest.approx(values.mean())
    assert 'class="band c0"' in chart("x", [Curve("a", list(enumerate(values)))])


def test_what_is_not_finite_is_not_drawn_and_flat_lines_are():
    assert chart("x", [Curve("a", [(1, math.nan)])]) == "" == chart("x", []) == histogram("x", np.zeros(0), x_name="n")
    for curve in ([(1, 0.0), (2, 0.0)], [(1, 3.0)], [(1, -2.0), (2, -2.0)], [(1, 1e-300), (2, 1e-300)]):
        for from_zero in (False, True):
            drawn = chart("x", [Curve("a", curve)], from_zero=from_zero)
            heights = [float(y) for y in re.findall(r'\bc?y[12]?="([\d.-]+)"', drawn)]
            assert "nan" not in drawn and heights and all(0 <= y <= HEIGHT for y in heights)


def test_a_histogram_counts_every_value_once():
    values = np.random.default_rng(0).integers(1, 400, 1000)
    drawn = histogram("x", values, x_name="tokens", limit=512)
    assert sum(map(int, re.findall(r"<title>(\d+) of", drawn))) == 1000 and "max_length" in drawn


# Compare


def test_runs_are_compared_on_one_page(first, place, tmp_path, capsys):
    second = run(place, "second", learning_rate=0.02, max_steps=4, eval_steps=2)
    capsys.readouterr()
    output = tmp_path / "both.html"
    assert compare.main([str(first), str(second), f"--output={output}"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    page = output.read_text(encoding="utf-8")
    assert_self_contained(page)
    assert '<td class="value">learning_rate</td><td class="value">0.01</td><td class="value">0.02</td>' in page
    assert '<td class="value">lora_r</td>' not in page and "other settings are the same" in page
    loss = re.search(r'aria-label="Training loss">(.*?)</svg>', page, re.DOTALL)[1]
    assert [len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', loss)] == [6, 4]
    seen = texts_of(page)
    for directory in (first, second):
        assert f"{lines_of(directory)[-1]['eval_loss']:.4f}" in seen and directory.name in seen


def test_what_cannot_be_compared_is_refused(first, place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    for runs, words in (
        ([first], "1 runs named; 2 to 8"),
        ([first, first], "one run is named twice"),
        ([first, place], "has no metrics.jsonl; name the output directory of a run"),
        ([first, tmp_path / "empty"], "has no line yet"),
        ([first, "--colour"], "unrecognized arguments|required"),
    ):
        with pytest.raises(InputError, match=words):
            compare.main(list(map(str, runs)))


def test_a_run_that_still_goes_is_compared_by_its_curves(first, tmp_path):
    going = tmp_path / "going"
    going.mkdir()
    (going / "metrics.jsonl").write_bytes((first / "metrics.jsonl").read_bytes())
    assert compare.main([str(first), str(going), f"--output={tmp_path / 'x.html'}"]) == 0
    assert "so not in this table" in (tmp_path / "x.html").read_text(encoding="utf-8")


# Reporters


def test_a_missing_package_is_a_clear_error_before_anything_is_loaded(place, monkeypatch):
    monkeypatch.setattr("jaxft.reporters.find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        with pytest.raises(
            InputError, match=rf"--report_to {name} needs the package {package}, .*pip install 'jaxft\[report"
        ):
            run(place, "missing", report_to=name)
    assert not (place / "missing").exists()


def events_of(directory: Path) -> list:
    """The events of all files of a TensorBoard directory (TFRecord: length, its CRC, the event, its CRC)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += size + 16
    return found


@pytest.mark.long
def test_tensorboard_has_every_line_and_a_resumed_run_takes_back_what_it_makes_anew(place):
    pytest.importorskip("tensorboardX", reason="the writer of event files is optional")
    out = run(place, "board", report_to="tensorboard", save_steps=2, max_steps=4)
    scalars = [(value.tag, event.step, value.simple_value) for event in events_of(out / "tensorboard")
               for value in event.summary.value if value.HasField("simple_value")]  # fmt: skip
    expected = [(line["step"], np.float32(line["loss"])) for line in lines_of(out) if "loss" in line]
    assert [(step, value) for tag, step, value in scalars if tag == "train/loss"] == expected
    assert [step for tag, step, _ in scalars if tag == "eval/gsm8k"] == [0, 2, 4]
    texts = [event.step for event in events_of(out / "tensorboard") for value in event.summary.value
             if value.tag.startswith("samples/1")]  # fmt: skip
    assert texts == [0, 2, 4]
    run(
        place,
        "board",
        report_to="tensorboard",
        save_steps=2,
        max_steps=4,
        resume_from_checkpoint=out / "checkpoints" / "2",
    )
    starts = [event.step for event in events_of(out / "tensorboard") if event.HasField("session_log")]
    assert starts == [0, 3]


OFFLINE = """
import sys
from jaxft.train import main
assert not {"wandb", "tensorboardX"} & sys.modules.keys()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_wandb_works_offline_and_nothing_imports_it_unasked(place):
    pytest.importorskip("wandb", reason="Weights & Biases is optional")
    named = flags(model_name_or_path=place / "base", dataset=place / "train.jsonl", eval_dataset=place / "held.jsonl")
    argv = [*RUN, *named, *flags(output_dir=place / "wandb", report_to="wandb", max_steps=2)]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-c", OFFLINE, *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (offline,) = (place / "wandb" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb")) and (place / "wandb" / "report.html").exists()
