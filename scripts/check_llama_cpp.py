"""Holds our GGUF files against the real llama.cpp, architecture by architecture, and writes docs/llama-cpp.md.

    scripts/check_llama_cpp.sh            builds llama.cpp when it is absent, then runs this

For tiny models of every architecture, around real vocabularies: greedy tokens, logits, tokens of texts, where answers
end, the adapter as a file of its own; every quantisation on the embedded trained model: its perplexity beside that of
llama.cpp's own quantiser, and how long the two take. Exits with 1 where something is not as promised.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import jaxft
from jaxft.convert import __main__ as convert
from jaxft.convert.ggml import QUANTS, file_type
from jaxft.convert.imatrix import read_imatrix
from jaxft.data import load_rows, tokenize_dataset
from jaxft.decode import generate
from jaxft.errors import InputError, RunError, run_command
from jaxft.load import EMBEDDED, load_adapter
from jaxft.models import Model
from jaxft.stops import stop_token_ids
from jaxft.trees import Tree
from scripts.make_tiny_model import read_tokenizer
from tests.tiny_models import hf_config, nonzero_adapter, random_params

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("JAXFT_TOKENIZERS", ROOT.parent / "shared" / "tokenizers"))
PAGE = ROOT / "docs" / "llama-cpp.md"
TEMPLATES = SHARED / "chat_templates"
# vocabulary -> its file and the chat template that goes with it
VOCABULARIES = {
    "llama-spm": ("llama2-tokenizer.model", None),
    "llama-bpe": ("ggml-vocab-llama-bpe.gguf", "meta-llama-Llama-3.1-8B-Instruct.jinja"),
    "qwen2": ("ggml-vocab-qwen2.gguf", "Qwen-Qwen2.5-7B-Instruct.jinja"),
}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
GEMMAS = WIDE | {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"}
# what llama.cpp can say of `tests.tiny_models.CONFIGS`: name -> (changes, vocabulary)
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama2": (WIDE, "llama-spm"),
    "llama3": (WIDE, "llama-bpe"),
    "llama_linear_tied": (WIDE | {"head_dim": 16}, "llama-spm"),
    "llama_bias": (WIDE | {"hidden_act": "silu"}, "llama-spm"),
    "llama_longrope": (WIDE | {"head_dim": 8}, "llama-spm"),
    "mistral": (WIDE | {"head_dim": 16, "sliding_window": None}, "llama-spm"),
    "mistral_yarn": (WIDE, "llama-spm"),
    "qwen2_tied": (WIDE, "qwen2"),
    "qwen3": (WIDE | {"head_dim": 16}, "qwen2"),
    "gemma": (GEMMAS, "llama-spm"),
    "gemma2": (GEMMAS | {"tie_word_embeddings": True, "sliding_window": 16}, "llama-spm"),
    "gemma3": (GEMMAS | {"sliding_window": 16}, "llama-spm"),
    "granite": (WIDE, "llama-spm"),
}
TEXTS = (
    "The quick brown fox jumps over the lazy dog, then sleeps until noon.",
    "A train leaves at 9:40 and arrives at 12:15. How long did it take? 2 hours and 35 minutes.",
    "火车九点四十分出发，十二点十五分到达。走了多久？两小时三十五分。",
    "I've been told he's there, you'LL see; it isn't   far\tfrom here.\n\n\nTwo  spaces, then a line's end. \n",
    "1 12 123 1234 12345 3.14159 -7e10 0xFF",
    "def f(x):\n    return [x**2 for x in range(10) if x % 3 == 0]  # squares\n",
    "Äpfel, naïve café, смех, γειά σου, 안녕하세요, こんにちは",
    "🚀 (normal) ✅ 👩‍👩‍👧 and !!!???...---===(({[<|>]}))",
    " leading and trailing ",
)
# transformers' Metaspace puts no ▁ before a text that begins with a space; llama.cpp puts one before every text
SPACED = (" leading and trailing ",)
NEW = 24  # tokens after each prompt
# the difference of logits over their standard deviation. llama.cpp rounds a layer's input as it holds its weights
# (16 bits, 8 bits), and Gemma's GELU through a table of float16 in any case
LIMITS = {"f32": 1e-3, "f16": 1e-2, "q8_0": 0.2}
PROBLEMS = 100  # held-out ones, of 200
WORSE = 1.01  # our perplexity over that of llama.cpp's own quantiser's file, at most
FTYPES = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
    "bf16": 32,
}  # fmt: skip


class LlamaCpp:
    """llama.cpp in a process of its own (`llama_cpp_worker.py`): calls by name, RunError where one fails."""

    def __init__(self, python: str, threads: int):
        self.threads = threads
        self.process = subprocess.Popen(
            [python, str(ROOT / "scripts" / "llama_cpp_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )  # fmt: skip

    def __call__(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": name, **arguments}, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RunError(f"llama.cpp ended with {self.process.wait()} in {name}")
        answer = json.loads(line)
        if "error" in answer:
            raise RunError(f"llama.cpp, {name}: {answer['error']}")
        return answer["result"]

    def logits(self, file: Path, rows: list[list[int]], place: Path, adapter: Path | None = None) -> np.ndarray:
        out = place / "logits.npy"
        self("logits", file=file, rows=rows, out=out, threads=self.threads, adapter=adapter)
        return np.load(out)


@dataclass
class Findings:
    """What the page says, and what was not as promised."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    kept: Path | None = None  # a file of what was found before, so that a run that was cut goes on

    def part(self, name: str, find: Callable[[], None]) -> None:
        """Runs `find`, or says again what it said when it ran before."""
        before = json.loads(self.kept.read_text(encoding="utf-8")) if self.kept and self.kept.exists() else {}
        if name in before:
            self.say(*before[name]["lines"])
            self.failures += before[name]["failures"]
            return
        lines, failures = len(self.lines), len(self.failures)
        find()
        before[name] = {"lines": self.lines[lines:], "failures": self.failures[failures:]}
        if self.kept:
            self.kept.write_text(json.dumps(before, indent=1), encoding="utf-8")

    def say(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), file=sys.stderr, flush=True)

    def expect(self, what: str, true: bool) -> str:
        """yes or NO for a cell of a table."""
        if not true:
            self.failures.append(what)
            print(f"FAILED: {what}", file=sys.stderr, flush=True)
        return "yes" if true else "**NO**"

    def table(self, *header: str) -> None:
        self.say(f"| {' | '.join(header)} |", "|---" * len(header) + "|")

    def row(self, *cells: Any) -> None:
        self.say(f"| {' | '.join(map(str, cells))} |")


@cache
def tokenizer_of(vocabulary: str) -> PreTrainedTokenizerBase:
    file, template = VOCABULARIES[vocabulary]
    if file.endswith(".model"):  # as Llama 2's directories have it
        with tempfile.TemporaryDirectory() as directory:
            shutil.copy(SHARED / file, Path(directory) / "tokenizer.model")
            settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
            settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            (Path(directory) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
            return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return read_tokenizer(SHARED / file, None if template is None else TEMPLATES / template)


def make_model(name: str, place: Path) -> tuple[Path, Model, Tree]:
    """A model directory whose every part moves the logits, around a real vocabulary."""
    changes, vocabulary = MODELS[name]
    tokenizer = tokenizer_of(vocabulary)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = hf_config(name, **changes, **ids, vocab_size=max(tokenizer.get_vocab().values()) + 1)
    model = jaxft.describe_model(config)
    params = random_params(model)
    directory = place / name
    jaxft.save_model(directory, model, params)
    tokenizer.save_pretrained(directory)
    return directory, model, params


def export(*argv: Any) -> None:
    """`jaxft.convert` with these arguments. Raises RunError where it fails."""
    if run_command(convert.main, [str(word) for word in argv]):
        raise RunError(f"jaxft.convert {' '.join(map(str, argv))} failed")


def forward(model: Model, trees: tuple[Tree, ...]) -> Callable[[list[list[int]]], np.ndarray]:
    """Our logits of rows of tokens, one below the other, in float32."""

    @jax.jit
    def run(trees: tuple[Tree, ...], tokens: jax.Array) -> jax.Array:
        decoder = model.bind(*trees)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = jnp.ones_like(tokens)
        return decoder.logits(decoder(tokens, segments, positions, dtype=jnp.dtype("float32")))

    def rows_of(rows: list[list[int]]) -> np.ndarray:
        longest = max(map(len, rows))
        tokens = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
        found = np.asarray(run(trees, tokens))
        return np.concatenate([one[: len(row)] for one, row in zip(found, rows, strict=True)])

    return rows_of


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The difference of logits, root of the mean square over that of the expected ones about their mean."""
    return float(np.sqrt(np.mean((found - expected) ** 2, dtype=np.float64)) / expected.std(dtype=np.float64))


def margins(logits: np.ndarray) -> np.ndarray:
    """How far the best token lies above the second, in standard deviations of all logits."""
    best = np.partition(logits, -2, axis=1)[:, -2:]
    return (best[:, 1] - best[:, 0]) / logits.std()


def check_architecture(name: str, llama: LlamaCpp, place: Path, page: Findings) -> None:
    """One row of the table."""
    directory, model, params = make_model(name, place)
    tokenizer = tokenizer_of(MODELS[name][1])
    export("gguf", directory, place / f"{name}.{{quant}}.gguf", "--quant=f32,f16,q8_0", "--check=false")
    files = {quant: place / f"{name}.{quant}.gguf" for quant in ("f32", "f16", "q8_0")}

    # longrope: llama.cpp chooses the factors by the context's size, transformers by how far the text is (8 tokens here)
    prompts = [ids for ids in map(tokenizer.encode, TEXTS) if name != "llama_longrope" or len(ids) > 8]
    ours = generate(model, (params,), prompts, max_new_tokens=NEW, stop_ids=[])
    logits = forward(model, (params,))
    rows = [prompt + answer for prompt, answer in zip(prompts, ours, strict=True)]
    expected = logits(rows)
    # an answer counts up to where two tokens are as good as each other to float32's rounding
    ends, at = [], 0
    gaps = margins(expected)
    for prompt, row in zip(prompts, rows, strict=True):
        close = np.flatnonzero(gaps[at + len(prompt) - 1 : at + len(row) - 1] < 2 * LIMITS["f32"])
        ends.append(int(close[0]) if len(close) else NEW)
        at += len(row)
    theirs = llama("greedy", file=files["f32"], prompts=prompts, count=NEW, threads=llama.threads)
    equal = [answer[:end] == other[:end] for answer, other, end in zip(ours, theirs, ends, strict=True)]
    different = {token for answer in ours for token in answer}
    varied = len({tuple(answer) for answer in ours}) == len(ours) and len(different) > 3 * len(ours)
    page.expect(f"{name}: answers vary", varied)
    compared = sum(ends)

    far = {quant: distance(llama.logits(file, rows, place), expected) for quant, file in files.items()}
    cells = []
    for quant, found in far.items():
        page.expect(f"{name}: {quant} logits differ by {found:.2g} σ, at most {LIMITS[quant]}", found <= LIMITS[quant])
        cells.append(f"{found:.1e}")

    found = llama("tokenize", file=files["q8_0"], texts=TEXTS, add_special=True)
    other = [text for text, ids in zip(TEXTS, found, strict=True) if ids != tokenizer.encode(text)]
    wrong = [text for text in other if not (text in SPACED and MODELS[name][1] == "llama-spm")]
    stops = set(llama("ends", file=files["q8_0"], count=model.config.vocab_size)["stops"])
    ending = set(stop_token_ids(tokenizer, directory)) <= stops
    template = llama("template", file=files["q8_0"]) == tokenizer.chat_template

    try:
        apart = check_adapter(name, llama, place, page, (directory, model, params), rows, expected)
    except RunError as failure:
        apart = page.expect(f"{name}: the adapter's file: {failure}", False)
    page.row(
        name, MODELS[name][1], f"{page.expect(f'{name}: greedy tokens', all(equal))} ({compared})", *cells,
        apart, f"{page.expect(f'{name}: tokens of {wrong}', not wrong)} ({len(TEXTS) - len(other)} of {len(TEXTS)})",
        page.expect(f"{name}: the ends {stop_token_ids(tokenizer, directory)} are among {sorted(stops)}", ending),
        page.expect(f"{name}: chat template", template),
    )  # fmt: skip
    for path in place.glob(f"{name}.*gguf"):
        path.unlink()


def check_adapter(
    name: str, llama: LlamaCpp, place: Path, page: Findings, base: tuple[Path, Model, Tree], rows: list[list[int]],
    expected: np.ndarray,
) -> str:  # fmt: skip
    """A cell: how far the adapter's own file over the base is from the merged model; expected: logits of the base."""
    directory, model, params = base
    lora = jaxft.LoraConfig(r=4, lora_alpha=8)
    tuned, trainable, _ = jaxft.add_lora(model, params, lora, jax.random.key(0))
    trainable = nonzero_adapter(trainable, deviation=0.1)
    jaxft.save_adapter(place / f"{name}.adapter", tuned, trainable, lora, base_model=str(directory))
    adapter, merged = place / f"{name}.adapter.gguf", place / f"{name}.merged.gguf"
    export("gguf", directory, merged, "--quant=f32", "--check=false", "--adapter", place / f"{name}.adapter")
    export("gguf-lora", directory, place / f"{name}.adapter", adapter)
    with_adapter = llama.logits(place / f"{name}.f32.gguf", rows, place, adapter)
    ours_tuned = forward(*_loaded(place / f"{name}.adapter", model, params))(rows)
    apart = distance(with_adapter, llama.logits(merged, rows, place))
    off = distance(with_adapter, ours_tuned)
    page.expect(f"{name}: the adapter over the base against the merged model: {apart:.2g} σ", apart <= LIMITS["f32"])
    page.expect(f"{name}: the adapter over the base against ours: {off:.2g} σ", off <= LIMITS["f32"])
    page.expect(f"{name}: the adapter moves the logits", distance(with_adapter, expected) > 0.1)
    return f"{apart:.1e}"


def check_model(name: str, llama: LlamaCpp, place: Path, page: Findings) -> None:
    """`check_architecture`; what cannot be done at all is a row too."""
    try:
        check_architecture(name, llama, place, page)
    except RunError as failure:
        page.row(name, MODELS[name][1], page.expect(f"{name}: {failure}", False))


def _loaded(adapter: Path, model: Model, params: Tree) -> tuple[Model, tuple[Tree, ...]]:
    tuned, trainable, frozen, _ = load_adapter(adapter, model, params)
    return tuned, (trainable, frozen)


def heldout_rows() -> list[list[int]]:
    """The embedded model's held-out problems as tokens."""
    rows, tokenizer = load_rows(str(EMBEDDED / "problems_heldout.jsonl")), AutoTokenizer.from_pretrained(BASE)
    samples, _ = tokenize_dataset(rows, tokenizer, max_length=512, vocab_size=len(tokenizer))
    return [sample.input_ids.tolist() for sample in samples[:PROBLEMS]]


BASE = EMBEDDED / "base"
OWN_PRE = "--pre_tokenizer=qwen2"  # the embedded model cuts text as no other does; its tokens are given as numbers


def check_quantisers(llama: LlamaCpp, place: Path, page: Findings) -> None:
    """The table of perplexities of the embedded model, and that of seconds."""
    rows = heldout_rows()
    quants = [quant for quant in QUANTS if quant != "f32"]
    imatrix = place / "base.imatrix.gguf"
    export("imatrix", BASE, EMBEDDED / "problems_train.jsonl", imatrix, "--max_length=512", "--chunks=100")
    np.savez(place / "imatrix.npz", **read_imatrix(imatrix))
    export("gguf", BASE, place / "base.f32.gguf", "--quant=f32", "--check=false", OWN_PRE)
    every = f"--quant={','.join(quants)}"
    export("gguf", BASE, place / "base.{quant}.gguf", every, "--check=false", OWN_PRE)
    export("gguf", BASE, place / "weighed.{quant}.gguf", every, "--check=false", OWN_PRE, "--imatrix", imatrix)

    def perplexity(file: Path) -> float:
        return float(np.exp(llama("loss", file=file, rows=rows, threads=llama.threads)))

    plain = perplexity(place / "base.f32.gguf")
    page.say(f"Unquantised: {plain:.4f}.", "")
    page.table(
        "quantisation", "ours", "llama.cpp's", "ratio", "ours, imatrix", "llama.cpp's, imatrix", "ratio", "bytes"
    )
    for quant in quants:
        cells: list[str] = []
        for name, weights in (("base", None), ("weighed", place / "imatrix.npz")):
            file, other = place / f"{name}.{quant}.gguf", place / f"their.{quant}.gguf"
            source = place / "base.f32.gguf"
            llama("quantize", file=source, out=other, ftype=FTYPES[quant], threads=llama.threads, imatrix=weights)
            ours, theirs = perplexity(file), perplexity(other)
            page.expect(f"{quant}: perplexity {ours:.4f} against {theirs:.4f}", ours <= WORSE * theirs)
            cells += [f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs:.4f}"]
            if weights is None:
                sizes = (file.stat().st_size, other.stat().st_size)
        page.row(quant, *cells, f"{sizes[0]:,}")
        page.expect(f"{quant}: {sizes[0]} bytes against {sizes[1]}", abs(sizes[0] - sizes[1]) < 4096)
        assert FTYPES[quant] == file_type(quant)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_python", required=True, help="the Python with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="only these")
    parser.add_argument("--parts", nargs="*", default=["models", "quants"], choices=["models", "quants"])
    parser.add_argument("--keep", type=Path, help="a JSON file of what is found; what is in it is not done again")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args(argv)
    if not SHARED.is_dir():
        raise InputError(f"{SHARED} is not there; it has the vocabularies")
    page, began = Findings(kept=options.keep), time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        llama = LlamaCpp(options.llama_python, options.threads)
        version = llama("version")
        page.say(
            "# Held against llama.cpp", "",
            f"Written by `scripts/check_llama_cpp.sh` with llama-cpp-python {version} (built from its source, "
            f"CPU) and jax {jax.__version__} on a CPU.", "",
        )  # fmt: skip
        if "models" in options.parts:
            page.say(
                "## Tiny models of every architecture", "",
                "Random weights with large deviations around real vocabularies. Greedy: whether llama.cpp gives our "
                f"tokens after {len(TEXTS)} prompts, {NEW} each, in float32 (weights, keys and values), one at a time; "
                "in brackets how many were compared, for an answer counts up to where its two best tokens are equal to "
                f"{2 * LIMITS['f32']:.0e} σ. Distances: the root mean square of the difference of logits from ours in "
                "float32 over their standard deviation σ; of the adapter's file over the base from the merged model. "
                f"Limits: {', '.join(f'{quant} {limit:g}' for quant, limit in LIMITS.items())}. Tokens of texts: "
                "whether llama.cpp's are the source's, in brackets of how many; of sentencepiece's a text that begins "
                "with a space may differ, for transformers puts no ▁ before it and llama.cpp does. Ends: what ends an "
                "answer here ends it there.", "",
            )  # fmt: skip
            page.table(
                "model", "vocabulary", "greedy tokens", *LIMITS, "adapter", "tokens of texts", "ends", "template"
            )
            for name in options.models:
                page.part(f"{name} {version}", partial(check_model, name, llama, place, page))
            page.say("")
        if "quants" in options.parts:
            page.say(
                "## Quantised: perplexity beside llama.cpp's own quantiser", "",
                f"The embedded base on {PROBLEMS} held-out problems, every token but the first of each. The importance "
                f"matrix is of its training problems. Ours may be {100 * (WORSE - 1):.0f} % worse at most.", "",
            )  # fmt: skip
            page.part(f"quantisers {version}", partial(check_quantisers, llama, place, page))
            page.say("")
    page.say(f"{len(page.failures)} of the checks failed.", *(f"- {failure}" for failure in page.failures))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    options.out.write_text("\n".join(page.lines) + "\n", encoding="utf-8")
    return 1 if page.failures else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
