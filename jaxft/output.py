"""The output directory of a run: chosen at the start, filled at the end with what other programs load."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError

from jaxft.config import to_yaml
from jaxft.convert import peft
from jaxft.convert.hf import whole_directory
from jaxft.errors import InputError, RunError
from jaxft.files import is_hub_name
from jaxft.load import QUANTIZED_BASE, copy_tokenizer, write_changes, write_model
from jaxft.models.extension import describe_changes
from jaxft.prepare import SUBTRACTED, Prepared
from jaxft.processes import ENVIRONMENT
from jaxft.settings import TrainSettings
from jaxft.stops import stop_token_ids
from jaxft.templates import write_template
from jaxft.trees import Tree, flatten, unflatten
from jaxft.usage import python_lines

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
SAMPLES, REPORT = "samples.jsonl", "report.html"
RESULTS = ("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors")


def choose_directory(settings: TrainSettings, model_name: str) -> Path:
    """`--output_dir`, or a new runs/MODEL-N. Raises InputError where it holds another run than the one to resume."""
    resume = settings.resume_from_checkpoint
    if settings.output_dir is None:
        if resume == "auto":
            raise InputError("--resume_from_checkpoint auto needs --output_dir; name the run to go on with")
        name = Path(model_name).expanduser().resolve().name or "model"
        number = 1
        while (directory := Path("runs") / f"{name}-{number}").exists():
            number += 1
        return directory
    directory = Path(settings.output_dir).expanduser()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir {directory} is a file; name a directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return directory
    if resume is None:
        raise InputError(
            f"--output_dir {directory} is not empty; name a new one, or go on with its run by "
            "--resume_from_checkpoint auto"
        )
    if resume != "auto" and directory.resolve() not in [(at := Path(resume).expanduser().resolve()), *at.parents]:
        raise InputError(
            f"--output_dir {directory} is not empty and {resume} is the checkpoint of another run; name a new directory"
        )
    results = [name for name in RESULTS if (directory / name).exists()]
    if results and not any((directory / CHECKPOINTS).glob("[0-9]*")):
        raise InputError(
            f"--output_dir {directory} holds {results[0]} and no checkpoint to go on from; name a new directory"
        )
    return directory


def is_finished(directory: Path, settings: TrainSettings) -> bool:
    """Whether the directory holds the result of a run with these very settings."""
    path = directory / CONFIG  # the last file that a run writes
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace") == config_text(settings)


def config_text(settings: TrainSettings) -> str:
    """config.yaml: the settings that repeat the run from its first step, wherever: without where it was resumed and by
    which processes."""
    left_out: dict[str, Any] = dict.fromkeys(("resume_from_checkpoint", *ENVIRONMENT))  # of the moment, not of the run
    left_out |= {"push_to_hub": False, "hub_model_id": None, "hub_private_repo": False, "hub_exist_ok": False}
    return to_yaml(replace(settings, **left_out, settings_given=settings.settings_given - left_out.keys()))


def write_result(
    directory: Path, prepared: Prepared, trainable: Tree, settings: TrainSettings, card: str, report: str
) -> None:
    """The tuned adapter (PEFT's layout) or model, tokenizer, model card, report and config.yaml; nothing half made is
    left.

    Raises RunError where the disk does not take them.
    """
    model = prepared.model
    temporary = directory / ".partial"  # inside: the directory may be the only place that can be written
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if prepared.lora is not None:
            base = settings.model_name_or_path or str(prepared.directory)
            if prepared.subtracted and prepared.quantized:  # no quantisation of the original is what was trained over
                write_base(temporary / QUANTIZED_BASE, prepared, trainable)
                peft.save_adapter(temporary, model, trainable, prepared.lora, str(directory / QUANTIZED_BASE))
            else:
                peft.save_adapter(temporary, model, trainable, prepared.lora, base, prepared.subtracted)
            write_changes(temporary, prepared.changes)
        else:
            # float32 masters are written as they are: what was trained is what is shipped
            write_model(temporary, model, trainable, jnp.dtype(jax.tree.leaves(trainable)[0].dtype))
        copy_tokenizer(prepared.directory, temporary)
        if prepared.new_tokens:
            prepared.tokenizer.save_pretrained(temporary)
        if prepared.new_template:
            write_template(temporary, prepared.tokenizer, stop_token_ids(prepared.tokenizer, temporary))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / REPORT).write_text(report, encoding="utf-8")
        for file in temporary.iterdir():
            if (directory / file.name).is_dir():  # a rename replaces a file, but not a directory
                shutil.rmtree(directory / file.name)
            file.replace(directory / file.name)
        (temporary / CONFIG).write_text(config_text(settings), encoding="utf-8")
        (temporary / CONFIG).replace(directory / CONFIG)
    except (OSError, SafetensorError) as failure:
        raise RunError(
            f"the result could not be written to {directory}: {failure}. The last checkpoint is whole: make room, then "
            f"go on with --output_dir {directory} --resume_from_checkpoint auto"
        ) from failure
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_base(directory: Path, prepared: Prepared, trainable: Tree) -> None:
    """The quantised base, from which parts were subtracted, as a model directory of its own."""
    directory.mkdir()
    leaves = dict(flatten(prepared.frozen))
    dtype = next(leaf.dtype for path, leaf in leaves.items() if path.endswith("norm/weight"))
    leaves |= {path: leaf.astype(dtype) for path, leaf in flatten(trainable)}
    write_model(
        directory, prepared.model, unflatten({p: leaf for p, leaf in leaves.items() if "/lora/" not in p}), dtype
    )
    copy_tokenizer(prepared.directory, directory)
    if prepared.new_tokens:
        prepared.tokenizer.save_pretrained(directory)


def write_subtracted(directory: Path, prepared: Prepared, settings: TrainSettings) -> None:
    """Keeps what was taken from the base, before the first step: a resumed run reads it (`prepare.resumed_factors`).

    Raises InputError where the directory cannot be made.
    """
    if prepared.lora is None or not prepared.subtracted:
        return
    base = settings.model_name_or_path or str(prepared.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with whole_directory(directory / SUBTRACTED) as temporary:
            peft.save_factors(temporary, prepared.model, prepared.subtracted, prepared.lora, base)
    except (OSError, SafetensorError) as failure:
        raise InputError(f"--output_dir {directory} cannot be written: {failure}; name another") from failure


def model_card(prepared: Prepared, settings: TrainSettings, facts: dict[str, Any]) -> str:
    """README.md of the output directory: what was trained on what, the figures of this run, how to load the result."""
    base = settings.model_name_or_path or str(prepared.directory)
    kind = "Full fine-tuning" if prepared.lora is None else "LoRA adapter"
    front: dict[str, Any] = {"base_model": base} if is_hub_name(base) else {}  # else the hub would refuse the card
    front["library_name"] = "transformers" if prepared.lora is None else "peft"
    front["tags"] = ["jaxft"] + ([] if prepared.lora is None else ["lora"])
    header = "\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items())
    if prepared.changes:
        facts = facts | {"rope of the base": describe_changes(prepared.changes)}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    load = python_lines(prepared, settings, "THIS_DIRECTORY")
    return (
        f"---\n{header}\n---\n\n# {kind} of {Path(base).name}\n\nTrained with jaxft; `config.yaml` repeats the run.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n```python\n{load}\n```\n"
    )
