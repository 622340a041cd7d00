"""Where arrays lie on a mesh, and that no mesh changes a loss or a gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxft import save_model
from jaxft.errors import InputError
from jaxft.sharding import RULES, mesh_sizes, spec
from jaxft.trees import flatten
from tests.forked_runs import devices
from tests.tiny_models import CONFIGS, tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five steps on one device and on meshes of eight, from the same directory; see eight_devices.py."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, *tiny_model("qwen3_window_bias"))
    environment = os.environ | devices(8) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "eight_devices.py"), str(directory)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_mesh_gives_the_losses_and_gradients_of_one_device(runs):
    for sharded, single in (("data=2,fsdp=4", "one device"), ("lora, data=2,fsdp=2,tensor=2", "lora, one device")):
        np.testing.assert_allclose(runs[sharded]["losses"], runs[single]["losses"], rtol=1e-5)
        assert runs[single]["losses"][-1] != runs[single]["losses"][0]
        for path, gradient in runs[single]["gradients"].items():
            difference = np.linalg.norm(np.subtract(runs[sharded]["gradients"][path], gradient))
            assert difference <= 1e-5 * np.linalg.norm(gradient), path

    # and the parameters did lie where the table says: nothing was quietly on every device
    placed = runs["data=2,fsdp=4"]["placed"]
    assert placed["layers/0/self_attn/q_proj/weight"] == str(PartitionSpec(None, "tensor", "fsdp"))
    assert placed["layers/0/self_attn/o_proj/weight"] == str(PartitionSpec(None, "fsdp", "tensor"))
    assert placed["layers/0/mlp/down_proj/weight"] == str(PartitionSpec(None, "fsdp", "tensor"))
    assert placed["embed_tokens/weight"] == str(PartitionSpec("tensor", "fsdp"))
    placed = runs["lora, data=2,fsdp=2,tensor=2"]["placed"]
    assert placed["layers/1/self_attn/q_proj/lora/a"] == str(PartitionSpec(None, None, "fsdp"))
    assert placed["layers/1/self_attn/q_proj/lora/b"] == str(PartitionSpec(None, "tensor", None))
    assert placed["lm_head/weight"] == str(PartitionSpec("tensor", "fsdp"))


def test_dimension_that_the_mesh_does_not_divide_is_not_split():
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    assert spec(("heads", "embed"), (6, 8), sizes) == PartitionSpec("tensor", "fsdp")
    assert spec(("heads", "embed"), (5, 8), sizes) == PartitionSpec(None, "fsdp")
    assert spec(("heads", "embed"), (6, 9), sizes) == PartitionSpec("tensor", None)
    assert spec(("batch", "length"), (4, 7), sizes) == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_dimension_of_every_parameter_stands_in_the_table(name):
    model, _ = tiny_model(name)
    axes = dict(flatten(model.axes))
    for path, leaf in flatten(model.shapes):
        assert len(axes[path]) == len(leaf.shape), path
        assert set(axes[path]) <= set(RULES), path


def test_mesh_must_have_the_run_s_devices():
    assert mesh_sizes(None, 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_sizes({"data": 2, "fsdp": 4}, 8) == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(InputError, match=r"data=2,fsdp=2,tensor=1 needs 4 devices, this run has 8"):
        mesh_sizes({"data": 2, "fsdp": 2}, 8)
