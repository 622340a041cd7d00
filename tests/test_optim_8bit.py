"""AdamW with 8-bit moments: its levels, its rounding, its update, and its place in runs, checkpoints and meshes."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.errors import InputError
from jaxft.optim import make_optimizer
from jaxft.optim_8bit import Moment8, dequantize, encode, levels, moment_shapes, quantize, scale_by_adam_8bit


@pytest.mark.parametrize("signed, checksum", [(True, 0x1B137AEB), (False, 0xE871278F)])
def test_the_levels_are_those_of_bitsandbytes_bit_for_bit(signed, checksum):
    # CRC-32 of bitsandbytes.functional.create_dynamic_map(signed) of 0.50.2, as float32
    assert zlib.crc32(levels(signed).tobytes()) == checksum


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_follow_the_definition(signed):
    expected = {0.0, 1.0}
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        middles = [(0.1 + 0.9 * (k + 0.5) / parts) * 10.0 ** (decade - 6) for k in range(parts)]
        expected |= set(middles) | ({-middle for middle in middles} if signed else set())
    assert len(expected) == 256
    np.testing.assert_allclose(levels(signed), sorted(expected), rtol=2e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_that_of_the_nearest_level(signed):
    table = levels(signed)
    middles = ((table[:-1].astype(np.float64) + table[1:]) / 2).astype(np.float32)
    random = np.random.default_rng(0)
    small = 10 ** random.uniform(-9, 0, 50_000) * (random.choice([-1, 1], 50_000) if signed else 1)
    flat = random.uniform(-1 if signed else 0, 1, 50_000)
    values = np.concatenate([small, flat, table, middles, np.nextafter(middles, 2), np.nextafter(middles, -2)])
    values = values.astype(np.float32)
    values = values[values >= (-1 if signed else 0)]
    codes = np.asarray(jax.jit(encode, static_argnums=1)(jnp.asarray(values), signed))
    np.testing.assert_array_equal(codes, np.searchsorted(middles, values, side="left"))


def test_blocks_of_zeros_and_single_large_numbers_come_back():
    blocks = np.zeros((3, 256), np.float32)
    blocks[1, 7], blocks[2] = 3e-20, np.linspace(-5, 5, 256)
    back = np.asarray(dequantize(quantize(jnp.asarray(blocks), True), True))
    np.testing.assert_array_equal(back[:2], blocks[:2])
    assert np.abs(back[2] - blocks[2]).max() <= 5 * 0.9 / 64 / 2 * 1.01  # half of the widest gap between levels


def slow_adam_8bit(grads, b1, b2, eps):
    """Adam with moments rounded after each step, number by number in float64: the updates and the last codes."""
    tables = [levels(True).astype(np.float64), levels(False).astype(np.float64)]
    blocks = -(-grads[0].size // 256)
    codes = [np.full((blocks, 256), int(np.argmin(np.abs(table)))) for table in tables]
    largest = [np.zeros(blocks) for _ in tables]
    updates = []
    for step, grad in enumerate(grads, 1):
        g = np.zeros(blocks * 256)
        g[: grad.size] = grad.ravel()
        g = g.reshape(blocks, 256)
        m, v = (table[code] * most[:, None] for table, code, most in zip(tables, codes, largest, strict=True))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        update = m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps)
        updates.append(update.ravel()[: grad.size].reshape(grad.shape))
        for which, moment in enumerate((m, v)):
            largest[which] = np.abs(moment).max(1)
            for block in range(blocks):
                scaled = moment[block] / (largest[which][block] or 1)
                codes[which][block] = np.abs(scaled[:, None] - tables[which][None]).argmin(1)
    return updates, codes


def test_the_update_is_that_of_a_slow_definition():
    random = np.random.default_rng(1)
    shape = (67, 71)  # 4757 numbers: 19 blocks, the last of them short
    scales = 10 ** random.uniform(-6, 0, shape)
    grads = [(random.normal(0, 1, shape) * scales).astype(np.float32) for _ in range(6)]
    wanted, codes = slow_adam_8bit(grads, 0.9, 0.999, 1e-8)
    transform = scale_by_adam_8bit(0.9, 0.999, 1e-8)
    state = transform.init({"w": jnp.zeros(shape)})
    update = jax.jit(transform.update)
    for grad, expected in zip(grads, wanted, strict=True):
        found, state = update({"w": jnp.asarray(grad)}, state)
        # a number that float32 puts on the other side of a middle gets the next level: rare, and then visible
        differs = ~np.isclose(np.asarray(found["w"]), expected, rtol=1e-4, atol=1e-6)
        assert differs.mean() < 2e-3
    for moment, code in zip((state.mu["w"], state.nu["w"]), codes, strict=True):
        gap = np.abs(np.asarray(moment.codes[0], np.int64).ravel()[: grads[0].size] - code.ravel()[: grads[0].size])
        assert (gap > 0).mean() < 2e-3 and gap.max() <= 1


def test_six_steps_are_those_of_bitsandbytes_with_codes_rounded_to_the_nearest(monkeypatch):
    """Its own optimizer on the same gradients. Its CPU build gives a third of all numbers another code than the nearest
    level's, so the rounding of codes is put right in it first."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    bnb = pytest.importorskip("bitsandbytes", reason="the reference is bitsandbytes")
    from bitsandbytes.backends.cpu import ops

    def nearest(values, code, absmax, out, blocksize):
        size = values.numel()
        rows = torch.nn.functional.pad(values.reshape(-1), (0, -size % blocksize)).reshape(-1, blocksize)
        absmax.copy_(rows.abs().amax(1))
        middles = ((code[:-1].double() + code[1:].double()) / 2).float()
        share = rows / torch.where(absmax > 0, absmax, 1.0)[:, None]
        out.reshape(-1).copy_(torch.searchsorted(middles, share).reshape(-1)[:size].to(torch.uint8))

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", nearest)
    random = np.random.default_rng(3)
    shape = (67, 71)
    start = random.normal(0, 1, shape).astype(np.float32)
    scales = 10 ** random.uniform(-6, 0, shape)
    grads = [(random.normal(0, 1, shape) * scales).astype(np.float32) for _ in range(6)]
    held = torch.nn.Parameter(torch.tensor(start))
    theirs = bnb.optim.AdamW8bit([held], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    ours = make_optimizer(0.01, optim="adamw_8bit", weight_decay=0.1, max_grad_norm=0)
    params = {"w": jnp.asarray(start)}
    state = ours.init(params)
    update = jax.jit(ours.update)
    for grad in grads:
        held.grad = torch.tensor(grad)
        theirs.step()
        updates, state = update({"w": jnp.asarray(grad)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        np.testing.assert_allclose(params["w"], held.detach(), rtol=0, atol=2e-5)
    kept = theirs.state[held]
    moments = [
        leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Moment8)) if isinstance(leaf, Moment8)
    ]
    for moment, name, number in zip(moments, ("state1", "state2"), (1, 2), strict=True):
        codes = np.asarray(moment.codes).reshape(-1)[: start.size].reshape(shape)
        differing = np.abs(codes.astype(int) - kept[name].numpy())
        assert differing.max() <= 1 and (differing > 0).mean() < 2e-3
        np.testing.assert_allclose(np.asarray(moment.largest)[0], kept[f"absmax{number}"], rtol=1e-5)


def test_twenty_steps_stay_near_adam_with_float32_moments():
    random = np.random.default_rng(2)
    target = jnp.asarray(random.normal(0, 1, (64, 80)), jnp.float32)

    def run(optim):
        optimizer = make_optimizer(0.05, optim=optim, weight_decay=0.01, max_grad_norm=0)
        params = {"w": jnp.zeros((64, 80))}
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            grads = {"w": params["w"] - target}
            updates, state = optimizer.update(grads, state, params)
            return {"w": params["w"] + updates["w"]}, state

        for _ in range(20):
            params, state = step(params, state)
        return np.asarray(params["w"])

    exact = run("adamw")
    # neighbouring levels are up to 14 % apart; 3 % is what rounding m at each step comes to here
    assert np.linalg.norm(run("adamw_8bit") - exact) < 0.05 * np.linalg.norm(exact)


def test_small_tensors_and_each_layer_of_a_stack_count_by_themselves():
    transform = scale_by_adam_8bit(0.9, 0.999, 1e-8)
    params = {
        "layers": {"0": {"a": jnp.zeros((3, 16, 300)), "norm": jnp.zeros((3, 4095))}},
        "head": jnp.zeros((64, 64)),
    }
    state = transform.init(params)
    mu = state.mu
    assert mu["layers"]["0"]["norm"].dtype == jnp.float32  # 3 tensors of 4095 numbers, not one of 12285
    assert (mu["layers"]["0"]["a"].codes.shape, mu["layers"]["0"]["a"].largest.shape) == ((3, 19, 256), (3, 19))
    assert mu["head"].codes.shape == (1, 16, 256) and mu["head"].codes.dtype == jnp.uint8
    random = np.random.default_rng(3)
    grads = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 1, leaf.shape), jnp.float32), params)
    together, after = transform.update(grads, state)
    for layer in range(3):
        alone = {"w": grads["layers"]["0"]["a"][layer]}
        update, new = transform.update(alone, transform.init(alone))
        np.testing.assert_array_equal(together["layers"]["0"]["a"][layer], update["w"])
        np.testing.assert_array_equal(after.mu["layers"]["0"]["a"].codes[layer], new.mu["w"].codes[0])


def test_a_large_tensor_in_parts_gets_the_same_update(monkeypatch):
    transform = scale_by_adam_8bit(0.9, 0.999, 1e-8)
    grads = {"w": jnp.asarray(np.random.default_rng(4).normal(0, 1, (64, 160)), jnp.bfloat16)}  # 40 blocks
    whole = transform.update(grads, transform.init(grads))
    monkeypatch.setattr("jaxft.optim_8bit.CHUNK", 2048)
    parts = transform.update(grads, transform.init(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), parts, whole)
    assert whole[0]["w"].dtype == jnp.float32 and whole[0]["w"].shape == (64, 160)


def test_moments_are_found_by_optax_and_placed_by_blocks():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("fsdp", "tensor")))
    params = {"w": jax.device_put(jnp.zeros((64, 65)), sharding), "norm": jax.device_put(jnp.zeros((8, 8)), sharding)}
    optimizer = make_optimizer(1e-3, optim="adamw_8bit")
    seen = []

    def put(moment, parameter):
        seen.append((type(moment).__name__, parameter.shape))
        return jax.tree.map(
            lambda leaf, to: jax.device_put(leaf, to.sharding), moment, moment_shapes(moment, parameter.sharding)
        )

    state = optax.tree.map_params(
        optimizer, put, optimizer.init(params), params, is_leaf=lambda node: isinstance(node, Moment8)
    )
    assert sorted(seen) == [("ArrayImpl", (8, 8))] * 2 + [("Moment8", (64, 65))] * 2
    mu = state[1].mu["w"]
    assert mu.codes.sharding.spec == mu.largest.sharding.spec == jax.sharding.PartitionSpec(None, ("fsdp", "tensor"))
    assert mu.codes.shape == (1, 17, 256)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match="'sgd'"):
        make_optimizer(1e-3, optim="sgd")
