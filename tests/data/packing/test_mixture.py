"""Mixtures: the configured shares, no repetition before everything is drawn once, and variants in turn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.data.packing.mixture import Mixture, MixtureSampler

weights = st.floats(0.1, 10.0)
sources = st.lists(st.tuples(st.integers(1, 60), weights), min_size=1, max_size=4)


def draws(mixture: Mixture, *, seed: int = 0, tokens: np.ndarray | None = None) -> MixtureSampler:
    if tokens is None:
        count = mixture.num_clips if mixture.variants is None else len(mixture.variants)
        tokens = np.random.default_rng(9).integers(1, 100, count)
    return MixtureSampler(mixture, tokens, seed=seed)


@settings(max_examples=60, deadline=None)
@given(given_sources=sources, length=st.integers(20, 200), seed=st.integers(0, 3), epochs=st.integers(1, 12))
def test_shares_by_number_are_drawn_without_replacement(given_sources, length, seed, epochs):
    sizes, by_weight = zip(*given_sources, strict=True)
    mixture = Mixture(sizes=sizes, weights=by_weight, length=length)
    drawn = [draws(mixture, seed=seed).draw_epoch(epoch) for epoch in range(epochs)]
    everything = np.concatenate(drawn)
    counts = np.rint(draws(mixture).compute_shares(everything)[0] * len(everything))
    expected = epochs * length * np.asarray(by_weight) / sum(by_weight)
    assert (np.abs(counts - expected) <= 1).all()
    first = 0
    for size in sizes:  # none comes again before the others have come
        times = np.bincount(everything, minlength=sum(sizes))[first : first + size]
        assert times.max() - times.min() <= 1
        first += size
    starts = np.cumsum([0, *map(len, drawn)])
    assert [draws(mixture).count_before(epoch) for epoch in range(epochs + 1)] == starts.tolist()
    assert min(map(len, drawn)) >= draws(mixture).min_examples


def test_shares_can_be_counted_in_tokens():
    tokens = np.concatenate([np.full(1000, 64), np.random.default_rng(0).integers(400, 2000, 300)])
    mixture = Mixture(sizes=(1000, 300), weights=(1, 3), weight_unit="tokens")
    mixed = draws(mixture, tokens=tokens)
    for epoch in range(4):
        number, share = mixed.compute_shares(mixed.draw_epoch(epoch))
        np.testing.assert_allclose(share, [0.25, 0.75], atol=0.01)
        assert number[0] > 0.8
    number, share = (mixed := draws(Mixture(sizes=(1000, 300), weights=(1, 3)), tokens=tokens)).compute_shares(
        mixed.draw_epoch(0)
    )
    np.testing.assert_allclose(number, [0.25, 0.75], atol=0.002)
    assert share[1] > 0.97


def test_without_weights_every_clip_is_drawn_once():
    for epoch in range(5):
        assert sorted(draws(Mixture(sizes=(7, 40, 3))).draw_epoch(epoch).tolist()) == list(range(50))
        assert sorted(draws(Mixture(sizes=(50,), weight_unit="tokens")).draw_epoch(epoch).tolist()) == list(range(50))


def test_a_part_of_a_source_has_the_sizes_of_the_whole():
    tokens = np.round(np.exp(np.random.default_rng(0).normal(5, 1, 20_000))).astype(np.int64) + 1
    mixed = draws(Mixture(sizes=(20_000,), length=500), tokens=tokens)
    totals = np.array([tokens[mixed.draw_epoch(epoch)].sum() for epoch in range(40)])
    assert totals.std() / totals.mean() < 0.025
    permuted = np.random.default_rng(1).permutation(tokens).reshape(40, 500).sum(axis=1)
    assert totals.std() < permuted.std() / 2.5


def test_epochs_and_seeds_differ():
    mixture = Mixture(sizes=(30, 50), weights=(1, 1))
    seen = {draws(mixture, seed=seed).draw_epoch(epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(seen) == 9
    np.testing.assert_array_equal(draws(mixture).draw_epoch(2), draws(mixture).draw_epoch(2))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=30), seed=st.integers(0, 3), split=st.integers(0, 29))
def test_each_variant_is_drawn_once_before_one_is_repeated(counts, seed, split):
    ends = np.cumsum(counts).tolist()
    groups = tuple(tuple(range(end - count, end)) for end, count in zip(ends, counts, strict=True))
    position = min(split, len(counts) - 1)
    sizes = (position, len(counts) - position) if position else (len(counts),)
    mixture = Mixture(sizes=sizes, variants=np.repeat(np.arange(len(counts)), counts))
    mixed = draws(mixture, seed=seed)
    seen = np.stack([np.sort(mixed.draw_epoch(epoch)) for epoch in range(12)])  # 12 = the least common multiple
    for clip, group in enumerate(groups):
        drawn = seen[:, clip]
        assert set(drawn) <= set(group)
        for first in range(0, 12, len(group)):
            assert sorted(drawn[first : first + len(group)]) == list(group)


def test_variants_of_clips_are_drawn_independently():
    mixed = draws(Mixture(sizes=(400,), variants=np.repeat(np.arange(400), 2)))
    second = (np.sort(mixed.draw_epoch(0)) % 2).mean()
    assert 0.4 < second < 0.6


def test_variants_of_several_sources_are_drawn():
    mixed = draws(Mixture(sizes=(2, 2), weights=(1, 1), variants=np.array([0, 0, 1, 2, 3, 3])), tokens=np.ones(6, int))
    number, tokens = mixed.compute_shares(np.array([1, 2, 2, 3, 4]))
    assert number.tolist() == tokens.tolist() == [0.6, 0.4]
    assert set(mixed.draw_epoch(0).tolist()) | set(mixed.draw_epoch(1).tolist()) == set(range(6))


def test_the_hash_changes_with_every_option():
    base = {"sizes": (4, 4), "weights": (1, 2)}
    options = [
        {},
        {"sizes": (5, 3)},
        {"weights": (2, 1)},
        {"weight_unit": "tokens"},
        {"length": 9},
        {"variants": np.array([0, 1, 2, 3, 4, 5, 7, 6])},
    ]
    assert len({draws(Mixture(**base | option)).hash for option in options}) == len(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": ()}, "at least one clip"),
        ({"sizes": (3, 0)}, "at least one clip"),
        ({"sizes": (3, 2), "weights": (1,)}, "one positive weight per source"),
        ({"sizes": (3, 2), "weights": (1, 0)}, "Remove sources"),
        ({"sizes": (3,), "length": 0}, "length=0"),
        ({"sizes": (2,), "variants": np.array([0, 0])}, "clip 1 has no variant"),
        ({"sizes": (2,), "variants": np.zeros(0, int)}, "clip 0 has no variant"),
        ({"sizes": (2,), "variants": np.array([0, 2])}, r"clips 0 to 2, .* Use numbers from 0 to 1"),
        ({"sizes": (2,), "variants": np.array([-1, 1])}, "clips -1 to 1"),
        ({"sizes": (3, 3, 3), "length": 1}, "raise length"),
    ],
)
def test_invalid_mixtures_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        draws(Mixture(**arguments))


def test_an_index_of_other_examples_is_refused():
    with pytest.raises(UserError, match="the mixture has 3 examples, but the index has 4"):
        draws(Mixture(sizes=(3,)), tokens=np.ones(4, int))
