"""`python -m jaxft.convert merge|quantize|gguf|hf|imatrix …`: model files out of model files; `args`: settings too."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from jaxft.convert import quantize_command
from jaxft.convert.gguf.command import add_gguf_commands
from jaxft.convert.imatrix import add_imatrix_command
from jaxft.convert.merge import DTYPES, compare, merge
from jaxft.convert.messages import say
from jaxft.errors import InputError, run_command
from jaxft.hub import open_repository, push


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
    own.set_defaults(run=run_merge)
    quantize_command.add_to(commands)
    add_gguf_commands(commands)
    for name in PUSHED & commands.choices.keys():
        add_hub_flags(commands.choices[name])
    add_imatrix_command(commands)
    theirs = commands.add_parser(
        "args", allow_abbrev=False, help="settings out of a script, YAML or command line for TRL or Unsloth",
        description="Writes YAML for `jaxft.train --config`, and lists what has no counterpart. A script is read as "
        "text and never run.",
    )  # fmt: skip
    theirs.add_argument("source", metavar="SOURCE", help="a .py, .ipynb or .yaml file, or a command line in quotes")
    theirs.add_argument("--out", metavar="FILE", type=Path, help="a YAML file that does not exist; without it stdout")
    theirs.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, flags = parser.parse_known_args(argv)
    if flags and options.command != "imatrix":  # whose further flags are those of another command
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if options.command == "args":
        return convert_arguments(options.source, options.out)
    options.flags = flags
    repository = None
    if getattr(options, "push_to_hub", False):
        name = Path(options.out).expanduser().resolve().name
        default = name.replace("{quant}", "").removesuffix(".gguf").strip(".-_")
        repository = open_repository(
            options.hub_model_id or default, private=options.hub_private_repo, exist_ok=options.hub_exist_ok
        )
    found = options.run(options)
    if repository is not None:
        found["pushed"] = push(repository, *written(options, found))
    print(json.dumps(found), flush=True)
    return 0


def convert_arguments(source: str, out: Path | None) -> int:
    """`args`: YAML to stdout or a new file, what is lost to stderr."""
    from jaxft.convert.arguments import convert

    if out is not None and out.exists():
        raise InputError(f"--out {out} exists already; name a new file")
    made = convert(source)
    text = made.to_yaml(Path(source).name if "\n" not in source and Path(source).is_file() else "a command line")
    if out is None:
        print(text, end="", flush=True)
    else:
        out.write_text(text, encoding="utf-8")
    for line in made.lost:
        print(f"no counterpart: {line}", file=sys.stderr)
    print(f"{len(made.settings)} settings, {len(made.lost)} without a counterpart", file=sys.stderr, flush=True)
    return 0


MODELFILE = "Modelfile"
PUSHED = {"merge", "quantize", "gguf", "gguf-lora", "hf"}


def add_hub_flags(own: argparse.ArgumentParser) -> None:
    group = own.add_argument_group("hub")
    group.add_argument("--push_to_hub", action="store_true", help="upload what was written to the Hugging Face hub")
    group.add_argument("--hub_model_id", metavar="NAME", help="OWNER/NAME or NAME there; without it named after OUT")
    group.add_argument("--hub_private_repo", action="store_true", help="a new repository is private")
    group.add_argument("--hub_exist_ok", action="store_true", help="add to a repository that holds files already")


def written(options: argparse.Namespace, found: dict[str, Any]) -> tuple[Path, str, tuple[str, ...]]:
    """What a command wrote, for `push`: a directory, a message, and the files in it, () for all."""
    out = Path(options.out).expanduser().resolve()
    message = f"python -m jaxft.convert {options.command}"
    if options.command in ("merge", "quantize", "hf"):
        return out, message, ()
    files = [Path(facts["file"]).name for facts in found["files"].values()] if "files" in found else [out.name]
    return out.parent, message, (*files, *((MODELFILE,) if (out.parent / MODELFILE).is_file() else ()))


def run_merge(options: argparse.Namespace) -> dict[str, Any]:
    out = options.out.expanduser().resolve()
    found = merge(options.model, options.adapter, out, options.dtype, say)
    say(f"{found['merged']} layers merged, {found['replaced']} weights replaced; written to {out}")
    if options.check == "true":
        found |= compare(options.model, options.adapter, out)
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
