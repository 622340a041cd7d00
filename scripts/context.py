"""How long a row fits which memory: Llama-3-8B, QLoRA in NF4, one row a step, beside Unsloth's published line.

    python scripts/context.py plan --device h200      # no card needed: compiles for one, and finds the longest rows
    python scripts/context.py measure --budget 24     # on a card: a step of that length in no more than that memory
    python scripts/context.py measure --budget 40 --stop_after 60  # the same, for its memory alone: not to its end
    python scripts/context.py table                   # writes docs/context.md

`plan` compiles a few candidates at two lengths, takes for each budget the one whose straight line reaches farthest,
and searches between lengths that fit and lengths that do not until they are neighbours: each length that it names was
itself compiled and fits, and the next one was compiled and does not. What is compiled is kept in docs/context.json.
`measure` lets XLA have no more of the card than the budget, so that what does not fit fails. Which kernels win, and
what scratch memory they take, is known only where the card is: the row is planned there once more, and is shortened
where it does not fit. XLA allocates all that a step needs before its first kernel: `--stop_after` takes the peak of a
step that runs and does not wait for its end, which is minutes away; the page says so.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from context_page import Record, document, unsloth_length

from jaxft import bench
from jaxft.budget import MARGIN
from jaxft.doctor import available_memory
from jaxft.errors import InputError, RunError, run_command
from jaxft.load import parameter_count
from jaxft.memory import GIB, gib

DOCS = Path(__file__).resolve().parents[1] / "docs"
WORKLOAD = "A7"
BUDGETS = (8, 12, 16, 24, 40, 48, 80)  # GiB, those for which Unsloth names lengths
STEP = 1024  # lengths are multiples of it
ANCHORS = (16, 128)  # of STEP: where every candidate is compiled
# (policy, tokens of an MLP tile), the slower of two with the same lengths last
CANDIDATES = (("offload", 2048), ("offload", 1024), ("offload", 512), ("offload_middle", 1024))
# how often a policy computes attention: forward, backward (2.5 of it), and forward again where it is not kept
ATTENTION_PASSES = {"offload": 4.5, "offload_middle": 3.5}
ATTENTION_RATE, PRODUCTS_RATE = 500e12, 650e12  # FLOP/s, taken for granted of an H200 in the estimate
LONG = 40  # seconds: a step that is estimated to take longer is measured without one before it
HOST_SPARE = 8  # GiB of pinned memory beside what a plan says
HOST_KEPT = 6  # GiB of the host that are not pinned, for the process itself
HELD = 0.99  # of a plan: what the allocator holds while the step runs
POLL = 1.0  # seconds between two looks at a step that may be stopped


def step_seconds(model: str, policy: str, length: int) -> float:
    """An estimate: causal attention at one rate, and 8 FLOPs a parameter and token at another."""
    described = bench.described(bench.Workload(model, 1, length))
    c = described.config
    attention = ATTENTION_PASSES[policy] * 2 * length**2 * c.num_heads * c.head_dim * c.num_layers
    return attention / ATTENTION_RATE + 8 * parameter_count(described.shapes) * length / PRODUCTS_RATE


class Results:
    """The JSON file: what was compiled, found for each budget, and measured. Written at each change."""

    def __init__(self, path: Path, about: Record) -> None:
        """Raises InputError where the file is of another model or device; about: {} takes it as it is."""
        self.path = path
        self.data: Record = {"compiled": {}, "budgets": {}, "measured": {}}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name, value in about.items() if self.data.get(name) != value]
            if differing:
                found = ", ".join(f"{name} {self.data.get(name)}" for name in differing)
                raise InputError(f"{path} was made with {found}; name another --results, or begin anew with --fresh")
        self.data |= about

    def save(self) -> None:
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def compiled(self, model: str, device: str | None, candidate: tuple[str, int], length: int) -> Record:
        """The plan of a step, its sizes in bytes; compiled where it was not before."""
        policy, tile = candidate
        tiles = -(-length // tile)
        key = f"{policy}, {tiles} tiles, {length} tokens" + ("" if device else ", on the card")
        if key not in self.data["compiled"]:
            flags = f"{WORKLOAD} --dry_run --model {model} --length {length} --gradient_checkpointing {policy}"
            flags += f" --mlp_tiles {tiles}" + (f" --device {device}" if device else "")
            line = bench.dry_run(WORKLOAD, bench.read_options(flags.split()))
            sizes = {name: line[name] for name in ("total", "temporary", "arguments", "host")}
            self.data["compiled"][key] = {"policy": policy, "tiles": tiles, "length": length} | sizes
            self.save()
            print(f"{key}: {gib(line['total'])}, and {gib(line['host'])} of the host", file=sys.stderr, flush=True)
        return self.data["compiled"][key]


def longest(limit: float, total: Callable[[int], int], known: dict[int, int], most: int = 1 << 14) -> int:
    """The largest count of steps whose total(count) is at most `limit`, where total grows; 0 where not even 1 fits.

    known: totals of at least two counts. The next count to try is where the straight line through the nearest known
    ones on both sides of the limit, or the last two on one side, reaches it.
    """
    known = dict(known)
    while True:
        fits = max((count for count, size in known.items() if size <= limit), default=0)
        over = min((count for count, size in known.items() if size > limit), default=most + 1)
        if over - fits == 1:
            return fits
        counts = sorted(known)
        inside = [count for count in counts if count <= fits][-2:]
        outside = [count for count in counts if count >= over][:2]
        a, b = (inside[-1], outside[0]) if inside and outside else (inside or outside)
        slope = (known[b] - known[a]) / (b - a)
        guess = a + int((limit - known[a]) // slope) if slope > 0 else (fits + over) // 2
        count = min(max(guess, fits + 1), over - 1)
        known[count] = total(count)


def plan(options: argparse.Namespace) -> int:
    model = options.model or bench.WORKLOADS[WORKLOAD].model
    if options.fresh:
        options.results.unlink(missing_ok=True)
    device = options.device or jax.devices()[0].device_kind
    about = {"model": model, "device": device, "jax": jax.__version__, "margin": options.margin}
    results = Results(options.results, about)

    def total(candidate: tuple[str, int], count: int) -> int:
        return results.compiled(model, options.device, candidate, count * STEP)["total"]

    anchors = {each: {count: total(each, count) for count in ANCHORS} for each in CANDIDATES}
    for budget in options.budget or BUDGETS:
        limit = budget * GIB * options.margin

        def reach(candidate: tuple[str, int], limit: float = limit) -> float:
            (a, first), (b, second) = anchors[candidate].items()
            return a + (limit - first) * (b - a) / (second - first)

        best = max(CANDIDATES, key=reach)
        count = longest(limit, lambda count, best=best: total(best, count), anchors[best])  # type: ignore[misc]
        if not count:
            results.data["budgets"][str(budget)] = None
            print(f"{budget} GiB: nothing fits")
            continue
        found = results.compiled(model, options.device, best, count * STEP)
        following = results.compiled(model, options.device, best, (count + 1) * STEP)
        seconds = step_seconds(model, best[0], found["length"])
        more = {"next_total": following["total"], "estimated_seconds": seconds}
        results.data["budgets"][str(budget)] = found | more
        results.save()
        print(
            f"{budget} GiB: {found['length']:,} tokens by --gradient_checkpointing {best[0]} --mlp_tiles "
            f"{found['tiles']}, {gib(found['total'])} and {gib(found['host'])} of the host, a step about "
            f"{seconds:.0f} s; Unsloth's line {unsloth_length(budget):,}",
            flush=True,
        )
    results.save()
    return 0


def limit_memory(budget: float, host: int) -> int | None:
    """Lets XLA have `budget` GiB of the card and no more, and pin `host` bytes, which may be more than its own 64 GiB.

    Before jax touches a device. Returns how many bytes may be pinned, fewer than `host` where the host has no more:
    XLA rounds what it pins up to a power of two, but not past this. None where there is no card. Raises InputError
    where the card is smaller than the budget.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    card = int(ask_card("memory.total")) * (1 << 20)
    if budget * GIB > card:
        raise InputError(f"--budget {budget:g}: the card has {gib(card)}")
    pinned = max(min(host // GIB + HOST_SPARE, available_memory() // GIB - HOST_KEPT), 1)
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(budget * GIB / card)
    os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] = str(pinned)
    return pinned * GIB


def ask_card(what: str) -> str:
    """One of nvidia-smi's figures, without its unit, of the first card that CUDA lets this process see."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    asked = ["nvidia-smi", f"--id={card}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.check_output(asked, text=True).split()[0]


def runs(total: int) -> bool:
    """Whether a step of `total` bytes runs now: the allocator holds them, and the card computes.

    The latter, for what waits on the host is allocated by the same step, and pinning it takes a minute.
    """
    held = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    if held < HELD * total:
        return False
    busy = ask_card("utilization.gpu")  # percent of the last second or less
    return busy.isdecimal() and int(busy) > 0


@contextmanager
def stopping(after: float | None, total: int, keep: Callable[[float], None]) -> Iterator[None]:
    """Ends this process where a step of `total` bytes inside runs and has run for `after` seconds; None: never.

    keep: called before, with the seconds for which it was seen to run, at every look.
    """
    ended = threading.Event()

    def watch(after: float) -> None:
        began = None
        while not ended.wait(POLL):
            if not runs(total):
                began = None
            elif began is None:
                began = time.monotonic()
                print(f"the step runs, and is stopped after {after:g} s", file=sys.stderr, flush=True)
            elif time.monotonic() - began >= after and not ended.is_set():
                keep(time.monotonic() - began)
                os._exit(0)  # in the middle of a step, for which an orderly exit would wait

    if after is None:
        yield
        return
    thread = threading.Thread(target=watch, args=(after,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def step_on_card(results: Results, found: Record, length: int | None, limit: float) -> Record:
    """The plan, made on the card that is here, of a step of `length`, or of the longest that takes at most `limit`.

    found: the plan made without the card, whose policy and tokens of an MLP tile it has and whose length it does not
    pass. Raises RunError where not even the shortest row takes so little.
    """
    candidate = found["policy"], -(-found["length"] // found["tiles"])

    def compiled(count: int) -> Record:
        return results.compiled(results.data["model"], None, candidate, count * STEP)

    if length is None:
        # a row of no tokens has its arguments alone
        most = found["length"] // STEP
        known = {0: found["arguments"], most: compiled(most)["total"]}
        length = longest(limit, lambda count: compiled(count)["total"], known, most) * STEP
        if not length:
            raise RunError(f"no row of {STEP:,} tokens takes at most {gib(limit)} on this card")
    return results.compiled(results.data["model"], None, candidate, length)


def measure(options: argparse.Namespace) -> int:
    if len(options.budget) > 1:  # a fresh process each: the allocator's limit and its peak are the process's
        flags = ["--results", str(options.results)]
        for name in ("length", "stop_after"):
            flags += [f"--{name}", str(getattr(options, name))] if getattr(options, name) is not None else []
        calls = [[sys.executable, __file__, "measure", "--budget", str(budget), *flags] for budget in options.budget]
        return max(subprocess.call(call) for call in calls)
    results, (budget,) = Results(options.results, {}), options.budget
    found = results.data["budgets"].get(str(budget))
    if found is None:
        raise InputError(f"{options.results} has no length for {budget} GiB; run the plan subcommand first")
    model, policy = results.data["model"], found["policy"]
    warmup = 0 if found["estimated_seconds"] > LONG else 1
    pinned = limit_memory(budget, found["host"] * (options.length or found["length"]) // found["length"])
    planned = step_on_card(results, found, options.length, budget * GIB * results.data["margin"])
    length, tiles = planned["length"], planned["tiles"]
    if pinned is not None and planned["host"] > pinned:
        raise InputError(
            f"--budget {budget}: {gib(planned['host'])} of {length:,} tokens wait on the host, which has "
            f"{gib(pinned)} to pin; try a smaller --length"
        )

    def keep(more: Record) -> None:
        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        record = {"length": length, "policy": policy, "tiles": tiles, "warmup": warmup}
        record |= {"named": True} if options.length else {}
        record |= {"total": planned["total"], "host": planned["host"], "device": device.device_kind}
        record |= {"bytes_limit": stats.get("bytes_limit"), "peak_bytes": stats.get("peak_bytes_in_use")}
        record |= more | {"jax": jax.__version__}
        print(json.dumps({"budget": budget} | record), flush=True)
        results.data["measured"][str(budget)] = record
        results.save()

    def keep_begun(seconds: float) -> None:
        keep({"stopped_after": seconds, "estimated_seconds": step_seconds(model, policy, length)})

    flags = f"{WORKLOAD} --model {model} --length {length} --steps 1 --warmup {warmup}"
    flags += f" --gradient_checkpointing {policy} --mlp_tiles {tiles}"
    try:
        with stopping(options.stop_after, planned["total"], keep_begun):
            line = bench.measure(WORKLOAD, bench.read_options(flags.split()))
    except jax.errors.JaxRuntimeError as failure:
        if "RESOURCE_EXHAUSTED" not in str(failure):
            raise
        raise RunError(
            f"{length:,} tokens do not fit {budget} GiB on this card: {str(failure).splitlines()[0]}; plan with a "
            "smaller --margin, or try a smaller --length"
        ) from failure
    losses = line["loss"]
    if not all(math.isfinite(loss) for loss in losses):
        raise RunError(f"the losses are {losses}, not all finite: the step is wrong at {length:,} tokens")
    keep({name: line[name] for name in ("compile_seconds", "loss")} | {"step_seconds": line["step_ms"] / 1e3})
    return 0


def table(options: argparse.Namespace) -> int:
    if not options.results.exists():
        raise InputError(f"{options.results} does not exist; run the plan subcommand first")
    data = json.loads(options.results.read_text(encoding="utf-8"))
    options.output.write_text(document(data, data["model"] == "llama-3-8b", STEP), encoding="utf-8")
    print(f"{options.output} written")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("plan", help="find the longest row of each budget by compiling")
    one.add_argument("--device", help="a card that is not here, h200; without it the device here")
    one.add_argument("--model", choices=bench.CONFIGS, help="instead of the workload's own")
    one.add_argument("--budget", nargs="+", type=int, help=f"GiB, {' '.join(map(str, BUDGETS))} where not given")
    one.add_argument("--margin", type=float, default=MARGIN, help="the share of a budget that a plan may take")
    one.add_argument("--fresh", action="store_true", help="forget what was compiled and measured, as after a change")
    one.set_defaults(run=plan)
    one = commands.add_parser("measure", help="run the step of a budget's longest row")
    one.add_argument("--budget", nargs="+", type=int, required=True, help="GiB, as planned")
    one.add_argument("--length", type=int, help="another length than the planned one")
    one.add_argument(
        "--stop_after", type=float, metavar="SECONDS",
        help="measure the memory alone: stop a step that has run so long, and say that it was",
    )  # fmt: skip
    one.set_defaults(run=measure)
    one = commands.add_parser("table", help="write the page")
    one.add_argument("--output", type=Path, default=DOCS / "context.md")
    one.set_defaults(run=table)
    for each in commands.choices.values():
        each.add_argument("--results", type=Path, default=DOCS / "context.json")
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
