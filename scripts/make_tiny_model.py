"""Makes a small model with random weights around a real tokenizer: enough to try the whole pipeline without a download.

    python scripts/make_tiny_model.py qwen2 path/to/ggml-vocab-qwen2.gguf tiny-qwen2 --chat_template template.jinja

MODEL_TYPE is any that jaxft writes. TOKENIZER is a directory that transformers reads, or a GGUF vocabulary file. OUT
becomes a Hugging Face model directory. What such a model learns is the form of the data, not its content.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import jaxft
from jaxft.errors import InputError, run_command
from jaxft.models import FAMILIES

PADDED_TO = 64  # the embedding has a multiple of this many rows, as released models do


def read_tokenizer(source: Path, template: Path | None) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory or a GGUF vocabulary file; `template` replaces its chat template.

    A template that ends its turns with a token of its own makes that token the EOS, as instruct models have it.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist; a tokenizer's directory or a GGUF file is needed")
    where = {"gguf_file": source.name} if source.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(source.parent if where else source, local_files_only=True, **where)
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        end = str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip().rpartition("b")[2]
        if end and len(tokenizer.encode(end, add_special_tokens=False)) == 1:
            tokenizer.eos_token = end
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows the embedding needs: one more than the largest id, padded."""
    return -(-(max(tokenizer.get_vocab().values()) + 1) // PADDED_TO) * PADDED_TO


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model_type", choices=sorted(name for name, family in FAMILIES.items() if not family.written_as)
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chat_template", type=Path, help="a .jinja file, where the tokenizer brings none")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.out.exists():
        raise InputError(f"{options.out} exists already; name a new directory")

    tokenizer = read_tokenizer(options.tokenizer, options.chat_template)
    config = AutoConfig.for_model(
        options.model_type,
        vocab_size=vocabulary_size(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.hidden_size // 4,
        max_position_embeddings=options.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = jaxft.describe_model(config)
    params = jaxft.init_params(model, jax.random.key(options.seed))
    jaxft.save_model(options.out, model, params, dtype=jnp.bfloat16)
    tokenizer.save_pretrained(options.out)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{options.out}: {options.model_type}, {count / 1e6:.1f} M random parameters, {len(tokenizer)} tokens in "
        f"{config.vocab_size} rows, EOS {tokenizer.eos_token}, "
        f"{'with' if tokenizer.chat_template else 'without'} a chat template"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
