"""The settings of the commands: which flags there are, and their defaults. `contradictions.py` says what is refused."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxft.cache import default_directory
from jaxft.columns import Columns, parse_template
from jaxft.errors import InputError
from jaxft.mixture import Source, parse_sources
from jaxft.sharding import MESH_AXES
from jaxft.typed import JsonObject, is_expression, parse_bytes, parse_seconds

SCHEDULES = (
    *("linear", "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "cosine_with_min_lr"),
    *("polynomial", "inverse_sqrt", "warmup_stable_decay"),
)

TEMPLATE_KWARGS = {"help": 'settings of the chat template, such as {"enable_thinking": false}'}


def _flag(default: Any, help: str, **options: Any) -> Any:
    """A field that becomes a flag; `options` go to argparse's add_argument."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    _argument_group_name: ClassVar[str] = "model"
    model_name_or_path: str | None = _flag(None, "a local model directory, or a name on the hub")
    adapter: str | None = _flag(None, "start from this PEFT LoRA adapter; r, alpha and targets come from its config")
    dtype: Literal["float32", "bfloat16", "float16"] | None = _flag(None, "float32 on a CPU, else bfloat16")
    bf16: bool | None = _flag(None, "compute in bfloat16; false is float32", nargs="?", const=True)
    fp16: bool | None = _flag(None, "compute in float16", nargs="?", const=True)
    max_length: int = _flag(1024, "longest row in tokens; asked for beyond the model's positions, its rope is scaled")
    load_in_4bit: bool = _flag(False, "hold the base's linear layers in 4 bits (NF4, double quantisation)")
    load_in_8bit: bool = _flag(False, "hold the base's linear layers in 8 bits")
    chat_template: str | None = _flag(
        None,
        "in place of the tokenizer's: chatml, llama-3, llama-3.1, qwen-2.5, qwen-3, gemma, mistral, phi-3, phi-4, "
        "alpaca, vicuna, zephyr or a FILE.jinja",
    )
    mesh: str | None = _flag(None, "devices by axis, such as data=2,fsdp=4; without it all local devices are data")
    debug: bool = _flag(False, "show the traceback of an error")

    def param_dtype(self, platform_dtype: str) -> str:
        """Dtype in which weights are held; `platform_dtype` is the default: float32 on a CPU, else bfloat16."""
        return self.dtype or self.compute_dtype(platform_dtype)

    def compute_dtype(self, platform_dtype: str) -> str:
        """Dtype of the matmuls. `--dtype float32 --bf16` holds float32 and computes in bfloat16."""
        if self.bf16:
            return "bfloat16"
        if self.fp16:
            return "float16"
        return self.dtype or ("float32" if self.bf16 is False else platform_dtype)

    @property
    def quantization(self) -> str | None:
        """How the base's linear layers are held: 'nf4', 'int8', or None for as the files have them."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else None

    @property
    def mesh_axes(self) -> dict[str, int] | None:
        """`--mesh data=2,fsdp=4` as {'data': 2, 'fsdp': 4}; None where it is not given."""
        if self.mesh is None:
            return None
        axes: dict[str, int] = {}
        for part in self.mesh.split(","):
            name, _, size = (word.strip() for word in part.partition("="))
            if name not in MESH_AXES or name in axes or not size.isdecimal() or int(size) < 1:
                raise InputError(f"--mesh {self.mesh!r}: expected {', '.join(MESH_AXES)} such as data=2,fsdp=4")
            axes[name] = int(size)
        return axes


@dataclasses.dataclass(frozen=True)
class LoraArguments:
    _argument_group_name: ClassVar[str] = "LoRA"
    lora_r: int = _flag(16, "rank")
    lora_alpha: int = _flag(16, "the branch is scaled by alpha / r")
    lora_dropout: float = _flag(0.0, "dropout on the input of the branch")
    lora_target_modules: str = _flag(
        "all-linear", "all-linear, names (q_proj,v_proj), or one regular expression that matches whole names", nargs="+"
    )
    use_rslora: bool = _flag(False, "scale by alpha / sqrt(r)")
    layers_to_transform: str | None = _flag(None, "put LoRA on these layers only (0,1,5)", nargs="+")
    rank_pattern: JsonObject = dataclasses.field(
        default_factory=JsonObject,
        metadata={"help": 'r of modules whose name ends with a match, such as {"q_proj": 8}'},
    )
    alpha_pattern: JsonObject = dataclasses.field(
        default_factory=JsonObject,
        metadata={"help": 'alpha of modules whose name ends with a match, such as {"q_proj": 32}'},
    )
    modules_to_save: str | None = _flag(None, "train these whole beside LoRA: embed_tokens, lm_head or both", nargs="+")
    ensure_weight_tying: bool | None = _flag(
        None,
        "a head that is the embedding stays it when modules_to_save trains one of them; without it they part, as in "
        "PEFT, but not with --add_tokens",
        nargs="?",
        const=True,
    )
    peft_type: Literal["lora", "adalora"] = _flag("lora", "adalora allocates the ranks while training; see init_r")
    init_r: int = _flag(12, "AdaLoRA: first rank of every module")
    target_r: int = _flag(8, "AdaLoRA: mean rank at the end")
    tinit: int = _flag(0, "AdaLoRA: steps before the first reduction")
    tfinal: int = _flag(0, "AdaLoRA: steps after the last reduction")
    deltaT: int = _flag(1, "AdaLoRA: steps a reduction")
    beta1: float = _flag(0.85, "AdaLoRA: smoothing of the sensitivity")
    beta2: float = _flag(0.85, "AdaLoRA: smoothing of the uncertainty")
    orth_reg_weight: float = _flag(0.5, "AdaLoRA: weight of the orthogonal regulariser")
    init_lora_weights: str = _flag(
        "true",
        "first values of A and B: true (A uniform, B zero), gaussian, pissa or pissa_niter_N (the largest singular "
        "values of the weights, taken out of the base), loftq (those of what 4 bits lose)",
    )
    loftq_iter: int = _flag(1, "rounds of quantisation and decomposition in loftq")
    use_dora: bool = _flag(False, "train the length of each weight's rows beside LoRA (DoRA)")
    loraplus_lr_ratio: float | None = _flag(None, "learning rate of LoRA's B as a multiple of A's (LoRA+), such as 16")
    full_finetuning: bool = _flag(False, "train every weight, without LoRA")

    @property
    def lora_targets(self) -> str | tuple[str, ...]:
        """`lora_target_modules` as PEFT takes it: 'all-linear', a regular expression, or the module names."""
        names = self.lora_target_modules
        return names if names == "all-linear" or is_expression(names) else tuple(names.split(","))

    @property
    def lora_layers(self) -> tuple[int, ...] | None:
        """`layers_to_transform` taken apart. Raises InputError where it is no list of whole numbers."""
        if self.layers_to_transform is None:
            return None
        words = self.layers_to_transform.split(",")
        if not all(word.isdecimal() for word in words):
            raise InputError(f"--layers_to_transform {self.layers_to_transform!r}: expected numbers such as 0,1,5")
        return tuple(sorted({int(word) for word in words}))

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """`modules_to_save` taken apart."""
        return tuple(self.modules_to_save.split(",")) if self.modules_to_save else ()


@dataclasses.dataclass(frozen=True)
class DataArguments:
    _argument_group_name: ClassVar[str] = "data"
    dataset: str | None = _flag(None, "local files, directories, or names on the hub; several are mixed", nargs="+")
    dataset_weights: str | None = _flag(None, "share of each of several data sets, such as 0.7 0.3", nargs="+")
    eval_dataset: str | None = _flag(None, "the same, held out for evaluation")
    template: str | None = _flag(
        None,
        "what is asked, made of any columns, such as 'Q: {question}[[\\nHint: {hint}]]'; [[…]] is left out where its "
        "column is empty",
    )
    response_template: str | None = _flag(None, "what is answered, such as '{answer}'; goes with --template")
    conversation_extension: int = _flag(1, "rows with one question each that are joined into one conversation")
    dataset_config: str | None = _flag(None, "configuration of a hub dataset")
    dataset_train_split: str = _flag("train", "split to train on")
    dataset_test_split: str = _flag("test", "split to evaluate on")
    dataset_cache: str | None = _flag(None, "where tokenised data are kept, or none; without it ~/.cache/jaxft")
    train_on: Literal["responses", "last", "all"] = _flag(
        "responses", "tokens that count in the loss: all assistant turns and answers, the last of a row, or everything"
    )
    chat_template_kwargs: JsonObject = dataclasses.field(default_factory=JsonObject, metadata=TEMPLATE_KWARGS)
    packing: bool = _flag(True, "put several documents into one row")
    per_device_eval_batch_size: int = _flag(8, "rows a device in evaluation")
    shuffle_dataset: bool = _flag(True, "false keeps the order of the data")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets that `dataset` names, with their weights; () where it names none."""
        return () if self.dataset is None else parse_sources(self.dataset, self.dataset_weights)

    @property
    def columns(self) -> Columns:
        """How rows become conversations. Raises InputError where a template cannot be read."""
        both = [
            None if text is None else parse_template(text, flag)
            for text, flag in ((self.template, "--template"), (self.response_template, "--response_template"))
        ]
        return Columns(both[0], both[1], self.conversation_extension, getattr(self, "seed", 0))

    @property
    def cache_directory(self) -> Path | None:
        """Where tokenised data sets are kept; None keeps them in memory."""
        if self.dataset_cache == "none":
            return None
        return default_directory() if self.dataset_cache is None else Path(self.dataset_cache).expanduser()


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    _argument_group_name: ClassVar[str] = "training"
    output_dir: str | None = _flag(None, "where everything is written; without it a new runs/MODEL-N")
    learning_rate: float | None = _flag(None, "without it 2e-4, or 2e-5 for --full_finetuning")
    embedding_learning_rate: float | None = _flag(None, "of embedding and head, where they are trained; same schedule")
    lr_scheduler_type: str = _flag("linear", "schedule of the learning rate", choices=SCHEDULES)
    lr_scheduler_kwargs: JsonObject = dataclasses.field(
        default_factory=JsonObject, metadata={"help": 'its further settings as JSON, such as {"min_lr": 1e-6}'}
    )
    warmup_steps: int = _flag(0, "steps of linear warm-up")
    warmup_ratio: float | None = _flag(None, "warm-up as a share of all steps, instead of --warmup_steps")
    weight_decay: float = _flag(0.0, "decoupled decay; norms and biases never decay")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_epsilon: float = _flag(1e-8, "added to the root of the second moment")
    max_grad_norm: float = _flag(1.0, "clip gradients to this global norm; 0 does not clip")
    num_train_epochs: float = _flag(3.0, "passes over the data")
    max_steps: int = _flag(-1, "optimizer steps instead of epochs; -1 counts epochs")
    per_device_train_batch_size: int = _flag(8, "rows a device and micro-batch")
    gradient_accumulation_steps: int = _flag(1, "micro-batches an optimizer step")
    gradient_checkpointing: Literal[
        "full", "none", "offload", "offload_attention", "offload_middle", "offload_v", "offload_qkv", "attention",
        "products", "true", "false",
    ] = _flag(
        "full",
        "full (or true) recomputes each layer in the backward pass, offload with its input on the host; "
        "attention and products keep more and recompute less, offload_attention, offload_middle, offload_v and "
        "offload_qkv on the host; none (or false) keeps all, and unrolls the layers on one GPU",
        nargs="?",
        const="full",
    )  # fmt: skip
    mlp_tiles: int = _flag(1, "in how many parts the MLPs take a micro-batch's tokens; more need less memory")
    kept_layers: int = _flag(
        0,
        "how many of the last layers keep what products keeps, take the tokens whole, and compute nothing large again: "
        "their backward passes are the first, so that part of it is gone when memory is at its peak",
    )
    memory_budget: str | None = _flag(
        None,
        "most bytes of a device, such as 11GiB, or auto: take the fastest gradient_checkpointing that fits, and as "
        "many kept_layers",
    )
    dry_run: bool = _flag(
        False, "say what a step needs, whether it fits and how long the run would take; train and write nothing"
    )
    device: str | None = _flag(None, "with --dry_run: plan for a card that is not here, h200")
    optim: Literal["adamw", "adamw_torch", "adamw_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        _flag("adamw", "adamw_torch is adamw; 8bit: its moments; paged: its moments wait on the host")
    )
    logging_steps: int = _flag(1, "steps a line of metrics")
    save_steps: int = _flag(500, "steps a checkpoint; 0 saves at the end only")
    save_total_limit: int | None = _flag(None, "keep the newest N checkpoints")
    resume_from_checkpoint: str | None = _flag(None, "auto, or the directory of a checkpoint")
    sample_prompts: int = _flag(0, "answer the first N held-out prompts before and after the run")
    streaming: bool = _flag(False, "read the data while training, for --max_steps; nothing of it is kept")
    buffer_size: int = _flag(10_000, "rows that --streaming reads ahead, to shuffle and pack them together")
    eval_split: float | None = _flag(
        None, "hold out this share (0.05) or number (200) of the rows, drawn by --seed, in place of --eval_dataset"
    )
    eval_steps: int = _flag(0, "steps an evaluation; 0 evaluates at the end only")
    seed: int = _flag(0, "seed of everything random")
    add_tokens: str | None = _flag(
        None,
        'new tokens, "<a>,<b>" or a text file with one a line: embedding and head get a row for each (the mean of the '
        "others) and are trained",
        nargs="+",
    )

    push_to_hub: bool = _flag(False, "upload the result to the Hugging Face hub, with the token of HF_TOKEN or hf auth")
    hub_model_id: str | None = _flag(None, "OWNER/NAME or NAME there; without it named after --output_dir")
    hub_private_repo: bool = _flag(False, "a new repository is private")
    hub_exist_ok: bool = _flag(False, "add to a repository that holds files already")

    @property
    def memory_limit(self) -> int | Literal["auto"] | None:
        """`memory_budget` in bytes."""
        if self.memory_budget in (None, "auto"):
            return self.memory_budget  # type: ignore[return-value]
        return parse_bytes(self.memory_budget)


@dataclasses.dataclass(frozen=True)
class AnswerArguments:
    _argument_group_name: ClassVar[str] = "answers to held-out prompts"
    eval_metric: str | None = _flag(
        None,
        "what counts on the model's answers: gsm8k (last number), or your own MODULE:FUNCTION(answers, references)",
    )
    eval_metric_samples: int = _flag(0, "answer only the first N held-out samples for --eval_metric; 0 answers all")
    eval_max_new_tokens: int | None = _flag(None, "longest answer in evaluations; without it 256, samples alone 64")


@dataclasses.dataclass(frozen=True)
class WatchArguments:
    _argument_group_name: ClassVar[str] = "evaluation and reports"
    eval_strategy: Literal["no", "steps", "epoch"] = _flag(
        "no", "held-out data are evaluated before and after the run, and every --eval_steps (steps) or every epoch"
    )
    load_best_model_at_end: bool = _flag(False, "keep the checkpoint of the best evaluation; it becomes the result")
    metric_for_best_model: str | None = _flag(
        None, "what is best: loss, perplexity or --eval_metric's; without it loss"
    )
    greater_is_better: bool | None = _flag(None, "without it only loss and perplexity are better smaller", nargs="?",
                                           const=True)  # fmt: skip
    early_stopping_patience: int | None = _flag(None, "end after N evaluations in a row that are no better")
    early_stopping_threshold: float = _flag(0.0, "better is what is better by more than this")
    max_time: str | None = _flag(None, "no step is sent after this many seconds (or 90m, 1h30m); the result is written")
    report_to: str = _flag("none", "beside metrics.jsonl: tensorboard, wandb, both, or none", nargs="+")

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else parse_seconds(self.max_time)

    @property
    def reporters(self) -> tuple[str, ...]:
        """`report_to` taken apart; () for none."""
        return () if self.report_to == "none" else tuple(self.report_to.split(","))


@dataclasses.dataclass(frozen=True)
class ProcessArguments:
    """The names of `jax.distributed.initialize`; the environment variables are in `jaxft.processes`."""

    _argument_group_name: ClassVar[str] = "several processes"
    coordinator_address: str | None = _flag(None, "HOST:PORT of process 0, the same for all")
    num_processes: int | None = _flag(None, "how many processes run together")
    process_id: int | None = _flag(None, "which of them this is, from 0")
    heartbeat_timeout_seconds: int = _flag(60, "a process that is silent for so long is dead, and ends the run")


@dataclasses.dataclass(frozen=True)
class GenerateArguments:
    _argument_group_name: ClassVar[str] = "generation"
    prompt: str | None = _flag(None, "text to continue")
    messages: str | None = _flag(None, "JSON file of a conversation, rendered with the chat template")
    prompts: str | None = _flag(None, "JSONL file; each line has a prompt or messages, and is answered")
    output: str | None = _flag(None, "new JSONL file for the answers to --prompts; without it stdout")
    chat: bool = _flag(
        False, "a prompt is a user's turn, rendered with the chat template; without a prompt: talk in the terminal"
    )
    chat_template_kwargs: JsonObject = dataclasses.field(default_factory=JsonObject, metadata=TEMPLATE_KWARGS)
    compare_base: bool = _flag(False, "in a --chat with --adapter, the base answers beside it")
    max_new_tokens: int = _flag(128, "most tokens to generate")
    stop: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "end before the first of these strings; may be given several times", "action": "extend"},
    )
    temperature: float = _flag(0.0, "0 is greedy")
    top_k: int = _flag(0, "sample from this many most probable tokens; 0 from all")
    top_p: float = _flag(1.0, "sample from the most probable tokens that make up this much probability")
    repetition_penalty: float = _flag(1.0, "above 1 makes tokens less likely that stand in the text already")
    per_device_eval_batch_size: int = _flag(8, "prompts a device that are answered together")
    seed: int = _flag(0, "seed of sampling")


@dataclasses.dataclass(frozen=True)
class ShowArguments:
    _argument_group_name: ClassVar[str] = "what is shown"
    show_samples: int = _flag(3, "render the first N samples with what is trained in colour")
    json: bool = _flag(False, "one JSON object on stdout instead of text")


@dataclasses.dataclass(frozen=True)
class _Origin:
    """`settings_given`: names that were set by a flag or YAML; `settings_ignored`: YAML keys of other commands."""

    settings_given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    settings_ignored: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)


@dataclasses.dataclass(frozen=True)
class TrainSettings(
    _Origin,
    ProcessArguments,
    WatchArguments,
    AnswerArguments,
    TrainArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
):
    """Everything `jaxft.train` can be told; what depends on other settings is filled in."""

    learning_rate: float = 2e-4


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(_Origin, AnswerArguments, DataArguments, ModelArguments):
    """Everything `jaxft.evaluate` can be told."""


@dataclasses.dataclass(frozen=True)
class GenerateSettings(_Origin, GenerateArguments, ModelArguments):
    """Everything `jaxft.generate` can be told."""


@dataclasses.dataclass(frozen=True)
class DataSettings(ShowArguments, TrainSettings):
    """Everything `jaxft.data` can be told: all that a training run can, as it shows what that run would see."""


Settings = TrainSettings | EvaluateSettings | GenerateSettings

GROUPS: dict[str, tuple[Any, ...]] = {
    "train": (
        ModelArguments,
        LoraArguments,
        DataArguments,
        TrainArguments,
        AnswerArguments,
        WatchArguments,
        ProcessArguments,
    ),
    "evaluate": (ModelArguments, DataArguments, AnswerArguments),
    "generate": (ModelArguments, GenerateArguments),
}
GROUPS["data"] = (*GROUPS["train"], ShowArguments)
SETTINGS: dict[str, type] = {
    "train": TrainSettings, "evaluate": EvaluateSettings, "generate": GenerateSettings, "data": DataSettings,
}  # fmt: skip

ADALORA = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
