"""What each architecture is in GGUF: llama.cpp's name for it, and what llama.cpp computes otherwise or not at all."""

from dataclasses import dataclass

from jaxft.errors import InputError
from jaxft.models import Model
from jaxft.trees import flatten

ALL_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """One model_type in GGUF.

    name: of the architecture. interleaved: llama.cpp rotates neighbours (2h, 2h + 1) of a head of q and k, transformers
    h and h + H/2, so that rows change places. norm: what norms' weights are stored more than in Hugging Face's files.
    biases: the linear layers whose bias it adds. untied: whether it takes a head that is not the embedding. windows: it
    knows sliding windows. factors: ropes whose waves are divided one by one (llama3's, longrope's).
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norm: float = 0.0
    biases: tuple[str, ...] = ()
    untied: bool = True
    windows: bool = False
    factors: bool = False


GEMMA = "gelu_pytorch_tanh"
QKV = ("q_proj", "k_proj", "v_proj")
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, biases=ALL_BIASES, factors=True),
    "mistral": Architecture("llama", interleaved=True, factors=True),
    "granite": Architecture("granite", interleaved=True, biases=ALL_BIASES, factors=True),
    "qwen2": Architecture("qwen2", biases=QKV),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", GEMMA, norm=1.0, untied=False),
    "gemma2": Architecture("gemma2", GEMMA, norm=1.0, untied=False, windows=True),
    "gemma3_text": Architecture("gemma3", GEMMA, norm=1.0, windows=True),
    "gemma3": Architecture("gemma3", GEMMA, norm=1.0, windows=True),
}
# GGUF's architecture -> model_type, where both directions are not told by the table
MODEL_TYPES = {"llama": "llama", "gemma3": "gemma3_text"} | {
    one.name: kind for kind, one in ARCHITECTURES.items() if one.name not in ("llama", "gemma3")
}
LARGE_GEMMAS = {"gemma2": 46, "gemma3": 62}  # layers of those whose scores are divided by √(D/N), not √H


def attention_scale(architecture: str, layers: int, hidden: int, heads: int, head_dim: int) -> float:
    """What llama.cpp multiplies q kᵀ by, where the file does not say it."""
    return float(hidden // heads if LARGE_GEMMAS.get(architecture) == layers else head_dim) ** -0.5


def check_expressible(model: Model) -> list[str]:
    """What llama.cpp will do otherwise than this model, a sentence each, in cases that a file may still be made for.

    Raises InputError where no file can say what the model computes.
    """
    c, kind = model.config, ARCHITECTURES[model.config.model_type]
    where = f"llama.cpp's architecture {kind.name}"
    if c.hidden_act != kind.activation:
        raise InputError(
            f"hidden_act is {c.hidden_act}; {where} computes {kind.activation}, and no file says otherwise"
        )
    held = {path.split("/")[-2] for path, _ in flatten(model.shapes) if path.endswith("/bias")}
    if held - set(kind.biases):
        raise InputError(f"{', '.join(sorted(held - set(kind.biases)))} have a bias; {where} has no place for it")
    if not (c.tie_word_embeddings or kind.untied):
        raise InputError(
            f"the head is not the embedding; {where} has one matrix for both. Was it parted by training it "
            "(--ensure_weight_tying keeps them one)?"
        )
    scale = attention_scale(kind.name, c.num_layers, c.hidden_size, c.num_heads, c.head_dim)
    if kind.name != "granite" and abs(c.attention_scale / scale - 1) > 1e-6:
        raise InputError(f"scores are multiplied by {c.attention_scale:.6g}; {where} multiplies by {scale:.6g}")
    said = []
    windows = [window for window in c.layer_window if 0 < window < c.max_position_embeddings]
    if windows and not kind.windows:
        said.append(f"{where} has no sliding windows: answers are the model's up to {min(windows)} tokens")
    return said


def row_order(interleaved: bool, name: str, heads: int, kv_heads: int, head_dim: int) -> tuple[int, int] | None:
    """(heads, head size) of a tensor whose rows change places in a file, None for all others; by Hugging Face name."""
    if not interleaved or name.split(".")[-2] not in ("q_proj", "k_proj"):
        return None
    return (heads if name.split(".")[-2] == "q_proj" else kv_heads), head_dim
