"""The two ways a command can fail on purpose, and how that failure reaches the terminal."""

import sys
import traceback
from collections.abc import Callable


class InputError(ValueError):
    """What was asked for cannot be done as asked: a flag, a file, a model, a data set. Exit code 2."""


class RunError(RuntimeError):
    """The run itself failed after it was asked for correctly: a non-finite loss, a full disk. Exit code 1."""


def run_command(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs `main(argv)` and turns its failure into one plain line.

    Returns the exit code: what `main` returned (None is 0), 2 for an `InputError`, 1 for any other exception.
    The line `error: …` goes to stderr unwrapped; a traceback only where `--debug` is among the arguments.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except (InputError, RunError, OSError, ValueError, RuntimeError, NotImplementedError, MemoryError) as failure:
        if "--debug" in arguments:
            traceback.print_exc()
        text = " ".join(str(failure).split()) or type(failure).__name__
        if not isinstance(failure, InputError | RunError):
            text = f"{type(failure).__name__}: {text} (run again with --debug for the traceback)"
        print(f"error: {text}", file=sys.stderr)
        return 2 if isinstance(failure, InputError) else 1
