"""Names of Qwen 3's tensors: Llama's and the norms of q and k."""

from jaxft.convert import llama
from jaxft.convert.table import Name

HEAD_NORMS = (
    Name("model.layers.{i}.self_attn.q_norm.weight", "layers/self_attn/q_norm/weight", "blk.{i}.attn_q_norm.weight"),
    Name("model.layers.{i}.self_attn.k_norm.weight", "layers/self_attn/k_norm/weight", "blk.{i}.attn_k_norm.weight"),
)
NAMES = (*llama.NAMES, *HEAD_NORMS)
