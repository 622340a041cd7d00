"""What a terminal shows: sparklines, the live view with nothing but computed numbers, plain lines."""

import io

from rich.console import Console

from jaxft import view
from jaxft.view import View, clock, live_display, plain, sparkline

STEP = {
    "step": 3, "epoch": 0.5, "loss": 1.25, "grad_norm": 0.5, "learning_rate": 2e-4, "target_tokens": 10,
    "tokens_per_second": 81234.5, "step_seconds": 0.5, "peak_memory_bytes": 3 << 30, "mfu": 0.412,
}  # fmt: skip
EVALUATION = {"step": 2, "epoch": 0.3, "eval_loss": 1.5, "eval_perplexity": 4.4817, "eval_target_tokens": 9}


def shown(lines, *, first=0, total=10, width=110, done=(), encoding="utf-8") -> str:
    """The view as a terminal shows it, after steps `done` and `lines`."""
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=raw, width=width, force_terminal=True, color_system=None)
    found = View(console, first, total, [])
    for step in done:
        found.advance(step)
    for line in lines:
        found.show(line)
    console.print(found)
    raw.flush()
    return raw.buffer.getvalue().decode(encoding)


def test_a_sparkline_goes_from_the_smallest_to_the_largest_and_takes_means_where_there_is_no_room():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 7, 0, 0, 3.5, 3.5], 3) == "█▁▅" and sparkline([1], 9) == "▁" and sparkline([], 9) == ""
    assert len(sparkline(list(range(1000)), 40)) == 40


def test_the_view_shows_the_line_and_nothing_that_was_not_measured():
    text = shown([EVALUATION, STEP | {"loss": 2.5}, STEP], done=[3])
    for words in ("step 3 of 10", "epoch 0.50", "1.2500", "81,234", "lr 2.00e-04", "grad norm 0.500", "memory 3.00 GiB",
                  "mfu 41.2%", "eval loss", "1.5000", "at step 2", "perplexity 4.482", "█▁"):  # fmt: skip
        assert words in text, words
    bare = shown([STEP | {"peak_memory_bytes": None, "mfu": None}], done=[3])
    assert "memory" not in bare and "mfu" not in bare and "eval" not in bare and "left" not in bare
    assert "compiling" in shown([]) and "loss" not in shown([])


def test_what_is_left_is_the_median_of_the_steps_after_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    found = View(Console(file=io.StringIO()), 0, 100, [])
    for step, seconds in enumerate([60, 2, 3, 2], 1):
        now[0] += seconds
        found.advance(step)
    assert found.remaining() == f"{clock(2 * 96)} left" == "3:12 left" and clock(3765) == "1:02:45"
    now[0] += 100
    found.show(EVALUATION)  # an evaluation is not a step's time
    now[0] += 2
    found.advance(5)
    assert found.remaining() == "3:10 left"


def test_a_terminal_without_such_characters_gets_no_sparkline_and_no_error():
    text = shown([STEP, STEP | {"loss": 2.0}], done=[3], encoding="ascii")
    assert "1.2500" not in text and "2.0000" in text and text.isascii()


def test_a_narrow_terminal_and_a_loss_that_is_not_finite_are_shown():
    text = shown([STEP, STEP | {"loss": float("nan")}, EVALUATION | {"eval_perplexity": None}], done=[3], width=60)
    assert "step 3 of 10" in text and "nan" in text and "perplexity" not in text


def test_without_a_terminal_lines_are_plain(capsys):
    with live_display(0, 10) as display:
        display.busy("evaluating 5 rows", told=True)
        display.show(EVALUATION | {"eval_gsm8k": 0.25})
        display.busy("evaluating", told=False)
        display.show(STEP)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [
        "evaluating 5 rows", "step 2  eval_loss 1.5000  perplexity 4.482  eval_gsm8k 0.2500",
        "step 3  loss 1.2500  grad_norm 0.500  lr 2.00e-04  81,234 tokens/s  peak 3.00 GiB  mfu 41.2%",
    ]  # fmt: skip
    assert "peak" not in plain(STEP | {"peak_memory_bytes": None, "mfu": None})
