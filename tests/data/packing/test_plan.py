"""Row plans: every example once, budgets kept, little padding, one plan for all hosts."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.data.packing import bin_packing
from dit_video.data.packing import plan as plan_module
from dit_video.data.packing.balance import Balance, Cost, measure_imbalance
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.plan import RowPlanner
from dit_video.tokens import PackedShape
from support.example_tables import make_table

SHAPE = PackedShape(tokens=1024, text=1024, segments=64)


def plan_rows(tokens, text, shape, *, seed, balance=None, **columns) -> RowPlanner:
    """Return the plan of examples of so many tokens, with captions of so many."""
    return RowPlanner(make_table(tokens, text, **columns), shape, seed=seed, balance=balance)


def mix(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens of images and clips of five sizes, and of captions of 5 to 60 tokens."""
    generator = np.random.default_rng(seed)
    sizes = np.array([t * h * w for t in (1, 3, 5) for h, w in ((4, 4), (4, 6), (6, 4), (5, 7), (8, 8))])
    return sizes[generator.integers(len(sizes), size=count)], generator.integers(5, 60, size=count)


def check(rows: list[list[int]], tokens: np.ndarray, text: np.ndarray, shape: PackedShape) -> None:
    assert sorted(example for row in rows for example in row) == list(range(len(tokens)))
    for row in rows:
        assert 1 <= len(row) <= shape.segments
        assert tokens[row].sum() <= shape.tokens
        assert text[row].sum() <= shape.text


sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=80)
shapes = st.builds(PackedShape, tokens=st.integers(50, 120), text=st.integers(20, 60), segments=st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(sizes=sizes, shape=shapes, seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_example_is_packed_once_within_three_budgets(sizes, shape, seed, epoch):
    tokens, text = np.array(sizes).T
    plan = plan_rows(tokens, text, shape, seed=seed).get_epoch(epoch)
    check(plan.rows, tokens, text, shape)
    assert plan.padding == pytest.approx(1 - tokens.sum() / (len(plan) * shape.tokens))
    again = plan_rows(tokens.copy(), text.copy(), shape, seed=seed).get_epoch(epoch)
    assert again.rows == plan.rows
    assert again.hash == plan.hash


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, shape=shapes, seed=st.integers(0, 5))
def test_every_epoch_has_the_same_number_of_rows(sizes, shape, seed):
    tokens, text = np.array(sizes).T
    balance = Balance(cost=Cost(linear=seed), batch=2 + seed) if seed else None
    stream = plan_rows(tokens, text, shape, seed=seed, balance=balance)
    for epoch in range(4):
        plan = stream.get_epoch(epoch)
        assert len(plan) == stream.rows_per_epoch
        check(plan.rows, tokens, text, shape)


def test_shuffles_that_do_not_fit_use_the_rows_of_epoch_0(monkeypatch):
    tokens, text = mix(400)
    monkeypatch.setattr(plan_module, "ATTEMPTS", 1)
    monkeypatch.setattr(plan_module, "SLACK", 1 << 20)  # no spare rows: those of epoch 0 are not divided
    stream = plan_rows(tokens, text, SHAPE, seed=0)
    one_each = lambda examples, *_: bin_packing.RowArrays.from_lists([[int(i)] for i in examples])  # noqa: E731
    monkeypatch.setattr(bin_packing, "fill_rows", one_each)
    first, plan = stream.get_epoch(0), stream.get_epoch(7)
    check(plan.rows, tokens, text, SHAPE)

    def pattern(rows):
        return sorted(sorted(zip(tokens[row].tolist(), text[row].tolist(), strict=True)) for row in rows)

    assert pattern(plan.rows) == pattern(first.rows)
    assert sorted(map(sorted, plan.rows)) != sorted(map(sorted, first.rows))


@pytest.mark.parametrize("count", [3000, 20_000])
def test_padding_is_below_one_percent(count):
    tokens, text = mix(count)
    stream = plan_rows(tokens, text, SHAPE, seed=0)
    assert plan_rows(tokens, text, SHAPE, seed=0).get_epoch(0).padding < 0.01
    assert max(stream.get_epoch(epoch).padding for epoch in range(3)) < 0.01


def test_epochs_and_seeds_differ():
    tokens, text = mix(500)
    hashes = {plan_rows(tokens, text, SHAPE, seed=s).get_epoch(e).hash for s in range(3) for e in range(3)}
    assert len(hashes) == 9


def test_cost_is_the_sum_of_squares():
    tokens, text = mix(300)
    plan = plan_rows(tokens, text, SHAPE, seed=0).get_epoch(0)
    expected = [sum(int(tokens[example]) ** 2 for example in row) / 1e6 for row in plan.rows]
    np.testing.assert_allclose(plan.attention_cost, expected)


def test_the_stream_has_random_access_and_continues_over_epochs():
    tokens, text = mix(300)
    stream = plan_rows(tokens, text, SHAPE, seed=3)
    forward = [stream.get_row(number) for number in range(3 * stream.rows_per_epoch)]
    assert np.concatenate([ranks for _, ranks in forward]).tolist() == list(range(900))
    fresh = pickle.loads(pickle.dumps(stream))
    for number in (2 * stream.rows_per_epoch + 1, 0, stream.rows_per_epoch):
        examples, ranks = fresh.get_row(number)
        np.testing.assert_array_equal(examples, forward[number][0])
        np.testing.assert_array_equal(ranks, forward[number][1])
    assert fresh.hash == stream.hash
    assert plan_rows(tokens, text, SHAPE, seed=4).hash != stream.hash


@pytest.mark.parametrize(
    ("options", "hashes"),
    [
        ({}, ["73581150cec8a5a8", "d18d6ad6def2ffc5", "58b9112c181fb070", "95e3aad3f94883f7"]),
        (
            {"balance": Balance(cost=Cost.from_width(64), batch=8, block=2)},
            ["f48b9a5b3ce5a0ad", "4ebec01a5e3e818c", "09ae42d14c39d4b3", "09fe46163caf4bf6"],
        ),
        (
            {"mixture": Mixture(sizes=(300, 400), weights=(1, 2), length=500)},
            ["8f8f627af4505898", "82ef238ec751981f", "4855ada209d55e5a", "9cd87c0cb132bd4e"],
        ),
        (
            {"shape": PackedShape(tokens=1024, text=220, segments=8)},
            ["e5f6752fbd1af1aa", "9fdaa9a065ca20f2", "7a63026712165486", "a439560df08fd3de"],
        ),
    ],
)
def test_plans_are_those_of_version_1(options, hashes):
    """Runs that were begun with another version continue with the same rows."""
    stream = plan_rows(*mix(700), **{"shape": SHAPE, "seed": 1, **options})
    assert [stream.hash, *(stream.get_epoch(epoch).hash for epoch in range(3))] == hashes


def test_ranks_wrap_at_32_bits():
    stream = plan_rows(np.array([4, 4, 4]), np.array([1, 1, 1]), SHAPE, seed=0)
    epoch = 2**32 // 3
    ranks = stream.get_row(epoch * stream.rows_per_epoch)[1]
    assert ranks.dtype == np.uint32
    assert ranks.tolist() == [2**32 - 1, 0, 1]


def histogram(kind: str, count: int, row: int = 8192) -> np.ndarray:
    """Return numbers of tokens of clips.

    Those of `mixed` are from 64 to half a row, an eighth on average; of `heavy`, one in 33 fills most of a row; those
    of `long` are from a tenth of a row to nine tenths, without short ones to fill gaps.
    """
    generator = np.random.default_rng(0)

    def clips(number: int, mean: float, least: float, most: float) -> np.ndarray:
        sizes = np.clip(np.exp(generator.normal(np.log(mean) - 0.25, 0.7, number)), least, most) * row
        area = generator.choice([64, 96, 128, 192, 256], number)
        return np.maximum(1, sizes.astype(np.int64) // area) * area

    if kind == "long":
        return clips(count, 0.32, 0.1, 0.9)
    images = generator.choice([64, 64, 64, 100, 144, 256], count * 15 // 100)
    tokens = np.concatenate([images, clips(count - len(images), 0.16, 0.02, 0.5)])
    if kind == "heavy":
        tokens[generator.choice(count, count * 3 // 100, replace=False)] = np.resize(
            [row, 7000, 6000], count * 3 // 100
        )
    assert tokens.mean() >= row / 8
    return tokens


@pytest.mark.parametrize("kind", ["mixed", "heavy", "long"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_are_99_percent_full_and_devices_within_5_percent(kind, rows):
    tokens = histogram(kind, 10_000)
    text = np.random.default_rng(1).integers(5, 60, len(tokens))
    shape = PackedShape(tokens=8192, text=16_384, segments=256)
    balance = Balance(cost=Cost.from_width(1152), batch=8 * rows, block=rows)
    stream = plan_rows(tokens, text, shape, seed=0, balance=balance)
    for epoch in range(2):
        check(stream.get_epoch(epoch).rows, tokens, text, shape)
        assert stream.get_epoch(epoch).padding < 0.01
        for devices in (1, 2, 4, 8):
            measured = stream.measure_imbalance(batch=8 * rows, devices=devices, epoch=epoch)
            assert measured.mean < 0.02
            assert measured.share_above_5_percent == 0  # though costs of `heavy` jump three times
    assert plan_rows(tokens, text, shape, seed=0).measure_imbalance(batch=8 * rows, devices=8).mean > 3 * measured.mean


@pytest.mark.parametrize("kind", ["mixed", "heavy", "long"])
def test_no_step_of_2000_clips_waits_for_a_device(kind):
    tokens = np.random.default_rng(2).permutation(histogram(kind, 10_000))[:2000]
    text = np.random.default_rng(1).integers(5, 60, len(tokens))
    balance = Balance(cost=Cost.from_width(1152), batch=8)
    stream = plan_rows(tokens, text, PackedShape(tokens=8192, text=16_384, segments=256), seed=0, balance=balance)
    # The steps that two epochs share, too.
    costs = np.concatenate(
        [balance.cost.compute(stream.get_epoch(epoch).attention_cost * 1e6, 8192) for epoch in range(4)]
    )
    assert measure_imbalance(costs, batch=8, devices=8).worst <= 0.05


def test_rows_cost_alike_where_short_clips_can_fill_them():
    tokens = histogram("mixed", 10_000)
    text, shape = np.full(len(tokens), 20), PackedShape(tokens=8192, text=16_384, segments=256)
    cost = plan_rows(tokens, text, shape, seed=0).get_epoch(0).attention_cost
    order = np.random.default_rng(0).permutation(tokens)
    starts = np.flatnonzero(np.diff(np.cumsum(order) // 8192, prepend=-1))
    at_random = np.add.reduceat(order.astype(float) ** 2, starts)
    assert cost.std() / cost.mean() < 0.15
    assert at_random.std() / at_random.mean() > 0.3


@pytest.mark.parametrize("tight", [{"text": 220}, {"segments": 8}])
def test_rows_may_be_filled_by_text_or_segments_first(tight):
    tokens, text = mix(2000)
    shape = PackedShape(**{"tokens": 1024, "text": 1024, "segments": 64} | tight)
    plan = plan_rows(tokens, text, shape, seed=0).get_epoch(0)
    check(plan.rows, tokens, text, shape)
    least = max(tokens.sum() / 1024, text.sum() / shape.text, len(tokens) / shape.segments)
    assert len(plan) < 1.1 * least


def test_the_fullest_rows_need_exchanges():
    """Without short clips, longest first leaves gaps: three of five lengths fill a row only with their own kind."""
    tokens = np.random.default_rng(0).choice([512, 682, 1024, 1638, 2730], 5000)
    plan = plan_rows(tokens, np.ones_like(tokens), PackedShape(tokens=8192, text=64, segments=64), seed=0).get_epoch(0)
    assert plan.padding < 0.006


def test_a_mixture_draws_the_rows_of_every_epoch():
    tokens, text = mix(1500)
    mixture = Mixture(sizes=(1000, 500), weights=(1, 3), length=1200)
    stream = plan_rows(tokens, text, SHAPE, seed=0, mixture=mixture)
    running = 0
    for epoch in range(12):
        plan = stream.get_epoch(epoch)
        assert len(plan) == stream.rows_per_epoch
        expected = stream.sampler.draw_epoch(epoch)
        assert sorted([*plan.order.tolist(), *plan.dropped_examples]) == sorted(expected.tolist())
        assert len(plan.dropped_examples) <= 0.001 * len(expected)
        assert plan.padding < 0.05
        np.testing.assert_allclose(stream.sampler.compute_shares(plan.order)[0], [0.25, 0.75], atol=0.002)
        assert stream.get_row(epoch * stream.rows_per_epoch)[1][0] == running
        running += len(expected)
    assert set(range(1500)) == {e for epoch in range(12) for e in stream.get_epoch(epoch).order.tolist()}


def test_examples_without_room_in_an_epoch_are_reported(monkeypatch, caplog):
    tokens, text = mix(300)
    stream = plan_rows(tokens, text, SHAPE, seed=0, mixture=Mixture(sizes=(300,)))
    monkeypatch.setattr(stream, "rows_per_epoch", stream.rows_per_epoch - 3)
    plan = stream.get_epoch(1)
    assert len(plan) == stream.rows_per_epoch
    assert len(plan.dropped_examples)
    assert sorted([*plan.order.tolist(), *plan.dropped_examples]) == list(range(300))
    assert f"epoch 1 drops {len(plan.dropped_examples)} of its 300 examples" in caplog.text


def count_fills(monkeypatch) -> list[str]:
    """Return a list that gets the name of the thread at every shuffle of an epoch's examples into rows."""
    filled, fill_rows = [], bin_packing.fill_rows
    count = lambda *arguments: filled.append(threading.current_thread().name) or fill_rows(*arguments)  # noqa: E731
    monkeypatch.setattr(bin_packing, "fill_rows", count)
    return filled


def test_the_first_epoch_is_planned_once(monkeypatch):
    filled = count_fills(monkeypatch)
    stream = plan_rows(*mix(400), SHAPE, seed=0)
    stream.get_row(0)
    pickle.loads(pickle.dumps(stream)).get_row(1)
    assert len(filled) == 1


def test_the_next_epoch_is_planned_by_a_thread_while_this_one_is_read(monkeypatch):
    filled = count_fills(monkeypatch)
    stream = plan_rows(*mix(400), SHAPE, seed=0)
    expected = plan_rows(*mix(400), SHAPE, seed=0).get_epoch(1).hash
    filled.clear()
    half, is_released, fill_rows = stream.rows_per_epoch // 2, threading.Event(), bin_packing.fill_rows
    monkeypatch.setattr(bin_packing, "fill_rows", lambda *arguments: is_released.wait(60) and fill_rows(*arguments))
    for number in range(stream.rows_per_epoch):  # none waits, though a plan takes for ever
        stream.get_row(number)
        assert any("epoch 1" in thread.name for thread in threading.enumerate()) == (number > half)
    is_released.set()
    stream.get_row(stream.rows_per_epoch)
    assert filled == ["plan of epoch 1"]
    assert stream.get_epoch(1).hash == expected


def test_an_epoch_is_planned_once_for_all_workers(monkeypatch):
    filled = count_fills(monkeypatch)
    stream = plan_rows(*mix(1000), SHAPE, seed=0)
    workers = [pickle.loads(pickle.dumps(stream)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for epoch in range(6):
            plans = list(pool.map(lambda worker, epoch=epoch: worker.get_epoch(epoch), workers))
            assert len({plan.hash for plan in plans}) == 1
            assert len(filled) == 1 + epoch
    assert plans[0].hash == plan_rows(*mix(1000), SHAPE, seed=0).get_epoch(5).hash
    assert stream.get_epoch(4).hash == workers[0].get_epoch(4).hash


def test_a_pickled_stream_is_small_and_its_arrays_are_mapped():
    stream = plan_rows(*mix(20_000), SHAPE, seed=0)
    content = pickle.dumps(stream)
    assert len(content) < 10_000
    copy = pickle.loads(content)
    assert copy.hash == stream.hash
    assert not copy.tokens.flags.writeable
    np.testing.assert_array_equal(copy.get_row(5)[0], stream.get_row(5)[0])


def test_an_epoch_is_planned_once_for_all_threads(monkeypatch):
    tokens, text = mix(2000)
    filled = count_fills(monkeypatch)
    stream = plan_rows(tokens, text, SHAPE, seed=0)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(stream.get_row, [0, 1, stream.rows_per_epoch, 2, stream.rows_per_epoch + 1, 3] * 4))
    assert len(filled) == 2
    np.testing.assert_array_equal(rows[0][0], plan_rows(tokens, text, SHAPE, seed=0).get_row(0)[0])


def test_rows_cost_as_much_as_their_pairs_in_attention():
    """There are images, and clips of 16 frames that attend to themselves: as many tokens, a sixteenth of the pairs."""
    tokens = np.full(400, 256)
    pairs = tokens**2.0 / np.random.default_rng(0).choice([1, 16], len(tokens))
    arguments = tokens, np.ones_like(tokens), PackedShape(tokens=1024, text=64, segments=8)
    balance = Balance(cost=Cost(), batch=4)
    blind, weighted = (plan_rows(*arguments, seed=0, balance=balance, attention_pairs=each) for each in (None, pairs))
    for stream in (blind, weighted):
        np.testing.assert_allclose(
            stream.get_epoch(0).attention_cost,
            [stream.attention_pairs[row].sum() / 1e6 for row in stream.get_epoch(0).rows],
        )
    costs = np.array([pairs[row].sum() for row in blind.get_epoch(0).rows])
    assert weighted.measure_imbalance(batch=4, devices=4).mean < 0.2 * measure_imbalance(costs, batch=4, devices=4).mean
    assert weighted.hash != blind.hash
    assert plan_rows(*arguments, seed=0, balance=balance, attention_pairs=tokens**2.0).hash == blind.hash


def test_the_hash_changes_with_every_option(monkeypatch):
    tokens, text = mix(200)
    balance = Balance(cost=Cost(), batch=4)
    options = [
        {},
        {"balance": balance},
        {"balance": replace(balance, batch=8)},
        {"balance": replace(balance, block=2)},
        {"balance": replace(balance, tolerance=0.1)},
        {"balance": replace(balance, cost=Cost(linear=3))},
        {"mixture": Mixture(sizes=(200,))},
        {"mixture": Mixture(sizes=(100, 100), weights=(1, 2))},
    ]
    hashes = {plan_rows(tokens, text, SHAPE, seed=0, **option).hash for option in options}
    hashes.add(plan_rows(tokens[::-1].copy(), text, SHAPE, seed=0).hash)
    hashes.add(plan_rows(tokens, text, replace(SHAPE, segments=63), seed=0).hash)
    monkeypatch.setattr(bin_packing, "CONSTANTS", ("another way to fill rows",))
    hashes.add(plan_rows(tokens, text, SHAPE, seed=0).hash)
    assert len(hashes) == len(options) + 3


def test_invalid_arguments_are_refused():
    tokens, text = np.array([10, 2000, 1500]), np.array([1, 1, 1])
    with pytest.raises(
        UserError, match=r"b has 2000 video tokens, .* \(2 examples are too large\); raise the row's tokens"
    ):
        plan_rows(tokens, text, SHAPE, seed=0, names=["a", "b", "c"])
    with pytest.raises(UserError, match=r"example 1 has .* \(1 examples are too large\); raise the row's text"):
        plan_rows(np.array([1, 1]), np.array([1, 1025]), SHAPE, seed=0).get_epoch(0)
    with pytest.raises(UserError, match="needs examples"):
        plan_rows(np.zeros(0, int), np.zeros(0, int), SHAPE, seed=0)
    with pytest.raises(UserError, match="no tokens"):
        plan_rows(np.array([0]), np.array([1]), SHAPE, seed=0)
    with pytest.raises(UserError, match="segments=0"):
        plan_rows(np.array([1]), np.array([1]), PackedShape(tokens=8, text=8, segments=0), seed=0)
