"""`python -m jaxft.convert merge MODEL ADAPTER OUT` and `quantize MODEL OUT`: model files out of model files."""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from jaxft.convert import quantize_command
from jaxft.convert.merge import DTYPES, compare, merge
from jaxft.errors import InputError, run_command


class Parser(argparse.ArgumentParser):
    """argparse with this package's errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m jaxft.convert", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = commands.add_parser(
        "merge", allow_abbrev=False, help="a LoRA adapter into its model",
        description="Adds a LoRA adapter into its model and writes a Hugging Face model directory. The last line on "
        "stdout is JSON; it has the largest difference between the logits of the two on a fixed text.",
    )  # fmt: skip
    own.add_argument("model", metavar="MODEL", help="a model directory, or a name on the hub")
    own.add_argument("adapter", metavar="ADAPTER", help="a PEFT LoRA adapter")
    own.add_argument("out", metavar="OUT", type=Path, help="a directory that does not exist, or is empty")
    own.add_argument("--dtype", choices=DTYPES, help="of all weights; without it each keeps the model's own")
    own.add_argument(
        "--check", choices=("true", "false"), default="true", nargs="?", const="true",
        help="false leaves out the comparison of logits, which holds the whole model in memory",
    )  # fmt: skip
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    quantize_command.add_to(commands)
    options = parser.parse_args(argv)
    out = options.out.expanduser().resolve()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.command == "quantize":
        print(json.dumps(quantize_command.run(options, out, say)), flush=True)
        return 0
    found = merge(options.model, options.adapter, out, options.dtype, say)
    say(f"{found['merged']} layers merged, {found['replaced']} weights replaced; written to {out}")
    if options.check == "true":
        found |= compare(options.model, options.adapter, out)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
