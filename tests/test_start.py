"""What a command does not import on its way to the first step: every module is files to be read, on any disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.without_torch import hidden, may_need_torch
from tests.ptx import MISSING, NEEDED
from tests.tiny_runs import flags, sums, write_base, write_rows

ROOT = Path(__file__).parent.parent
UNNEEDED = {"torch", "matplotlib", "orbax", "sklearn", "tensorboardX", "wandb", "gguf"}


def imported(words: list[str], **environment: str) -> set[str]:
    """The modules and packages that `python -m` with these words imports."""
    paths = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words], env=os.environ | environment | {"PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "PyTorch was not found" not in done.stderr
    return set(re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> list[str]:
    """A run as far as its compiled step."""
    place = tmp_path_factory.mktemp("start")
    rows = write_rows(place / "rows.jsonl", sums(12))
    run = flags(model_name_or_path=write_base(place / "base"), dataset=rows, output_dir=place / "run", max_length=32)
    return ["jaxft.train", *run, *flags(max_steps=2, per_device_train_batch_size=1, dry_run=True)]


@pytest.fixture
def fake_torch(tmp_path) -> str:
    """A folder where PyTorch is installed, as far as transformers can see, that must not be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0")
    return str(tmp_path)


def test_a_run_compiles_its_step_without_importing_torch_or_anything_for_later(dry_run, fake_torch):
    found = imported(dry_run, PYTHONPATH=fake_torch)
    assert {"jaxft.prepare", "transformers.configuration_utils", "jaxft.step"} <= found
    assert not packages(found) & UNNEEDED
    again = imported(dry_run, PYTHONPATH=fake_torch)  # the tokens are kept now
    assert "datasets" in packages(found) and not packages(again) & {"datasets", "pandas", "pyarrow", "scipy"}


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    "words, needed",
    [
        (["--dataset", "a.jsonl"], False),
        (["--eval_metric", "mine:score"], True),
        (["--eval-metric=mine:score"], True),
        (["--config", "FILE"], True),
        (["--config=FILE"], True),
        (["--config", "nowhere.yaml"], False),
        (["--config"], False),
        ([], False),
    ],
)
def test_torch_is_left_in_reach_of_a_metric_that_may_use_it(words, needed, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("eval_metric: mine:score\n")
    assert may_need_torch([word.replace("FILE", str(file)) for word in words]) == needed


def test_what_is_hidden_is_found_again_afterwards(fake_torch, monkeypatch):
    monkeypatch.syspath_prepend(fake_torch)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with hidden("torch"), pytest.raises(ModuleNotFoundError):
        __import__("torch")
    with pytest.raises(SystemExit, match="torch was imported"):
        __import__("torch")


def test_torch_is_left_in_reach_of_somebody_elses_command(fake_torch):
    package = Path(fake_torch) / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("import jaxft")
    (package / "__main__.py").write_text("")
    paths = os.pathsep.join([fake_torch, str(ROOT)])
    words = [sys.executable, "-m", "theirs", "-m", "jaxft"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode != 0 and "torch was imported" in done.stderr


@pytest.mark.skipif(bool(MISSING), reason=NEEDED)
def test_a_command_compiles_its_kernels_without_importing_torch(fake_torch, tmp_path):
    program = """
import sys
sys.orig_argv, sys.argv = ["python", "-m", "jaxft.train"], ["-m"]
import jaxft
import jax, jax.numpy as jnp
from jaxft.kernels.rms_norm import triton
x, w = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.bfloat16)
traced = jax.jit(lambda x, w: triton.residual_rms_norm(x, w, 1e-6, 90)).trace(x, w)
assert "triton_kernel_call" in traced.lower(lowering_platforms=("cuda",)).as_text()
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([fake_torch, str(ROOT)])}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "kept")}  # so that it is compiled
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
