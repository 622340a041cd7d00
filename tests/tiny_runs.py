"""What the tests of the commands share: a tiny model with its tokenizer, rows, and the reading of what a run left.

The tokenizer has one token a byte and four special ones; nothing here needs torch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxft import save_model
from tests.tiny_models import tiny_model

V = 264
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EOS, END_OF_TURN = 257, 259


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, then <bos> 256, <eos> 257, <|im_start|> 258 and <|im_end|> 259."""
    names = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(names, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = template
    return made


def write_base(
    directory: Path, name: str = "qwen3", seed: int = 0, template: str | None = CHATML, **changes: Any
) -> Path:
    """A model directory: two layers of `tiny_models.CONFIGS[name]` with large weights, and the tokenizer."""
    sizes = {"vocab_size": V, "num_hidden_layers": 2, "max_position_embeddings": 256, "eos_token_id": EOS}
    model, params = tiny_model(name, seed, **(sizes | changes))
    save_model(directory, model, params)
    make_tokenizer(template).save_pretrained(directory)
    return directory


def sums(count: int, first: int = 0) -> list[dict[str, str]]:
    """Question/answer rows of different lengths."""
    rows = []
    for number in range(first, first + count):
        a, b = number * 7 % 90, number * number % 11
        rows.append({"question": f"{a} + {b}" + "?" * (1 + number % 3), "answer": f"{a + b}" + "!" * (number % 4)})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(**settings: Any) -> list[str]:
    """Settings as they are typed: max_steps=3 is --max_steps=3, packing=False is --packing=false."""
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]


def lines_of(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_of(directory: Path) -> list[float]:
    """The loss of every logged step, in order."""
    return [line["loss"] for line in lines_of(directory) if "loss" in line]


def same_tensors(one: Path, two: Path) -> bool:
    """Whether two safetensors files hold the same bits under the same names."""
    from safetensors.numpy import load_file

    left, right = load_file(one), load_file(two)
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k], equal_nan=True) for k in left)
