"""Near-duplicates among many clips, by perceptual hashes."""

import itertools
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from dit_video.core.errors import UserError

BITS = 64
BANDED = 8
"""Bits. Up to here bands pick out less than a tenth of the clips; beyond it all kept ones are compared."""


def drop_duplicates(hashes: Sequence[tuple[int, ...] | None], *, distance: int) -> list[int | None]:
    """Which clips show what an earlier one shows.

    Two clips are near-duplicates where each hash of one differs from the other's hash at the same place in at most
    `distance` of 64 bits. In the order given, a clip that is a near-duplicate of one that was kept is dropped; the rest
    are kept. So no two kept ones are near-duplicates, and every dropped one is a near-duplicate of a kept one.

    Exact, and faster than all pairs up to a distance of 8: of d + 1 bands of 64 bits that differ in d places one at
    least is the same, so only clips that share a band of their first hash are compared (Manku et al., "Detecting
    near-duplicates for web crawling", WWW 2007).

    Args:
      hashes: of every clip; None, and a clip with another number of hashes, is like no other.
      distance: bits, 0 to 64.

    Returns:
      For every clip the number of the first kept one that it duplicates, None where it is kept.

    Raises:
      UserError: a distance outside 0 to 64.
    """
    if not 0 <= distance <= BITS:
        raise UserError(f"distance={distance} is a number of differing bits; use 0 to {BITS}, 4 is usual")
    kept: dict[int, _Kept] = {}
    found: list[int | None] = []
    for number, bits in enumerate(hashes):
        if not bits:
            found.append(None)
            continue
        table = kept.setdefault(len(bits), _Kept(len(bits), distance))
        wanted = np.array(bits, np.uint64)
        first = table.first_near(wanted)
        found.append(first)
        if first is None:
            table.add(number, wanted)
    return found


class _Kept:
    """Clips of one number of hashes that were kept, by the bands of their first hash."""

    def __init__(self, length: int, distance: int):
        self._distance, self._count = distance, 0
        self._hashes = np.empty((length, 16), np.uint64)
        self._numbers = np.empty(16, np.int64)
        edges = [BITS * band // (distance + 1) for band in range(distance + 2)] if distance <= BANDED else []
        self._bands = [(start, (1 << stop - start) - 1) for start, stop in itertools.pairwise(edges)]
        self._buckets: dict[tuple[int, int], array[int]] = defaultdict(lambda: array("q"))

    def add(self, number: int, bits: UInt64[np.ndarray, " L"]) -> None:
        if self._count == len(self._numbers):
            self._hashes = np.concatenate([self._hashes, self._hashes], axis=1)
            self._numbers = np.concatenate([self._numbers, self._numbers])
        self._hashes[:, self._count], self._numbers[self._count] = bits, number
        for key in self._keys(int(bits[0])):
            self._buckets[key].append(self._count)
        self._count += 1

    def first_near(self, bits: UInt64[np.ndarray, " L"]) -> int | None:
        """The number of the first one within the distance."""
        places = self._candidates(int(bits[0]))
        for at, wanted in enumerate(bits):
            places = places[np.bitwise_count(self._hashes[at, places] ^ wanted) <= self._distance]
        return int(self._numbers[places.min()]) if len(places) else None

    def _candidates(self, bits: int) -> Int64[np.ndarray, " n"]:
        if not self._bands:
            return np.arange(self._count)
        buckets = [np.frombuffer(self._buckets[key], np.int64) for key in self._keys(bits) if key in self._buckets]
        return np.concatenate(buckets) if buckets else np.empty(0, np.int64)

    def _keys(self, bits: int) -> Iterator[tuple[int, int]]:
        for start, mask in self._bands:
            yield start, bits >> start & mask
