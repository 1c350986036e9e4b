"""Balanced steps, in which no device waits for another, whatever their number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.data.packing.balance import Balance, Cost, measure_imbalance, order_rows

some_costs = st.lists(st.floats(1.0, 50.0), min_size=1, max_size=120).map(np.array)


@settings(max_examples=100, deadline=None)
@given(
    costs=some_costs,
    block=st.integers(1, 6),
    blocks=st.integers(1, 5),
    first=st.integers(0, 50),
    seed=st.integers(0, 3),
)
def test_the_order_has_every_row_once_and_is_reproducible(costs, block, blocks, first, seed):
    balance = Balance(cost=Cost(), batch=block * blocks, block=block)
    order = order_rows(costs, balance, np.random.default_rng(seed), first=first)
    assert sorted(order.tolist()) == list(range(len(costs)))
    np.testing.assert_array_equal(order_rows(costs, balance, np.random.default_rng(seed), first=first), order)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_one_order_balances_all_numbers_of_devices(devices, rows):
    # One row in ten costs three times as much: at random, most steps have devices with one more of them.
    costs = np.where(np.arange(4001) % 10 == 0, 3.0, 1.0) * np.random.default_rng(0).uniform(0.95, 1.05, 4001)
    order = order_rows(costs, Balance(cost=Cost(), batch=8 * rows, block=rows), np.random.default_rng(1), first=5)
    measured = measure_imbalance(costs[order], batch=8 * rows, devices=devices, first=5)
    assert measured.share_above_5_percent < 0.01
    assert measured.mean < 0.03
    if devices > 1:
        at_random = measure_imbalance(
            costs[np.random.default_rng(2).permutation(4001)], batch=8 * rows, devices=devices
        )
        assert at_random.mean > 5 * measured.mean


def test_a_step_that_cannot_be_balanced_row_by_row_is_so_for_fewer_devices():
    costs = np.array([5.0, 1, 1, 1, 5, 1, 1, 1])
    order = order_rows(costs, Balance(cost=Cost(), batch=8), np.random.default_rng(0))
    assert measure_imbalance(costs[order], batch=8, devices=8).worst == 1.5
    assert measure_imbalance(costs[order], batch=8, devices=2).worst == 0


@pytest.mark.parametrize("devices", [8, 16, 32])
@pytest.mark.parametrize("costly", [201, 205, 215])
def test_no_step_exceeds_the_tolerance_where_costs_jump(costly, devices):
    """The costly rows do not fill a whole number of steps, however many devices there are."""
    draw = np.random.default_rng(costly)
    costs = np.concatenate([draw.uniform(9.0, 9.8, 1500), draw.uniform(12.4, 12.6, costly), np.full(costly, 16.0)])
    order = order_rows(costs, Balance(cost=Cost(), batch=devices), np.random.default_rng(0), first=3)
    assert sorted(order.tolist()) == list(range(len(costs)))
    measured = measure_imbalance(costs[order], batch=devices, devices=devices, first=3)
    assert measured.share_above_5_percent == 0
    assert measured.worst <= 0.05


def test_an_exchange_may_need_rows_of_two_other_steps():
    """The third step needs two rows of 12.5: one directly from the second step, one by way of the first.

    Steps of 8 have only 14s; 14s and two 12.5s; 12.5s and 10.8s. The second step exchanges one 12.5 for a 10.8. The
    first takes another 10.8, and its 14 replaces the other 12.5.
    """
    costs = np.array([14.0] * 14 + [12.5] * 6 + [10.8] * 12)
    by_cost = measure_imbalance(costs, batch=8, devices=8)
    assert by_cost.worst > 0.07
    order = order_rows(costs, Balance(cost=Cost(), batch=8), np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(32))
    assert measure_imbalance(costs[order], batch=8, devices=8).worst < 0.05


def test_larger_blocks_make_steps_more_alike():
    costs = np.exp(np.random.default_rng(0).normal(0, 0.3, 8000))
    steps = []
    for block in (1, 2, 4):
        balance = Balance(cost=Cost(), batch=16, block=block)
        order = order_rows(costs, balance, np.random.default_rng(1))
        measured = measure_imbalance(costs[order], batch=16, devices=16 // block)
        assert measured.mean < 0.02
        steps.append(measured.step_std)
    assert steps[0] > 3 * steps[1] > 3 * steps[2]


def test_equal_costs_leave_the_order_to_chance():
    balance = Balance(cost=Cost(), batch=4)
    costs = np.random.default_rng(0).uniform(0.995, 1.005, 400)
    orders = [order_rows(costs, balance, np.random.default_rng(seed)) for seed in range(2)]
    steps = [{tuple(sorted(step)) for step in order.reshape(-1, 4).tolist()} for order in orders]
    assert len(steps[0] & steps[1]) < 3
    # Neither are rows of like costs together: costs within a step vary as much as overall.
    inside = costs[orders[0]].reshape(-1, 4).std(axis=1).mean()
    assert inside > 0.6 * costs.std()


def test_steps_that_two_epochs_share_get_the_commonest_rows():
    costs = np.where(np.arange(403) % 5 == 0, 4.0, 1.0)
    order = order_rows(costs, Balance(cost=Cost(), batch=16), np.random.default_rng(0), first=7)
    head, tail = 16 - 7, (403 - 9) % 16
    np.testing.assert_array_equal(costs[order][:head], 1)
    np.testing.assert_array_equal(costs[order][-tail:], 1)


def test_imbalance_is_the_costliest_device_by_the_mean():
    costs = np.array([9.0, 1, 1, 2, 2, 3, 3, 1, 1])
    measured = measure_imbalance(costs, batch=4, devices=2, first=3)  # the first row belongs to the epoch before
    assert measured.mean == pytest.approx((4 + 6) / (3 + 4) - 1)
    assert measured.worst == pytest.approx(0.5)
    assert measured.share_above_5_percent == 1
    assert measured.step_std == pytest.approx(1 / 7)
    assert measure_imbalance(costs, batch=4, devices=1).worst == 0


def test_cost_counts_padding_and_pairs():
    assert Cost(linear=2, attention=3).compute(np.array([10.0, 20.0]), 100).tolist() == [230, 260]
    wide = Cost.from_width(1152)
    assert wide.linear / wide.attention == 8064  # clips of this length take as much attention as matrices
    assert str(Cost(linear=2, attention=3)) == "2 * tokens of the row + 3 * pairs in attention"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cost(linear=0, attention=0), "nor both zero"),
        (lambda: Cost(linear=-1), "linear=-1"),
        (lambda: Balance(cost=Cost(), batch=6, block=4), "batch=6 must be a positive multiple of block=4"),
        (lambda: Balance(cost=Cost(), batch=6, tolerance=0.0), "tolerance=0.0"),
        (lambda: measure_imbalance(np.ones(9), batch=4, devices=3), "devices=3"),
        (lambda: measure_imbalance(np.ones(3), batch=4, devices=2), "no whole step"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
