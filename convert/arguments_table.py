"""What each setting of transformers, TRL, PEFT and Unsloth is here: one table, read by the converter and by docs/.

A rule says what becomes of a setting that is given. The defaults that differ stand at the end.
"""

import dataclasses
from typing import Any

from jaxft.convert import arguments_values as values
from jaxft.convert.arguments_rules import Outcome, Rule, asked, changed, is_off, is_on, missing, needless, renamed, same
from jaxft.settings import TrainSettings

SETTINGS = {field.name for field in dataclasses.fields(TrainSettings)} - {"settings_given", "settings_ignored"}
UNLIKE = ("debug",)  # names that are a setting here too, and another one

TRAINING = [
    same(
        "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_kwargs "
        "weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 "
        "logging_steps eval_steps per_device_eval_batch_size save_steps save_total_limit seed warmup_ratio max_length "
        "packing early_stopping_patience early_stopping_threshold metric_for_best_model greater_is_better"
    ),
    asked("load_best_model_at_end report_to push_to_hub hub_model_id hub_private_repo"),
    renamed("max_seq_length", "max_length"),
    changed("lr_scheduler_type", "`lr_scheduler_type`", "those of `--help`", values.schedule),
    changed("warmup_steps", "`warmup_steps`", "below 1 it is a share: `warmup_ratio`", values.warmup),
    changed("optim", "`optim`", "every spelling of AdamW; others are not here", values.optim),
    changed("gradient_checkpointing", "`gradient_checkpointing`", "true is `full`, false `none`", values.checkpointing),
    changed("activation_offloading", "`gradient_checkpointing: offload`", "", values.offloading),
    changed("resume_from_checkpoint", "`resume_from_checkpoint`", "true is `auto`", values.resume),
    changed("save_strategy", "`save_steps`", "`no` is 0; `epoch` has to be said in steps", values.save_strategy),
    changed("eval_strategy evaluation_strategy", "`eval_strategy`", "", values.evaluation),
    changed("logging_strategy", "`logging_steps`", "counted in steps", values.by_steps),
    changed("train_sampling_strategy", "`shuffle_dataset`", "`sequential` is false", values.sampling),
    changed("assistant_only_loss", "`train_on`", "true is `responses`; false `all`, for `messages`",
            values.assistant_only),
    changed("completion_only_loss", "`train_on`", "true is `responses`, false `all`", values.completion_only),
    needless("rows are shuffled by `seed` anyway", "shuffle_dataset"),
    needless("XLA compiles the step", "torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps"),
    needless("losses and norms have their kernels here", "use_liger_kernel liger_kernel_config"),
    needless(
        "rows are read by index, without workers",
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order dataset_num_proc",
    ),
    needless(
        "devices are a mesh: `mesh`, all of them by default",
        "local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
        "ddp_timeout accelerator_config parallelism_config save_on_each_node log_on_each_node",
    ),
    needless(
        "packing masks documents from each other and pads no row to another's length",
        "padding_free pad_to_multiple_of length_column_name",
    ),
    needless(
        "logging is lines on stderr and `metrics.jsonl`",
        "disable_tqdm log_level log_level_replica include_num_input_tokens_seen logging_first_step run_name project "
        "logging_dir skip_memory_metrics",
    ),
    needless("every step is checked to be finite", "logging_nan_inf_filter"),
    needless("the loss is the mean over all target tokens of a step, always", "average_tokens_across_devices"),
    needless("the command decides", "do_train do_eval do_predict overwrite_output_dir"),
    needless("columns are recognised, others passed over", "remove_unused_columns label_names"),
    needless(
        "evaluation is the loss, summed in float32",
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "batch_eval_metrics bf16_full_eval fp16_full_eval",
    ),
    needless("a checkpoint holds what resuming needs; a signal saves one", "save_only_model enable_jit_checkpoint"),
    needless("matmuls accumulate in float32", "tf32"),
    needless("nothing is cached in training", "use_cache"),
    needless("set JAX_PLATFORMS=cpu in the environment", "use_cpu"),
    needless("the tokenizer's own tokens are used", "eos_token pad_token"),
    missing("the columns tell the format: rename the column to `text`", "dataset_text_field", lambda v: v == "text"),
    missing("first fit decreasing is the one way to pack", "packing_strategy", lambda v: v in ("bfd", "ffd")),
    missing("what is too long is cut at its end", "truncation_mode", lambda v: v == "keep_start"),
    missing("evaluation packs as training does", "eval_packing"),
    missing("evaluation begins before the first step", "eval_delay"),
    needless("evaluation begins before the first step", "eval_on_start"),
    missing("`report_to` knows tensorboard and wandb", "trackio_space_id trackio_bucket_id trackio_static_space_id"),
    missing("one loss: cross entropy; your own by `make_train_step(loss=…)`", "loss_type", lambda v: v == "nll"),
    missing("write it as your own loss: notebooks/own_loss.ipynb", "label_smoothing_factor"),
    missing("embeddings get no noise", "neftune_noise_alpha"),
    missing("no mixture of experts here", "router_aux_loss_coef"),
    missing("a short last batch is filled with padding, never dropped", "dataloader_drop_last"),
    missing("`seed` orders the data too", "data_seed"),
    missing("`memory_budget` finds what fits, before the run", "auto_find_batch_size"),
    missing("`mesh: fsdp=N` shards the weights", "fsdp fsdp_config deepspeed"),
    missing("`gradient_checkpointing` is one word", "gradient_checkpointing_kwargs activation_checkpointing_kwargs"),
    missing("see `gradient_checkpointing`", "activation_checkpointing"),
    missing("`push_to_hub` uploads the result, at the end", "hub_strategy hub_always_push",
            lambda v: is_off(v) or v == "end"),
    missing("log in to the hub by HF_TOKEN", "hub_token", lambda v: v is None),
    missing("`push_to_hub` uploads to the repository's main branch", "hub_revision", lambda v: v in (None, "main")),
    missing("a resumed run always goes on where it was", "ignore_data_skip restore_callback_states_from_checkpoint"),
    missing("runs on a CPU are deterministic; for a GPU see docs/numbers.md", "full_determinism"),
    missing("AdamW has the settings of its own flags", "optim_args optim_target_modules"),
    missing("what counts on answers is `eval_metric: MODULE:FUNCTION`", "include_for_metrics"),
    missing("`jaxft.load_model` in a script of your own", "model_init_kwargs dataset_kwargs"),
    changed("chat_template_path chat_template", "`chat_template`", "a file or the name of one that is here",
            values.template),
    missing("`debug` there is another thing", "debug"),
    missing("no code of a model's repository is run", "trust_remote_code"),
]  # fmt: skip

COMMAND = [
    same(
        "model_name_or_path lora_r lora_alpha lora_dropout use_rslora load_in_8bit load_in_4bit dataset_config "
        "dataset_train_split dataset_test_split use_dora"
    ),
    renamed("dataset_name", "dataset"),
    renamed("dataset_streaming", "streaming"),
    renamed("pretrained_model_name_or_path", "model_name_or_path"),
    changed("use_peft", "`full_finetuning`", "LoRA is the default here: false is `full_finetuning: true`",
            lambda value: Outcome({} if is_on(value) else {"full_finetuning": True})),
    changed("dtype torch_dtype", "`dtype`", "", values.dtype),
    changed("lora_target_modules", "`lora_target_modules`", "", values.targets),
    changed("lora_modules_to_save", "`modules_to_save`", "`embed_tokens`, `lm_head`", values.saved),
    changed("bnb_4bit_quant_type", "", "4 bits are NF4 here", values.quant_type),
    changed("use_bnb_nested_quant bnb_4bit_use_double_quant", "", "NF4 is always doubly quantised", values.nested),
    needless("attention has kernels of its own", "attn_implementation"),
    needless("storage is bitsandbytes' own", "bnb_4bit_quant_storage bnb_4bit_compute_dtype"),
    needless("there are no buffers", "ignore_bias_buffers"),
    needless("the task is language modelling", "lora_task_type"),
    needless("devices are a mesh: `mesh`", "device_map"),
    missing("the hub's newest revision is read", "model_revision revision", lambda v: is_off(v) or v == "main"),
    missing("LoRA goes on linear layers", "lora_target_parameters"),
]  # fmt: skip

PEFT = [
    same(
        "lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern ensure_weight_tying init_lora_weights use_dora"
    ),
    renamed("r", "lora_r"),
    changed("target_modules", "`lora_target_modules`", "names, `all-linear` or a regular expression", values.targets),
    changed("layers_to_transform", "`layers_to_transform`", "", values.layers),
    changed("modules_to_save", "`modules_to_save`", "`embed_tokens`, `lm_head`", values.saved),
    needless(
        "what a config file says about itself",
        "task_type peft_type auto_mapping peft_version base_model_name_or_path inference_mode layers_pattern "
        "fan_in_fan_out megatron_core runtime_config qalora_group_size",
    ),
    missing("list what is wanted in `lora_target_modules`", "exclude_modules"),
    missing("biases stay frozen", "bias lora_bias"),
    changed("loftq_config", "`loftq_iter`", "4 bits are those of `load_in_4bit`", values.loftq),
    missing("not here", "use_qalora use_bdlora eva_config corda_config lora_ga_config "
            "velora_config monteclora_config arrow_config kasa_config alora_invocation_tokens"),
    missing("new tokens are trained by `add_tokens`", "trainable_token_indices"),
    missing("layers are not repeated", "layer_replication megatron_config"),
    missing("LoRA goes on linear layers", "target_parameters"),
]  # fmt: skip

UNSLOTH = [
    same("load_in_4bit load_in_8bit full_finetuning embedding_learning_rate"),
    renamed("model_name", "model_name_or_path"),
    renamed("max_seq_length", "max_length", "beyond the model's positions its rope is scaled, as there"),
    renamed("random_state", "seed"),
    changed("target_modules", "`lora_target_modules`", "`embed_tokens`, `lm_head` go to `modules_to_save`",
            values.targets),
    changed("use_gradient_checkpointing", "`gradient_checkpointing`", "`\"unsloth\"` is `offload`",
            values.checkpointing),
    changed("dtype", "`dtype`", "", values.dtype),
    needless("16 bits are the default on a GPU", "load_in_16bit float32_mixed_precision"),
    needless("the whole of it runs in one process", "fast_inference gpu_memory_utilization max_lora_rank "
             "float8_kv_cache disable_log_stats unsloth_vllm_standby offload_embedding"),
    needless("the tokenizer is used as it is", "fix_tokenizer use_exact_model_name temporary_location model tokenizer"),
    missing("log in to the hub by HF_TOKEN", "token", lambda v: v is None),
    missing("`max_length` beyond the model's positions scales its rope", "rope_scaling"),
    missing("`add_tokens` extends the vocabulary", "resize_model_vocab"),
    missing("8 bits of floats are not here", "load_in_fp8"),
    missing("images are not read: the text part alone is trained", "finetune_vision_layers", is_off),
    missing("`lora_target_modules` names the linear layers",
            "finetune_language_layers finetune_attention_modules finetune_mlp_modules", is_on),
]  # fmt: skip

# arguments that trainers took themselves before there was SFTConfig, and those that are no settings
TRAINER = [
    needless("the data set is found by load_dataset", "train_dataset eval_dataset args model"),
    needless("the tokenizer comes with the model", "tokenizer processing_class"),
    needless("the data set is packed by its plan", "data_collator dataset_batch_size"),
    missing("columns tell the format, `template` that of others (docs/data.md)", "formatting_func"),
    missing("AdamW and its schedule come by flags; your own by `make_train_step`", "optimizers"),
    missing(
        "what counts on answers is `eval_metric: MODULE:FUNCTION`", "compute_metrics preprocess_logits_for_metrics"
    ),
    missing("your own loss: notebooks/own_loss.ipynb", "compute_loss_func"),
    missing("there are no callbacks; early stopping is `early_stopping_patience`", "callbacks"),
    needless("LoRA's settings are taken from there", "peft_config quantization_config"),
]

# what `load_dataset`, and what is done to its rows, says
DATA = [
    same("dataset eval_dataset eval_split dataset_config dataset_train_split dataset_test_split"),
    renamed("dataset_streaming", "streaming"),
    missing("columns tell the format, `template` that of others (docs/data.md)", "map"),
]

TABLE = {"data": DATA, "training": TRAINING, "command": COMMAND, "LoRA": PEFT, "Unsloth": UNSLOTH, "trainer": TRAINER}

# where settings are given -> the parts of the table that are looked into, in this order
ORIGINS = {
    "SFTConfig": ("training", "Unsloth"),
    "TrainingArguments": ("training", "Unsloth"),
    "UnslothTrainingArguments": ("training", "Unsloth"),
    "SFTTrainer": ("trainer", "training"),
    "UnslothTrainer": ("trainer", "training"),
    "Trainer": ("trainer", "training"),
    "BitsAndBytesConfig": ("command",),
    "from_pretrained": ("command", "trainer", "Unsloth", "training"),
    "FastLanguageModel.from_pretrained": ("Unsloth", "command", "training"),
    "LoraConfig": ("LoRA",),
    "FastLanguageModel.get_peft_model": ("Unsloth", "LoRA"),
    "load_dataset": ("data",),
    "command": ("training", "command", "LoRA", "Unsloth"),
}

# what a call means where it is silent and jaxft would mean something else
DEFAULTS: dict[str, dict[str, Any]] = {
    "SFTConfig": {"learning_rate": 2e-5, "packing": False},
    "TrainingArguments": {"learning_rate": 5e-5, "packing": False},
    "UnslothTrainingArguments": {"learning_rate": 5e-5, "packing": False},
    "FastLanguageModel.from_pretrained": {"max_length": 2048, "load_in_4bit": True},
    "LoraConfig": {"lora_r": 8, "lora_alpha": 8, "lora_target_modules": "q_proj,v_proj"},
    "trl": {"learning_rate": 2e-5, "packing": False},
    "trl with --use_peft": {"lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": "q_proj,v_proj"},
}


def taken_by_name(rule: Rule | None, name: str) -> bool:
    """Whether a setting that the table has no counterpart for has one of its own name: it is newer than its rule."""
    return name in SETTINGS and name not in UNLIKE and (rule is None or rule.lost)


def rule_for(origin: str, name: str) -> Rule | None:
    """The rule for a setting that was given in `origin`; None where it is unknown."""
    for part in ORIGINS[origin]:
        for rule in TABLE[part]:
            if name in rule.names:
                return rule
    return None
