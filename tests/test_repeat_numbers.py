"""scripts/repeat_numbers.py: reads the page as it stands, runs what it names, and says what is otherwise here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.bench import WORKLOADS
from jaxft.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def repeat(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import repeat_numbers

    return repeat_numbers


@pytest.fixture
def claims(repeat):
    return repeat.claims(repeat.PAGE.read_text(encoding="utf-8"))


def test_every_line_of_jaxft_is_read_and_a_workload_begins_with_its_own_policy(repeat, claims):
    text = repeat.PAGE.read_text(encoding="utf-8")
    assert len(claims) == text.count("| jaxft, `")
    first = repeat.chosen(claims, [], False)
    kept = {name: f" --kept_layers {one.kept_layers}" if one.kept_layers else "" for name, one in WORKLOADS.items()}
    assert {claim.id: claim.policy for claim in first} == {
        name: workload.gradient_checkpointing + kept[name] for name, workload in WORKLOADS.items()
    }
    assert repeat.chosen(claims, ["A8"], True) == [claim for claim in claims if claim.id == "A8"]
    with pytest.raises(InputError, match="A0: not on the page, which has A1, A2"):
        repeat.chosen(claims, ["A0", "A1"], False)


def test_a_line_is_bench_with_the_policy_that_the_page_names(repeat):
    tiled = repeat.Claim("A8", "offload_middle --mlp_tiles 2", 1.0, 1.0, 1.0)
    assert tiled.command == [
        sys.executable, "-m", "jaxft.bench", "A8", "--gradient_checkpointing", "offload_middle", "--mlp_tiles", "2",
    ]  # fmt: skip


def told(claim, speed=1.0, memory=1.0, loss=0.0) -> dict:
    return {
        "tokens_per_second": speed * claim.tokens_per_second, "peak_bytes": int(memory * claim.gib * 2**30),
        "loss": [claim.loss + loss, 1.0], "device": "a card",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({}, ""),
        ({"speed": 0.96, "memory": 1.01, "loss": -0.015}, ""),
        ({"speed": 0.94}, "slower"),
        ({"memory": 1.03}, "more memory"),
        ({"loss": 0.03}, "another loss"),
        ({"loss": float("nan"), "speed": 0.5}, "slower, another loss"),
    ],
)
def test_what_is_otherwise_here_is_said_and_exit_1(line, said, repeat, claims, monkeypatch, capsys, tmp_path):
    def run(command, **_):
        claim = next(one for one in claims if one.command == command)
        found = told(claim, **line) if claim.id == "A3" else told(claim)
        return subprocess.CompletedProcess(command, 0, f"{json.dumps(found)}\n", "")

    monkeypatch.setattr(repeat.subprocess, "run", run)
    assert repeat.main(["A1", "A3", "--json", str(tmp_path / "lines.jsonl")]) == (1 if said else 0)
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| A")]
    assert [row[0].strip("| ") for row in rows] == ["A1", "A3"]
    assert [row[-1].strip("| ") for row in rows] == ["", said]
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 2


def test_a_line_that_fails_is_an_error_with_its_last_words(repeat, claims, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "a warning\nerror: out of memory\n")
    monkeypatch.setattr(repeat.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunError, match=r"jaxft\.bench A1 .* ended with 1: error: out of memory"):
        repeat.main(["A1"])
