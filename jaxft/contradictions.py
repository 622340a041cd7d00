"""Which values of the settings make sense, each by itself and together."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from jaxft.errors import InputError
from jaxft.settings import (
    ADALORA,
    DataArguments,
    EvaluateSettings,
    GenerateSettings,
    LoraArguments,
    TrainSettings,
)  # fmt: skip
from jaxft.templates import read_template
from jaxft.typed import is_expression

RANGES: list[tuple[str, str, Callable[[float], bool]]] = [
    ("learning_rate embedding_learning_rate weight_decay max_grad_norm temperature", "at least 0", lambda x: x >= 0),
    ("warmup_steps save_steps eval_steps sample_prompts tinit tfinal orth_reg_weight", "at least 0", lambda x: x >= 0),
    ("eval_metric_samples early_stopping_threshold", "at least 0", lambda x: x >= 0),
    ("eval_max_new_tokens early_stopping_patience", "at least 1", lambda x: x >= 1),
    ("lora_r lora_alpha logging_steps save_total_limit gradient_accumulation_steps", "at least 1", lambda x: x >= 1),
    ("buffer_size mlp_tiles conversation_extension", "at least 1", lambda x: x >= 1),
    ("loftq_iter init_r target_r deltaT", "at least 1", lambda x: x >= 1),
    ("show_samples kept_layers", "at least 0", lambda x: x >= 0),
    (
        "eval_split",
        "a share between 0 and 1, or a whole number of rows",
        lambda x: 0 < x < 1 or (x >= 1 and x % 1 == 0),
    ),
    ("max_new_tokens per_device_train_batch_size per_device_eval_batch_size", "at least 1", lambda x: x >= 1),
    ("lora_dropout adam_beta1 adam_beta2", "at least 0 and below 1", lambda x: 0 <= x < 1),
    ("adam_epsilon num_train_epochs loraplus_lr_ratio", "above 0", lambda x: x > 0),
    ("beta1 beta2", "above 0 and below 1", lambda x: 0 < x < 1),
    ("warmup_ratio", "from 0 to 1", lambda x: 0 <= x <= 1),
    ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
    ("top_k", "at least 0; 0 keeps all tokens", lambda x: x >= 0),
    ("repetition_penalty", "above 0; 1 is none", lambda x: x > 0),
    ("num_processes heartbeat_timeout_seconds", "at least 1", lambda x: x >= 1),
    ("process_id", "at least 0", lambda x: x >= 0),
    ("max_length", "at least 2", lambda x: x >= 2),
    ("max_steps", "at least 1, or -1 to count epochs", lambda x: x == -1 or x >= 1),
    ("seed", "from 0 to 4294967295", lambda x: 0 <= x < 2**32),
]


def check(settings: Any, where: dict[str, str]) -> None:
    """Raises InputError for values out of range and for contradictions; `where` names the place of each."""
    for name, text, fits in ((name, text, fits) for names, text, fits in RANGES for name in names.split()):
        value = getattr(settings, name, None)
        if value is not None and not (abs(value) < math.inf and fits(value)):
            raise InputError(f"{where[name]} is {value}; it must be {text}")
    exclusive = (
        *(("bf16", "fp16"), ("warmup_steps", "warmup_ratio"), ("prompt", "messages"), ("load_in_4bit", "load_in_8bit")),
        *(("load_in_4bit", "full_finetuning"), ("load_in_8bit", "full_finetuning")),
        *(("prompt", "prompts"), ("messages", "prompts"), ("eval_split", "eval_dataset"), ("eval_split", "streaming")),
    )
    for one, two in exclusive:
        if getattr(settings, one, None) and getattr(settings, two, None):
            raise InputError(f"{where[one]} and {where[two]} contradict each other; choose one")
    for dtype, own, other in (("bfloat16", "bf16", "fp16"), ("float16", "fp16", "bf16")):
        if settings.dtype == dtype and (getattr(settings, own) is False or getattr(settings, other)):
            name = other if getattr(settings, other) else own
            value = str(getattr(settings, name)).lower()
            raise InputError(f"{where['dtype']} {dtype} and {where[name]} {value} contradict each other; choose one")
    _ = settings.mesh_axes  # raises where it cannot be read
    if settings.chat_template is not None:
        read_template(settings.chat_template)
    if isinstance(settings, DataArguments):
        if settings.dataset is None and settings.dataset_weights is not None:
            raise InputError(f"{where['dataset_weights']} has no meaning without --dataset")
        _ = settings.columns  # raises where a template cannot be read
        if settings.response_template is not None and settings.template is None:
            raise InputError(
                f"{where['response_template']} says what is answered, and --template is missing: it says what is asked"
            )
        try:
            _ = settings.sources
        except InputError as failure:
            raise InputError(f"{where['dataset']}: {failure}") from failure
    if isinstance(settings, TrainSettings | EvaluateSettings):
        if settings.eval_metric is None and "eval_metric_samples" in where:
            raise InputError(f"{where['eval_metric_samples']} has no meaning without --eval_metric")
        if settings.eval_metric is not None and settings.train_on == "all":
            raise InputError(
                f"{where['eval_metric']} needs questions and answers, which --train_on all does not tell apart; leave "
                "one of them out"
            )
    if isinstance(settings, GenerateSettings):
        if settings.compare_base and settings.adapter is None:
            raise InputError(f"{where['compare_base']} needs --adapter: the base alone has nothing to be compared with")
        asked = [where[name] for name in ("prompt", "messages", "prompts") if getattr(settings, name) is not None]
        if settings.compare_base and (asked or not settings.chat):
            raise InputError(
                f"{where['compare_base']} is for --chat in a terminal{', without ' + asked[0] if asked else ''}"
            )
        if "" in settings.stop:
            raise InputError(f"{where['stop']} is empty; it must be a string that can end an answer")
        if settings.output is not None and settings.prompts is None:
            raise InputError(f"{where['output']} is for the answers to --prompts FILE.jsonl; one answer goes to stdout")
    if isinstance(settings, TrainSettings):
        _ = settings.memory_limit  # raises where it cannot be read
        chosen = [where[name] for name in ("gradient_checkpointing", "mlp_tiles", "kept_layers") if name in where]
        if settings.memory_budget and chosen and not settings.dry_run:
            raise InputError(f"{where['memory_budget']} chooses what {chosen[0]} says; leave one of them out")
        if settings.kept_layers and settings.gradient_checkpointing in ("none", "products"):
            raise InputError(
                f"{where['kept_layers']} is about what is computed again, and --gradient_checkpointing "
                f"{settings.gradient_checkpointing} keeps it for all layers; leave one of them out"
            )
        if settings.device and not settings.dry_run:
            raise InputError(
                f"{where['device']} is {settings.device}, which is not here: it has a meaning with --dry_run only"
            )
        if settings.streaming and settings.max_steps < 0:
            raise InputError("--streaming does not know how long an epoch is; set --max_steps")
        if settings.streaming and settings.conversation_extension > 1:
            raise InputError(f"{where['conversation_extension']} draws from the whole set; --streaming never has it")
        if settings.eval_split is not None and settings.eval_split >= 1 and len(settings.sources) > 1:
            raise InputError(
                f"{where['eval_split']} is a number of rows and there are {len(settings.sources)} data sets; give a "
                "share such as 0.05, of each"
            )
        if settings.streaming and len(settings.sources) > 1:
            raise InputError("--streaming reads one data set; mix several ones without it")
        _check_watch(settings, where)
        _check_lora(settings, where)


def _check_watch(settings: TrainSettings, where: dict[str, str]) -> None:
    """The part of `check` about evaluations during the run and what follows from them."""
    _ = settings.max_seconds  # raises where it cannot be read
    for name in settings.reporters:
        if name not in ("tensorboard", "wandb"):
            raise InputError(f"{where['report_to']} is {name!r}; expected tensorboard, wandb, both, or none alone")
    if settings.eval_strategy == "steps" and not settings.eval_steps:
        raise InputError(f"{where['eval_strategy']} steps needs --eval_steps N")
    if settings.eval_strategy != "steps" and settings.eval_steps:
        raise InputError(f"{where['eval_steps']} and {where['eval_strategy']} {settings.eval_strategy} contradict each "
                         "other; choose one")  # fmt: skip
    if settings.eval_strategy == "epoch" and settings.streaming:
        raise InputError("--streaming does not know how long an epoch is; set --eval_steps")
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(settings, name) and settings.eval_strategy == "no":
            raise InputError(f"{where[name]} needs evaluations during the run: --eval_steps N or --eval_strategy epoch")
    for name in ("metric_for_best_model", "greater_is_better"):
        if name in where and not (settings.load_best_model_at_end or settings.early_stopping_patience):
            raise InputError(
                f"{where[name]} has no meaning without --load_best_model_at_end or --early_stopping_patience"
            )
    if "early_stopping_threshold" in where and settings.early_stopping_patience is None:
        raise InputError(f"{where['early_stopping_threshold']} has no meaning without --early_stopping_patience")


def _check_lora(settings: TrainSettings, where: dict[str, str]) -> None:
    """The part of `check` about what is trained."""
    targets = settings.lora_target_modules.split(",")
    if targets == [""] or ("all-linear" in targets and len(targets) > 1):
        raise InputError(f"--lora_target_modules {settings.lora_target_modules!r}: expected all-linear or names")
    if settings.lora_layers is not None and is_expression(settings.lora_target_modules):
        raise InputError(
            f"{where['layers_to_transform']} and the regular expression {settings.lora_target_modules!r} contradict "
            "each other; let the expression choose the layers"
        )
    for name in ("add_tokens", "modules_to_save"):
        if getattr(settings, name) == "":
            raise InputError(f"{where[name]} names no {'token' if name == 'add_tokens' else 'module'}")
    for name, kinds, text in (("rank_pattern", int, "a whole number"), ("alpha_pattern", (int, float), "a number")):
        for key, value in getattr(settings, name).items():
            if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
                raise InputError(f"{where[name]}: {key!r} is {value!r}; it must be {text} above 0")
    initial = settings.init_lora_weights
    if not re.fullmatch(r"true|gaussian|loftq|pissa(_niter_[1-9]\d*)?", initial):
        raise InputError(
            f"{where['init_lora_weights']} is {initial!r}; it must be true, gaussian, pissa, pissa_niter_N or loftq"
        )
    if initial != "true" and settings.adapter:
        raise InputError(
            f"{where['init_lora_weights']} and {where['adapter']} contradict each other: an adapter has its values"
        )
    if initial == "loftq" and settings.quantization is None:
        raise InputError(f"{where['init_lora_weights']} loftq makes up for quantisation; add --load_in_4bit")
    if settings.loftq_iter != 1 and initial != "loftq":
        raise InputError(f"{where['loftq_iter']} has a meaning with --init_lora_weights loftq only")
    given = [where[name] for name in ADALORA if name in where]
    if settings.peft_type == "adalora":
        others = ("lora_r", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights")
        chosen = [where[name] for name in others if name in where and getattr(settings, name) != "true"]
        if chosen:
            raise InputError(
                f"{where['peft_type']} adalora and {chosen[0]} contradict each other: it has its own ranks, "
                "--init_r and --target_r, scale and first values"
            )
        if settings.target_r > settings.init_r:
            raise InputError(f"target_r {settings.target_r} is more than init_r {settings.init_r}: ranks only fall")
    elif given and not settings.full_finetuning:
        raise InputError(f"{given[0]} has a meaning with --peft_type adalora only")
    if settings.adapter and given:
        raise InputError(f"{given[0]} and {where['adapter']} contradict each other: an adapter keeps its ranks")
    own = [field.name for field in dataclasses.fields(LoraArguments) if field.name != "full_finetuning"]
    given = [name for name in own if where.get(name, "").startswith("--")]
    if settings.full_finetuning and given:
        raise InputError(
            f"{where[given[0]]} has no meaning with --full_finetuning, which trains without LoRA; leave it out"
        )
    if settings.add_tokens and settings.adapter:
        raise InputError(
            f"{where['add_tokens']} and {where['adapter']} contradict each other; merge the adapter first, or train a "
            "new one"
        )
    embedding = settings.full_finetuning or settings.saved_modules or settings.add_tokens or settings.adapter
    if settings.embedding_learning_rate is not None and not embedding:
        raise InputError(
            f"{where['embedding_learning_rate']} needs a trained embedding: --modules_to_save embed_tokens, "
            "--add_tokens or --full_finetuning"
        )
    if settings.embedding_learning_rate is not None and settings.learning_rate == 0:
        raise InputError(f"{where['embedding_learning_rate']} follows the schedule of learning_rate, which is 0")
    if settings.ensure_weight_tying and not (settings.saved_modules or settings.add_tokens or settings.adapter):
        raise InputError(
            f"{where['ensure_weight_tying']} needs --modules_to_save or --add_tokens: nothing is to be tied"
        )
