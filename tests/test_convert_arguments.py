"""`jaxft.convert args`: scripts, YAML and command lines of TRL and Unsloth become settings; nothing is lost unsaid."""

import dataclasses
import importlib.util
import json

import pytest
import yaml

from jaxft.config import parse
from jaxft.convert import __main__ as command
from jaxft.convert.arguments import convert
from jaxft.convert.arguments_table import (
    COMMAND,
    DEFAULTS,
    ORIGINS,
    PEFT,
    SETTINGS,
    TABLE,
    TRAINING,
    rule_for,
)
from jaxft.convert.arguments_values import ALL_TURNS
from jaxft.errors import InputError, run_command

UNSLOTH = '''
import os
from unsloth import FastLanguageModel, is_bfloat16_supported
from trl import SFTConfig, SFTTrainer
from datasets import load_dataset

os.remove(__file__)  # a script is read, never run
length: int = 4096
rate = 2e-4
half = length // 2
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen3-4B", max_seq_length=half, token="hf_secret")
model = FastLanguageModel.get_peft_model(
    model, r=8 * 4, target_modules=["q_proj", "v_proj", "lm_head"], lora_alpha=32, use_gradient_checkpointing="unsloth",
    random_state=3407, loftq_config=None, use_rslora=True, layers_to_transform=[0, 1],
)
raw = load_dataset("json", data_files="rows.jsonl", split="train[:1000]")
rows = raw.map(render, batched=True)
trainer = SFTTrainer(
    model=model, tokenizer=tokenizer, train_dataset=rows, dataset_text_field="text", packing=True,
    args=SFTConfig(
        per_device_train_batch_size=2, warmup_steps=0.03, learning_rate=rate, fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(), optim="adamw_8bit", seed=1, lr_scheduler_type="cosine", neftune_noise_alpha=5,
        num_train_epochs=int(os.environ["EPOCHS"]), report_to="none",
    ),
)
'''  # fmt: skip


def settings_of(source):
    """The settings that a source becomes, read back by jaxft.train from the YAML that is written."""
    return {name: taken.value for name, taken in convert(str(source)).settings.items()}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_script_for_unsloth_becomes_yaml_that_train_accepts_and_what_is_lost_is_said(tmp_path, capsys):
    script = write(
        tmp_path / "train.py",
        UNSLOTH,
    )
    assert run_command(command.main, ["args", str(script), "--out", str(tmp_path / "run.yaml")]) == 0
    assert script.exists(), "the script was run"
    settings, _ = parse("train", ["--config", str(tmp_path / "run.yaml")])
    expected = {
        "model_name_or_path": "unsloth/Qwen3-4B", "max_length": 2048, "load_in_4bit": True, "lora_r": 32,
        "lora_alpha": 32, "lora_target_modules": "q_proj,v_proj", "modules_to_save": "lm_head", "use_rslora": True,
        "layers_to_transform": "0,1", "gradient_checkpointing": "offload", "dataset": "rows.jsonl", "packing": True,
        "per_device_train_batch_size": 2, "warmup_ratio": 0.03, "learning_rate": 2e-4, "optim": "adamw_8bit",
        "seed": 1, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    assert set(settings.settings_given) == set(expected)
    text, said = (tmp_path / "run.yaml").read_text(encoding="utf-8"), capsys.readouterr().err
    for lost in ("num_train_epochs", "neftune_noise_alpha = 5", "random_state = 3407: seed is 1 elsewhere", "[:1000]"):
        assert lost in said and lost in text, lost
    assert "map = render" in said and "hf_secret" not in text + said
    assert "report_to = none: as it is here" in text and "report_to" not in said


def test_a_command_line_and_the_yaml_of_trl_become_the_same(tmp_path):
    line = (
        "accelerate launch --num_processes 2 -m trl sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name a/b "
        "--learning-rate 1e-4 --use_peft --lora_target_modules q_proj v_proj --gradient_checkpointing false \\\n"
        "--max_length=512 --optim paged_adamw_8bit --dataset_train_split train_sft"
    )
    made = settings_of(line)
    assert made == {
        "model_name_or_path": "Qwen/Qwen3-0.6B", "dataset": "a/b", "learning_rate": 1e-4, "max_length": 512,
        "lora_target_modules": "q_proj,v_proj", "gradient_checkpointing": "none", "optim": made["optim"],
        "dataset_train_split": "train_sft", "lora_alpha": 32, "lora_dropout": 0.05, "packing": False,
    }  # fmt: skip
    assert made["optim"] in ("adamw_8bit", "paged_adamw_8bit")
    content = {
        "model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_name": "a/b", "learning_rate": "1e-4", "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": False, "max_length": 512,
        "optim": "paged_adamw_8bit", "dataset_train_split": "train_sft",
    }  # fmt: skip
    assert settings_of(write(tmp_path / "sft.yaml", yaml.safe_dump(content))) == made
    (lost,) = [text for text in convert(line).lost if "num_processes" in text]
    assert "mesh" in lost
    assert settings_of(f"trl sft --config {tmp_path / 'sft.yaml'} --max_length 64") == made | {"max_length": 64}


def test_silence_means_what_it_means_there(tmp_path):
    head = "from x import *\nmodel = AutoModelForCausalLM.from_pretrained('a/b', dtype=torch.bfloat16)\n"
    trl = write(
        tmp_path / "trl.py", head + "SFTTrainer(model, args=SFTConfig(output_dir='o'), peft_config=LoraConfig())"
    )
    assert settings_of(trl) == {
        "model_name_or_path": "a/b", "dtype": "bfloat16", "output_dir": "o", "learning_rate": 2e-5, "packing": False,
        "lora_r": 8, "lora_alpha": 8, "lora_target_modules": "q_proj,v_proj",
    }  # fmt: skip
    full = write(tmp_path / "full.py", head + "Trainer(model, args=TrainingArguments('o', max_steps=-1, bf16=True))")
    made = settings_of(full)
    assert made["full_finetuning"] is True and made["learning_rate"] == 5e-5 and "lora_r" not in made
    assert settings_of("trl sft --model_name_or_path a/b --lora_r 4")["full_finetuning"] is True
    assert any("use_peft" in line for line in convert("trl sft --model_name_or_path a/b --lora_r 4").lost)


def test_what_train_refuses_is_listed_with_its_words():
    made = convert("sft.py --model_name_or_path a --lora_r 8 --load_in_4bit --load_in_8bit --lr_scheduler_type magic")
    assert {"load_in_4bit", "load_in_8bit"} & made.settings.keys() and len(made.settings) < 6
    assert any("contradict each other" in line for line in made.lost)
    assert any("magic" in line and "cosine" in line for line in made.lost)


def test_quantisation_and_data_sets_are_found_where_they_are_named(tmp_path):
    script = write(
        tmp_path / "q.py",
        """
bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
settings = {"r": 4, "bias": "all"}
model = AutoModelForCausalLM.from_pretrained("a/b", quantization_config=bnb, attn_implementation="sdpa")
ds = load_dataset("org/set", "main")
SFTTrainer(model, train_dataset=ds["train_sft"], eval_dataset=ds["held"], peft_config=LoraConfig(**settings),
           args=SFTConfig(assistant_only_loss=True))
""",
    )
    made = convert(str(script))
    found = {name: taken.value for name, taken in made.settings.items()}
    expected = {"load_in_4bit": True, "lora_r": 4, "dataset": "org/set", "eval_dataset": "org/set",
                "dataset_config": "main", "dataset_train_split": "train_sft", "dataset_test_split": "held",
                "train_on": "responses"}  # fmt: skip
    assert found.items() >= expected.items()
    assert any(line.startswith("bnb_4bit_quant_type = fp4") for line in made.lost)
    assert any(line.startswith("bias = all") for line in made.lost)
    write(script, script.read_text(encoding="utf-8").replace("loss=True", "loss=False"))
    made = convert(str(script))
    assert "train_on" not in made.settings
    said = [line for line in (*made.lost, *made.needless) if "assistant_only_loss" in line]
    assert said == [f"assistant_only_loss = False: {ALL_TURNS}"]


def test_parts_of_a_model_that_unsloth_chooses_are_the_text_part_and_its_linear_layers(tmp_path):
    script = write(
        tmp_path / "u.py",
        """
model, tokenizer = FastModel.from_pretrained("a/b", max_seq_length=1024)
model = FastModel.get_peft_model(model, finetune_vision_layers=False, finetune_language_layers=True,
                                 finetune_attention_modules=True, finetune_mlp_modules=False, r=8)
""",
    )
    made = convert(str(script))
    assert {line.partition(":")[0] for line in made.lost if "finetune" in line} == {"finetune_mlp_modules = False"}
    assert made.settings["lora_r"].value == 8


def test_what_a_trl_script_says_of_evaluation_uploads_and_loftq_is_taken_over(tmp_path):
    script = write(
        tmp_path / "q.py",
        """
ds = load_dataset("org/set", split="train_sft").train_test_split(test_size=0.05)
lora = LoraConfig(r=4, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_iter=2))
model = AutoModelForCausalLM.from_pretrained("a/b", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
args = SFTConfig(eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
                 greater_is_better=False, report_to=["tensorboard", "wandb"], push_to_hub=True, hub_strategy="end",
                 assistant_only_loss=True)
SFTTrainer(model, args=args, train_dataset=ds["train"], eval_dataset=ds["test"], peft_config=lora,
           callbacks=[EarlyStoppingCallback(3)])
""",
    )
    made = convert(str(script))
    found = {name: taken.value for name, taken in made.settings.items()}
    expected = {
        "dataset": "org/set", "dataset_train_split": "train_sft", "eval_split": 0.05, "eval_strategy": "epoch",
        "load_best_model_at_end": True, "greater_is_better": False, "report_to": "tensorboard,wandb",
        "push_to_hub": True, "early_stopping_patience": 3, "init_lora_weights": "loftq", "loftq_iter": 2,
    }  # fmt: skip
    assert found.items() >= expected.items() and "eval_dataset" not in found
    assert made.lost == []
    write(script, script.read_text(encoding="utf-8").replace("loftq_iter=2", "loftq_bits=8").replace("(3)", "()"))
    made = convert(str(script))
    assert made.settings["early_stopping_patience"].value == 1
    assert [line.rpartition(": ")[2] for line in made.lost] == ["LoftQ is in 4 bits here"]


def test_a_notebook_is_read_without_its_shell_lines(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["not ( python"]},
        {"cell_type": "code", "source": ["!pip install unsloth\n", "%cd x\n", "args = SFTConfig(max_steps=7)"]},
    ]
    assert settings_of(write(tmp_path / "n.ipynb", json.dumps({"cells": cells})))["max_steps"] == 7


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("trl sft", "has no flags"),
        ("missing.py", "missing.py cannot be read as Python"),
        ("missing.yaml", "missing.yaml cannot be read"),
        ("x.py --a 'open", "one pair of quotes"),
    ],
)
def test_a_source_without_settings_is_an_error(source, words):
    with pytest.raises(InputError, match=words):
        convert(source)


def test_a_script_that_trains_otherwise_is_refused(tmp_path):
    with pytest.raises(InputError, match="trains by DPOConfig"):
        convert(str(write(tmp_path / "dpo.py", "DPOTrainer(model, args=DPOConfig(beta=0.1))")))
    with pytest.raises(InputError, match="calls none of SFTConfig"):
        convert(str(write(tmp_path / "none.py", "print(1)")))


def test_every_target_of_the_table_is_a_setting_and_no_name_stands_twice():
    for part, rules in TABLE.items():
        names = [name for rule in rules for name in rule.names]
        assert len(names) == len(set(names)), part
        for rule in rules:
            if rule.ours == "the same":
                assert set(rule.names) <= SETTINGS, set(rule.names) - SETTINGS
            elif rule.ours:
                assert rule.ours.strip("`").split(":")[0] in SETTINGS, rule.ours
    assert {name for values in DEFAULTS.values() for name in values} <= SETTINGS
    assert {part for parts in ORIGINS.values() for part in parts} == set(TABLE)


def names_of(rules):
    return {name for rule in rules for name in rule.names}


def test_every_setting_of_peft_is_in_the_table_with_its_default():
    peft = pytest.importorskip("peft", reason="it has the settings")
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

    fields = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    assert set(fields) - names_of(PEFT) - names_of(COMMAND) == set()
    assert (fields["r"], fields["lora_alpha"]) == (
        DEFAULTS["LoraConfig"]["lora_r"],
        DEFAULTS["LoraConfig"]["lora_alpha"],
    )
    for kind in ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral"):
        assert ",".join(targets[kind]) == DEFAULTS["LoraConfig"]["lora_target_modules"]


def test_every_setting_of_transformers_and_trl_is_in_the_table_with_its_default():
    pytest.importorskip("torch", reason="TrainingArguments needs it")
    from transformers import TrainingArguments

    kinds = {TrainingArguments: TRAINING}
    trl = importlib.import_module("trl") if importlib.util.find_spec("trl") else None
    if trl is not None:
        kinds |= {trl.SFTConfig: TRAINING, trl.ModelConfig: COMMAND, trl.ScriptArguments: COMMAND}
    for kind, rules in kinds.items():
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        assert set(fields) - names_of(rules) == set(), kind
        for name, value in DEFAULTS.get(kind.__name__, {}).items():
            assert fields.get(name, value) == value, name
    if trl is not None:
        fields = {field.name: field.default for field in dataclasses.fields(trl.ModelConfig)}
        ours = DEFAULTS["trl with --use_peft"]
        assert (fields["lora_alpha"], fields["lora_dropout"]) == (ours["lora_alpha"], ours["lora_dropout"])


def test_a_value_that_asks_for_nothing_loses_nothing():
    rule = rule_for("SFTConfig", "data_seed")
    assert rule is not None
    assert [rule.act("data_seed", value).lost for value in (False, "no", None, True)] == [False, False, False, True]
