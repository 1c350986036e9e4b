import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.curation.duplicates import MAX_BANDED_DISTANCE, drop_duplicates


def brute_force(hashes, distance):
    kept, result = [], []
    for number, bits in enumerate(hashes):
        near = [
            other
            for other in kept
            if bits and len(bits) == len(hashes[other] or ())
            and all((a ^ b).bit_count() <= distance for a, b in zip(bits, hashes[other], strict=True))
        ]  # fmt: skip
        result.append(near[0] if near else None)
        if not near:
            kept.append(number)
    return result


@st.composite
def families(draw):
    """Return families of hashes whose members differ in a few bits: chains of near-duplicates, and ties."""
    length = draw(st.integers(1, 4))
    word = st.integers(0, 2**64 - 1)
    parents = draw(st.lists(st.tuples(*[word] * length), min_size=1, max_size=4))
    hashes: list[tuple[int, ...] | None] = []
    for _ in range(draw(st.integers(0, 24))):
        bits = list(draw(st.sampled_from(parents)))
        for offset in draw(st.lists(st.integers(0, 64 * length - 1), max_size=12)):
            bits[offset // 64] ^= 1 << offset % 64
        hashes.append(tuple(bits))
    return hashes + draw(st.lists(st.one_of(st.none(), st.tuples(word)), max_size=3))


@pytest.mark.nightly
@settings(max_examples=300, deadline=None)
@given(families(), st.sampled_from([0, 1, 2, 3, 5, 6, MAX_BANDED_DISTANCE, MAX_BANDED_DISTANCE + 1, 20, 63, 64]))
def test_duplicates_equal_those_of_comparing_all_pairs(hashes, distance):
    assert drop_duplicates(hashes, distance=distance) == brute_force(hashes, distance)


@pytest.mark.nightly
@pytest.mark.parametrize("distance", [0, 4, MAX_BANDED_DISTANCE, MAX_BANDED_DISTANCE + 1])
def test_duplicates_among_many_equal_those_of_comparing_all_pairs(distance):
    generator = np.random.default_rng(distance)
    parents = generator.integers(0, 2**64, (200, 2), np.uint64)
    hashes = []
    for parent in parents[generator.integers(0, len(parents), 900)]:
        flips = generator.random((2, 64)) < generator.choice([0.0, 0.03, 0.1])
        masks = np.packbits(flips, axis=1, bitorder="little").view(np.uint64)[:, 0]
        hashes.append(tuple((parent ^ masks).tolist()))
    result = drop_duplicates(hashes, distance=distance)
    assert result == brute_force(hashes, distance)
    assert 0 < sum(first is not None for first in result) < len(result) - 200 * (distance > 0)


def test_few_pairs_of_many_hashes_are_compared(monkeypatch):
    """The work is the number of kept hashes that each new one is compared with."""
    compared, count = 0, np.bitwise_count

    def counted(values):
        nonlocal compared
        compared += values.size
        return count(values)

    monkeypatch.setattr(np, "bitwise_count", counted)
    hashes = [tuple(row) for row in np.random.default_rng(0).integers(0, 2**64, (3000, 1), np.uint64).tolist()]
    assert drop_duplicates(hashes, distance=4) == [None] * 3000
    pairs = 3000 * 2999 / 2
    # 5 bands of 12 or 13 bits: 4 · 2⁻¹³ + 2⁻¹² of the pairs share one.
    assert compared < 0.002 * pairs


def test_the_first_is_kept_and_chains_are_not_followed():
    assert drop_duplicates([(0b0,), (0b1,), (0b11,), None, (0b0,), None], distance=1) == [None, 0, None, None, 0, None]
    assert drop_duplicates([], distance=3) == []
    assert drop_duplicates([(5,), (5, 5), (5,)], distance=0) == [None, None, 0]
    assert drop_duplicates([(), ()], distance=64) == [None, None]


def test_duplicates_are_near_in_every_hash():
    assert drop_duplicates([(0, 0), (0b11, 0b111), (0b111, 0)], distance=2) == [None, None, None]
    assert drop_duplicates([(0, 0), (0b11, 0b11)], distance=2) == [None, 0]


@pytest.mark.parametrize("distance", [-1, 65])
def test_an_impossible_distance_is_refused(distance):
    with pytest.raises(UserError, match="Use 0 to 64"):
        drop_duplicates([], distance=distance)
