"""A model directory with random bfloat16 weights in the real sizes of a public model, to measure with.

    python scripts/random_model.py qwen3-4b TOKENIZER_DIR OUT [--chat_template FILE.jinja]

What takes time and memory does not depend on the values, so nothing need be downloaded but a tokenizer: a directory, or
a GGUF vocabulary file. A directory that was made before is left as it is. To be run as a process of its own beside
what measures: it holds the weights on the device while it writes them.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from make_tiny_model import read_tokenizer, vocabulary_size
from transformers import AutoConfig

import jaxft
from jaxft.bench import CONFIGS
from jaxft.errors import InputError, run_command

TOKENIZER = "tokenizer_config.json"  # written last


def write_random_model(name: str, tokenizer: Path, out: Path, template: Path | None = None, seed: int = 0) -> None:
    """Writes the model `name` of `jaxft.bench.CONFIGS` with random weights and the tokenizer to `out`.

    Raises InputError where the tokenizer has more tokens than the model, or `out` holds something else.
    """
    constants = dict(CONFIGS[name])
    if (out / TOKENIZER).exists():
        found = json.loads((out / "config.json").read_text(encoding="utf-8"))
        if any(found.get(field) != constants[field] for field in ("model_type", "hidden_size", "num_hidden_layers")):
            raise InputError(f"{out} holds another model than {name}; name another directory")
        print(f"{out}: there already", file=sys.stderr)
        return
    read = read_tokenizer(tokenizer, template)
    if vocabulary_size(read) > constants["vocab_size"]:
        raise InputError(f"{tokenizer} has {len(read)} tokens, {name} {constants['vocab_size']}; name another")
    ids = {"bos_token_id": read.bos_token_id, "eos_token_id": read.eos_token_id}
    model = jaxft.describe_model(AutoConfig.for_model(**(constants | ids)))
    jaxft.save_model(out, model, jaxft.init_params(model, jax.random.key(seed), jnp.bfloat16))
    read.save_pretrained(out)
    print(f"{out}: {name} with random weights", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chat_template", type=Path, help="a .jinja file, where the tokenizer brings none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    write_random_model(options.name, options.tokenizer, options.out, options.chat_template, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
