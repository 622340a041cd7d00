"""A step that ends in place has the numbers of optax's update, takes no copies, and leaves a bad step out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.cards import COMPILER_OPTIONS, absent_card
from jaxft.errors import InputError
from jaxft.kernels.adamw_8bit import adamw_8bit, triton
from jaxft.kernels.gpu import compiling_for
from jaxft.optim import apply_updates, make_optimizer
from jaxft.optim_8bit import Moment8, quantize
from tests.ptx import CAPABILITIES, MISSING, NEEDED, assemble, compiled

ROOT = Path(__file__).parents[1]
SHAPES = {
    "layers": {"0": {"proj": (3, 64, 96), "uneven": (3, 16, 300), "input_norm": (3, 96), "bias": (3, 64)}},
    "embed_tokens": (128, 96),
}


def tree(seed: int, dtype=jnp.float32, scale: float = 1.0):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(0, scale, shape), dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def optimizer(**options):
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    return make_optimizer(schedule, optim="adamw_8bit", weight_decay=0.1, embedding_factor=0.5, **options)


@pytest.mark.parametrize("chunk", [1 << 24, 2048])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_ten_steps_in_place_are_those_of_update(chunk, max_grad_norm, monkeypatch):
    monkeypatch.setattr("jaxft.optim_8bit.CHUNK", chunk)
    tx = optimizer(max_grad_norm=max_grad_norm)
    plain = placed = tree(0)
    states = [tx.init(plain), tx.init(placed)]

    @jax.jit
    def both(plain, placed, states, grads, key):
        updates, first = tx.update(jax.tree.map(lambda g: g * 0.5, grads), states[0], plain)
        factor = 0.5 * tx.clipping(0.5 * optax.tree.norm(grads))
        placed, second = tx.apply(grads, states[1], placed, key, factor, jnp.bool_(True))
        return apply_updates(plain, updates, key), placed, [first, second]

    for number in range(10):
        plain, placed, states = both(plain, placed, states, tree(number + 1, scale=3), jax.random.key(number))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    # a code at the middle between two levels may fall to either side: levels are up to 14 % apart, a step is 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), placed, plain)
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        if a.dtype == jnp.uint8:
            assert np.mean(np.asarray(a) != np.asarray(b)) < 2e-3
        else:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    tx, params = optimizer(), tree(0, jnp.bfloat16)
    state = tx.init(params)
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), params)
    new = jax.jit(tx.apply)(grads, state, params, jax.random.key(0), jnp.float32(1), jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, new, (params, state))


def test_bfloat16_parameters_move_by_less_than_their_last_bit_on_average():
    params = {"w": jnp.ones((64, 256), jnp.bfloat16)}
    tx = make_optimizer(1e-4, optim="adamw_8bit", max_grad_norm=0)  # 1e-4 is a fortieth of the last bit below 1
    grads = {"w": jnp.ones((64, 256), jnp.bfloat16)}
    new, _ = jax.jit(tx.apply)(grads, tx.init(params), params, jax.random.key(0), jnp.float32(1), jnp.bool_(True))
    moved = 1 - np.asarray(new["w"], np.float64)
    assert set(np.unique(moved)) == {0, 2**-8}
    assert abs(moved.mean() - 1e-4) < 1e-5


def test_shapes_that_do_not_fit_are_refused():
    leaf = jnp.ones((64, 80))
    moment = quantize(jnp.ones((1, 20, 256)), True)
    arguments = dict(b1=0.9, b2=0.999, eps=1e-8, decay=0.0)
    scalars, key = jnp.ones(5), jax.random.key(0)
    with pytest.raises(ValueError, match="do not belong together"):
        adamw_8bit(leaf, leaf[:-1], moment, moment, scalars, key, **arguments)
    with pytest.raises(ValueError, match="scalars"):
        adamw_8bit(leaf, leaf, moment, moment, scalars[:4], key, **arguments)
    with pytest.raises(ValueError, match="'cuda'"):
        adamw_8bit(leaf, leaf, moment, moment, scalars, key, **arguments, implementation="cuda")
    with pytest.raises(NotImplementedError, match="adamw_8bit by triton: cpu device"):
        adamw_8bit(leaf, leaf, moment, moment, scalars, key, **arguments, implementation="triton")


needs_triton = pytest.mark.skipif(bool(MISSING), reason=NEEDED)


@needs_triton
def test_on_a_card_a_step_in_place_adds_next_to_nothing_where_update_makes_copies_of_all_leaves():
    try:
        device = absent_card("h200")
    except InputError as refusal:
        pytest.skip(str(refusal))
    tx = make_optimizer(1e-3, optim="adamw_8bit")
    place = jax.sharding.SingleDeviceSharding(device)
    here = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)  # noqa: E731
    params = {"layers": {"0": {name: jax.ShapeDtypeStruct((16, 1024, 1024), jnp.bfloat16) for name in "abc"}}}
    params, states, numbers = here(params), here(jax.eval_shape(tx.init, params)), 3 << 24
    known = (jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), bool))

    def by_update(grads, state, params, key, factor, finite):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates, key), state

    def temporary(function):
        step = jax.jit(function, donate_argnums=(1, 2), compiler_options=COMPILER_OPTIONS)
        with compiling_for(device):
            return step.lower(params, states, params, *here(known)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(by_update) > 4 * numbers  # the float32 updates
    assert temporary(tx.apply) < numbers // 100


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_compiles_for_every_card_without_spilling(capability, dtype, tmp_path):
    S = jax.ShapeDtypeStruct
    param = S((16, 1024, 1024), jnp.dtype(dtype))
    moment = Moment8(S((16, 4096, 256), jnp.uint8), S((16, 4096), jnp.float32))
    function = lambda *x: triton.adamw_8bit(*x, 0.9, 0.999, 1e-8, 0.0, capability)  # noqa: E731
    arrays = param, param, moment, moment, S((5,), jnp.float32), S((1,), jnp.uint32)
    ((shared, ptx),) = compiled(function, *arrays).values()
    assert shared <= 4 << 10  # the rows' maxima, and one layout turned over for the store
    registers, spilled = assemble(ptx, capability, tmp_path)
    assert registers <= 96 and spilled == 0
    # a thread's 16 numbers: parameters, gradients and codes by 16 bytes
    wide = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)), len(re.findall(r"ld\.global\S*\.v2\.b32", ptx))
    assert wide == {"bfloat16": (6, 0), "float32": (10, 0)}[dtype]


@needs_triton
def test_the_interpreted_kernel_equals_the_reference():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "interpret_adamw.py")], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done: ok\n")
