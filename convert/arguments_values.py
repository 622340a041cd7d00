"""Values of other libraries' settings that need more than another name: one function a setting, value to outcome."""

import typing
from typing import Any

from jaxft.convert.arguments_rules import Outcome, is_off, is_on
from jaxft.settings import SCHEDULES, TrainArguments

ALL_TURNS = "TRL then trains on every token of `messages`, jaxft on the answers; train_on: all does as TRL"


def optim(value: Any) -> Outcome:
    name = str(value).lower().removeprefix("optimizernames.")
    offered = typing.get_args(TrainArguments.__annotations__["optim"])
    spellings = {
        "adamw_torch": ("adamw",), "adamw_torch_fused": ("adamw",), "adamw_hf": ("adamw",), "adamw": ("adamw",),
        "adamw_8bit": ("adamw_8bit",), "adamw_bnb_8bit": ("adamw_8bit",),
        "paged_adamw": ("paged_adamw", "paged_adamw_32bit", "adamw"),
        "paged_adamw_32bit": ("paged_adamw_32bit", "paged_adamw", "adamw"),
        "paged_adamw_8bit": ("paged_adamw_8bit", "adamw_8bit"),
    }  # fmt: skip
    found = next((one for one in spellings.get(name, (name,)) if one in offered), None)
    if found is None:
        return Outcome({}, f"the optimizers here are {', '.join(offered)}", lost=True)
    return Outcome({"optim": found}, "" if "paged" in found or "paged" not in name else "its states stay on the device")


def schedule(value: Any) -> Outcome:
    name = str(value).lower().removeprefix("schedulertype.")
    if name in SCHEDULES:
        return Outcome({"lr_scheduler_type": name})
    return Outcome({}, f"the schedules here are {', '.join(SCHEDULES)}", lost=True)


def warmup(value: Any) -> Outcome:
    number = 0.0 if value is None else float(value)
    return Outcome({"warmup_ratio": number} if 0 < number < 1 else {"warmup_steps": int(number)})


def checkpointing(value: Any) -> Outcome:
    if value is None:
        return Outcome({})
    if str(value).lower() == "unsloth":
        return Outcome({"gradient_checkpointing": "offload"}, "each layer's input on the host, as there")
    return Outcome({"gradient_checkpointing": "full" if is_on(value) else "none"})


def offloading(value: Any) -> Outcome:
    return Outcome({"gradient_checkpointing": "offload"} if is_on(value) else {})


def dtype(value: Any) -> Outcome:
    name = str(value).rsplit(".", 1)[-1]
    name = {"half": "float16", "bf16": "bfloat16", "fp16": "float16", "float": "float32"}.get(name, name)
    if value is None or name in ("None", "auto"):
        return Outcome({}, "bfloat16 on a GPU")
    if name in ("float32", "bfloat16", "float16"):
        return Outcome({"dtype": name})
    return Outcome({}, "dtypes here are float32, bfloat16, float16", lost=True)


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value).replace(" ", ",")


def targets(value: Any) -> Outcome:
    if value is None:
        return Outcome({})
    names = _listed(value).split(",") if isinstance(value, list | tuple | set) else [str(value)]
    whole = [name for name in names if name in ("embed_tokens", "lm_head")]
    linear = [name for name in names if name not in whole]
    settings = {"lora_target_modules": ",".join(linear)} if linear else {}
    if whole:
        return Outcome(settings | {"modules_to_save": ",".join(whole)}, f"{' and '.join(whole)} trained whole")
    return Outcome(settings)


def layers(value: Any) -> Outcome:
    return Outcome({} if value is None else {"layers_to_transform": _listed(value)})


def saved(value: Any) -> Outcome:
    return Outcome({} if is_off(value) else {"modules_to_save": _listed(value)})


def resume(value: Any) -> Outcome:
    if is_off(value):
        return Outcome({})
    if is_on(value):
        return Outcome({"resume_from_checkpoint": "auto"})
    return Outcome({}, "a checkpoint of another library cannot be gone on with", lost=True)


def save_strategy(value: Any) -> Outcome:
    if str(value) == "no":
        return Outcome({"save_steps": 0})
    if str(value) == "steps":
        return Outcome({}, "save_steps says when")
    return Outcome({}, "checkpoints come by steps: set save_steps", lost=True)


def by_steps(value: Any) -> Outcome:
    if str(value) == "steps":
        return Outcome({}, "as it is here")
    return Outcome({}, "counted in steps here", lost=str(value) != "no")


def evaluation(value: Any) -> Outcome:
    name = str(value).lower().removeprefix("intervalstrategy.")
    if is_off(value) or name == "no":
        return Outcome({}, "as it is here")
    return Outcome({"eval_strategy": name})


def template(value: Any) -> Outcome:
    return Outcome({} if value is None else {"chat_template": value})


def sampling(value: Any) -> Outcome:
    if str(value) in ("random", "None"):
        return Outcome({}, "as it is here")
    if str(value) == "sequential":
        return Outcome({"shuffle_dataset": False})
    return Outcome({}, "packing makes rows of one length", lost=False)


def assistant_only(value: Any) -> Outcome:
    return Outcome({"train_on": "responses"}) if is_on(value) else Outcome({}, ALL_TURNS, lost=True)


def completion_only(value: Any) -> Outcome:
    return Outcome({} if value is None else {"train_on": "responses" if is_on(value) else "all"})


def quant_type(value: Any) -> Outcome:
    return Outcome({}, "as it is here" if value == "nf4" else "4 bits are NF4 here", lost=value != "nf4")


def loftq(value: Any) -> Outcome:
    if is_off(value):
        return Outcome({}, "as it is here")
    if not isinstance(value, dict) or value.get("loftq_bits", 4) != 4:
        return Outcome({}, "LoftQ is in 4 bits here", lost=True)
    return Outcome({"loftq_iter": value.get("loftq_iter", 1)})


def nested(value: Any) -> Outcome:
    return Outcome(
        {}, "as it is here" if is_on(value) else "NF4 here is always doubly quantised", lost=not is_on(value)
    )
