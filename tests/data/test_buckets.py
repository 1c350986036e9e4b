"""Buckets: no batch over the memory budget, no example dropped or enlarged, no data set too small for a batch."""

import functools
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.data.buckets import BatchMemory, BucketPlanner, Buckets, plan_buckets
from dit_video.tokens import Grid
from support.example_tables import make_table

MEMORY = BatchMemory(fixed=1000, per_token=10)
some_sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=40).map(
    np.array
)


choose_buckets = functools.partial(plan_buckets, text=8)


def plan(buckets: Buckets, *, seed: int, hosts: int = 1) -> BucketPlanner:
    """Return the batches of examples with these buckets, and captions of 1 to 8 tokens."""
    count = len(buckets.assignment)
    return BucketPlanner(make_table(np.ones(count), 1 + np.arange(count) % 8), buckets, seed=seed, hosts=hosts)


def get_uses(planner: BucketPlanner, step: int, host: int = 0) -> list[tuple[Grid, int, int]]:
    """Return the size, the example and the rank of every row of a batch."""
    return [(row.shape.size, *row.entries[0][:2]) for row in planner.get_batch(step, host=host)]


def mixed(count: int = 400, seed: int = 0) -> np.ndarray:
    """Return sizes of images and clips of three aspect ratios, in latents."""
    generator = np.random.default_rng(seed)
    frames = generator.choice([1, 1, 3, 5, 9, 13], count)
    return np.stack([frames, *np.array([(8, 14), (14, 8), (10, 10), (4, 7)])[generator.integers(4, size=count)].T], 1)


def count_visible_tokens(sizes: np.ndarray, buckets: list[tuple[int, ...]]) -> float:
    """Return tokens times the visible part of the frame, for each example's best bucket; -inf without one."""
    total = 0.0
    for size in sizes.tolist():
        values = [-np.inf]
        for bucket in buckets:
            if all(b <= s for b, s in zip(bucket, size, strict=True)):
                scale = max(bucket[1] / size[1], bucket[2] / size[2])
                values.append(np.prod(bucket) * bucket[1] * bucket[2] / (size[1] * size[2] * scale**2))
        total += max(values)
    return total


@settings(max_examples=60, deadline=None)
@given(sizes=some_sizes, count=st.integers(1, 5), devices=st.integers(1, 4), budget=st.integers(6800, 40_000))
def test_buckets_hold_every_example_without_enlarging_it_within_the_budget(sizes, count, devices, budget):
    plan = choose_buckets(sizes, MEMORY, budget=budget, count=count, devices=devices)
    assert 1 <= len(plan.buckets) <= count
    assert sum(bucket.examples for bucket in plan.buckets) == len(sizes) == len(plan.assignment)
    for index, bucket in enumerate(plan.buckets):
        members = sizes[plan.assignment == index]
        assert len(members) == bucket.examples >= 1
        np.testing.assert_array_equal(members.min(axis=0), bucket.size)  # as large as its members allow
        assert bucket.batch % devices == 0
        assert 1000 + bucket.batch // devices * 10 * bucket.size.volume <= budget
        assert bucket.batch == devices or bucket.batch <= bucket.examples
    lost = sum(int(np.prod(size)) for size in sizes) * plan.token_retention
    assert lost == pytest.approx(sum(plan.buckets[index].size.volume for index in plan.assignment))
    assert all(0 < bucket.token_retention <= 1 and 0 < bucket.frame_coverage <= 1 + 1e-12 for bucket in plan.buckets)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(2, 4)), min_size=1, max_size=8).map(
        np.array
    ),
    count=st.integers(1, 3),
)
def test_the_chosen_buckets_are_nearly_optimal(sizes, count):
    plan = choose_buckets(sizes, MEMORY, budget=1e9, count=count)
    candidates = list(itertools.product(*(sorted(set(axis)) for axis in sizes.T.tolist())))
    best = max(
        count_visible_tokens(sizes, list(group)) for group in itertools.combinations_with_replacement(candidates, count)
    )
    one = count_visible_tokens(sizes, [tuple(sizes.min(axis=0))])
    result = count_visible_tokens(sizes, [tuple(bucket.size) for bucket in plan.buckets])
    assert result <= best * (1 + 1e-9)
    # Greedy alone, with the size that holds all as one of `count`.
    greedy_bound = one + (1 - 1 / np.e) * (
        max(
            count_visible_tokens(sizes, [tuple(sizes.min(axis=0)), *group])
            for group in itertools.combinations_with_replacement(candidates, count - 1)
        )
        - one
    )
    assert result >= greedy_bound * (1 - 1e-9)


def test_enough_buckets_lose_nothing():
    sizes = mixed()
    distinct = len(np.unique(sizes, axis=0))
    plan = choose_buckets(sizes, MEMORY, budget=1e6, count=distinct)
    assert (plan.token_retention, plan.frame_coverage) == (1, 1)
    few = choose_buckets(sizes, MEMORY, budget=1e6, count=6)
    assert len(few.buckets) == 6
    assert choose_buckets(sizes, MEMORY, budget=1e6, count=1).token_retention < few.token_retention < 1
    assert few.token_retention > 0.7


def test_many_lengths_are_thinned_and_still_hold_all():
    generator = np.random.default_rng(0)
    sizes = np.stack([generator.integers(1, 200, 500) for _ in range(3)], axis=1)
    plan = choose_buckets(sizes, MEMORY, budget=1e12, count=12)
    assert all((plan.buckets[index].size <= size).all() for index, size in zip(plan.assignment, sizes, strict=True))
    assert plan.token_retention > choose_buckets(sizes, MEMORY, budget=1e12, count=4).token_retention > 0.02


def test_large_sizes_do_not_force_small_batches_on_small_ones():
    sizes = np.array([(1, 4, 4)] * 500 + [(9, 8, 8)] * 50)
    plan = choose_buckets(sizes, MEMORY, budget=1000 + 10 * 9 * 64 * 2, count=2)
    batches = {bucket.size: bucket.batch for bucket in plan.buckets}
    assert batches == {Grid(9, 8, 8): 2, Grid(1, 4, 4): 72}
    quadratic = BatchMemory(fixed=0, per_token=1, per_pair=1)
    batches = {b.size: b.batch for b in choose_buckets(sizes, quadratic, budget=576 + 576**2, count=2).buckets}
    assert batches == {Grid(9, 8, 8): 1, Grid(1, 4, 4): 500}
    assert max(b.batch for b in choose_buckets(sizes, MEMORY, budget=1e9, max_batch=32, devices=4).buckets) == 32


def test_a_size_that_runs_out_of_memory_is_refused_before_training():
    with pytest.raises(UserError, match=r"example of 9x8x8 \(576 tokens\) takes 6.76e\+03 bytes, but the budget is"):
        choose_buckets(np.array([(1, 4, 4), (9, 8, 8)]), MEMORY, budget=5000, count=2)


@settings(max_examples=40, deadline=None)
@given(sizes=some_sizes, seed=st.integers(0, 3), devices=st.sampled_from([1, 2, 4]), budget=st.integers(6800, 20_000))
def test_every_example_comes_equally_often_and_no_batch_is_empty(sizes, seed, devices, budget):
    buckets = choose_buckets(sizes, MEMORY, budget=budget, count=4, devices=devices)
    planner, hosts = plan(buckets, seed=seed), [plan(buckets, seed=seed, hosts=devices)] * devices
    size_of = {bucket.size: index for index, bucket in enumerate(buckets.buckets)}
    seen = np.zeros(len(sizes), int)
    running = 0
    for step in range(int(3 * planner.steps_per_epoch) + 2):
        uses = get_uses(planner, step)
        (size,) = {size for size, _, _ in uses}
        examples = [example for _, example, _ in uses]
        assert len(uses) == buckets.buckets[size_of[size]].batch >= 1
        assert {int(index) for index in buckets.assignment[examples]} == {size_of[size]}
        assert [rank for _, _, rank in uses] == list(range(running, running + len(uses)))
        running += len(uses)
        np.add.at(seen, examples, 1)
        assert [use for host, each in enumerate(hosts) for use in get_uses(each, step, host)] == uses
    for index in range(len(buckets.buckets)):  # without replacement within a bucket
        times = seen[buckets.assignment == index]
        assert times.max() - times.min() <= 1
    assert seen.min() >= 1 or any(bucket.batch > 1 for bucket in buckets.buckets)


def test_every_example_is_drawn_about_once_in_each_epoch():
    sizes = mixed()
    planner = plan(choose_buckets(sizes, MEMORY, budget=30_000, count=5), seed=0)
    seen = np.zeros(len(sizes), int)
    for step in range(round(20 * planner.steps_per_epoch)):
        np.add.at(seen, [example for _, example, _ in get_uses(planner, step)], 1)
    assert seen.min() >= 19
    assert seen.max() <= 21


def test_batches_are_a_function_of_seed_and_step():
    buckets = choose_buckets(mixed(), MEMORY, budget=30_000, count=5, devices=2)
    planner = plan(buckets, seed=1)
    forward = [planner.get_batch(step) for step in range(200)]
    fresh = pickle.loads(pickle.dumps(planner))
    for step in (199, 3, 120):
        assert fresh.get_batch(step) == forward[step]
    other = plan(buckets, seed=2)
    assert any(get_uses(other, step) != get_uses(planner, step) for step in range(5))
    third = plan(choose_buckets(mixed(), MEMORY, budget=20_000), seed=1)
    assert len({planner.hash, other.hash, third.hash}) == 3
    assert fresh.hash == planner.hash


@pytest.mark.parametrize(
    ("buckets", "options", "message"),
    [
        ({"devices": 2}, {"hosts": 7}, "Plan the buckets with devices=7"),
        ({"text": 4}, {}, "example 7 has 8 text tokens, but a row has room for 4"),
    ],
)
def test_buckets_that_do_not_fit_the_hosts_or_the_captions_are_refused(buckets, options, message):
    chosen = choose_buckets(mixed(), MEMORY, budget=30_000, count=5, **buckets)
    with pytest.raises(UserError, match=message):
        plan(chosen, seed=1, **options)


def test_the_report_counts_every_example():
    plan = choose_buckets(mixed(), MEMORY, budget=30_000, count=3)
    lines = plan.report().splitlines()
    assert len(lines) == 5
    assert sum(int(line.split()[2]) for line in lines[1:-1]) == 400
    assert "400" in lines[-1]
    assert "0 dropped" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": np.zeros((0, 3), int)}, "0 sizes are invalid"),
        ({"sizes": np.array([(0, 1, 1)])}, "at least one frame"),
        ({"count": 0}, "count=0"),
        ({"devices": 4, "max_batch": 2}, "max_batch=2"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        choose_buckets(**{"sizes": mixed(), "memory": MEMORY, "budget": 1e6} | arguments)
    with pytest.raises(UserError, match=r"per_token=0 is invalid: .* Use a positive number"):
        BatchMemory(fixed=1, per_token=0)
