"""metrics.jsonl and samples.jsonl: what a run writes while it goes, one JSON object a line."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxft.errors import RunError
from jaxft.processes import is_first

Line = dict[str, Any]


class MetricsFile:
    """One JSON object a line, each with its `step`. Floats are written so that they read back exactly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """Every line that was written whole, in order."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a run killed while it wrote leaves half a line, and nothing after it
        return found

    def cut(self, step: int) -> None:
        """Drops every line after `step`, and a last line that was not written whole."""
        self.keep(lambda line: line["step"] <= step)

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        """Drops every line that is not wanted, and a last line that was not written whole."""
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in self.lines() if wanted(line)]
            temporary = self.path.with_suffix(".partial")
            with _written(self.path):
                try:
                    temporary.write_text("".join(kept), encoding="utf-8")
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)

    def figures(self, step: int) -> Line:
        """What a model card tells of a run whose result is that of `step`: the last loss, and what the evaluations
        before the run and of the result found."""
        lines = self.lines()
        losses = [line["loss"] for line in lines if "loss" in line and line["step"] <= step]
        held_out = [line for line in lines if "eval_loss" in line and line["step"] <= step]
        found = {"loss": losses[-1]} if losses else {}
        for name in held_out[-1] if held_out else ():
            if name.startswith("eval_") and name not in ("eval_perplexity", "eval_target_tokens"):
                found |= {f"{name} before": held_out[0][name], name: held_out[-1][name]}
        return found

    def write(self, line: Line) -> None:
        """Appends a line; of several processes the first writes it."""
        if not is_first():
            return
        # JSON has no NaN: what is not finite is written as null
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with _written(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raises RunError where the disk does not take what is written inside."""
    try:
        yield
    except OSError as failure:
        raise RunError(
            f"{path} could not be written: {failure}. Make room, then go on from the last checkpoint by "
            "--resume_from_checkpoint auto"
        ) from failure
