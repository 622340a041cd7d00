"""The same steps of one model, adapter and text in jaxft, transformers + PEFT and Unsloth, in bfloat16: equal losses?

    python scripts/parity.py prepare parity --config qwen3-4b --dataset train.jsonl --tokenizer vocabulary.gguf
    python scripts/parity.py run jaxft parity jaxft-0.json               # then hf and unsloth, in turn
    python scripts/parity.py run jaxft parity jaxft-1.json --seed 1      # the same but for rounding, see below
    python scripts/parity.py report *.json                               # writes docs/parity.md and docs/parity.png

`prepare` writes random weights of a real configuration, a PEFT adapter (A as PEFT draws it, B zero, float32), and
batches of full rows of running text, without padding: every token but the first of its row is a target, for each
program. Each trains the adapter in float32 with AdamW in 32 bits, its weights and products in bfloat16. A seed other
than 0 takes the rows of a batch in another order and lets every row begin at another position, of which RoPE knows
differences alone: exact arithmetic would not notice, and rounding does. By how much the losses of two seeds differ is
the run-to-run noise, which `report` holds the difference between programs against; exit 1 where that is too large.
Runs with `--dtype float32`, which round next to nothing, are what `report --exact` holds all others against, and each
other: programs that compute the same differ there by a tenth at most of what bfloat16 does to one of them.

`prepare --batches_only` needs neither torch nor a GPU, and `prepare --batches FILE` neither data nor a tokenizer. Where
Unsloth runs, nothing of jaxft is imported: it wants to be the first to import transformers, which it changes.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from parity_report import ALPHA, GIB, RANK, SIZES, Result, draw, page, read_exact, read_results, verdicts

PREPARED, BATCHES, MODEL, ADAPTER = "prepared.json", "batches.npz", "model", "adapter"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNTIMED = 10  # first steps, in which programs compile and tune themselves
# before Unsloth is imported
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_ENABLE_LOGGING": "0",
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What all programs train with: AdamW after clipping, a linear warmup from 0, then a constant rate."""

    learning_rate: float = 2e-4
    warmup_steps: int = 10
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


TRAINING = Training()
Step = Callable[[np.ndarray, np.ndarray, int], float]  # tokens, labels (B, T), first position: loss before the update


@dataclass(frozen=True)
class Program:
    """A program ready to train. peak: the most bytes of the device so far, None on a CPU. packages: what it is."""

    step: Step
    peak: Callable[[], int | None]
    device: str
    packages: tuple[str, ...]


# prepare


def running_text(dataset: str, tokenizer: Path, vocab_size: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Tokens int32 (steps, B, T): the rows of a data set, rendered as for training, one after the other in an order
    drawn by `seed`, cut into full rows. Raises InputError where the data set is too short."""
    from make_tiny_model import read_tokenizer

    from jaxft.data import load_rows, tokenize_dataset
    from jaxft.errors import InputError
    from jaxft.packing import permutation

    samples, report = tokenize_dataset(
        load_rows(dataset), read_tokenizer(tokenizer, None), max_length=1 << 20, vocab_size=vocab_size
    )
    print("\n".join(report.lines()))
    steps, rows, length = shape
    if report.tokens < steps * rows * length:
        raise InputError(
            f"{dataset} has {report.tokens} tokens, {steps} steps of {rows} rows of {length} need "
            f"{steps * rows * length}; {report.tokens // (rows * length)} such steps would fit"
        )
    stream = np.concatenate([samples[int(number)].input_ids for number in permutation(len(samples), seed)])
    return stream[: steps * rows * length].reshape(shape).astype(np.int32)


def read_config(name: str) -> dict[str, Any]:
    """The constants of a configuration: by its name in `jaxft.bench`, or from a JSON file of config.json's fields."""
    from jaxft.bench import CONFIGS
    from jaxft.errors import InputError

    if name in CONFIGS:
        return dict(CONFIGS[name])
    if not Path(name).is_file():
        raise InputError(f"--config {name}: neither a file nor one of {', '.join(CONFIGS)}")
    found = json.loads(Path(name).read_text(encoding="utf-8"))
    if missing := {"model_type", "vocab_size"} - found.keys():
        raise InputError(f"--config {name} lacks {', '.join(sorted(missing))}; it is written as a config.json is")
    return found


def write_model(out: Path, constants: dict[str, Any], seed: int) -> None:
    """OUT/model with random bfloat16 weights, drawn on a GPU where there is one, and OUT/adapter around it.

    The tokenizer beside the weights has a hundred words and is there because Unsloth loads one; none of it is used.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    constants = dict(constants)
    config = AutoConfig.for_model(
        constants.pop("model_type"), **constants, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # transformers makes the padding token's row zero; in a real vocabulary this id is a word
    model.get_input_embeddings().weight.data[0].normal_(0, config.initializer_range)
    model.save_pretrained(out / MODEL, max_shard_size="4GB")
    words = {word: number for number, word in enumerate([*names.values(), *map(str, range(100))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", **names).save_pretrained(out / MODEL)
    adapter = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )
    adapter.save_pretrained(str(out / ADAPTER), save_embedding_layers=False)
    sizes = {name: p.numel() for name, p in adapter.named_parameters()}
    trained = sum(size for name, size in sizes.items() if ".lora_" in name)
    weights = sum(sizes.values()) - trained
    print(f"{out}: {weights / 1e6:,.1f} M random weights, {trained / 1e6:,.2f} M in the adapter")


def digest(out: Path) -> str:
    """What stands for all that was prepared: results of other weights or batches cannot be compared."""
    found = hashlib.sha256()
    for path in sorted((out / BATCHES, *(out / MODEL).iterdir(), *(out / ADAPTER).glob("*.safetensors"))):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def prepare(options: argparse.Namespace) -> int:
    from jaxft.errors import InputError

    out: Path = options.out
    constants = read_config(options.config)
    if bool(options.batches) == bool(options.dataset and options.tokenizer):
        raise InputError("name --dataset and --tokenizer, or --batches of an earlier prepare")
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    if options.batches and given:
        raise InputError(f"--batches {options.batches} has its own {', '.join(given)}; leave the flag out")
    if out.exists():
        raise InputError(f"{out} exists already; name a new directory")
    if options.batches:
        with np.load(options.batches) as held:
            tokens, labels, about = held["tokens"], held["labels"], json.loads(str(held["about"]))
        if tokens.max() >= constants["vocab_size"]:
            raise InputError(
                f"{options.batches} has token {tokens.max()}, {options.config} a vocabulary of "
                f"{constants['vocab_size']}; make the batches for this --config"
            )
    else:
        sizes = SIZES | given
        shape = sizes["steps"], sizes["rows"], sizes["length"]
        tokens = running_text(options.dataset, options.tokenizer, constants["vocab_size"], shape, sizes["seed"])
        labels = tokens.copy()
        about = {"dataset": "/".join(Path(options.dataset).parts[-2:]), "tokenizer": options.tokenizer.name, **sizes}
    out.mkdir(parents=True)
    np.savez_compressed(out / BATCHES, tokens=tokens, labels=labels, about=json.dumps(about))
    print(f"{out / BATCHES}: {tokens.shape[0]} steps of {tokens.shape[1]} rows of {tokens.shape[2]} tokens")
    if options.batches_only:
        return 0
    write_model(out, constants, about["seed"])
    prepared = {"config": Path(options.config).name.removesuffix(".json"), **about, "digest": digest(out)}
    (out / PREPARED).write_text(json.dumps(prepared, indent=2) + "\n", encoding="utf-8")
    return 0


# run


def jaxft_program(directory: Path, shape: tuple[int, int], dtype: str) -> Program:
    """jaxft as `jaxft.train` sets it up on one device, with its defaults: the fast path is whatever it takes."""
    import jax
    import jax.numpy as jnp

    from jaxft import load_adapter, load_model, make_optimizer, make_schedule
    from jaxft.convert.peft import read_adapter_config
    from jaxft.devices import use_compile_cache
    from jaxft.load import adapter_shapes, model_shapes
    from jaxft.memory import batch_shapes, plan
    from jaxft.optim import state_shapes
    from jaxft.sharding import make_mesh, mesh_sizes, put_batch

    use_compile_cache()
    device = jax.devices()[0]
    mesh = make_mesh(mesh_sizes(None, 1), [device])
    held = dict(dtype=jnp.dtype(dtype), mesh=mesh)
    schedule = make_schedule("constant_with_warmup", TRAINING.learning_rate, TRAINING.warmup_steps, 0)
    optimizer = make_optimizer(
        schedule, adam_beta1=TRAINING.beta1, adam_beta2=TRAINING.beta2, adam_epsilon=TRAINING.epsilon,
        weight_decay=TRAINING.weight_decay, max_grad_norm=TRAINING.max_grad_norm,
    )  # fmt: skip
    # make_train_step, compiled before any array is there: what XLA tries out is then no part of the peak
    model, shapes = model_shapes(directory / MODEL, **held)
    model, trainable, frozen = adapter_shapes(model, shapes, read_adapter_config(directory / ADAPTER), mesh)
    places = state_shapes(optimizer, trainable)
    compiled = plan(
        model, optimizer=optimizer, trainable=trainable, opt_state=places, frozen=frozen,
        batch=batch_shapes(mesh, 1, *shape), max_documents=1,
    ).compiled  # fmt: skip
    _, trainable, frozen, _ = load_adapter(directory / ADAPTER, *load_model(directory / MODEL, **held), mesh=mesh)
    opt_state = jax.device_put(optimizer.init(trainable), jax.tree.map(lambda leaf: leaf.sharding, places))
    key = jax.random.key(0)
    row = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))

    def step(tokens: np.ndarray, labels: np.ndarray, start: int) -> float:
        nonlocal trainable, opt_state
        batch = {
            "tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": row + np.int32(start),
            "loss_weights": ((labels != -100) & (row > 0)).astype(np.float32),
        }  # fmt: skip
        put = put_batch({name: array[None] for name, array in batch.items()}, mesh)
        trainable, opt_state, metrics = compiled(trainable, opt_state, frozen, put, key)
        return float(metrics["loss"])

    def peak() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    return Program(step, peak, device.device_kind, ("jax", "jaxlib"))


def torch_program(model: Any, packages: tuple[str, ...], autocast: bool) -> Program:
    """A step of a torch model that gives its own loss when it gets labels."""
    import torch
    from transformers import get_scheduler

    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    adam = torch.optim.AdamW(
        params, lr=TRAINING.learning_rate, betas=(TRAINING.beta1, TRAINING.beta2), eps=TRAINING.epsilon,
        weight_decay=TRAINING.weight_decay, fused=device.type == "cuda",
    )  # fmt: skip
    schedule = get_scheduler("constant_with_warmup", adam, num_warmup_steps=TRAINING.warmup_steps)

    def step(tokens: np.ndarray, labels: np.ndarray, start: int) -> float:
        ids, wanted = (torch.from_numpy(array).long().to(device) for array in (tokens, labels))
        row = torch.arange(start, start + ids.shape[1], device=device)
        positions = {"position_ids": row.expand(ids.shape)} if start else {}  # else the model's own
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=wanted, **positions).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, TRAINING.max_grad_norm)
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)
        return loss.item()

    def peak() -> int | None:
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else None

    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return Program(step, peak, name, (*packages, "transformers", "peft", "torch"))


def hf_program(directory: Path, shape: tuple[int, int], dtype: str) -> Program:
    """transformers + PEFT as TRL runs them: bfloat16 weights, float32 adapter, autocast, layers recomputed."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory / MODEL, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PeftModel.from_pretrained(model, str(directory / ADAPTER), is_trainable=True).train()
    return torch_program(model, (), autocast=dtype != "float32")


def unsloth_program(directory: Path, shape: tuple[int, int], dtype: str) -> Program:
    """Unsloth by its own two calls; the prepared adapter's numbers then take the place of the ones that it drew."""
    os.environ.update(OFFLINE)
    from unsloth import FastLanguageModel  # isort: skip  # before torch and transformers

    import torch
    from safetensors.torch import load_file

    model, _ = FastLanguageModel.from_pretrained(
        str(directory / MODEL), max_seq_length=2 * shape[1], dtype=getattr(torch, dtype), load_in_4bit=False,
        local_files_only=True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth", random_state=0,
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    put_adapter(model, load_file(str(directory / ADAPTER / "adapter_model.safetensors")))
    return torch_program(model, ("unsloth", "unsloth_zoo"), autocast=False)


def put_adapter(model: Any, tensors: dict[str, Any]) -> None:
    """Writes a PEFT adapter's tensors into a model's trained parameters, in float32, by name.

    Raises RuntimeError where one of the two has a name or a shape that the other has not.
    """
    found = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    apart = sorted(found.keys() ^ tensors.keys()) or sorted(n for n, t in tensors.items() if found[n].shape != t.shape)
    if apart:
        raise RuntimeError(f"the adapter and the model's trained parameters differ in {len(apart)}: {apart[:4]}")
    for name, tensor in tensors.items():
        found[name].data = tensor.to(found[name].device).float()


PROGRAMS: dict[str, Callable[[Path, tuple[int, int], str], Program]] = {
    "jaxft": jaxft_program, "hf": hf_program, "unsloth": unsloth_program,
}  # fmt: skip


def row_order(seed: int, step: int, rows: int) -> np.ndarray:
    """In what order a step takes the rows of its batch; as they stand for seed 0."""
    return np.random.default_rng([seed, step]).permutation(rows) if seed else np.arange(rows)


def first_position(seed: int, length: int) -> int:
    """At which position every row of a run begins: 0 for seed 0, else 1 to T."""
    return int(np.random.default_rng(seed).integers(1, length + 1)) if seed else 0


def run(options: argparse.Namespace) -> int:
    directory: Path = options.directory.resolve()
    if not (directory / PREPARED).is_file():
        raise FileNotFoundError(f"{directory / PREPARED} is not there: python scripts/parity.py prepare {directory}")
    with np.load(directory / BATCHES) as held:
        tokens, labels = held["tokens"], held["labels"]
    steps, B, T = tokens.shape
    start = first_position(options.seed, T)
    began = time.perf_counter()
    program = PROGRAMS[options.program](directory, (B, T), options.dtype)
    losses, seconds = [], []
    for step in range(steps):
        order = row_order(options.seed, step, B)
        started = time.perf_counter()
        losses.append(program.step(tokens[step][order], labels[step][order], start))  # waits for the step
        seconds.append(time.perf_counter() - started)
        if step == 0 or (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}, {time.perf_counter() - began:.1f} s", flush=True)
    timed = seconds[UNTIMED:] or seconds
    result = Result(
        options.program, options.seed, options.dtype, json.loads((directory / PREPARED).read_text(encoding="utf-8")),
        asdict(TRAINING), losses, B * T / statistics.median(timed), program.peak(), program.device,
        {package: version(package) for package in program.packages},
    )  # fmt: skip
    options.result.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
    peak = "" if result.peak_bytes is None else f", peak {result.peak_bytes / GIB:.2f} GiB"
    print(f"{options.result}: {result.tokens_per_second:,.0f} tokens/s{peak} on {result.device}")
    return 0


# report


def report(options: argparse.Namespace) -> int:
    results = read_results(options.results)
    exact = read_exact(options.exact, results[0])
    verdict = verdicts(results, exact)
    picture = options.out.with_suffix(".png")
    draw(picture, results, exact)
    options.out.write_text(page(results, exact, verdict, picture.name), encoding="utf-8")
    for holds, text in verdict:
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    print(f"written to {options.out} and {picture}")
    return 0 if all(holds for holds, _ in verdict) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare", help="write weights, adapter and batches into a new directory")
    one.set_defaults(command=prepare)
    one.add_argument("out", type=Path)
    one.add_argument("--config", default="qwen3-4b", help="a name of jaxft.bench's, or a JSON file like config.json")
    one.add_argument("--dataset", help="rows in any format that training reads")
    one.add_argument("--tokenizer", type=Path, help="a directory that transformers reads, or a GGUF file")
    one.add_argument("--batches", type=Path, help="batches.npz of an earlier prepare, in place of those two")
    one.add_argument("--batches_only", action="store_true", help="no model and no adapter, for another machine")
    for name, default in SIZES.items():
        one.add_argument(f"--{name}", type=int, help=f"{default} where not given")
    one = commands.add_parser("run", help="train with one program and write what it did")
    one.set_defaults(command=run)
    one.add_argument("program", choices=PROGRAMS)
    one.add_argument("directory", type=Path)
    one.add_argument("result", type=Path)
    one.add_argument("--seed", type=int, default=0, help="of what only rounding notices; 0: nothing is changed")
    one.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and products")
    one = commands.add_parser("report", help="write the page and its picture")
    one.set_defaults(command=report)
    one.add_argument("results", type=Path, nargs="+")
    one.add_argument(
        "--exact", type=Path, nargs="+", default=[], help="runs of the same with --dtype float32: held against each "
        "other, and all against the first program's, transformers + PEFT's where it is there",
    )  # fmt: skip
    one.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "parity.md")
    for subcommand in commands.choices.values():
        subcommand.add_argument("--debug", action="store_true", help="a traceback where something fails")
    options = parser.parse_args(argv)
    return options.command(options)


if __name__ == "__main__":
    if "unsloth" in sys.argv[1:]:
        sys.exit(main())
    from jaxft.errors import run_command

    sys.exit(run_command(main))
