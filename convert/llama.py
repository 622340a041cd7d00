"""Names of Llama's tensors."""

from jaxft.convert.table import Name

NAMES = (
    Name("model.embed_tokens.weight", "embed_tokens/weight", "token_embd.weight"),
    Name("model.norm.weight", "norm/weight", "output_norm.weight"),
    Name("lm_head.weight", "lm_head/weight", "output.weight"),
    Name("model.layers.{i}.input_layernorm.weight", "layers/input_layernorm/weight", "blk.{i}.attn_norm.weight"),
    Name("model.layers.{i}.self_attn.q_proj.weight", "layers/self_attn/q_proj/weight", "blk.{i}.attn_q.weight"),
    Name("model.layers.{i}.self_attn.q_proj.bias", "layers/self_attn/q_proj/bias", "blk.{i}.attn_q.bias"),
    Name("model.layers.{i}.self_attn.k_proj.weight", "layers/self_attn/k_proj/weight", "blk.{i}.attn_k.weight"),
    Name("model.layers.{i}.self_attn.k_proj.bias", "layers/self_attn/k_proj/bias", "blk.{i}.attn_k.bias"),
    Name("model.layers.{i}.self_attn.v_proj.weight", "layers/self_attn/v_proj/weight", "blk.{i}.attn_v.weight"),
    Name("model.layers.{i}.self_attn.v_proj.bias", "layers/self_attn/v_proj/bias", "blk.{i}.attn_v.bias"),
    Name("model.layers.{i}.self_attn.o_proj.weight", "layers/self_attn/o_proj/weight", "blk.{i}.attn_output.weight"),
    Name("model.layers.{i}.self_attn.o_proj.bias", "layers/self_attn/o_proj/bias", "blk.{i}.attn_output.bias"),
    Name(
        "model.layers.{i}.post_attention_layernorm.weight",
        "layers/post_attention_layernorm/weight",
        "blk.{i}.ffn_norm.weight",
    ),
    Name("model.layers.{i}.mlp.gate_proj.weight", "layers/mlp/gate_proj/weight", "blk.{i}.ffn_gate.weight"),
    Name("model.layers.{i}.mlp.gate_proj.bias", "layers/mlp/gate_proj/bias", "blk.{i}.ffn_gate.bias"),
    Name("model.layers.{i}.mlp.up_proj.weight", "layers/mlp/up_proj/weight", "blk.{i}.ffn_up.weight"),
    Name("model.layers.{i}.mlp.up_proj.bias", "layers/mlp/up_proj/bias", "blk.{i}.ffn_up.bias"),
    Name("model.layers.{i}.mlp.down_proj.weight", "layers/mlp/down_proj/weight", "blk.{i}.ffn_down.weight"),
    Name("model.layers.{i}.mlp.down_proj.bias", "layers/mlp/down_proj/bias", "blk.{i}.ffn_down.bias"),
)
