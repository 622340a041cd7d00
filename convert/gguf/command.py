"""`jaxft.convert gguf|hf`: what they are told, and their course from the input to the check that they print."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxft.convert.ggml import QUANTS
from jaxft.convert.gguf import check
from jaxft.convert.gguf.lora import write_adapter
from jaxft.convert.gguf.to_hf import facts, write_directory
from jaxft.convert.gguf.write import open_origin, vocabulary_of, write_files
from jaxft.convert.merge import DTYPES
from jaxft.errors import InputError
from jaxft.load import load_tokenizer


def say(text: str) -> None:
    """Everything but the last line goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def add_gguf_commands(commands: Any) -> None:
    """Adds the commands of this package to `jaxft.convert`'s."""
    own = commands.add_parser(
        "gguf", allow_abbrev=False, help="a model, with an adapter merged or not, as GGUF files for llama.cpp",
        description="Writes a model as GGUF: one file, or one a quantisation where OUT has {quant} in it. The last line "
        "on stdout is JSON: for each file whether it gives the source's tokens, and how far its logits are from it.",
    )  # fmt: skip
    own.add_argument("model", metavar="MODEL", help="a model directory, a GGUF file, or a name on the hub")
    own.add_argument("out", metavar="OUT", help="the file; {quant} in it becomes the quantisation")
    own.add_argument("--quant", required=True, metavar="Q[,Q…]", help=f"of {', '.join(QUANTS)}")
    own.add_argument("--adapter", metavar="DIR", help="a PEFT LoRA adapter, merged while writing")
    own.add_argument("--imatrix", metavar="FILE", type=Path, help="an importance matrix, ours or llama.cpp's")
    own.add_argument("--pre_tokenizer", metavar="NAME", help="llama.cpp's, where none cuts text as the tokenizer does")
    _add_check(own)
    own.set_defaults(run=run_gguf)
    own = commands.add_parser(
        "gguf-lora", allow_abbrev=False, help="an adapter alone, for llama.cpp to put on the model's GGUF file",
        description="Writes a LoRA adapter in llama.cpp's adapter format. The last line on stdout is JSON.",
    )  # fmt: skip
    own.add_argument("model", metavar="MODEL", help="the adapter's base: a model directory, or a name on the hub")
    own.add_argument("adapter", metavar="ADAPTER", help="a PEFT LoRA adapter")
    own.add_argument("out", metavar="OUT", help="the file")
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    own.set_defaults(run=run_lora)
    own = commands.add_parser(
        "hf", allow_abbrev=False, help="a GGUF file as a Hugging Face model directory",
        description="Writes a GGUF file's weights, dequantised, with its configuration and tokenizer rebuilt. The last "
        "line on stdout is JSON; it says how far the logits of the two are apart.",
    )  # fmt: skip
    own.add_argument("file", metavar="FILE", help="a GGUF file")
    own.add_argument("out", metavar="OUT", type=Path, help="a directory that does not exist, or is empty")
    own.add_argument("--dtype", choices=DTYPES, help="of all weights; without it quantised ones become float32")
    _add_check(own)
    own.set_defaults(run=run_hf)


def _add_check(own: argparse.ArgumentParser) -> None:
    own.add_argument(
        "--check", choices=("true", "false"), default="true", nargs="?", const="true",
        help="false leaves out the comparison of logits, which holds the whole model in memory",
    )  # fmt: skip
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_gguf(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the files, then reads each back and compares it with its source."""
    quants = [quant for quant in options.quant.lower().split(",") if quant]
    if unknown := [quant for quant in quants if quant not in QUANTS] or not quants:
        raise InputError(f"--quant {options.quant}: {unknown or 'nothing'} is not known; there are {', '.join(QUANTS)}")
    files = out_files(options.out, list(dict.fromkeys(quants)))
    origin = open_origin(options.model, options.adapter)
    vocabulary = vocabulary_of(origin, options.pre_tokenizer)
    if vocabulary is not None and options.pre_tokenizer is None:
        check.check_vocabulary(origin.tokenizer, vocabulary)
    write_files(origin, files, vocabulary, say)
    found: dict[str, dict[str, Any]] = {
        quant: {"file": str(path), "bytes": path.stat().st_size} for quant, path in files.items()
    }
    if origin.tokenizer is not None:
        for quant, path in files.items():
            found[quant] |= check.check_tokenizer(origin.tokenizer, path)
    if options.check == "true":
        c = origin.model.config
        tokens = check.sample_tokens(origin.tokenizer, c.vocab_size, c.max_position_embeddings)
        expected = check.log_probabilities(options.model, options.adapter, tokens)
        for quant, path in files.items():
            found[quant] |= check.check_weights(expected, path, tokens)
    for quant, facts in found.items():
        say(f"{quant}: {describe(facts)}")
    return {"files": found}


def run_lora(options: argparse.Namespace) -> dict[str, Any]:
    (path,) = out_files(options.out, [""]).values()
    found = write_adapter(open_origin(options.model, options.adapter), path)
    say(f"{found['layers']} layers: {found['bytes']:,} bytes in {path}")
    return found


def run_hf(options: argparse.Namespace) -> dict[str, Any]:
    out = options.out.expanduser().resolve()
    origin = write_directory(options.file, out, options.dtype, say)
    found = facts(out)
    if origin.tokenizer is not None:
        wrong = check.differing(origin.tokenizer, load_tokenizer(out))
        found |= {"texts": len(check.probes(origin.tokenizer)), "texts_that_differ": len(wrong)}
    if options.check == "true":
        c = origin.model.config
        tokens = check.sample_tokens(origin.tokenizer, c.vocab_size, c.max_position_embeddings)
        found |= check.check_weights(check.log_probabilities(options.file, None, tokens), out, tokens)
    say(describe(found))
    return found


def out_files(out: str, quants: list[str]) -> dict[str, Path]:
    """quant -> file. Raises InputError where two would be one, one is there, or its directory is not."""
    if len(quants) > 1 and "{quant}" not in out:
        raise InputError(f"{out}: {len(quants)} quantisations need a name with {{quant}} in it")
    files = {quant: Path(out.replace("{quant}", quant)).expanduser().resolve() for quant in quants}
    for path in files.values():
        if path.exists():
            raise InputError(f"{path} exists already; name a new file")
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no directory {path.parent}; make it first")
    return files


def describe(facts: dict[str, Any]) -> str:
    """One line about what was written."""
    said = f"{facts['bytes']:,} bytes in {facts['file']}" if "bytes" in facts else f"{facts['dtype']} in {facts['out']}"
    if "texts" in facts:
        wrong = facts["texts_that_differ"]
        said += f"; tokens {f'of {wrong} texts differ' if wrong else 'equal'} ({facts['texts']} texts)"
    if "kl_divergence" in facts:
        said += (
            f"; KL divergence {facts['kl_divergence']:.3g} nats a token, at most {facts['largest_kl_divergence']:.3g}, "
            f"the same top token {100 * facts['same_top_token']:.1f} % ({facts['tokens']} tokens)"
        )
    return said
