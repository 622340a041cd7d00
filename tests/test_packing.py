"""Plans of rows and the batches of steps: nothing lost, nothing twice, and the same on every call."""

import time

import numpy as np
import pytest

from jaxft.errors import InputError
from jaxft.packing import Batches, Sample, eval_batches, make_plan, plan_in_order, plan_packing, plan_padding


def some_samples(lengths):
    """Samples whose tokens say where they come from: 100·(sample + 1) + place; every token but the first trained."""
    samples = []
    for number, length in enumerate(lengths):
        ids = 100 * (number + 1) + np.arange(length, dtype=np.int32)
        weights = np.ones(length, np.float32)
        weights[0] = 0
        samples.append(Sample(ids.astype(np.int32), weights))
    return samples


def ragged(n, high, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(np.log(high / 5), 0.7, n).astype(int), 1, high).tolist()


def slow_first_fit_decreasing(lengths, max_length):
    """The definition, without a tree; row sizes only, since ties may fall either way."""
    rows = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + length <= max_length), None)
        if row is None:
            rows.append([length])
        else:
            row.append(length)
    return rows


def test_first_fit_decreasing_equals_its_definition():
    for seed, (n, high) in enumerate([(1, 8), (2, 8), (3, 5), (200, 64), (777, 100), (64, 3)]):
        lengths = ragged(n, high, seed)
        plan = plan_packing(lengths, high, seed)
        assert [[lengths[number] for number in row] for row in plan] == slow_first_fit_decreasing(lengths, high)
        assert sorted(number for row in plan for number in row) == list(range(n))


def test_plan_depends_on_lengths_and_seed_only():
    lengths = ragged(500, 64)
    assert plan_packing(lengths, 64, 3) == plan_packing(np.array(lengths), 64, 3)
    assert plan_packing(lengths, 64, 3) != plan_packing(lengths, 64, 4)


def test_orders_are_those_that_earlier_runs_drew():
    """Written down: a resumed run meets another order where a new version of jaxft or numpy draws another one."""
    assert plan_packing([5, 3, 3, 2, 8, 1, 3], 8, 0) == [[4], [0, 1], [6, 2, 3], [5]]
    batches = Batches(some_samples([1] * 12), plan_padding([1] * 12, 1), max_length=1, batch_size=1)
    assert batches.row_order(0).tolist() == [0, 4, 6, 3, 9, 5, 7, 1, 8, 10, 2, 11]
    assert batches.row_order(1).tolist() == [9, 3, 4, 11, 0, 8, 10, 6, 1, 2, 7, 5]


def test_hundred_thousand_documents_are_planned_in_seconds():
    lengths = ragged(100_000, 1024)
    start = time.process_time()
    plan = plan_packing(lengths, 1024, 0)
    assert time.process_time() - start < 5
    assert sum(lengths) / (len(plan) * 1024) > 0.99


def test_in_order_plan_keeps_the_files_order_inside_and_across_rows():
    assert plan_in_order([3, 3, 3, 8, 1, 1, 6, 1], 8) == [[0, 1], [2], [3], [4, 5, 6], [7]]
    lengths = ragged(300, 64)
    plan = make_plan(lengths, 64, packing=True, shuffle=False, seed=0)
    assert [number for row in plan for number in row] == list(range(300))
    assert all(sum(lengths[number] for number in row) <= 64 for row in plan)


def test_padding_plan_has_one_sample_a_row():
    assert plan_padding([3, 8, 1], 8) == [[0], [1], [2]]
    assert make_plan([3, 8, 1], 8, packing=False, shuffle=True, seed=0) == [[0], [1], [2]]


@pytest.mark.parametrize("plan", [lambda sizes, room: plan_packing(sizes, room, 0), plan_in_order, plan_padding])
def test_sample_that_cannot_lie_in_a_row_is_refused(plan):
    with pytest.raises(InputError, match="sample 1 has 9 tokens; a row takes 1 to 8"):
        plan([3, 9], 8)
    with pytest.raises(InputError, match="sample 0 has 0 tokens"):
        plan([0, 3], 8)


def test_batch_lays_documents_out_as_the_contract_says():
    batches = Batches(
        some_samples([3, 2, 4]), [[0, 1], [2]], max_length=6, batch_size=1, accumulation=2, seed=0, shuffle=False
    )
    batch = batches.batch(0)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((2, 1, 6), "int32"),
        "segment_ids": ((2, 1, 6), "int32"),
        "positions": ((2, 1, 6), "int32"),
        "loss_weights": ((2, 1, 6), "float32"),
    }
    assert batch["tokens"][:, 0].tolist() == [[100, 101, 102, 200, 201, 0], [300, 301, 302, 303, 0, 0]]
    assert batch["segment_ids"][:, 0].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert batch["positions"][:, 0].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch["loss_weights"][:, 0].tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]]
    assert batches.efficiency == 9 / 12


@pytest.mark.parametrize(("lengths", "most"), [([6, 6], 1), ([6, 4, 2], 2), ([3, 2], 3)])
def test_padding_counts_as_a_document_where_a_row_has_room_for_it(lengths, most):
    batches = Batches(
        some_samples(lengths), plan_packing(lengths, 6, 0), max_length=6, batch_size=2, seed=0, shuffle=False
    )
    assert batches.max_documents == most
    for step in range(batches.steps_per_epoch):  # rows that the last batch lacks are one document of padding
        segments = batches.batch(step)["segment_ids"].reshape(-1, 6)
        assert max(1 + np.count_nonzero(np.diff(row)) for row in segments) <= most


def test_rows_of_a_step_are_cut_into_micro_batches_in_order():
    samples = some_samples([2] * 8)
    plan = plan_padding([2] * 8, 2)
    flat = Batches(samples, plan, max_length=2, batch_size=8, accumulation=1, seed=5, shuffle=True).batch(3)
    for batch_size, accumulation in [(1, 8), (2, 4), (4, 2)]:
        cut = Batches(
            samples, plan, max_length=2, batch_size=batch_size, accumulation=accumulation, seed=5, shuffle=True
        ).batch(3)
        for name, array in cut.items():
            assert array.shape == (accumulation, batch_size, 2)
            assert np.array_equal(array.reshape(8, 2), flat[name][0])


def test_every_epoch_has_every_sample_once_in_a_new_order():
    lengths = ragged(100, 32)
    batches = Batches(
        some_samples(lengths), plan_packing(lengths, 32, 1), max_length=32, batch_size=3, accumulation=2, seed=1
    )
    orders = []
    for epoch in range(3):
        seen = []
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(epoch * batches.steps_per_epoch + step)
            seen += batch["tokens"][(batch["positions"] == 0) & (batch["segment_ids"] > 0)].tolist()
        assert sorted(seen) == [100 * (number + 1) for number in range(100)]
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_last_batch_of_an_epoch_is_filled_with_padding_and_the_next_epoch_begins_after_it():
    samples = some_samples([4] * 5)
    batches = Batches(samples, plan_padding([4] * 5, 4), max_length=4, batch_size=2, accumulation=1, shuffle=False)
    assert batches.steps_per_epoch == 3
    last = batches.batch(2)
    assert last["segment_ids"][0].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert last["loss_weights"][0, 1].sum() == 0
    assert batches.batch(3)["tokens"][0, :, 0].tolist() == [100, 200]
    assert [batches.position(step) for step in (0, 2, 3, 7)] == [(0, 0), (0, 4), (1, 0), (2, 2)]


def test_batch_is_a_pure_function_of_its_step():
    lengths = ragged(60, 32)
    plan = plan_packing(lengths, 32, 7)

    def make():
        return Batches(some_samples(lengths), plan, max_length=32, batch_size=2, accumulation=2, seed=7)

    first = make()
    forward = [first.batch(step) for step in range(3 * first.steps_per_epoch)]
    second = make()
    for step in reversed(range(3 * first.steps_per_epoch)):
        again = second.batch(step)
        assert all(np.array_equal(again[name], array) for name, array in forward[step].items())


def test_one_short_batch_is_enough_for_a_run():
    batches = Batches(some_samples([3]), [[0]], max_length=8, batch_size=4, accumulation=2)
    assert batches.steps_per_epoch == 1
    assert batches.batch(0)["loss_weights"].sum() == batches.batch(41)["loss_weights"].sum() == 2


def test_eval_batches_pass_over_every_sample_once_each_time():
    samples = some_samples(ragged(30, 16))
    batches = eval_batches(samples, max_length=16, batch_size=4)
    for _ in range(2):
        total = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
        assert total == sum(len(sample) for sample in samples)
    assert next(iter(batches))["tokens"].shape == (1, 4, 16)
    assert len(list(eval_batches(samples, max_length=16, batch_size=4, packing=False))) == 8


def test_no_samples_and_bad_sizes_are_refused():
    with pytest.raises(InputError, match="no sample"):
        Batches([], [], max_length=8, batch_size=1)
    with pytest.raises(InputError, match="batch_size is 0"):
        Batches(some_samples([3]), [[0]], max_length=8, batch_size=0)
    with pytest.raises(InputError, match="seed is -1"):
        Batches(some_samples([3]), [[0]], max_length=8, batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="a row of the plan holds over 2 tokens"):
        Batches(some_samples([3]), [[0]], max_length=2, batch_size=1).batch(0)


def test_sample_refuses_what_is_not_a_document():
    ids, weights = np.array([1, 2], np.int32), np.array([0, 1], np.float32)
    with pytest.raises(ValueError, match="shape"):
        Sample(ids, weights[:1])
    with pytest.raises(ValueError, match="int64"):
        Sample(ids.astype(np.int64), weights)
    with pytest.raises(ValueError, match=r"loss_weights\[0\] is 1"):
        Sample(ids, np.ones(2, np.float32))
