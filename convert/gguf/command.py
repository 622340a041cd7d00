"""`jaxft.convert gguf|hf`: what they are told, and their course from the input to the check that they print."""

import argparse
from pathlib import Path
from typing import Any

from jaxft.convert.ggml import QUANTS
from jaxft.convert.gguf import check
from jaxft.convert.gguf.lora import write_adapter
from jaxft.convert.gguf.modelfile import write_modelfile
from jaxft.convert.gguf.to_hf import facts, write_directory
from jaxft.convert.gguf.write import open_origin, write_files
from jaxft.convert.merge import DTYPES
from jaxft.convert.messages import say
from jaxft.errors import InputError
from jaxft.load import load_tokenizer


def add_gguf_commands(commands: Any) -> None:
    """Adds the commands of this package to `jaxft.convert`'s."""
    own = commands.add_parser(
        "gguf", allow_abbrev=False, help="a model, with an adapter merged or not, as GGUF files for llama.cpp",
        description="Writes a model as GGUF: one file, or one a quantisation where OUT has {quant} in it. The "
        "last line on stdout is JSON: for each file whether it gives the source's tokens, and how far its logits are.",
    )  # fmt: skip
    own.add_argument("model", metavar="MODEL", help="a model directory, a GGUF file, or a name on the hub")
    own.add_argument("out", metavar="OUT", help="the file; {quant} in it becomes the quantisation")
    own.add_argument("--quant", required=True, metavar="Q[,Q…]", help=f"of {', '.join(QUANTS)}")
    own.add_argument("--adapter", metavar="DIR", help="a PEFT LoRA adapter, merged while writing")
    own.add_argument("--imatrix", metavar="FILE", type=Path, help="an importance matrix, ours or llama.cpp's")
    own.add_argument("--pre_tokenizer", metavar="NAME", help="llama.cpp's, where none cuts text as the tokenizer does")
    own.add_argument("--modelfile", action="store_true", help="writes an Ollama Modelfile beside each file too")
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
    unknown = [quant for quant in quants if quant not in QUANTS]
    if unknown or not quants:
        said = unknown[0] if unknown else "nothing"
        raise InputError(f"--quant {options.quant}: {said} is none of {', '.join(QUANTS)}")
    files = out_files(options.out, list(dict.fromkeys(quants)))
    modelfiles = {quant: modelfile_of(path, len(files) > 1) for quant, path in files.items() if options.modelfile}
    importance = None
    if options.imatrix is not None:
        from jaxft.convert.imatrix import read_imatrix

        importance = read_imatrix(options.imatrix)
    origin = open_origin(options.model, options.adapter)
    if options.modelfile and origin.tokenizer is None:
        raise InputError(f"--modelfile: {options.model} has no tokenizer, and so neither a template nor stop tokens")
    vocabulary = check.vocabulary_of(
        origin.tokenizer, origin.model.config.vocab_size, origin.directory, options.pre_tokenizer
    )
    write_files(origin, files, vocabulary, say, importance)
    found: dict[str, dict[str, Any]] = {
        quant: {"file": str(path), "bytes": path.stat().st_size} for quant, path in files.items()
    }
    for quant, path in modelfiles.items():
        assert vocabulary is not None
        if not write_modelfile(path, files[quant], origin.tokenizer, vocabulary, origin.directory):
            say(f"{path}: the chat template is no sequence of turns; Ollama reads the one in the GGUF file")
        found[quant]["modelfile"] = str(path)
    if origin.tokenizer is not None:
        for quant, path in files.items():
            found[quant] |= check.check_tokenizer(origin.tokenizer, path)
    if options.check == "true":
        c = origin.model.config
        tokens = check.sample_tokens(origin.tokenizer, c.vocab_size, c.max_position_embeddings)
        expected = check.log_probabilities(options.model, options.adapter, tokens)
        for quant, path in files.items():
            found[quant] |= check.check_weights(expected, path, tokens)
    for quant, said in found.items():
        say(f"{quant}: {describe(said)}")
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


def modelfile_of(file: Path, several: bool) -> Path:
    """`Modelfile` beside a file, or `Modelfile.<name>` where there are several. Raises InputError where it exists."""
    path = file.with_name(f"Modelfile.{file.stem}" if several else "Modelfile")
    if path.exists():
        raise InputError(f"{path} exists already; move it, or leave --modelfile out")
    return path


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
