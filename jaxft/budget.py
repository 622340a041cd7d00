"""The fastest way to compile a run's step that fits into a device, and what a dry run says of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
from jax.sharding import Mesh

from jaxft.cards import MEMORY, PREALLOCATED, is_absent
from jaxft.errors import InputError, RunError
from jaxft.estimate import estimate
from jaxft.loop import Run
from jaxft.memory import Plan, gib, plan_of
from jaxft.models.decoder import ModelConfig
from jaxft.models.layers import KEPT_MLP, OFFLOADED, can_keep_layers
from jaxft.offload_check import check_offload
from jaxft.prepare import Prepared
from jaxft.quant import is_quantized
from jaxft.settings import TrainSettings

MARGIN = 0.95  # of what XLA may use of a device: its allocator leaves gaps, and what runs beside the step needs some
# (gradient_checkpointing, mlp_tiles), fastest first as measured (docs/log.md), each smaller on a card than the one
# before. Of all policies (`models.layers.REMAT`) these are not in it: "offload_attention", neither faster nor smaller
# than "offload_middle", which only sends more to the host; "offload_v", which gains half a percent over that where the
# bus has so much time left. "full" stands before those that put residuals there: it needs no bus and, with few tokens,
# is faster
LADDER = (
    *(("none", 1), ("products", 1), ("attention", 1), ("full", 1)),
    *(("offload_qkv", 1), ("offload_middle", 1), ("offload_middle", 4), ("offload", 8)),
)
# FLOPs of a layer's products for each byte that "offload_qkv" sends to the host, below which it waits for the bus: an
# H200 behind 16 lanes of PCIe 5 gained 3.4 % with 11,800 (Llama-3-8B) and lost 10 % with 6,600 (Qwen3-4B)
WORK_A_BYTE = 10_000
KEPT_TRIES = 3  # plans that ask how many layers a policy can keep beside it
# where the host is the device, nothing is gained by moving arrays there
CPU_LADDER = (("products", 1), ("attention", 1), ("full", 1), ("full", 2), ("full", 8))


def plan_run(
    run: Run, prepared: Prepared, say: Callable[[str], None],
    ahead: Callable[[Run, Prepared], Plan | None] = lambda run, prepared: None,
) -> Plan:  # fmt: skip
    """The step that the run will take, compiled: as the flags say, or the fastest within `--memory_budget`.

    ahead: gives that of the flags, where it was made beside other work (`step_ahead`), or None. A dry run prints the
    plan on stdout. Raises InputError where nothing fits, RunError where a dry run's step does not.
    """
    settings, device = run.settings, prepared.mesh.devices.flat[0]
    limit, advice = settings.memory_limit, what_helps(settings, prepared)
    source = "--memory_budget"
    if limit == "auto" or (limit is None and settings.dry_run):
        limit, source = device_limit(device), f"{MARGIN:.0%} of what XLA may use of {device.device_kind}"
        if limit is None and settings.memory_budget:
            raise InputError(
                f"--memory_budget auto: {device.device_kind} has no memory of its own; name a number such as 8GiB"
            )
    if limit is not None:
        say(f"memory: at most {gib(limit)}, {source}")

    def make(gradient_checkpointing: str, mlp_tiles: int, kept_layers: int = 0) -> Plan:
        policy = gradient_checkpointing, mlp_tiles, kept_layers
        return plan_of(settings, prepared, run.optimizer, run.batches.max_documents, policy)

    given = settings.settings_given & {"gradient_checkpointing", "mlp_tiles", "kept_layers"}
    if settings.memory_budget and not given:
        assert isinstance(limit, int)
        try:
            planned = fastest(limit, make, prepared.mesh, prepared.model.config, say=say, advice=advice)
        except InputError as failure:
            if settings.dry_run:  # which was asked whether it fits: the answer is no
                raise RunError(str(failure)) from failure
            raise
    else:
        planned = ahead(run, prepared) or plan_of(settings, prepared, run.optimizer, run.batches.max_documents)
    if settings.dry_run:
        print("\n".join([*planned.lines(), f"{run.total_steps} steps of {run.batches.rows_per_step} rows"]))
        for line in time_lines(run, prepared, planned):
            print(line)
        if limit is not None and planned.total > limit:
            raise RunError(
                f"{planned.policy} needs {gib(planned.total)}, more than {gib(limit)} ({source}). What helps: "
                f"--memory_budget in place of --gradient_checkpointing, --mlp_tiles and --kept_layers, {advice}"
            )
        print("fits" if limit is not None else "whether it fits is not known: name a --memory_budget")
    else:
        check_residuals(planned, device)
    return planned


def fastest(
    budget: int, make: Callable[..., Plan], mesh: Mesh, config: ModelConfig, *, say: Callable[[str], None],
    advice: str = "",
) -> Plan:  # fmt: skip
    """What `choose` takes of the ladder for a model on the devices of a mesh, with as many kept layers as fit, as far
    as `KEPT_TRIES` plans find; make(gradient_checkpointing, mlp_tiles, kept_layers) compiles one.
    """
    found = choose(budget, make, say=say, advice=advice, ladder=ladder_of(mesh, config))
    policy, tiles = found.gradient_checkpointing, found.mlp_tiles
    if policy in KEPT_MLP or tiles > 1 or not can_keep_layers(policy, mesh.size == 1):
        return found
    fits, too_many, asked = 0, config.num_layers, config.num_layers // 2
    for _ in range(KEPT_TRIES):
        if not fits < asked < too_many:
            break
        more = make(policy, tiles, asked)
        each = max(1, more.total - found.total) / (asked - fits)  # bytes a layer; the first may cost less than others
        if _fits(more, budget, say):
            found, fits = more, asked
        else:
            too_many = asked
        asked = min(fits + int((budget - found.total) / each), too_many - 1) or too_many // 2
    if fits:
        say(f"memory: and --kept_layers {fits}")
    return found


def choose(
    budget: int, make: Callable[[str, int], Plan], *, say: Callable[[str], None], advice: str = "",
    ladder: Sequence[tuple[str, int]] = LADDER,
) -> Plan:  # fmt: skip
    """The plan of the first step of the ladder that needs at most `budget` bytes of a device.

    make(gradient_checkpointing, mlp_tiles) compiles one. The ladder is halved, not climbed: each of its steps should
    need less than the one before, and a smaller budget never gets an earlier step, whatever they need. Raises
    InputError with the smallest that was tried, and `advice`, where none fits.
    """
    first, last = 0, len(ladder)
    tried: dict[int, Plan] = {}
    while first < last:
        middle = (first + last) // 2
        tried[middle] = found = make(*ladder[middle])
        if _fits(found, budget, say):
            last = middle
        else:
            first = middle + 1
    if first == len(ladder):
        least = min(tried.values(), key=lambda one: one.total)
        raise InputError(
            f"--memory_budget {gib(budget)}: nothing fits; the smallest, {least.policy}, needs {gib(least.total)}, "
            f"of which {gib(least.arguments)} are weights, states and batch. What helps: {advice or 'fewer tokens'}"
        )
    say(f"memory: taken {tried[first].policy}, the fastest within {gib(budget)}")
    return tried[first]


def _fits(found: Plan, budget: int, say: Callable[[str], None]) -> bool:
    """Whether it does, which is said."""
    fits = found.total <= budget
    say(f"memory: {found.policy} needs {gib(found.total)}{_beside(found)}: {'fits' if fits else 'too much'}")
    return fits


def _beside(found: Plan) -> str:
    return f" and {gib(found.host)} of the host" if found.gradient_checkpointing in OFFLOADED and found.host else ""


def ladder_of(mesh: Mesh, config: ModelConfig) -> Sequence[tuple[str, int]]:
    """The ladder for a model on the devices of a mesh."""
    if mesh.devices.flat[0].platform == "cpu":
        return CPU_LADDER
    D, heads, kv_heads = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    work = 2 * D * (2 * heads + 2 * kv_heads + 3 * config.intermediate_size)
    sent = 2 * (2 * D + 2 * heads + 2 * kv_heads)  # bytes: its input and middle, q, k, v and what attention gives
    left_out = set() if work >= WORK_A_BYTE * sent else {"offload_qkv"}
    if mesh.size > 1:  # where its layers are not unrolled, and it is no faster than "products"
        left_out.add("none")
    return [step for step in LADDER if step[0] not in left_out]


def device_limit(device: jax.Device) -> int | None:
    """Bytes that XLA may use of a device, times `MARGIN`; None where the device has no limit of its own, as a CPU."""
    if is_absent(device):
        return int(MEMORY[device.device_kind] * PREALLOCATED * MARGIN)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit * MARGIN)


def check_residuals(planned: Plan, device: jax.Device) -> None:
    """`check_offload`, before a step runs whose residuals wait in memory that is not the device's own."""
    if planned.gradient_checkpointing in OFFLOADED and device.platform != "cpu":
        check_offload()


def time_lines(run: Run, prepared: Prepared, planned: Plan) -> list[str]:
    """How long the run would take, as lines; a line that says why it is not known."""
    devices = prepared.mesh.devices
    here = [device for device in devices.flat if not is_absent(device) and device in jax.local_devices()]
    found = estimate(
        prepared.model, run.batches, steps=run.total_steps, device=(here or devices.flat)[0], devices=devices.size,
        gradient_checkpointing=planned.gradient_checkpointing, kept_layers=planned.kept_layers,
        full_finetuning=prepared.lora is None, dtype=prepared.compute_dtype,
        rank=prepared.lora.r if prepared.lora else None,
    )  # fmt: skip
    return [found] if isinstance(found, str) else found.lines()


def with_plan(run: Run, planned: Plan) -> Run:
    """The run with its step compiled; dropout draws other masks for other tiles, so a resumed run must have the same.

    Where the layers are not dropped out, the policy that a budget chooses may change between a run and its resumption.
    """
    tiles = {"mlp_tiles": planned.mlp_tiles} if run.settings.memory_budget and run.settings.lora_dropout else {}
    return replace(run, step=planned.compiled, fingerprint=run.fingerprint | tiles)


def what_helps(settings: TrainSettings, prepared: Prepared) -> str:
    """The flags that would make a step smaller, with what they are now."""
    quantized = any(is_quantized(leaf) for leaf in jax.tree.leaves(prepared.frozen, is_leaf=is_quantized))
    rows = settings.per_device_train_batch_size
    ways = [
        f"a smaller --max_length (now {settings.max_length})",
        f"a smaller --per_device_train_batch_size (now {rows}) with more --gradient_accumulation_steps" * (rows > 1),
        "LoRA in place of --full_finetuning" * settings.full_finetuning,
        "--load_in_4bit" * (not quantized and not settings.full_finetuning),
        smaller_optimizer(settings.optim, settings.full_finetuning, prepared.mesh),
        f"a smaller --lora_r (now {prepared.lora.r})" if prepared.lora and settings.adapter is None else "",
    ]
    return ", ".join(filter(None, ways))


def smaller_optimizer(optim: str, full_finetuning: bool, mesh: Mesh) -> str:
    """The flag of an optimizer that needs less of a device; empty where none does.

    Bytes a number of the end of a bfloat16 step, of four equal leaves, by XLA's plan for an H200: adamw 12, adamw_8bit
    6.0, which is in place; paged_adamw 6.0, which has one leaf's moments there; paged_adamw_8bit 10.7, as it has
    float32 updates, too. On a mesh adamw_8bit is not in place: 12.7.
    """
    large = full_finetuning and mesh.devices.flat[0].platform != "cpu"  # where the host is another memory
    if large and mesh.size > 1:
        return "--optim paged_adamw or paged_adamw_8bit" if optim in ("adamw", "adamw_8bit") else ""
    if optim != "adamw":
        return ""
    return "--optim adamw_8bit or paged_adamw" if large else "--optim adamw_8bit"
