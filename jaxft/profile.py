"""Where a step's time goes: reads the trace that `jax.profiler` wrote and sums kernels by what they are."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

CLASSES = (  # the first whose word stands in a kernel's name or its HLO operation's; lower case
    ("attention", ("flash", "attention", "sdpa", "fmha", "cudnn")),
    ("matrix products", ("gemm", "cublas", "cutlass", "nvjet", "xmma", "matmul", "dot")),
    ("copies", ("memcpy", "copy", "transpose")),
    ("reductions", ("reduce", "argmax", "norm")),
    ("elementwise and other fusions", ("fusion", "loop", "input", "wrapped")),
)


WAITING = "nothing but copies, or nothing at all"


def device_time(directory: Path) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Microseconds on the device by kernel class, by kernel name, and of waiting by the kernel that ended it.

    From the newest trace below `directory`. Copies may run beside kernels, so classes can be more than the step. Raises
    FileNotFoundError where there is no trace.
    """
    traces = sorted(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"{directory} holds no trace (*.trace.json.gz)")
    with gzip.open(traces[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    classes: Counter[str] = Counter()
    names: Counter[str] = Counter()
    kernels: list[tuple[Any, Any, str]] = []
    for event in events:
        if event.get("ph") != "X" or "/device:" not in processes.get(event["pid"], ""):
            continue
        if "stream" not in threads.get((event["pid"], event["tid"]), "").lower():
            continue  # the other lines of a device repeat the same time as modules and operations
        words = f"{event['name']} {event.get('args', {}).get('hlo_op', '')}".lower()
        kind = next((name for name, keys in CLASSES if any(key in words for key in keys)), "other")
        name = f"{event.get('args', {}).get('hlo_op', '')}  {event['name']}"[:110]
        classes[kind] += event["dur"]
        names[name] += event["dur"]
        if "memcpy" not in event["name"].lower():
            kernels.append((event["ts"], event["ts"] + event["dur"], name))
    waits: Counter[str] = Counter()
    latest = min((start for start, _, _ in kernels), default=0)  # end of what ran so far
    for start, end, name in sorted(kernels):
        if start > latest:
            waits[name] += start - latest
        latest = max(latest, end)
    return classes, names, waits


def table(directory: Path, steps: int, most: int = 25) -> str:
    """The times of `device_time` in milliseconds a step: classes, the longest kernels, and what was waited for."""
    classes, names, waits = device_time(directory)
    lines = [f"{'ms a step':>10}  what"]
    lines += [f"{time / steps / 1e3:10.2f}  {name}" for name, time in classes.most_common()]
    lines += [f"{sum(classes.values()) / steps / 1e3:10.2f}  in all", ""]
    lines += [f"{time / steps / 1e3:10.2f}  {name}" for name, time in names.most_common(most)]
    lines += ["", f"{sum(waits.values()) / steps / 1e3:10.2f}  {WAITING}; before"]
    lines += [f"{time / steps / 1e3:10.2f}  {name}" for name, time in waits.most_common(most // 2)]
    return "\n".join(lines)
