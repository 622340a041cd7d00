"""`python -m jaxft.bench A1 …`: speed and memory of a train step on random weights, one JSON line a workload."""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoConfig

from jaxft.budget import check_residuals, device_limit, fastest
from jaxft.cards import absent_card, peak_flops
from jaxft.devices import use_compile_cache
from jaxft.errors import InputError, RunError, run_command
from jaxft.flops import model_flops
from jaxft.load import adapter_shapes, held_shapes, new_adapter, parameter_count
from jaxft.lora import LoraConfig
from jaxft.memory import Plan, batch_shapes, plan
from jaxft.models import Model, describe_model, init_params
from jaxft.models.layers import KEPT_MLP, REMAT
from jaxft.models.quantized import all_linears, with_quantized
from jaxft.optim import OPTIMS, make_optimizer, state_shapes
from jaxft.optim_paged import on_host
from jaxft.packing import Batch
from jaxft.processes import say
from jaxft.profile import table
from jaxft.sharding import make_mesh, mesh_sizes
from jaxft.trees import Tree
from jaxft.typed import parse_bytes

# constants of the public configurations of the named models
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-4b": dict(
        model_type="qwen3", hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_theta=1e6, max_position_embeddings=40960,
    ),
    "qwen3-0.6b": dict(
        model_type="qwen3", hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_theta=1e6, max_position_embeddings=40960,
    ),
    "llama-3-8b": dict(
        model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_theta=5e5, max_position_embeddings=131072,
    ),
    "llama-3.2-1b": dict(
        model_type="llama", hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_theta=5e5, max_position_embeddings=131072,
    ),
    "gemma-2-2b": dict(
        model_type="gemma2", hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, intermediate_size=9216, vocab_size=256000, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_theta=1e4, max_position_embeddings=8192, query_pre_attn_scalar=256, sliding_window=4096,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    ),
    "gemma-3-1b": dict(
        model_type="gemma3_text", hidden_size=1152, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=6912, vocab_size=262144, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_theta=1e6, rope_local_base_freq=1e4, max_position_embeddings=32768, query_pre_attn_scalar=256,
        sliding_window=512, sliding_window_pattern=6,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One row of the table: a model, how it is trained, and the rows of a step. mean_document 0: one a row."""

    model: str
    batch: int
    length: int
    full_finetuning: bool = False
    load_in_4bit: bool = False
    gradient_checkpointing: str = "full"
    kept_layers: int = 0
    mean_document: int = 0


# with the policies of docs/performance.md
WORKLOADS = {
    "A1": Workload("qwen3-4b", 8, 2048, gradient_checkpointing="offload_middle", kept_layers=1),
    "A2": Workload("qwen3-4b", 8, 2048, gradient_checkpointing="none"),
    "A3": Workload("qwen3-4b", 1, 2048, load_in_4bit=True, gradient_checkpointing="offload_v", kept_layers=1),
    "A4": Workload("qwen3-4b", 8, 2048, load_in_4bit=True, gradient_checkpointing="offload_middle"),
    "A5": Workload("llama-3-8b", 2, 2048, load_in_4bit=True, gradient_checkpointing="offload_qkv"),
    "A6": Workload("llama-3-8b", 4, 4096, gradient_checkpointing="offload_qkv"),
    "A7": Workload("llama-3-8b", 1, 32768, load_in_4bit=True, gradient_checkpointing="offload_middle"),
    "A8": Workload(
        "llama-3.2-1b", 8, 2048, full_finetuning=True, gradient_checkpointing="offload_middle", kept_layers=2
    ),
    "A9": Workload("qwen3-4b", 8, 2048, mean_document=200, gradient_checkpointing="offload_middle"),
}


def random_batch(workload: Workload, vocab_size: int, seed: int) -> Batch:
    """Random tokens, every one a target; ragged documents have log-normal lengths (σ 0.8) of the workload's mean."""
    random = np.random.default_rng(seed)
    B, T = workload.batch, workload.length
    segments, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for row in range(B if workload.mean_document else 0):
        start, segment = 0, 0
        while start < T:
            drawn = random.lognormal(math.log(workload.mean_document) - 0.32, 0.8)
            stop = min(T, start + max(8, int(drawn)))
            segment += 1
            segments[row, start:stop], positions[row, start:stop] = segment, np.arange(stop - start)
            start = stop
    tokens = random.integers(4, vocab_size, (B, T)).astype(np.int32)
    weights = (positions > 0).astype(np.float32)
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_weights": weights}
    return {name: array[None] for name, array in arrays.items()}


def workload_of(name: str, options: argparse.Namespace) -> Workload:
    """The named workload, with what the flags say in place of its own."""
    asked = {field: getattr(options, field) for field in ("model", "batch", "length")}
    return replace(WORKLOADS[name], **{field: value for field, value in asked.items() if value})


def described(workload: Workload) -> Model:
    """The workload's model, without an adapter."""
    constants = dict(CONFIGS[workload.model])
    model = describe_model(AutoConfig.for_model(constants.pop("model_type"), **constants))
    return with_quantized(model, all_linears(model, "nf4", jnp.bfloat16)) if workload.load_in_4bit else model


def planned(name: str, options: argparse.Namespace) -> Plan:
    """What the workload's step needs, by the flags or by the fastest policy within `--memory_budget`."""
    workload = workload_of(name, options)
    device = absent_card(options.device) if options.device else jax.devices()[0]
    mesh = make_mesh(mesh_sizes(None, 1), [device])
    model = described(workload)
    trainable: Tree = held_shapes(model, jnp.bfloat16, mesh)
    frozen: Tree = {}
    if not workload.full_finetuning:
        model, trainable, frozen = adapter_shapes(model, trainable, LoraConfig(), mesh)
    optimizer = make_optimizer(2e-4, optim=options.optim)
    documents = max(int(batch["segment_ids"].max()) for batch in batches_of(workload, model))

    def make(gradient_checkpointing: str, mlp_tiles: int, kept_layers: int = 0) -> Plan:
        return plan(
            model, optimizer=optimizer, trainable=trainable, opt_state=state_shapes(optimizer, trainable),
            frozen=frozen, batch=batch_shapes(mesh, 1, workload.batch, workload.length),
            gradient_checkpointing=gradient_checkpointing, mlp_tiles=mlp_tiles, kept_layers=kept_layers,
            max_documents=documents, compiler_options=dict(options.compiler_option),
        )  # fmt: skip

    if options.memory_budget is None:
        policy = options.gradient_checkpointing or workload.gradient_checkpointing
        kept = options.kept_layers
        if kept is None:  # the workload's own, with its own policy
            kept = workload.kept_layers if policy == workload.gradient_checkpointing else 0
        return make(policy, options.mlp_tiles or 1, kept)
    limit = device_limit(device) if options.memory_budget == "auto" else parse_bytes(options.memory_budget)
    if limit is None:
        raise InputError(f"--memory_budget auto: {device.device_kind} has no memory of its own; name a number")
    try:
        return fastest(limit, make, mesh, model.config, say=say)
    except InputError as failure:
        if options.dry_run:  # which was asked whether it fits: the answer is no
            raise RunError(str(failure)) from failure
        raise


def dry_run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The line of a workload that is planned and not run; sizes in bytes of one device."""
    found = planned(name, options)
    sizes = {field.name: getattr(found, field.name) for field in fields(found) if field.name != "compiled"}
    return {"id": name, "device": options.device or jax.devices()[0].device_kind} | sizes | {"total": found.total}


def batches_of(workload: Workload, model: Model) -> list[Batch]:
    """The batches that the steps take in turn."""
    return [random_batch(workload, model.config.vocab_size, seed) for seed in range(4)]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Builds the workload's step, compiles it ahead, runs it, and returns the figures of its line."""
    workload = workload_of(name, options)
    use_compile_cache()
    # before any array is there: the scratch memory in which XLA times its choices is then no part of the peak
    began = time.perf_counter()
    found = planned(name, options)
    compile_seconds = time.perf_counter() - began
    check_residuals(found, jax.devices()[0])
    model = described(workload)
    params = init_params(model, jax.random.key(0), jnp.bfloat16)
    trainable: Tree = params
    frozen: Tree = {}
    if not workload.full_finetuning:
        model, trainable, frozen = new_adapter(model, params, LoraConfig(), jax.random.key(1))
    del params
    optimizer = make_optimizer(2e-4, optim=options.optim)
    opt_state = jax.jit(optimizer.init)(trainable)
    opt_state = jax.device_put(opt_state, on_host(opt_state))
    batches = batches_of(workload, model)
    key = jax.random.key(2)
    losses: list[float] = []
    read = [time.perf_counter()]  # when each step's loss was, behind the time of the beginning

    def wait(sent: jax.Array) -> None:
        losses.append(float(sent))
        read.append(time.perf_counter())

    sent: list[jax.Array] = []
    for number in range(options.warmup + options.steps):
        if number == options.warmup:  # no timed step's time is spent, unseen, beside an untimed one
            while sent:
                wait(sent.pop())
            if options.profile:
                jax.profiler.start_trace(options.profile)
        batch = jax.device_put(batches[number % len(batches)])
        trainable, opt_state, metrics = found.compiled(trainable, opt_state, frozen, batch, key)
        sent.append(metrics["loss"])
        if len(sent) == 2:  # a step is sent before the loss of the last is read, as the training loop does
            wait(sent.pop(0))
    wait(sent.pop())
    if options.profile:
        jax.profiler.stop_trace()
        print(table(Path(options.profile), options.steps), file=sys.stderr)
    median = statistics.median(after - before for before, after in itertools.pairwise(read[options.warmup :]))
    tokens = workload.batch * workload.length
    flops = model_flops(model, batches[0], workload.full_finetuning)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    peak = peak_flops(device, jnp.bfloat16)
    return {
        "id": name,
        "model": workload.model,
        "shape": [workload.batch, workload.length],
        "gradient_checkpointing": found.gradient_checkpointing,
        "mlp_tiles": found.mlp_tiles,
        "kept_layers": found.kept_layers,
        "compiler_options": dict(options.compiler_option),
        "optim": options.optim,
        "backends": found.backends,
        "device": device.device_kind,
        "tokens_per_second": tokens / median,
        "step_ms": median * 1e3,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "temp_bytes": found.temporary,
        "argument_bytes": found.arguments,
        "host_bytes": found.host,
        "compile_seconds": compile_seconds,
        "model_tflops": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "trained_parameters": parameter_count(trainable),
        "loss": losses,
    }


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _compiler_option(text: str) -> tuple[str, str | bool]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, {"true": True, "false": False}.get(value, value)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked against each other."""
    parser = argparse.ArgumentParser(prog="python -m jaxft.bench", description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS, metavar="ID", help=", ".join(WORKLOADS))
    parser.add_argument("--model", choices=CONFIGS, help="instead of the workload's own")
    parser.add_argument("--batch", type=_positive, help="rows of a step, instead of the workload's own")
    parser.add_argument("--length", type=_positive, help="tokens of a row, instead of the workload's own")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--gradient_checkpointing", choices=list(REMAT), help="instead of the workload's own")
    parser.add_argument("--mlp_tiles", type=int, help="in how many parts the MLPs take the tokens, 1 where not given")
    parser.add_argument(
        "--kept_layers",
        type=int,
        help="how many of the last layers keep what products keeps, instead of the workload's own",
    )
    parser.add_argument("--memory_budget", help="11GiB or auto: the fastest policy that fits, in place of those three")
    parser.add_argument("--dry_run", action="store_true", help="compile, say what the step needs, run nothing")
    parser.add_argument("--device", help="dry runs only: a card that is not here, h200")
    parser.add_argument("--optim", default="adamw_8bit", choices=OPTIMS)
    parser.add_argument(
        "--compiler_option", action="append", type=_compiler_option, default=[], metavar="NAME=VALUE",
        help="an option of XLA, such as xla_gpu_enable_triton_gemm=false; as often as wanted",
    )  # fmt: skip
    parser.add_argument("--profile", help="write a trace of the timed steps here, and say where their time goes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    chosen = options.gradient_checkpointing or options.mlp_tiles or options.kept_layers is not None
    if options.memory_budget and chosen:
        raise InputError(
            "--memory_budget chooses --gradient_checkpointing, --mlp_tiles and --kept_layers; leave them out, or it"
        )
    if options.kept_layers:
        policies = [
            options.gradient_checkpointing or WORKLOADS[name].gradient_checkpointing for name in options.workloads
        ]
        if options.kept_layers < 0 or set(policies) & set(KEPT_MLP):
            raise InputError(
                f"--kept_layers {options.kept_layers} must be at least 0, and has no meaning with "
                f"--gradient_checkpointing {' and '.join(KEPT_MLP)}, which keep all layers; leave it out"
            )
    if options.device and not options.dry_run:
        raise InputError(f"--device {options.device} is not here to be measured; it has a meaning with --dry_run")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    arguments = sys.argv[1:] if argv is None else argv
    if len(options.workloads) == 1:
        line = (dry_run if options.dry_run else measure)(options.workloads[0], options)
        print(json.dumps(line), flush=True)
        return 0
    # a fresh process a measurement: the allocator's peak cannot be reset
    flags = [argument for argument in arguments if argument not in WORKLOADS]
    codes = [subprocess.call([sys.executable, "-m", "jaxft.bench", name, *flags]) for name in options.workloads]
    return max(codes)


if __name__ == "__main__":
    sys.exit(run_command(main))
