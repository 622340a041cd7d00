"""When a command starts the devices: training early, beside its imports, and only what is going to want them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.devices import wanted_now
from tests.tiny_runs import flags, sums, write_base, write_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    """The flags of a run as far as its compiled step."""
    place = tmp_path_factory.mktemp("devices")
    rows = write_rows(place / "rows.jsonl", sums(12))
    named = flags(model_name_or_path=write_base(place / "base"), dataset=rows, output_dir=place / "run")
    return [
        *named,
        *flags(max_steps=2, max_length=32, per_device_train_batch_size=1, dry_run=True, dataset_cache="none"),
    ]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No variable that has a run join other processes."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_of_one_process_on_what_is_here_wants_the_devices(run, tmp_path):
    assert wanted_now(run) and wanted_now([]) and wanted_now(["--max_steps", "3"])
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {run[0].partition('=')[2]}\n")
    assert wanted_now([f"--config={tmp_path / 'run.yaml'}", *run[1:]])


@pytest.mark.parametrize(
    "more",
    [
        ["--help"],
        ["-h"],
        ["--nonsense"],
        ["--max_steps=many"],
        ["--learning_rate=-1"],
        ["--memory_budget=much"],
        ["--config=nowhere.yaml"],
        ["--device=h200"],
        ["--num_processes=2", "--process_id=0", "--coordinator_address=here:1234"],
        ["--num_processes=2", "--process_id=2"],
        ["--dataset=nowhere.jsonl"],
        ["--model_name_or_path=nowhere/at-all"],
    ],
)
def test_a_run_that_ends_sooner_or_begins_otherwise_does_not(run, more, capsys):
    assert not wanted_now([*run, *more])
    assert capsys.readouterr() == ("", "")  # the run says it


def test_one_of_model_and_data_alone_is_an_error_that_waits_for_no_device(run):
    assert not wanted_now(run[:1]) and not wanted_now(run[1:])


def test_a_process_that_the_environment_has_join_others_leaves_the_devices_to_them(run, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert not wanted_now(run)


@pytest.mark.parametrize(
    "words, early",
    [
        (["jaxft.train"], True),
        (["jaxft.train", "--device=h200"], False),
        (["jaxft.train", "--nonsense"], False),
        (["jaxft.evaluate"], False),
        (["jaxft.generate"], False),
    ],
)
def test_only_training_starts_them_with_its_imports(run, words, early, tmp_path):
    # read by Python before the command: says at its end whether the devices were begun, and before the models' import
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "import concurrent.futures.thread as thread\n"
        "begun, submit = [], thread.ThreadPoolExecutor.submit\n"
        "def noted(self, function, *more, **options):\n"
        "    if getattr(function, '__name__', '') == 'start_devices':\n"
        "        begun.append('jaxft.models' not in sys.modules)\n"
        "    return submit(self, function, *more, **options)\n"
        "thread.ThreadPoolExecutor.submit = noted\n"
        "atexit.register(lambda: print('begun', begun, file=sys.stderr))\n"
    )
    words = [*words[:1], *(run if words[0] == "jaxft.train" else []), *words[1:]]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", *words], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert ("begun [True]" in done.stderr) == early, done.stderr
    assert done.returncode == 0 or not early, done.stderr
