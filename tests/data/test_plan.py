"""Row plans: every example once, budgets kept, little padding, one plan for all hosts."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.data import plan as plan_module
from dit_video.data.plan import RowStream, plan_rows
from dit_video.errors import UserError
from dit_video.tokens import RowShape

SHAPE = RowShape(tokens=1024, text=1024, segments=64)


def mix(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and clips of five sizes, captions of 5 to 60 tokens."""
    generator = np.random.default_rng(seed)
    sizes = np.array([t * h * w for t in (1, 3, 5) for h, w in ((4, 4), (4, 6), (6, 4), (5, 7), (8, 8))])
    return sizes[generator.integers(len(sizes), size=count)], generator.integers(5, 60, size=count)


def check(rows: list[list[int]], tokens: np.ndarray, text: np.ndarray, shape: RowShape) -> None:
    assert sorted(example for row in rows for example in row) == list(range(len(tokens)))
    for row in rows:
        assert 1 <= len(row) <= shape.segments
        assert tokens[row].sum() <= shape.tokens
        assert text[row].sum() <= shape.text


sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=80)
shapes = st.builds(RowShape, tokens=st.integers(50, 120), text=st.integers(20, 60), segments=st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(sizes=sizes, shape=shapes, seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_example_once_within_three_budgets(sizes, shape, seed, epoch):
    tokens, text = np.array(sizes).T
    plan = plan_rows(tokens, text, shape, seed=seed, epoch=epoch)
    check(plan.rows, tokens, text, shape)
    assert plan.padding == pytest.approx(1 - tokens.sum() / (len(plan) * shape.tokens))
    again = plan_rows(tokens.copy(), text.copy(), shape, seed=seed, epoch=epoch)
    assert again.rows == plan.rows
    assert again.hash == plan.hash


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, shape=shapes, seed=st.integers(0, 5))
def test_every_epoch_has_the_same_number_of_rows(sizes, shape, seed):
    tokens, text = np.array(sizes).T
    stream = RowStream(tokens, text, shape, seed=seed)
    for epoch in range(4):
        plan = stream.epoch(epoch)
        assert len(plan) == stream.rows_per_epoch
        check(plan.rows, tokens, text, shape)


def test_shuffles_that_do_not_fit_use_the_rows_of_epoch_0(monkeypatch):
    tokens, text = mix(400)
    monkeypatch.setattr(plan_module, "ATTEMPTS", 1)
    stream = RowStream(tokens, text, SHAPE, seed=0)
    monkeypatch.setattr(stream, "rows_per_epoch", len(stream._first))
    monkeypatch.setattr(plan_module.bins, "fill_rows", lambda examples, *_: [[int(i)] for i in examples])
    plan = stream.epoch(7)
    check(plan.rows, tokens, text, SHAPE)

    def pattern(rows):
        return sorted(sorted(zip(tokens[row].tolist(), text[row].tolist(), strict=True)) for row in rows)

    assert pattern(plan.rows) == pattern(stream._first)
    assert sorted(map(sorted, plan.rows)) != sorted(map(sorted, stream._first))


@pytest.mark.parametrize("count", [3000, 20_000])
def test_padding_below_one_percent(count):
    tokens, text = mix(count)
    stream = RowStream(tokens, text, SHAPE, seed=0)
    assert plan_rows(tokens, text, SHAPE, seed=0, epoch=0).padding < 0.01
    assert max(stream.epoch(epoch).padding for epoch in range(3)) < 0.01


def test_epochs_and_seeds_differ():
    tokens, text = mix(500)
    hashes = {plan_rows(tokens, text, SHAPE, seed=s, epoch=e).hash for s in range(3) for e in range(3)}
    assert len(hashes) == 9


def test_cost_is_the_sum_of_squares():
    tokens, text = mix(300)
    plan = plan_rows(tokens, text, SHAPE, seed=0, epoch=0)
    expected = [sum(int(tokens[example]) ** 2 for example in row) / 1e6 for row in plan.rows]
    np.testing.assert_allclose(plan.cost, expected)


def test_stream_is_random_access_and_ranks_count_on():
    tokens, text = mix(300)
    stream = RowStream(tokens, text, SHAPE, seed=3)
    forward = [stream.row(number) for number in range(3 * stream.rows_per_epoch)]
    assert np.concatenate([ranks for _, ranks in forward]).tolist() == list(range(900))
    fresh = pickle.loads(pickle.dumps(stream))
    for number in (2 * stream.rows_per_epoch + 1, 0, stream.rows_per_epoch):
        examples, ranks = fresh.row(number)
        np.testing.assert_array_equal(examples, forward[number][0])
        np.testing.assert_array_equal(ranks, forward[number][1])
    assert fresh.hash == stream.hash
    assert RowStream(tokens, text, SHAPE, seed=4).hash != stream.hash


def test_ranks_wrap_at_32_bits():
    stream = RowStream(np.array([4, 4, 4]), np.array([1, 1, 1]), SHAPE, seed=0)
    epoch = 2**32 // 3
    ranks = stream.row(epoch * stream.rows_per_epoch)[1]
    assert ranks.dtype == np.uint32
    assert ranks.tolist() == [2**32 - 1, 0, 1]


def test_refusals():
    tokens, text = np.array([10, 2000, 1500]), np.array([1, 1, 1])
    with pytest.raises(
        UserError, match=r"b has 2000 video tokens, .* \(2 examples are too large\); raise the row's tokens"
    ):
        plan_rows(tokens, text, SHAPE, seed=0, epoch=0, names=["a", "b", "c"])
    with pytest.raises(UserError, match=r"example 1 has .* \(1 examples are too large\); raise the row's text"):
        plan_rows(np.array([1, 1]), np.array([1, 1025]), SHAPE, seed=0, epoch=0)
    with pytest.raises(UserError, match="needs examples"):
        RowStream(np.zeros(0, int), np.zeros(0, int), SHAPE, seed=0)
    with pytest.raises(UserError, match="no tokens"):
        RowStream(np.array([0]), np.array([1]), SHAPE, seed=0)
    with pytest.raises(UserError, match="segments=0"):
        RowStream(np.array([1]), np.array([1]), RowShape(tokens=8, text=8, segments=0), seed=0)
