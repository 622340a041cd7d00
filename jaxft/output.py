"""The output directory of a run: chosen at the start, filled at the end with what other programs load."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.config import TrainSettings, to_yaml
from jaxft.convert import hf, peft
from jaxft.errors import InputError
from jaxft.load import copy_tokenizer, write_model
from jaxft.prepare import Prepared
from jaxft.trees import Tree

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"


def choose_directory(settings: TrainSettings, model_name: str) -> Path:
    """`--output_dir`, or a new runs/MODEL-N. Raises InputError where it holds another run and nothing says resume."""
    if settings.output_dir is None:
        if settings.resume_from_checkpoint == "auto":
            raise InputError("--resume_from_checkpoint auto needs --output_dir, the directory of the run to go on with")
        name = Path(model_name).name or "model"
        number = 1
        while (directory := Path("runs") / f"{name}-{number}").exists():
            number += 1
        return directory
    directory = Path(settings.output_dir).expanduser()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir {directory} is a file")
    if directory.is_dir() and any(directory.iterdir()) and settings.resume_from_checkpoint is None:
        raise InputError(
            f"--output_dir {directory} is not empty; name a new one, or go on with its run by "
            "--resume_from_checkpoint auto"
        )
    return directory


def write_result(directory: Path, prepared: Prepared, trainable: Tree, settings: TrainSettings, card: str) -> None:
    """The tuned adapter (PEFT's layout) or model, tokenizer, model card and config.yaml; nothing half made is left."""
    model = prepared.model
    with hf.whole_directory(directory) as temporary:
        if prepared.lora is not None:
            base = settings.model_name_or_path or str(prepared.directory)
            peft.save_adapter(temporary, model.family.names, trainable, prepared.lora, base)
        else:
            # float32 masters are written as they are: what was trained is what is shipped
            write_model(temporary, model, trainable, jnp.dtype(jax.tree.leaves(trainable)[0].dtype))
        copy_tokenizer(prepared.directory, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / CONFIG).write_text(to_yaml(settings), encoding="utf-8")


def model_card(prepared: Prepared, settings: TrainSettings, facts: dict[str, Any]) -> str:
    """README.md of the output directory: what was trained on what, the figures of this run, how to load the result."""
    base = settings.model_name_or_path or str(prepared.directory)
    kind = "Full fine-tuning" if prepared.lora is None else "LoRA adapter"
    front: dict[str, Any] = {"base_model": base, "library_name": "transformers" if prepared.lora is None else "peft"}
    front["tags"] = ["jaxft"] + ([] if prepared.lora is None else ["lora"])
    header = "\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    load = (
        'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")'
        if prepared.lora is None
        else f'base = AutoModelForCausalLM.from_pretrained({base!r})\n'
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")'
    )
    imports = "from transformers import AutoModelForCausalLM" + ("" if prepared.lora is None else "\nfrom peft import PeftModel")
    return (
        f"---\n{header}\n---\n\n# {kind} of {Path(base).name}\n\nTrained with jaxft; `config.yaml` repeats the run.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n```python\n{imports}\n\n{load}\n```\n"
    )
