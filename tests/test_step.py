"""The train step by itself: packing, factorisations, checkpointing, dropout, low precision, and what is not finite."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft import LoraConfig, add_lora, make_eval_step, make_optimizer, make_train_step
from jaxft.models import decoder, layers
from jaxft.models.layers import REMAT, round_factors
from jaxft.models.offload import unrolled_scan
from jaxft.models.quantized import all_linears, with_quantized
from jaxft.optim import with_loss_scale
from jaxft.trees import flatten
from tests.tiny_models import LENGTHS, T, V, documents, nonzero_adapter, pack, packed_batch, tiny_model

KEY = jax.random.key(0)


def last_gradients():
    """An optimizer that changes nothing; its state is the gradients that it saw last."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params: (jax.tree.map(jnp.zeros_like, updates), updates),
    )


@cache
def gradient_step(
    name, *, lora=False, dropout=0.0, weights="float32", compute=None, checkpointing="none", kept_layers=0
):
    """(run, trainable, frozen) of a tiny model, where run(trainable, frozen, batch, key) -> (metrics, gradients).

    Compiled once for all tests that ask for the same."""
    model, trainable, frozen = with_adapter(name, weights, dropout) if lora else (*tiny_model(name, dtype=weights), {})
    step = make_train_step(
        model, optimizer=last_gradients(), gradient_checkpointing=checkpointing,
        kept_layers=kept_layers, dtype=None if compute is None else jnp.dtype(compute),
    )  # fmt: skip

    @jax.jit
    def run(trainable, frozen, batch, key=KEY):
        _, gradients, metrics = step(trainable, jax.tree.map(jnp.zeros_like, trainable), frozen, batch, key)
        return metrics, gradients

    return run, trainable, frozen


def with_adapter(name, weights="float32", dropout=0.0):
    """A tiny model with LoRA whose B is not zero: (model, trainable, frozen)."""
    model, params = tiny_model(name, dtype=weights)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    model, trainable, frozen = add_lora(model, params, config, KEY)
    return model, nonzero_adapter(trainable), frozen


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    theirs = dict(flatten(theirs))
    for path, gradient in flatten(ours):
        assert np.linalg.norm(gradient - theirs[path]) <= tolerance * np.linalg.norm(theirs[path]), path


def assert_equal_trees(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", ["llama3", "qwen2_window", "qwen3_window_bias", "gemma3"])
def test_packed_rows_equal_separate_rows(name):
    run, params, _ = gradient_step(name)
    rows = [documents(lengths, row) for row, lengths in enumerate(LENGTHS)]
    alone = [[document] for row in rows for document in row]
    packed, packed_gradients = run(params, {}, pack(rows + [[]] * (len(alone) - len(rows)), T))
    separate, separate_gradients = run(params, {}, pack(alone, T))
    assert int(packed["target_tokens"]) == int(separate["target_tokens"]) == 48
    np.testing.assert_allclose(packed["loss"], separate["loss"], rtol=1e-5)
    assert_same_gradients(packed_gradients, separate_gradients)


def test_every_factorisation_into_micro_batches_gives_the_same_gradients():
    run, params, _ = gradient_step("llama2")
    whole, gradients = run(params, {}, packed_batch())
    for accumulation in (2, 4):  # the rows have different numbers of targets: a mean of means would differ
        metrics, parts = run(params, {}, packed_batch(accumulation=accumulation))
        np.testing.assert_allclose(metrics["loss"], whole["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], whole["grad_norm"], rtol=1e-5)
        assert_same_gradients(parts, gradients)


def test_gradient_checkpointing_changes_nothing():
    run, trainable, frozen = gradient_step("llama2", lora=True, dropout=0.4)
    kept, gradients = run(trainable, frozen, packed_batch())
    for policy in sorted(REMAT.keys() - {"none"}):
        run, _, _ = gradient_step("llama2", lora=True, dropout=0.4, checkpointing=policy)
        again, recomputed = run(trainable, frozen, packed_batch())
        np.testing.assert_allclose(kept["loss"], again["loss"], rtol=1e-6, err_msg=policy)
        assert_same_gradients(recomputed, gradients)
    run, trainable, frozen = gradient_step("llama2", checkpointing="some")
    with pytest.raises(ValueError, match="gradient_checkpointing 'some': must be one of none, full"):
        run(trainable, frozen, packed_batch())


@pytest.mark.parametrize(
    "name, policy, kept_layers",
    [("gemma3", "offload_middle", 2), ("llama2", "offload_middle", 100), ("llama2", "full", 1)],
)
def test_kept_layers_change_nothing(name, policy, kept_layers):
    run, trainable, frozen = gradient_step(name, lora=True, dropout=0.4)
    wanted, gradients = run(trainable, frozen, packed_batch())
    run, _, _ = gradient_step(name, lora=True, dropout=0.4, checkpointing=policy, kept_layers=kept_layers)
    got, again = run(trainable, frozen, packed_batch())
    np.testing.assert_allclose(wanted["loss"], got["loss"], rtol=1e-6)
    assert_same_gradients(again, gradients)


@pytest.mark.parametrize("kept_layers", [1, 100])
def test_on_a_mesh_layers_are_kept_beside_an_offload_alone(kept_layers, monkeypatch):
    monkeypatch.setattr(layers, "one_device", lambda: False)
    run, trainable, frozen = gradient_step("gemma3", checkpointing="full", kept_layers=kept_layers)
    with pytest.raises(NotImplementedError, match="kept_layers with gradient_checkpointing 'full': needs one device"):
        run(trainable, frozen, packed_batch())


def test_kept_layers_are_the_last_ones_of_all_runs(monkeypatch):
    model, _ = tiny_model("llama2", num_hidden_layers=5)
    leaves = all_linears(model, "nf4", jnp.float32)
    model = with_quantized(model, {name: leaf for name, leaf in leaves.items() if "layers.2" not in name})
    asked = []
    monkeypatch.setattr(decoder, "scan_layers", lambda block, x, *rest: (asked.append(rest[-1]), (x, None))[1])
    batch = {name: array[0] for name, array in packed_batch().items()}

    def run(params, kept_layers):
        options = {"gradient_checkpointing": "offload", "kept_layers": kept_layers}
        return model.bind(params)(batch["tokens"], batch["segment_ids"], batch["positions"], **options)

    for kept_layers in (0, 1, 3, 4, 9):
        jax.eval_shape(partial(run, kept_layers=kept_layers), model.shapes)
    # runs of two layers, one and two
    assert asked == [*(0, 0, 0), *(0, 0, 1), *(0, 1, 2), *(1, 1, 2), *(2, 1, 2)]


def test_keeping_everything_on_a_gpu_unrolls_the_layers_and_gives_the_gradients_of_the_loop(monkeypatch):
    run, trainable, frozen = gradient_step("llama2", lora=True)
    kept, gradients = run(trainable, frozen, packed_batch())
    unrolled = []
    monkeypatch.setattr(layers, "one_gpu", lambda: True)
    monkeypatch.setattr(
        layers, "unrolled_scan", lambda *arguments: (unrolled.append(1), unrolled_scan(*arguments))[1]
    )  # fmt: skip
    run, _, _ = gradient_step.__wrapped__("llama2", lora=True)
    again, same = run(trainable, frozen, packed_batch())
    assert unrolled
    np.testing.assert_allclose(kept["loss"], again["loss"], rtol=1e-6)
    assert_same_gradients(same, gradients)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_factors_that_are_rounded_and_put_side_by_side_before_the_loop_give_the_bits_of_those_in_it(name, monkeypatch):
    run, trainable, frozen = gradient_step(name, lora=True, weights="bfloat16", checkpointing="full")
    metrics, gradients = run(trainable, frozen, packed_batch())
    joined = []

    def apart(block, dtype):
        round_factors(block, dtype)
        for _, module in nnx.iter_graph(block):
            if isinstance(module, layers.Lora) and module.joint is not None:
                joined.append(module.joint.get_value().shape)
                module.joint = None

    monkeypatch.setattr(layers, "round_factors", apart)
    run, _, _ = gradient_step.__wrapped__(name, lora=True, weights="bfloat16", checkpointing="full")
    again, same = run(trainable, frozen, packed_batch())
    assert {shape[-2:] for shape in joined} == {(12, 32), (8, 32)}  # q, k and v; gate and up
    assert metrics["loss"] == again["loss"]
    jax.tree.map(np.testing.assert_array_equal, gradients, same)


def test_weight_of_a_documents_first_token_counts_nothing():
    run, params, _ = gradient_step("llama2")
    batch = packed_batch()
    spoiled = batch | {"loss_weights": np.where(batch["positions"] == 0, np.float32(9), batch["loss_weights"])}
    (plain, gradients), (same, same_gradients) = run(params, {}, batch), run(params, {}, spoiled)
    assert plain["loss"] == same["loss"]
    assert plain["weight"] == same["weight"] == 48
    assert_equal_trees(gradients, same_gradients)


def test_tokens_of_padding_change_nothing():
    run, params, _ = gradient_step("llama2")
    batch = packed_batch()
    noise = np.random.default_rng(0).integers(0, V, batch["tokens"].shape).astype(np.int32)
    (plain, gradients), (same, same_gradients) = (
        run(params, {}, batch),
        run(params, {}, batch | {"tokens": np.where(batch["segment_ids"] == 0, noise, batch["tokens"])}),
    )
    assert plain["loss"] == same["loss"]
    assert_same_gradients(gradients, same_gradients, 1e-6)


def test_weights_of_tokens_weigh_their_losses():
    run, params, _ = gradient_step("llama2")
    batch = packed_batch()
    first, second = batch["loss_weights"].copy(), batch["loss_weights"].copy()
    first[:, 2:], second[:, :2] = 0, 0
    parts = [run(params, {}, batch | {"loss_weights": weights})[0] for weights in (first, second)]
    mixed, _ = run(params, {}, batch | {"loss_weights": first + 3 * second})
    total = parts[0]["loss"] * parts[0]["weight"] + 3 * parts[1]["loss"] * parts[1]["weight"]
    np.testing.assert_allclose(mixed["weight"], parts[0]["weight"] + 3 * parts[1]["weight"], rtol=1e-6)
    np.testing.assert_allclose(mixed["loss"], total / mixed["weight"], rtol=1e-5)


# steps that must do nothing


def test_batch_that_is_not_finite_leaves_the_state_as_it_was():
    model, trainable, frozen = with_adapter("llama2")
    tx = make_optimizer(1e-3, weight_decay=0.1)
    step = jax.jit(make_train_step(model, optimizer=tx, gradient_checkpointing="none"))
    trained, state, metrics = step(trainable, tx.init(trainable), frozen, packed_batch(), KEY)
    assert bool(metrics["finite"])
    for bad in (np.inf, np.nan):
        batch = packed_batch(1)
        batch["loss_weights"][0, 1, 6] = bad
        after, same_state, metrics = step(trained, state, frozen, batch, KEY)
        assert not bool(metrics["finite"])
        assert not np.isfinite(metrics["loss"])
        assert_equal_trees(after, trained)
        assert_equal_trees(same_state, state)
    after, _, metrics = step(trained, state, frozen, packed_batch(1), KEY)
    assert bool(metrics["finite"])
    assert any(np.any(leaf != dict(flatten(trained))[path]) for path, leaf in flatten(after))


def test_batch_of_padding_alone_is_a_step_of_zero():
    run, params, _ = gradient_step("llama2")
    metrics, gradients = run(params, {}, pack([[]] * 4, T))
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), int(metrics["target_tokens"])) == (0, 0, 0)
    assert bool(metrics["finite"])
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradients))


# low precision


def test_float16_halves_its_scale_on_overflow_and_goes_on():
    model, trainable, frozen = with_adapter("llama2", "float16")
    tx = with_loss_scale(make_optimizer(3e-3), first=2.0**24)  # far too large: the first steps must overflow
    step = jax.jit(make_train_step(model, optimizer=tx, gradient_checkpointing="none"))
    state, losses, overflows = tx.init(trainable), [], 0
    for number in range(24):
        before, scale = trainable, float(state.scale)
        trainable, state, metrics = step(trainable, state, frozen, packed_batch(), jax.random.key(number))
        assert np.isfinite(metrics["loss"])  # only the gradients overflow
        if bool(metrics["finite"]):
            losses.append(float(metrics["loss"]))
            assert float(state.scale) == scale
        else:
            overflows += 1
            assert float(state.scale) == scale / 2
            assert_equal_trees(trainable, before)
    assert 1 <= overflows <= 16
    assert losses[-1] < losses[0] - 0.1


def test_float16_gradients_are_those_of_float32_whatever_the_scale():
    run, trainable, frozen = gradient_step("llama2", lora=True, dropout=0.0)
    _, expected = run(trainable, frozen, packed_batch())
    model, _, frozen = with_adapter("llama2", "float16")
    tx = with_loss_scale(last_gradients(), first=1.0)
    step = jax.jit(make_train_step(model, optimizer=tx, gradient_checkpointing="none"))
    for scale in (1.0, 256.0):
        state = tx.init(trainable)._replace(scale=jnp.float32(scale))
        _, state, metrics = step(trainable, state, frozen, packed_batch(), KEY)
        assert bool(metrics["finite"])
        assert_same_gradients(state.inner, expected, 0.05)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_full_finetuning_in_bfloat16_keeps_bfloat16_and_learns(accumulation):
    model, params = tiny_model("qwen3", dtype=jnp.bfloat16)
    tx = make_optimizer(1e-2)
    step = jax.jit(make_train_step(model, optimizer=tx, gradient_checkpointing="none"))
    state, losses = tx.init(params), []
    for number in range(8):
        params, state, metrics = step(params, state, {}, packed_batch(0, accumulation), jax.random.key(number))
        losses.append(float(metrics["loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert losses[-1] < losses[0] - 1


def test_float32_masters_compute_in_bfloat16():
    run, params, _ = gradient_step("llama2")
    exact, expected = run(params, {}, packed_batch())
    run, _, _ = gradient_step("llama2", compute="bfloat16")
    rough, gradients = run(params, {}, packed_batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    assert 1e-5 < abs(float(rough["loss"] / exact["loss"]) - 1) < 1e-2
    assert_same_gradients(gradients, expected, 0.1)


# dropout and evaluation


def test_eval_step_sums_the_losses_that_the_train_step_averages_and_drops_nothing():
    run, trainable, frozen = gradient_step("llama2", lora=True)
    metrics, _ = run(trainable, frozen, packed_batch())
    dropping, _, _ = with_adapter("llama2", dropout=0.4)
    for accumulation in (1, 4):
        sums = jax.jit(make_eval_step(dropping))(trainable, frozen, packed_batch(accumulation=accumulation))
        assert int(sums["target_tokens"]) == int(metrics["target_tokens"])
        np.testing.assert_allclose(sums["loss_sum"] / sums["weight"], metrics["loss"], rtol=1e-5)


def test_dropout_masks_differ_between_modules_layers_and_keys():
    """With one target behind one token, A's gradient has a zero column exactly where that token's input was dropped."""
    rate = 0.4
    run, trainable, frozen = gradient_step("llama2", lora=True, dropout=rate)
    batch = pack([documents([2]), [], [], []], T)
    masks = {}
    for number, key in enumerate(jax.random.split(KEY, 2)):
        _, gradients = run(trainable, frozen, batch, key)
        for path, gradient in flatten(gradients):
            # the scores of a single key do not matter, so q's and k's gradients are zero
            if path.endswith("/a") and "q_proj" not in path and "k_proj" not in path:
                for layer in range(3):
                    dropped = np.abs(np.asarray(gradient)[layer]).max(axis=0) == 0
                    masks[number, path.split("/")[3], layer] = dropped[:32]
    assert len(masks) == 2 * 5 * 3
    assert abs(np.mean(list(masks.values())) - rate) < 4 * (rate * (1 - rate) / (30 * 32)) ** 0.5  # standard errors
    for one, other in itertools.combinations(masks, 2):
        assert np.sum(masks[one] != masks[other]) >= 5, (one, other)  # 15.4 of 32 on average


def test_same_key_drops_the_same():
    run, trainable, frozen = gradient_step("llama2", lora=True, dropout=0.4)
    losses = [float(run(trainable, frozen, packed_batch(), jax.random.key(seed))[0]["loss"]) for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_rows_with_more_documents_than_promised_give_nan_and_not_another_answer():
    model, params = tiny_model("llama2")
    batch = jax.tree.map(lambda leaf: leaf[0], packed_batch())
    most = int(batch["segment_ids"].max()) + 1  # padding counts as one

    def hidden(bound):
        inputs = batch["tokens"], batch["segment_ids"], batch["positions"]
        return jax.jit(lambda params: model.bind(params)(*inputs, max_documents=bound))(params)

    np.testing.assert_array_equal(hidden(most), hidden(None))
    assert np.isnan(hidden(1)).all()
