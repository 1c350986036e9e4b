"""Near-duplicates among the embeddings of clips: k-means, and cosines within clusters (SemDeDup, arXiv 2303.09540).

Embeddings say what is seen, and those of two takes of a scene are alike. So pairs are compared by thumbnails, too.

Each clip is compared with those of its two nearest clusters, so that pairs on a border are not missed. Only clips that
are kept can have duplicates, so the range of clips is halved again and again: once its first half is decided, the kept
ones of it are compared with the second half. However many clips are alike, the pairs of one block are in memory.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float, Float32, Int, Int64, UInt8

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.curation.annotator import Column, TableAnnotator
from dit_video.curation.clip_scores import THUMBNAIL_SIDE

CLUSTER_CLIPS = 4000
"""Mean number of clips of a cluster; fewer clips than this are all compared with each other."""

_ITERATIONS, _BATCH, _BLOCK, _NEAREST = 10, 8192, 2048, 2
_MAX_UNDECIDED = 128
"""Maximum number of a cluster's clips of which all pairs are compared, before it is known which of them are kept."""
_CACHED_CLIPS, _MATCHED_CLIPS = 4096, 64
"""Numbers of clips whose normalised thumbnails are in memory, and of those that are compared at once."""


ThumbnailReader = Callable[[int], UInt8[np.ndarray, "_ h w"]]
"""Function that returns the thumbnails of the clip of a number."""


class NearDuplicates(NamedTuple):
    """Result of the search."""

    originals: Int64[np.ndarray, " n"]
    """Number of the kept clip that each clip duplicates, or -1 for a clip that is kept."""
    similarities: Float32[np.ndarray, " n"]
    """Cosine with that clip; NaN for a clip that is kept."""


def find_near_duplicates(
    embeddings: Float32[np.ndarray, "n P"],
    read_thumbnails: ThumbnailReader | None = None,
    *,
    threshold: float,
    min_match: float = 0.0,
    cluster_clips: int = CLUSTER_CLIPS,
) -> NearDuplicates:
    """Return for every clip the kept clip that it duplicates.

    Clips are visited in order: one whose cosine with a kept clip reaches the threshold duplicates the most similar of
    them, all others are kept. A row that is not finite, or zero, duplicates none.

    Args:
      embeddings: Embeddings of any length.
      read_thumbnails: Function that returns small luma of at least one frame of the clip of a number. It is called for
        clips of similar embeddings; None compares embeddings alone.
      threshold: Cosine from which on two clips are near-duplicates.
      min_match: Correlation of frames from which on they are, see `compute_frame_matches`; 0 compares embeddings alone.
      cluster_clips: Mean number of clips of a cluster.

    Raises:
      UserError: If the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UserError(f"threshold={threshold} is invalid: it is a cosine. Use a number in (0, 1], such as 0.97")
    originals, similarities = np.full(len(embeddings), -1), np.full(len(embeddings), np.nan, np.float32)
    lengths = np.linalg.norm(embeddings, axis=1)
    usable = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))
    if not len(usable):
        return NearDuplicates(originals, similarities)
    rows = (embeddings[usable] / lengths[usable, None]).astype(np.float32)
    count = max(1, len(rows) // cluster_clips)
    matcher = _Matcher(read_thumbnails, usable, min_match) if read_thumbnails and min_match > 0 else None
    search = _Search(rows, _find_clusters(rows, count), count, threshold, matcher)
    search.decide(0, len(rows))
    is_copy = search.originals >= 0
    originals[usable[is_copy]] = usable[search.originals[is_copy]]
    similarities[usable] = search.similarities
    return NearDuplicates(originals, similarities)


def compute_frame_matches(
    frames: Float32[np.ndarray, "n h w"], others: Sequence[Float32[np.ndarray, "_ h w"]]
) -> Float32[np.ndarray, " k"]:
    """Return the mean correlation of the frames of a clip with the best ones of each other clip, which may be mirrored.

    Of two clips the one whose frames are all in the other counts, as a trimmed clip's are.

    Args:
      frames: Frames with mean 0 and length 1.
      others: Such frames of other clips, at least one each.
    """
    counts = np.array([len(other) for other in others])
    starts = np.cumsum(counts) - counts
    columns = np.concatenate(others).reshape(counts.sum(), -1)
    scores = []
    for rows in (frames, frames[:, :, ::-1]):
        correlations = rows.reshape(len(rows), -1) @ columns.T
        scores.append(np.maximum.reduceat(correlations, starts, axis=1).mean(axis=0))
        scores.append(np.add.reduceat(correlations.max(axis=0), starts) / counts)
    return np.max(scores, axis=0).astype(np.float32)


class _Search:
    """Search of the kept clip that each clip duplicates."""

    def __init__(
        self,
        rows: Float32[np.ndarray, "n P"],
        clusters: Int64[np.ndarray, "n m"],
        count: int,
        threshold: float,
        matcher: "_Matcher | None",
    ):
        self.originals = np.full(len(rows), -1)
        self.similarities = np.full(len(rows), np.nan, np.float32)
        self._rows, self._threshold, self._matcher = rows, threshold, matcher
        self._first_clusters = clusters.min(axis=1)
        members, numbers = np.repeat(np.arange(len(rows)), clusters.shape[1]), clusters.ravel()
        order = np.argsort(numbers, kind="stable")
        self._members = np.split(members[order], np.searchsorted(numbers[order], np.arange(1, count)))

    def decide(self, start: int, stop: int) -> None:
        """Decide the clips of a range, which have been compared with those that are kept before it."""
        ranges = [members[slice(*np.searchsorted(members, (start, stop)))] for members in self._members]
        if max(len(members) for members in ranges) <= _MAX_UNDECIDED:
            pairs = [
                part for number, members in enumerate(ranges) for part in self._find_pairs(number, members, members)
            ]
            self._choose_originals(np.concatenate([np.zeros(0, _PAIR), *pairs]))
            return
        middle = (start + stop) // 2
        self.decide(start, middle)
        for number, members in enumerate(ranges):
            firsts, seconds = np.split(members, np.searchsorted(members, [middle]))
            for part in self._find_pairs(number, firsts[self.originals[firsts] < 0], seconds):
                self._choose_originals(part)
        self.decide(middle, stop)

    def _find_pairs(
        self, cluster: int, firsts: Int64[np.ndarray, " m"], seconds: Int64[np.ndarray, " k"]
    ) -> Iterator[np.ndarray]:
        """Yield pairs of a cluster's clips whose cosine reaches the threshold, block by block."""
        for top in range(0, len(seconds), _BLOCK):
            for left in range(0, len(firsts), _BLOCK):
                second, first = seconds[top : top + _BLOCK], firsts[left : left + _BLOCK]
                padded = (_pad(self._rows[part], 1 << max(5, (len(part) - 1).bit_length())) for part in (second, first))
                cosines = np.asarray(_compute_cosines(*padded))[: len(second), : len(first)]
                row, column = np.nonzero(cosines >= self._threshold)
                pairs = np.zeros(len(row), _PAIR)
                pairs["first"], pairs["second"], pairs["cosine"] = first[column], second[row], cosines[row, column]
                # Clips with the same two clusters are a pair of the first one alone.
                shared = self._first_clusters[pairs["first"]]
                is_repeated = (shared < cluster) & (shared == self._first_clusters[pairs["second"]])
                yield pairs[(pairs["first"] < pairs["second"]) & ~is_repeated]

    def _choose_originals(self, pairs: np.ndarray) -> None:
        """Replace the original of each second clip by a kept one that is more similar."""
        pairs = pairs[np.lexsort((pairs["first"], -pairs["cosine"], pairs["second"]))]
        clips, starts = np.unique(pairs["second"], return_index=True)
        for clip, own in zip(clips.tolist(), np.split(pairs, starts)[1:], strict=True):
            own = own[self.originals[own["first"]] < 0]
            original, similarity = self.originals[clip], self.similarities[clip]
            if original >= 0:
                is_same = (own["cosine"] == similarity) & (own["first"] < original)
                own = own[(own["cosine"] > similarity) | is_same]
            best = 0 if self._matcher is None else self._matcher.find_match(clip, own["first"])
            if best < len(own):
                self.originals[clip], self.similarities[clip] = own["first"][best], own["cosine"][best]


class _Matcher:
    """Comparison of clips by their thumbnails; those that were compared last are in memory."""

    def __init__(self, read_thumbnails: ThumbnailReader, usable: Int64[np.ndarray, " n"], min_match: float):
        @functools.lru_cache(_CACHED_CLIPS)
        def read(clip: int) -> Float32[np.ndarray, "n h w"]:
            frames = read_thumbnails(int(usable[clip]))
            centred = frames - frames.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
            return centred / np.maximum(np.sqrt((centred**2).sum(axis=(1, 2), keepdims=True)), 1e-6)

        self._read, self._min_match = read, min_match

    def find_match(self, clip: int, others: Int64[np.ndarray, " m"]) -> int:
        """Return the index of the first of other clips that matches a clip, or their number if none does."""
        start, count = 0, 1
        while start < len(others):
            frames = [self._read(other) for other in others[start : start + count].tolist()]
            is_match = compute_frame_matches(self._read(clip), frames) >= self._min_match
            if is_match.any():
                return start + int(is_match.argmax())
            start, count = start + count, _MATCHED_CLIPS
        return len(others)


def _find_clusters(rows: Float32[np.ndarray, "n P"], count: int) -> Int64[np.ndarray, "n m"]:
    """Return the numbers of the two clusters that are nearest to each row."""
    if count == 1:
        return np.zeros((len(rows), 1), np.int64)
    generator = make_generator(0, "cluster centres", len(rows), count)
    centres = rows[np.sort(generator.choice(len(rows), count, replace=False))]
    for _ in range(_ITERATIONS):
        sums, counts = np.zeros_like(centres), np.zeros(count)
        for start in range(0, len(rows), _BATCH):
            part_sums, part_counts = _sum_by_centre(_pad(rows[start : start + _BATCH], _BATCH), centres)
            sums, counts = sums + np.asarray(part_sums), counts + np.asarray(part_counts)
        empty = counts == 0
        sums[empty] = rows[generator.choice(len(rows), empty.sum())]
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    starts = range(0, len(rows), _BATCH)
    nearest = np.concatenate([_find_nearest(_pad(rows[start : start + _BATCH], _BATCH), centres) for start in starts])
    return nearest[: len(rows)].astype(np.int64)


@jax.jit
def _sum_by_centre(
    rows: Float[Array, "n P"], centres: Float[Array, "k P"]
) -> tuple[Float[Array, "k P"], Float[Array, " k"]]:
    """Return sum and number of the rows that are nearest to each centre; rows of zeros do not count."""
    nearest = (rows @ centres.T).argmax(axis=1)
    numbers = jnp.any(rows != 0, axis=1).astype(jnp.float32)
    return (
        jax.ops.segment_sum(rows, nearest, len(centres)),
        jax.ops.segment_sum(numbers, nearest, len(centres)),
    )


@jax.jit
def _find_nearest(rows: Float[Array, "n P"], centres: Float[Array, "k P"]) -> Int[Array, "n m"]:
    return jax.lax.top_k(rows @ centres.T, min(_NEAREST, len(centres)))[1]


_PAIR = np.dtype([("first", np.int64), ("second", np.int64), ("cosine", np.float32)])


@jax.jit
def _compute_cosines(first: Float[Array, "n P"], second: Float[Array, "m P"]) -> Float[Array, "n m"]:
    return jnp.matmul(first, second.T, precision="highest")


def _pad(rows: Float32[np.ndarray, "n P"], count: int) -> Float32[np.ndarray, "count P"]:
    """Return the rows and rows of zeros, so that few programs serve all sizes."""
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))


@dataclass(frozen=True, kw_only=True)
class Duplicates(TableAnnotator):
    """Clips that nearly equal one before them in the table."""

    threshold: float = 0.97
    """Cosine of embeddings from which on two clips may be near-duplicates."""
    min_match: float = 0.92
    """Mean correlation of thumbnails of their frames from which on they are. Second takes of a scene have less, and so
    have copies with another crop; 0 compares embeddings alone."""

    @property
    def name(self) -> str:
        return "duplicates"

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            "near_duplicate_of": Column(
                type=pa.string(), description="Name of the first clip that it nearly equals; null for none."
            ),
            "near_duplicate_similarity": Column(
                type=pa.float32(), description="Cosine of the embeddings of both; null for none."
            ),
        }

    @property
    def needs(self) -> Mapping[str, str]:
        return {"embedding": "clip", "thumbnails": "clip"}

    @property
    def identity(self) -> str:
        return f"duplicates 1, threshold {self.threshold:g}, match {self.min_match:g}"

    def annotate_table(self, names: list[str], columns: Mapping[str, pa.ChunkedArray]) -> Mapping[str, Any]:
        if not pa.types.is_large_binary(columns["thumbnails"].type):
            raise UserError("the thumbnails are of an older version. Use tools/annotate.py DATA clip before")
        side = THUMBNAIL_SIDE

        def read_thumbnails(clip: int) -> UInt8[np.ndarray, "n h w"]:
            content = columns["thumbnails"][clip].as_py() or bytes(side**2)
            return np.frombuffer(content, np.uint8).reshape(-1, side, side)

        originals, similarities = find_near_duplicates(
            to_matrix(columns["embedding"]), read_thumbnails, threshold=self.threshold, min_match=self.min_match
        )
        return {
            "near_duplicate_of": [None if original < 0 else names[original] for original in originals],
            "near_duplicate_similarity": pa.array(similarities, mask=np.isnan(similarities)),
        }


def to_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists of one length as a matrix; a null is a row of NaN."""
    values = column.combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    is_valid = values.is_valid().to_numpy(zero_copy_only=False)
    matrix = np.full((len(values), values.type.list_size), np.nan, np.float32)
    matrix[is_valid] = flat.reshape(-1, values.type.list_size)
    return matrix
