"""The command `quantize MODEL OUT`: its flags, and from them to the directory and its report."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxft.activations import collect_activations
from jaxft.convert import dynamic
from jaxft.convert.calibration import read_calibration
from jaxft.convert.messages import say
from jaxft.convert.quantize import DTYPES, KINDS, Source, open_source, quantize, write_card
from jaxft.convert.report import write_report
from jaxft.errors import InputError
from jaxft.load import find_directory, load_model, load_tokenizer

ROWS = 512  # of each layer's inputs, on which the error of its output is measured
GIVEN_WITH = ("calibration", "budget", "by")  # flags that have a meaning with --dynamic only


def add_to(commands: Any) -> None:
    """Adds the command to an argument parser's."""
    own = commands.add_parser(
        "quantize", allow_abbrev=False, help="a model in 4 or 8 bits, as bitsandbytes has them",
        description="Writes a model with its linear layers in 4 bits (NF4 with double quantisation) or 8 bits "
        "(LLM.int8()), tensor by tensor, as transformers with bitsandbytes loads it. --dynamic keeps the layers that "
        "lose the most by it in 16 bits. The last line on stdout is JSON.",
    )  # fmt: skip
    own.add_argument("model", metavar="MODEL", help="a model directory in 16 or 32 bits, or a name on the hub")
    own.add_argument("out", metavar="OUT", type=Path, help="a directory that does not exist, or is empty")
    own.add_argument("--bits", type=int, choices=tuple(KINDS), default=4, help="of each linear weight")
    own.add_argument("--dtype", choices=DTYPES, help="of everything else; without it the model's own 16 bits")
    own.add_argument("--dynamic", action="store_true", help="keep the layers that lose the most in 16 bits")
    own.add_argument(
        "--budget",
        metavar="+10%",
        help="with --dynamic: bytes over plain quantisation, +10%% where not given, or +64MiB",
    )
    own.add_argument(
        "--calibration", metavar="FILE", help="with --dynamic: text to score the layers on, .txt or a data set as "
        "jaxft.train reads it; without it they are scored by their weights alone",
    )  # fmt: skip
    own.add_argument(
        "--by", choices=dynamic.SCORES, help="with --dynamic: the score to choose by; divergence where there is "
        "calibration text, else weight",
    )  # fmt: skip
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    own.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the directory that `options.out` names, whole or not at all, and returns what was done."""
    out = options.out.expanduser().resolve()
    from jaxft.convert.hf import whole_directory

    given = [f"--{name}" for name in GIVEN_WITH if getattr(options, name) is not None]
    if given and not options.dynamic:
        raise InputError(f"{given[0]} has a meaning with --dynamic only; give both, or leave it out")
    by = options.by or ("divergence" if options.calibration else "weight")
    if by != "weight" and not options.calibration:
        raise InputError(f"--by {by} needs --calibration FILE: it is measured on text")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; name a new directory")
    source = open_source(options.model, options.bits, options.dtype)
    plain = source.total(())
    facts: dict[str, Any] = {"bits": options.bits, "dtype": source.dtype.name, "bytes_plain": plain}
    scores: list[dynamic.Score] = []
    kept: tuple[str, ...] = ()
    if options.dynamic:
        budget = dynamic.parse_budget(options.budget or "+10%", plain)
        scores = score(source, options.calibration, say)
        kept = dynamic.choose(scores, budget, by)
        facts |= {"by": by, "budget": budget, "calibration": options.calibration, "kept": len(kept)}
        facts |= {"of": len(scores), "bytes": plain + dynamic.bytes_of(scores, kept)}
        more = f"{facts['bytes'] / plain - 1:+.2%} bytes"
        say(f"kept in {source.dtype.name}: {len(kept)} of {len(scores)} linear layers, {more}")
    with whole_directory(out) as temporary:
        quantize(source, temporary, kept, say)
        if options.dynamic:
            facts["report"] = write_report(temporary, scores, kept, facts)
            if "quantization.png" not in facts["report"]:
                say("quantization.png is left out: pip install 'jaxft[plot]'")
        write_card(temporary, options.model, source, kept)
    say(f"written to {out}")
    return {"out": str(out)} | facts


def score(source: Source, calibration: str | None, say: Callable[[str], None]) -> list[dynamic.Score]:
    """The scores of all linear layers, as far as calibration text lets them be measured."""
    if calibration is None:
        return dynamic.measure(source, None, [], None, say)
    directory = find_directory(str(source.directory))
    tokenizer = load_tokenizer(directory)
    config = source.model.config
    batches, tokens = read_calibration(
        calibration, tokenizer, positions=config.max_position_embeddings, vocab_size=config.vocab_size
    )
    say(f"calibration: {tokens} tokens of {calibration}")
    model, params = load_model(directory, dtype=jnp.dtype(source.dtype))
    read = collect_activations(model, (params,), batches, rows=ROWS, dtype=jnp.dtype("float32"))
    return dynamic.measure(source, params, batches, read, say)
