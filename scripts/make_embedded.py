"""Makes the embedded default: problems, a tokenizer, and a tiny Qwen3-shaped base trained with jaxft on generated text.

    python scripts/make_embedded.py --out jaxft/embedded --seed 0 --steps 800

Stages: text -> tokenizer -> initial weights -> training -> OUT/base and OUT/problems_*.jsonl.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import embedded_text as text
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import jaxft
from jaxft.models import read_hf_config
from jaxft.packing import Batches, Sample, plan_packing

TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 2000, 200
TOKENIZER_DOCUMENTS = 20_000
ROWS, MAX_LENGTH = 16, 256  # of a training batch
LEARNING_RATE = 3e-3
VOCAB_SIZE = 1024
SPECIAL = (text.ENDOFTEXT, text.IM_START, text.IM_END)
END, EOS = SPECIAL.index(text.ENDOFTEXT), SPECIAL.index(text.IM_END)

# One token a Chinese character, at most two digits a token: every number that the text counts with is one token, the
# same in both languages, so that a sum is one step and not a carry.
PIECES = r"\p{Han}| ?(?:(?!\p{Han})\p{L})+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s"

# Every linear map reads 256 or 512 numbers: quantisation in blocks of 256 fits each of them.
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": EOS,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": END,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG = {"do_sample": False, "eos_token_id": [EOS, END], "pad_token_id": END}
TOKENIZER_CONFIG = {
    # named outright: the class that model_type suggests would put its own way of cutting words in place of PIECES
    "tokenizer_class": "TokenizersBackend",
    "backend": "tokenizers",
    "chat_template": text.CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": text.IM_END,
    "extra_special_tokens": [text.IM_START],
    "model_max_length": 1024,
    "pad_token": text.ENDOFTEXT,
}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_problems(out: Path, seed: int) -> None:
    """problems_train.jsonl and problems_heldout.jsonl with `question` and `answer`."""
    for name, rows in zip(("train", "heldout"), text.problems(seed, TRAIN_PROBLEMS, HELD_OUT_PROBLEMS), strict=True):
        lines = [json.dumps({"question": p.question, "answer": p.answer}, ensure_ascii=False) + "\n" for p in rows]
        (out / f"problems_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over the pre-training text, the training problems and the numbers 0…99."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    train, _ = text.problems(seed, TRAIN_PROBLEMS, HELD_OUT_PROBLEMS)
    plain = (
        document.replace(text.IM_START, "").replace(text.IM_END, "")
        for document in itertools.islice(text.documents(seed), TOKENIZER_DOCUMENTS)
    )
    numbers = [" ".join(map(str, range(100)))] * 200  # often enough that each becomes one token
    tokenizer.train_from_iterator(
        itertools.chain(plain, (f"{p.question}\n{p.answer}" for p in train), numbers), trainer=trainer
    )
    return tokenizer


def write_base_files(base: Path, tokenizer: Tokenizer) -> None:
    """Everything of the model directory but its weights."""
    base.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(base / "tokenizer.json"))
    write_json(base / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(base / "config.json", CONFIG)
    write_json(base / "generation_config.json", GENERATION_CONFIG)


def training_batches(tokenizer: Tokenizer, seed: int, steps: int) -> Batches:
    """Packed rows of enough documents that `steps` steps see each about once; every token but the first is a target."""
    stream = text.documents(seed)
    samples: list[Sample] = []
    tokens = 0
    while tokens < steps * ROWS * MAX_LENGTH:
        for encoding in tokenizer.encode_batch(list(itertools.islice(stream, 1000))):
            ids = np.array([*encoding.ids, END], np.int32)
            weights = np.ones(len(ids), np.float32)
            weights[0] = 0
            samples.append(Sample(ids, weights))
            tokens += len(ids)
    plan = plan_packing([len(sample) for sample in samples], MAX_LENGTH, seed)
    return Batches(samples, plan, max_length=MAX_LENGTH, batch_size=ROWS, seed=seed)


def train(base: Path, tokenizer: Tokenizer, seed: int, steps: int) -> None:
    """Full training from random weights, float32; the weights are written to `base` in bfloat16."""
    model = jaxft.describe_model(read_hf_config(base))
    first_key, step_key = jax.random.split(jax.random.key(seed))
    params = jaxft.init_params(model, first_key)
    schedule = jaxft.make_schedule("cosine", LEARNING_RATE, min(50, steps // 4), steps)
    optimizer = jaxft.make_optimizer(schedule, adam_beta2=0.95, weight_decay=0.05)
    step = jax.jit(
        jaxft.make_train_step(model, optimizer=optimizer, gradient_checkpointing="none"), donate_argnums=(0, 1)
    )
    state = optimizer.init(params)
    batches = training_batches(tokenizer, seed, steps)
    start = time.monotonic()
    for number in range(steps):
        params, state, metrics = step(params, state, {}, batches.batch(number), jax.random.fold_in(step_key, number))
        if number % 50 == 0 or number == steps - 1:
            print(
                f"step {number + 1}/{steps}  loss {metrics['loss']:.4f}  {time.monotonic() - start:.0f} s", flush=True
            )
    jaxft.save_model(base, model, params, dtype=jnp.bfloat16)
    write_json(base / "config.json", CONFIG)  # the short one, without every default of the transformers at hand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("jaxft/embedded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(args.out, args.seed)
    tokenizer = make_tokenizer(args.seed)
    write_base_files(args.out / "base", tokenizer)
    train(args.out / "base", tokenizer, args.seed, args.steps)


if __name__ == "__main__":
    main()
