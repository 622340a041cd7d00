"""Names of Gemma 2's tensors: Llama's, with norms before and after both branches (in GGUF 1 + weight, as Gemma 1's)."""

from jaxft.convert import llama
from jaxft.convert.table import Name

NORMS = (
    Name(
        "model.layers.{i}.post_attention_layernorm.weight",
        "layers/post_attention_layernorm/weight",
        "blk.{i}.post_attention_norm.weight",
    ),
    Name(
        "model.layers.{i}.pre_feedforward_layernorm.weight",
        "layers/pre_feedforward_layernorm/weight",
        "blk.{i}.ffn_norm.weight",
    ),
    Name(
        "model.layers.{i}.post_feedforward_layernorm.weight",
        "layers/post_feedforward_layernorm/weight",
        "blk.{i}.post_ffw_norm.weight",
    ),
)
# what Llama calls post_attention_layernorm stands before the feed-forward; here it stands after the attention
NAMES = (*(name for name in llama.NAMES if name.hf not in {norm.hf for norm in NORMS}), *NORMS)
