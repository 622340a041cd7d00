"""recipes/*.yaml: every key is accepted, and each recipe runs to its end on a tiny model with rows of its own kind."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxft import train
from jaxft.config import parse
from tests.forked_runs import devices
from tests.tiny_runs import CHATML, flags, lines_of, sums, write_base, write_rows

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# a turn's thought is shown in the last turn only, as Qwen3's template does
THINKING = CHATML.replace(
    "m.content +", "(m.reasoning_content + '|' if loop.last and m.reasoning_content else '') + m.content +"
)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}  # blocks of 4 bits fit
TINY = flags(max_length=64, max_steps=2, per_device_train_batch_size=1, save_steps=0, dataset_cache="none")
TEXT = [{"text": f"page {number}: " + "ab c" * (number % 23)} for number in range(60)]


def chat(n):
    """Two questions, each answered with a thought."""
    answers = [("one more", n + 1), ("two more", n + 3)]
    turns = [
        [
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": thought, "content": str(sum)},
        ]
        for question, (thought, sum) in zip((f"{n} + 1?", "and 2?"), answers, strict=True)
    ]
    return {"messages": [turn for pair in turns for turn in pair]}


ROWS = {"chat-with-thinking": [chat(n) for n in range(20)], "continued-pretraining": TEXT, "endless-stream": TEXT,
        "llama-3-8b-qlora-long-context": TEXT}  # fmt: skip


def content_of(recipe):
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The tiny bases by model_type, and rows for every recipe."""
    directory = tmp_path_factory.mktemp("recipes")
    for kind in ("qwen3", "llama3", "gemma3"):
        write_base(directory / kind, kind, template=THINKING, **SIZES)
    write_base(directory / "tied", "qwen3", template=THINKING, tie_word_embeddings=True, **SIZES)
    for recipe in RECIPES:
        write_rows(directory / f"{recipe.stem}.jsonl", ROWS.get(recipe.stem, sums(60)))
    write_rows(directory / "held.jsonl", sums(4, 60))
    return directory


def tiny(recipe, place):
    """The flags that make a recipe small, and nothing else of it other."""
    content = content_of(recipe)
    name = content["model_name_or_path"].lower()
    base = "gemma3" if "gemma" in name else "llama3" if "llama" in name else "tied" if "base" in name else "qwen3"
    rows = place / f"{recipe.stem}.jsonl"
    several = json.dumps([{**source, "path": str(rows)} for source in content["dataset"]]
                         if isinstance(content["dataset"], list) else [str(rows)])  # fmt: skip
    argv = ["--config", str(recipe), *TINY, *flags(model_name_or_path=place / base, dataset=several)]
    if "eval_dataset" in content:
        argv += flags(eval_dataset=place / "held.jsonl")
    return argv


def check(recipe, argv, directory):
    """The run took every setting of its recipe that no flag replaced, and its two losses are numbers."""
    losses = [line["loss"] for line in lines_of(directory) if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    written = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    replaced = {flag[2:].split("=")[0] for flag in argv if "=" in flag}
    for name in content_of(recipe).keys() - replaced:
        assert name in written["settings_given"], name
    adapter = not content_of(recipe).get("full_finetuning")
    assert (directory / ("adapter_model.safetensors" if adapter else "model.safetensors")).is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_key_of_a_recipe_is_a_setting_and_none_says_what_is_so_anyway(recipe):
    settings, provenance = parse("train", ["--config", str(recipe)])
    assert settings.model_name_or_path and settings.dataset and len(provenance) >= 3
    usual = {
        "lora_r", "lora_alpha", "learning_rate", "lr_scheduler_type", "max_length", "num_train_epochs", "train_on",
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    }  # fmt: skip
    assert content_of(recipe).keys() - provenance.keys() <= usual
    first, command = recipe.read_text(encoding="utf-8").split("python -m jaxft.train --config recipes/")
    assert first.startswith("# ") and command.startswith(recipe.name)


def test_there_is_a_recipe_for_every_kind_of_run():
    contents = {recipe.stem: content_of(recipe) for recipe in RECIPES}
    for setting in ("load_in_4bit", "full_finetuning", "mesh", "memory_budget", "streaming", "add_tokens",
                    "modules_to_save", "eval_dataset", "rank_pattern", "use_rslora", "use_dora",
                    "early_stopping_patience"):  # fmt: skip
        assert any(setting in content for content in contents.values()), setting
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {stem for stem in contents if f"`recipes/{stem}.yaml`" in page} == set(contents)


def test_a_recipe_runs_with_its_model_and_data_made_tiny(place, tmp_path):
    recipe = ROOT / "recipes" / "gemma-3-1b-lora.yaml"
    argv = tiny(recipe, place) + flags(output_dir=tmp_path / "run")
    assert train.main(argv) == 0
    check(recipe, argv, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("recipe", [one for one in RECIPES if "mesh" not in content_of(one)], ids=lambda one: one.stem)
def test_each_recipe_runs(recipe, place, tmp_path):
    argv = tiny(recipe, place) + flags(output_dir=tmp_path / "run")
    assert train.main(argv) == 0
    check(recipe, argv, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("recipe", [one for one in RECIPES if "mesh" in content_of(one)], ids=lambda one: one.stem)
def test_each_recipe_for_several_devices_runs(recipe, place, tmp_path):
    argv = tiny(recipe, place) + flags(output_dir=tmp_path / "run")
    eight = devices(8) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jaxft.train", *argv], env=os.environ | eight, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(recipe, argv, tmp_path / "run")
