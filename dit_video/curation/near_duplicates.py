"""Near-duplicates among the embeddings of clips: k-means, and cosines within clusters (SemDeDup, arXiv 2303.09540).

Embeddings say what is seen, and those of two takes of a scene are alike. So pairs are compared by thumbnails, too.

Each clip is compared with those of its two nearest clusters, so that pairs on a border are not missed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int64, UInt8

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator

CLUSTER_CLIPS = 4000
"""Mean number of clips of a cluster; fewer clips than this are all compared with each other."""

_ITERATIONS, _BATCH, _BLOCK, _NEAREST = 10, 8192, 2048, 2


class NearDuplicates(NamedTuple):
    """Result of the search."""

    originals: Int64[np.ndarray, " n"]
    """Number of the kept clip that each clip duplicates, or -1 for a clip that is kept."""
    similarities: Float32[np.ndarray, " n"]
    """Cosine with that clip; NaN for a clip that is kept."""


def find_near_duplicates(
    embeddings: Float32[np.ndarray, "n P"],
    thumbnails: Sequence[UInt8[np.ndarray, "_ h w"]] | None = None,
    *,
    threshold: float,
    min_match: float = 0.0,
    cluster_clips: int = CLUSTER_CLIPS,
) -> NearDuplicates:
    """Return for every clip the kept clip that it duplicates.

    Clips are visited in order: one whose cosine with a kept clip reaches the threshold duplicates the most similar of
    them, all others are kept. A row that is not finite, or zero, duplicates none.

    Args:
      embeddings: embeddings of any length.
      thumbnails: small luma of some frames of each clip; None compares embeddings alone.
      threshold: cosine from which on two clips are near-duplicates.
      min_match: correlation of frames from which on they are, see `compute_frame_match`.
      cluster_clips: mean number of clips of a cluster.

    Raises:
      UserError: the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UserError(f"threshold={threshold} is invalid: it is a cosine. Use a number in (0, 1], such as 0.97")
    originals, similarities = np.full(len(embeddings), -1), np.full(len(embeddings), np.nan, np.float32)
    lengths = np.linalg.norm(embeddings, axis=1)
    usable = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))
    if not len(usable):
        return NearDuplicates(originals, similarities)
    rows = (embeddings[usable] / lengths[usable, None]).astype(np.float32)
    clusters = _cluster(rows, max(1, len(rows) // cluster_clips))
    pairs = np.concatenate([_find_pairs(rows, members, threshold) for members in clusters])
    if thumbnails is not None:
        frames = [_normalize_frames(thumbnails[clip]) for clip in usable.tolist()]
        matches = [compute_frame_match(frames[first], frames[second]) for first, second, _ in pairs.tolist()]
        pairs = pairs[np.array(matches, np.float32) >= min_match]
    order = np.lexsort((-pairs["cosine"], pairs["first"], pairs["second"]))
    pairs = pairs[order]
    starts = np.searchsorted(pairs["second"], np.arange(len(rows) + 1))
    is_kept = np.ones(len(rows), bool)
    for clip in np.unique(pairs["second"]):
        own = pairs[starts[clip] : starts[clip + 1]]
        own = own[is_kept[own["first"]]]
        if len(own):
            best = own[own["cosine"].argmax()]
            is_kept[clip] = False
            originals[usable[clip]], similarities[usable[clip]] = usable[best["first"]], best["cosine"]
    return NearDuplicates(originals, similarities)


def compute_frame_match(first: Float32[np.ndarray, "n h w"], second: Float32[np.ndarray, "m h w"]) -> float:
    """Return the mean correlation of the frames of one clip with the best ones of another, which may be mirrored.

    Of two clips the one whose frames are all in the other counts, as a trimmed clip's are.

    Args:
      first: frames with mean 0 and length 1.
      second: frames of the other clip.
    """
    scores = []
    for other in (second, second[:, :, ::-1]):
        correlations = np.einsum("nhw,mhw->nm", first, other)
        scores += [correlations.max(axis=axis).mean(axis=0) for axis in (0, 1)]
    return float(max(scores))


def _normalize_frames(frames: UInt8[np.ndarray, "n h w"]) -> Float32[np.ndarray, "n h w"]:
    centred = frames - frames.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    return centred / np.maximum(np.sqrt((centred**2).sum(axis=(1, 2), keepdims=True)), 1e-6)


def _cluster(rows: Float32[np.ndarray, "n P"], count: int) -> list[Int64[np.ndarray, " m"]]:
    """Return the members of each cluster, in order; a row is a member of its two nearest clusters."""
    if count == 1:
        return [np.arange(len(rows))]
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
    nearest = nearest[: len(rows)]
    members, clusters = np.repeat(np.arange(len(rows)), nearest.shape[1]), nearest.ravel()
    order = np.argsort(clusters, kind="stable")
    return np.split(members[order], np.searchsorted(clusters[order], np.arange(1, count)))


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


def _find_pairs(rows: Float32[np.ndarray, "n P"], members: Int64[np.ndarray, " m"], threshold: float) -> np.ndarray:
    """Return the pairs of members, in order, whose cosine reaches the threshold."""
    pairs = [np.zeros(0, _PAIR)]
    for top in range(0, len(members), _BLOCK):
        for left in range(top, len(members), _BLOCK):
            firsts, seconds = members[top : top + _BLOCK], members[left : left + _BLOCK]
            size = 1 << max(5, (max(len(firsts), len(seconds)) - 1).bit_length())
            cosines = np.asarray(_compute_cosines(_pad(rows[firsts], size), _pad(rows[seconds], size)))
            row, column = np.nonzero(cosines[: len(firsts), : len(seconds)] >= threshold)
            is_before = firsts[row] < seconds[column]
            part = np.zeros(is_before.sum(), _PAIR)
            part["first"], part["second"] = firsts[row][is_before], seconds[column][is_before]
            part["cosine"] = cosines[row, column][is_before]
            pairs.append(part)
    return np.concatenate(pairs)


@jax.jit
def _compute_cosines(first: Float[Array, "n P"], second: Float[Array, "m P"]) -> Float[Array, "n m"]:
    return jnp.matmul(first, second.T, precision="highest")


def _pad(rows: Float32[np.ndarray, "n P"], count: int) -> Float32[np.ndarray, "count P"]:
    """Return the rows and rows of zeros, so that few programs serve all sizes."""
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))
