"""Checkpoints come back bit for bit, whole or not at all, whatever happens while they are written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.checkpoint import Checkpoints
from jaxft.errors import InputError, RunError
from tests.forked_runs import devices

ROOT = Path(__file__).parent.parent
META = {"row": 17, "epoch": 2, "best": 0.1 + 0.2, "settings": {"seed": 3}}


def state(seed: int = 0) -> dict:
    """One leaf of every dtype, string keys that look like numbers, optax's named tuples, keys, an empty array."""
    keys = jax.random.split(jax.random.key(seed), 4)
    trainable = {
        "layers": {"0": {"a": jax.random.normal(keys[0], (3, 4))}, "10": {"a": jax.random.normal(keys[1], (5,))}},
        "odd": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32),
    }
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    gradients = jax.tree.map(jnp.ones_like, trainable)
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction raises a float to an int32
        _, opt_state = transform.update(gradients, transform.init(trainable), trainable)
    return {
        "trainable": trainable,
        "opt_state": opt_state,
        "rest": {
            "half": jax.random.normal(keys[2], (7, 3)).astype(jnp.bfloat16),
            "q": jnp.arange(256, dtype=jnp.uint8),
            "n": jnp.array([-(2**31), 2**31 - 1], jnp.int32),
            "flag": jnp.array([True, False]),
            "empty": jnp.zeros((0, 3), jnp.bfloat16),
            "words": jax.random.key_data(keys[3]),
            "key": keys[3],
            "keys": keys,
        },
    }


def abstract(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same_bits(one: dict, two: dict) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(left) == jax.random.key_impl(right)
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_every_dtype_and_optax_state_comes_back_bit_for_bit(tmp_path):
    saved = state()
    assert Checkpoints(tmp_path).save(5, saved, META) == tmp_path / "5"
    restored, meta = Checkpoints(tmp_path).restore(None, abstract(saved))
    assert_same_bits(restored, saved)
    assert meta == META and Checkpoints(tmp_path).meta() == META
    assert isinstance(restored["opt_state"][1][0], optax.ScaleByAdamState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_save_total_limit_keeps_the_newest_and_a_step_can_be_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, save_total_limit=2)
    assert checkpoints.latest() is None and list(tmp_path.iterdir()) == []
    for step in (9, 10, 100):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {"step": step})
    assert checkpoints.steps() == [10, 100] and checkpoints.latest() == 100
    checkpoints.save(100, {"x": jnp.full(3, 7)}, {"step": "again"})
    restored, meta = checkpoints.restore(None, {"x": jax.ShapeDtypeStruct((3,), jnp.int32)})
    assert restored["x"].tolist() == [7, 7, 7] and meta == {"step": "again"}
    assert checkpoints.meta(10) == {"step": 10}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10", "100"]
    with pytest.raises(InputError, match="save_total_limit is 0"):
        Checkpoints(tmp_path, save_total_limit=0)


def test_a_missing_checkpoint_is_named_with_those_that_exist(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "none").restore(None, {})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"x": jnp.zeros(1)}, {})
    with pytest.raises(InputError, match="no checkpoint of step 4; it has 3"):
        checkpoints.restore(4, {"x": jnp.zeros(1)})


def test_another_structure_shape_or_dtype_is_refused_with_what_differs(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}}, {})
    cases = {
        "trainable/a has shape [2, 3] in the checkpoint and [2, 4] in this run": {
            "a": jnp.zeros((2, 4)),
            "b": jnp.zeros(2),
        },
        "trainable/b has dtype float32 in the checkpoint and bfloat16 in this run": {
            "a": jnp.zeros((2, 3)),
            "b": jnp.zeros(2, jnp.bfloat16),
        },
        "trainable/b is only in the checkpoint": {"a": jnp.zeros((2, 3))},
        "trainable/c is only in this run": {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2), "c": jnp.zeros(1)},
    }
    for words, tree in cases.items():
        with pytest.raises(InputError) as failure:
            checkpoints.restore(1, {"trainable": tree})
        assert words in str(failure.value) and str(tmp_path / "1") in str(failure.value)


def test_any_damaged_file_of_a_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    tree = {"x": jnp.arange(3000.0), "y": jnp.ones(3)}
    checkpoints.save(1, tree, {})
    checkpoints.save(2, tree, {})
    files = [path for path in sorted((tmp_path / "2").rglob("*")) if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        flipped = bytes([content[0] ^ 1, *content[1:]])
        for damaged in (content[: len(content) // 2], b"", flipped, None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(InputError) as failure:
                checkpoints.restore(None, tree)
            assert str(path) in str(failure.value) and "to resume from step 1" in str(failure.value)
            path.write_bytes(content)
    assert_same_bits(checkpoints.restore(None, tree)[0], tree)


def test_a_half_made_checkpoint_is_neither_listed_nor_kept(tmp_path):
    tree = {"x": jnp.arange(4.0)}
    Checkpoints(tmp_path).save(1, tree, {"n": 1})
    (tmp_path / ".saving-2" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / ".deleting-0" / "arrays").mkdir(parents=True)
    os.rename(tmp_path / "1", tmp_path / ".replaced-1")  # killed between the two renames of a replacement
    (tmp_path / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "notes"]
    assert_same_bits(checkpoints.restore(None, tree)[0], tree)


SAVE_UNTIL_KILLED = """
import os, sys, jax.numpy as jnp
import orbax.checkpoint  # so that the children do not import it again
from jaxft.checkpoint import Checkpoints
for directory in sys.stdin:  # forks a child for each line; JAX's backend starts in the child
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(directory.strip(), save_total_limit=2)
        start = (checkpoints.latest() or 0) + 1
        for step in range(start, start + 10_000):
            checkpoints.save(step, {"x": jnp.full((300, 1000), step), "y": {"0": jnp.full(5, step)}}, {"step": step})
            print(os.getpid(), step, flush=True)
    os.waitpid(child, 0)
    print("killed", 0, flush=True)
"""


def test_a_process_killed_at_any_moment_of_a_save_leaves_the_previous_checkpoint_whole(tmp_path):
    like = {"x": jax.ShapeDtypeStruct((300, 1000), jnp.int32), "y": {"0": jax.ShapeDtypeStruct((5,), jnp.int32)}}
    command = [sys.executable, "-W", "ignore", "-c", SAVE_UNTIL_KILLED]
    half_made = 0
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forker:
        assert forker.stdin is not None and forker.stdout is not None
        for delay in (0.0, 0.007, 0.013, 0.021, 0.031, 0.043, 0.052, 0.077):
            forker.stdin.write(f"{tmp_path}\n")
            forker.stdin.flush()
            child, reported = map(int, forker.stdout.readline().split())
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            while (line := forker.stdout.readline().split())[0] != "killed":
                reported = int(line[1])
            half_made += any(entry.name.startswith(".") for entry in tmp_path.iterdir())
            checkpoints = Checkpoints(tmp_path)
            assert checkpoints.latest() in (reported, reported + 1)
            assert {entry.name for entry in tmp_path.iterdir()} == {str(step) for step in checkpoints.steps()}
            for step in checkpoints.steps():
                restored, meta = checkpoints.restore(step, like)
                assert meta == {"step": step} and restored["y"]["0"].tolist() == [step] * 5
                assert np.array_equal(restored["x"], np.full((300, 1000), step))
        forker.stdin.close()
    assert half_made >= 1


FULL_DISK = """
import logging, resource, signal, sys, jax
from jaxft.checkpoint import Checkpoints
from jaxft.errors import RunError
assert "orbax" not in sys.modules
logging.basicConfig(level=logging.INFO)
tree = {"x": jax.random.normal(jax.random.key(0), (300, 1000))}
print("loud", file=sys.stderr)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, tree, {})
checkpoints.restore(1, tree)
print("quiet", file=sys.stderr)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk
for limit in (100_000, 100):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, tree, {})
    except RunError as failure:
        print(failure)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.restore(1, tree)
checkpoints.save(2, tree, {})
print(checkpoints.steps())
"""


def test_a_save_logs_nothing_and_on_a_full_disk_it_is_a_run_error_and_the_previous_one_stays(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, second, steps = run.stdout.splitlines()
    for line in (first, second):
        assert f"checkpoint {tmp_path / '2'} could not be written" in line and "File too large" in line
        assert "The checkpoint of step 1 is intact." in line
    assert steps == "[1, 2]"
    assert "loud\nquiet\n" in run.stderr  # a save that goes well logs nothing, and Orbax is imported only by it


def test_a_directory_that_cannot_be_written_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(RunError, match="could not be written"):
        Checkpoints(tmp_path / "file" / "below").save(1, {"x": jnp.zeros(1)}, {})


def test_state_that_is_not_arrays_and_meta_that_is_not_json_are_refused_before_anything_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="step is a int"):
        checkpoints.save(1, {"step": 3}, {})
    with pytest.raises(ValueError, match="two arrays are called a/b"):
        checkpoints.save(1, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}, {})
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, {"x": jnp.zeros(1)}, {"x": jnp.zeros(1)})
    assert list(tmp_path.iterdir()) == []


OTHER_SHARDING = """
import json, sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxft.checkpoint import Checkpoints
def put(shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return {"w": NamedSharding(mesh, P("fsdp", "data")), "b": NamedSharding(mesh, P("fsdp")),
            "key": NamedSharding(mesh, P()), "n": NamedSharding(mesh, P())}
tree = {"w": jnp.arange(64.0).reshape(8, 8), "b": jnp.arange(8).astype(jnp.bfloat16), "key": jax.random.key(5),
        "n": jnp.int32(3)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, jax.device_put(tree, put((2, 4))), {})
for sharding in (put((4, 2)), put((1, 8)), put((8, 1)), None):
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    if sharding is not None:
        like = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding[n]) for n, s in like.items()}
    restored, _ = checkpoints.restore(1, like)
    for name in tree:
        if sharding is not None and name != "key":
            assert restored[name].sharding == sharding[name], name
        assert jnp.array_equal(restored[name], tree[name]), name
    assert len(restored["w"].devices()) == (8 if sharding else 1)
    assert len(restored["key"].devices()) == (8 if sharding else 1)
print(len(jax.devices()))
"""


def test_a_checkpoint_is_restored_onto_another_sharding(tmp_path):
    environment = os.environ | devices(8) | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OTHER_SHARDING, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "8"
    tree = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8, jnp.bfloat16), "key": jax.random.key(0), "n": jnp.int32(0)}
    restored, _ = Checkpoints(tmp_path).restore(1, tree)  # and from eight devices onto those of this process
    assert restored["w"].tolist() == np.arange(64.0).reshape(8, 8).tolist() and restored["n"] == 3
