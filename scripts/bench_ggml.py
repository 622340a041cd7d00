"""Values a second that the GGUF quantisers take on the device at hand: one line of JSON a case.

    python scripts/bench_ggml.py                          # every type, 2^26 values from host memory and back
    python scripts/bench_ggml.py --types q4_k --importance
    python scripts/bench_ggml.py --model q4_k_m           # all tensors of an 8B Llama, random bfloat16, nothing on disk
    python scripts/bench_ggml.py --library libggml-base.so --values 4194304    # beside it llama.cpp's own, one thread

Timed from numpy arrays to numpy arrays, transfers included, compiles not (they are given apart). On a CPU time is that
of the process.
"""

import argparse
import json
import time

import jax
import ml_dtypes
import numpy as np

from jaxft.convert.ggml import TYPES, quantize, tensor_type

LAYER = {
    "attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096), "attn_output": (4096, 4096),
    "ffn_gate": (14336, 4096), "ffn_up": (14336, 4096), "ffn_down": (4096, 14336),
}  # fmt: skip
LAYERS, VOCABULARY = 32, (128256, 4096)


def clock() -> float:
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def random_rows(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    one = np.random.default_rng(seed).standard_normal((min(shape[0], 256), shape[1]), np.float32) * np.float32(0.02)
    return np.resize(one.astype(ml_dtypes.bfloat16), shape)


def timed(rows: np.ndarray, name: str, importance: np.ndarray | None, repeats: int) -> tuple[float, float]:
    started = clock()
    quantize(rows, name, importance)
    first, times = clock() - started, []
    for _ in range(repeats):
        started = clock()
        quantize(rows, name, importance)
        times.append(clock() - started)
    return min(times), first - min(times)


def bench_types(options: argparse.Namespace) -> None:
    rows = random_rows((options.values // 4096, 4096))
    for name in options.types:
        importance = np.linspace(0.1, 10, 4096).astype(np.float32) if options.importance else None
        seconds, compiling = timed(rows, name, importance, options.repeats)
        line = {
            "type": name, "importance": options.importance, "values": rows.size, "seconds": round(seconds, 4),
            "values_per_second": round(rows.size / seconds), "compile_seconds": round(compiling, 2),
        }  # fmt: skip
        if options.library:
            from scripts.make_ggml_golden import Library

            library, wide = Library(options.library), rows[: 2**20 // 4096].astype(np.float32)
            started = time.process_time()
            library.quantize(wide, name, importance)
            line["ratio_to_library"] = round((time.process_time() - started) / wide.size / (seconds / rows.size), 2)
        say(line)


def bench_model(quant: str) -> None:
    tensors = {"token_embd.weight": VOCABULARY, "output.weight": VOCABULARY}
    tensors |= {f"blk.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in LAYER.items()}
    made = {shape: random_rows(shape) for shape in set(tensors.values())}
    started, values, written = time.perf_counter(), 0, 0
    for name, shape in tensors.items():
        kind = tensor_type(quant, name, shape, layers=LAYERS, group=4, tied=False)
        written += quantize(made[shape], kind).nbytes
        values += shape[0] * shape[1]
    seconds = time.perf_counter() - started
    say({
        "model": quant, "values": values, "bytes": written, "seconds": round(seconds, 2),
        "values_per_second": round(values / seconds), "compiling_included": True,
    })  # fmt: skip


def say(line: dict) -> None:
    device = jax.devices()[0]
    print(json.dumps({"device": getattr(device, "device_kind", device.platform)} | line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--values", type=int, default=2**26)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--importance", action="store_true", help="with an importance matrix")
    parser.add_argument("--model", metavar="QUANT", help="a quantisation of all tensors of an 8B Llama")
    parser.add_argument("--library", metavar="FILE", help="llama.cpp's libggml-base.so, to be timed beside")
    options = parser.parse_args()
    if options.model:
        bench_model(options.model)
    else:
        bench_types(options)


if __name__ == "__main__":
    main()
