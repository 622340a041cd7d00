"""Where a step's time goes: reads the trace that `jax.profiler` wrote and sums kernels by what they are."""

import gzip
import json
from collections import Counter
from pathlib import Path

CLASSES = (  # the first whose word stands in a kernel's name or its HLO operation's; lower case
    ("attention", ("flash", "attention", "sdpa", "fmha", "cudnn")),
    ("matrix products", ("gemm", "cublas", "cutlass", "nvjet", "xmma", "matmul", "dot")),
    ("copies", ("memcpy", "copy", "transpose")),
    ("reductions", ("reduce", "argmax", "norm")),
    ("elementwise and other fusions", ("fusion", "loop", "input", "wrapped")),
)


def device_time(directory: Path) -> tuple[Counter[str], Counter[str]]:
    """Microseconds on the device by kernel class and by kernel name, from the newest trace below `directory`.

    Raises FileNotFoundError where there is no trace.
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
    for event in events:
        if event.get("ph") != "X" or "/device:" not in processes.get(event["pid"], ""):
            continue
        if "stream" not in threads.get((event["pid"], event["tid"]), "").lower():
            continue  # the other lines of a device repeat the same time as modules and operations
        words = f"{event['name']} {event.get('args', {}).get('hlo_op', '')}".lower()
        kind = next((name for name, keys in CLASSES if any(key in words for key in keys)), "other")
        classes[kind] += event["dur"]
        names[f"{event.get('args', {}).get('hlo_op', '')}  {event['name']}"[:110]] += event["dur"]
    return classes, names


def table(directory: Path, steps: int, most: int = 25) -> str:
    """The times of `device_time` in milliseconds a step, classes first, then the longest kernels."""
    classes, names = device_time(directory)
    lines = [f"{'ms a step':>10}  what"]
    lines += [f"{time / steps / 1e3:10.2f}  {name}" for name, time in classes.most_common()]
    lines += [f"{sum(classes.values()) / steps / 1e3:10.2f}  in all", ""]
    lines += [f"{time / steps / 1e3:10.2f}  {name}" for name, time in names.most_common(most)]
    return "\n".join(lines)
