"""What README says can be done is done: its script, its flags, its two lines, and the run without arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxft
from jaxft import train
from jaxft.config import parse, to_yaml
from jaxft.convert.__main__ import main as convert
from jaxft.settings import GROUPS
from tests.tiny_runs import lines_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EMBEDDED = Path(jaxft.__file__).parent / "embedded"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_two_lines_do_everything():
    lines = "".join(blocks("bash")).splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("python -m jaxft.train") and "pytest" in lines[1]


def test_every_flag_and_command_of_the_readme_exists(capsys):
    known = {field for groups in GROUPS.values() for group in groups for field in group.__annotations__} | {
        "help",
        "config",
    }
    for command in ("merge", "gguf", "quantize"):
        with pytest.raises(SystemExit):
            convert([command, "--help"])
        known |= set(re.findall(r"--([a-z][a-z_0-9]+)", capsys.readouterr().out))
    named = set(re.findall(r"--([a-z][a-z_0-9]+)", README))
    assert {"lora_r", "resume_from_checkpoint", "train_on"} <= named <= known
    for command in re.findall(r"python -m (jaxft\.\w+)", README):
        module = ROOT / command.replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), command
    for path in re.findall(r"`((?:jaxft|scripts|docs|tests)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_script_of_the_readme_runs_and_its_loss_falls(tmp_path, monkeypatch, capsys):
    (script,) = blocks("python")
    rows = (EMBEDDED / "problems_train.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for shown, here in (
        ("jaxft/embedded/problems_train.jsonl", tmp_path / "rows.jsonl"),  # the whole of it takes a minute
        ("my-adapter", tmp_path / "my-adapter"),
    ):
        assert script.count(f'"{shown}"') == 1
        script = script.replace(f'"{shown}"', f'"{here.as_posix()}"')
    monkeypatch.chdir(ROOT)
    exec(compile(script, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) >= 5 and losses[-1] < losses[0] - 0.2
    assert {entry.name for entry in (tmp_path / "my-adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_flags_win_over_the_embedded_settings_and_what_is_written_reads_back(tmp_path):
    settings, provenance = train.read_settings(["--learning_rate=0.5", "--warmup_ratio=0.1"])
    assert (settings.learning_rate, settings.warmup_ratio, settings.warmup_steps) == (0.5, 0.1, 0)
    assert settings.model_name_or_path == str(EMBEDDED / "base") and settings.sample_prompts == 3
    assert (provenance["learning_rate"], provenance["dataset"]) == ("flag", "embedded default")
    (tmp_path / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
    assert parse("train", ["--config", str(tmp_path / "config.yaml")])[0] == settings


@pytest.fixture
def first_run(tmp_path) -> tuple[Path, str, float]:
    """The directory in which `python -m jaxft.train` ran without arguments, what it said, and how busy the machine was:
    the run that .ci/run has done as README's first line, with nothing beside it, where there is one."""
    if "JAXFT_FIRST_RUN" in os.environ:
        said = Path(os.environ["JAXFT_FIRST_RUN_SAID"]).read_text(encoding="utf-8")
        return Path(os.environ["JAXFT_FIRST_RUN"]), said, 1.0
    command, environment = [sys.executable, "-m", "jaxft.train"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    return tmp_path, done.stderr, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.long
def test_without_arguments_the_held_out_loss_halves_and_peft_loads_the_adapter(first_run):
    directory, said, busy = first_run
    for word in ("prompt:", "before:", "after:"):
        assert len(re.findall(rf"^{word}", said, re.MULTILINE)) == 3
    assert said.splitlines()[-1] == "adapter written to runs/base-1"
    run = directory / "runs" / "base-1"
    evaluations = [line["eval_loss"] for line in lines_of(run) if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0] / 2
    seconds = (run / "config.yaml").stat().st_mtime - run.parent.stat().st_mtime  # written last, and when run was made
    assert 0 < seconds < 80 * busy, f"{seconds:.0f} s"  # the start before it takes less than another ten
    pytest.importorskip("peft", reason="the reference needs torch and peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "base")
    tuned = PeftModel.from_pretrained(base, run)
    assert sum("lora_B" in name and bool(p.any()) for name, p in tuned.named_parameters()) == 2 * 7
