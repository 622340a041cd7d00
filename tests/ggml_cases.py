"""Tensors whose quantisation is compared with llama.cpp's, and models whose mixtures are: for the golden file."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

BASE = Path(__file__).resolve().parents[1] / "jaxft" / "embedded" / "base" / "model.safetensors"
SIZES = {"small": 2**14, "large": 2**18}  # values; rows are 1024 wide
TENSORS = ("gaussian", "heavy", "trained")


def tensor(name: str, size: str) -> np.ndarray:
    """(R, 1024) float32."""
    random, count = np.random.default_rng(7), SIZES[size]
    if name == "gaussian":
        flat = random.standard_normal(count) * 0.02
    elif name == "heavy":
        flat = random.standard_t(4, count) * 0.02
    else:
        weights = load_file(BASE)
        names = sorted(name for name in weights if weights[name].ndim == 2 and name.startswith("model.layers"))
        flat = np.concatenate([weights[name].astype(np.float32).reshape(-1) for name in names])
        flat = flat[: flat.size // count * count].reshape(count // 1024, -1, 1024)[:, 0]  # of all layers
    return np.ascontiguousarray(flat, np.float32).reshape(-1, 1024)


def column_weights() -> np.ndarray:
    """(1024,) float32, as skewed as importance matrices are."""
    return np.exp(1.5 * np.random.default_rng(8).standard_normal(1024)).astype(np.float32)


def errors(values: np.ndarray, found: np.ndarray, importance: np.ndarray | None) -> float:
    """The root of the mean of squared differences; with importances, of the weighted mean."""
    weights = np.ones(values.shape[1]) if importance is None else importance.astype(np.float64)
    squares = np.square(found.astype(np.float64) - values)
    return float(np.sqrt(np.mean(squares @ weights) / np.sum(weights)))


# architecture, layers, query heads a key/value head, width, width of the feed-forward part, tied, importance matrix
MODELS = {
    "llama, 32 layers, groups of 4": ("llama", 32, 4, 512, 1024, False, False),
    "llama, 16 layers, groups of 4, tied": ("llama", 16, 4, 512, 1024, True, False),
    "llama, 22 layers, no groups": ("llama", 22, 1, 512, 1024, False, False),
    "llama, 80 layers, groups of 8": ("llama", 80, 8, 256, 256, False, False),
    "llama, 3 layers": ("llama", 3, 2, 256, 512, True, False),
    "llama, 12 layers, with an importance matrix": ("llama", 12, 4, 256, 512, False, True),
    "qwen2, 80 layers, groups of 8": ("qwen2", 80, 8, 256, 256, False, False),
    "qwen3, 28 layers, groups of 2, tied": ("qwen3", 28, 2, 256, 768, True, False),
    "gemma2, 26 layers, groups of 2, tied": ("gemma2", 26, 2, 256, 512, True, False),
    "gemma3, 18 layers, groups of 4, 640 and 2048 wide": ("gemma3", 18, 4, 640, 2048, True, False),
    "llama, widths of 96 and 80": ("llama", 8, 2, 96, 80, False, False),
    "llama, widths of 96 and 80, tied": ("llama", 8, 2, 96, 80, True, False),
}


def model_tensors(model: tuple) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors: rows are few, only widths matter."""
    architecture, layers, _, width, wide, tied, _ = model
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (2, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (2, width)
    norms = ["attn_norm", "ffn_norm"]
    if architecture.startswith("gemma"):
        norms += ["post_attention_norm", "post_ffw_norm"]
    if architecture in ("qwen3", "gemma3"):
        norms += ["attn_q_norm", "attn_k_norm"]
    for i in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{i}.{part}.weight"] = (2, width)
        shapes[f"blk.{i}.ffn_down.weight"] = (2, wide)
        shapes |= {f"blk.{i}.{norm}.weight": (width,) for norm in norms}
        if architecture == "qwen2":
            shapes |= {f"blk.{i}.attn_{part}.bias": (width,) for part in "qkv"}
    return shapes


def runs(types: dict[str, str]) -> dict[str, str]:
    """Types by tensor, as the parts that have the same ones in all layers: {"q6_k 2, q4_k 4": "attn_v ffn_down"}."""
    by_part: dict[str, list[str]] = {}
    for name, kind in types.items():
        part = name.split(".", 2)[2] if name.startswith("blk.") else name
        by_part.setdefault(part.removesuffix(".weight"), []).append(kind)
    found: dict[str, str] = {}
    for part, kinds in sorted(by_part.items()):
        found[_written(kinds)] = f"{found.get(_written(kinds), '')} {part}".strip()
    return found


def _written(kinds: list[str]) -> str:
    found: list[list] = []
    for kind in kinds:
        if found and found[-1][0] == kind:
            found[-1][1] += 1
        else:
            found.append([kind, 1])
    return ", ".join(f"{kind} {count}" for kind, count in found)
