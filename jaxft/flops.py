"""FLOPs of a train step without recomputation: what model FLOPs utilisation (MFU) is a share of."""

import numpy as np

from jaxft.models import Model
from jaxft.packing import Batch
from jaxft.trees import flatten


def model_flops(model: Model, batch: Batch, full_finetuning: bool) -> float:
    """FLOPs of one step on a batch of arrays (A, B, T): products with weights, forward and backward, and attention's
    pairs. Padding (segment 0) counts for nothing, the branches of LoRA neither."""
    c = model.config
    matrices = sum(leaf.size for path, leaf in flatten(model.shapes) if leaf.ndim == 3 and "/lora/" not in path)
    matrices += c.vocab_size * c.hidden_size
    passes = 3 if full_finetuning else 2  # forward and dX; dW only where the weight is trained
    real = batch["segment_ids"] > 0
    seen = batch["positions"][real].astype(np.float64) + 1  # keys of each query, where no window hides the first ones
    by_window = {window: float(np.sum(np.minimum(seen, window or np.inf))) for window in set(c.layer_window)}
    pairs = sum(by_window[window] for window in c.layer_window)
    attention = 4 * c.num_heads * c.head_dim * pairs * 3
    return 2.0 * matrices * int(np.count_nonzero(real)) * passes + attention
