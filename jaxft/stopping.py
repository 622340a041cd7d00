"""Which evaluation of a run was the best one, and when a run ends before its last step: rules, and a plain state."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxft.errors import InputError
from jaxft.settings import TrainSettings


@dataclass(frozen=True)
class Rules:
    """metric: a name in the lines of evaluations, better where it is `greater`, or smaller.

    keep_best: the checkpoint of the best evaluation stays, whatever `--save_total_limit` says. patience: so many
    evaluations in a row that are not better than the best before them by more than `threshold` end the run.
    seconds: after so long no further step begins.
    """

    metric: str
    greater: bool
    keep_best: bool
    patience: int | None
    threshold: float
    seconds: float | None

    @classmethod
    def of(cls, settings: TrainSettings) -> "Rules":
        """The rules of the settings; whether greater is better goes by the metric's name, as in transformers."""
        metric = settings.metric_for_best_model or "eval_loss"
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        greater = settings.greater_is_better
        return cls(
            metric=metric,
            greater=not metric.endswith(("loss", "perplexity")) if greater is None else greater,
            keep_best=settings.load_best_model_at_end,
            patience=settings.early_stopping_patience,
            threshold=settings.early_stopping_threshold,
            seconds=settings.max_seconds,
        )


@dataclass
class Course:
    """What has become of a run so far, by its rules; `state()` is what a checkpoint holds of it.

    best_step, best_value: of the best evaluation. counted: the step of the last evaluation that was taken note of.
    waited: evaluations in a row that were no better by the threshold. spent: seconds before this process went on.
    """

    rules: Rules
    best_step: int | None = None
    best_value: float | None = None
    counted: int = 0
    waited: int = 0
    spent: float = field(default=0.0, compare=False)

    def state(self, seconds: float) -> dict[str, Any]:
        """Plain values; seconds: how long this process has been at it."""
        kept = asdict(self) | {"metric": self.rules.metric, "spent": self.spent + seconds}
        del kept["rules"]
        return kept

    @classmethod
    def restored(cls, rules: Rules, state: dict[str, Any] | None, evaluations: Iterable[dict[str, Any]]) -> "Course":
        """The course of a checkpoint's `state`, with the evaluations (lines of metrics) that were made since.

        Where another metric decided then, it begins anew and only the time goes on.
        """
        state = dict(state or {})
        same = state.pop("metric", rules.metric) == rules.metric
        found = cls(rules, **state) if same else cls(rules, counted=state["counted"], spent=state["spent"])
        for line in evaluations:
            if line["step"] > found.counted:
                found.note(line)
        return found

    def note(self, line: dict[str, Any]) -> bool:
        """Takes note of an evaluation; whether it is the best one so far. That of the untrained model is none of them.

        A value that is not finite (null in a file) is never better. Raises InputError where the line has no such
        metric.
        """
        if self.rules.metric not in line:
            known = ", ".join(name for name in line if name.startswith("eval_"))
            raise InputError(f"--metric_for_best_model {self.rules.metric}: an evaluation here has {known}")
        step, value = line["step"], line[self.rules.metric]
        if step <= self.counted:  # 0, or what a run resumed in another directory evaluates again
            return False
        self.counted = step
        gain = -math.inf
        if value is not None and math.isfinite(value):
            gain = math.inf if self.best_value is None else value - self.best_value
            gain = gain if self.rules.greater or self.best_value is None else -gain
        self.waited = 0 if gain > self.rules.threshold else self.waited + 1
        if gain > 0:
            self.best_step, self.best_value = step, value
        return gain > 0

    def over(self) -> str | None:
        """Why no further step is to begin by the evaluations; None where the run goes on."""
        if self.rules.patience is None or self.waited < self.rules.patience:
            return None
        times = "evaluation" if self.waited == 1 else f"{self.waited} evaluations in a row"
        by = f" by more than {self.rules.threshold}" if self.rules.threshold else ""
        best = "" if self.best_step is None else f", {self.best_value:.6g} at step {self.best_step}"
        return f"{times} without a better {self.rules.metric}{by}{best}"

    def too_long(self, seconds: float) -> bool:
        """Whether the run, resumed parts of it together, has taken its time; seconds: those of this process."""
        return self.rules.seconds is not None and self.spent + seconds >= self.rules.seconds
