"""Near-duplicates equal those of a comparison of all pairs, in one cluster and in many."""

import time
import tracemalloc

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.curation.near_duplicates import compute_frame_matches, find_near_duplicates


def make_embeddings(count, copies, *, noise, seed=0):
    """Return random embeddings followed by noisy copies of the first ones."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, 16)).astype(np.float32)
    copied = rows[:copies] + noise * generator.normal(size=(copies, 16)).astype(np.float32)
    return np.concatenate([rows, copied])


def find_by_all_pairs(rows, threshold):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    originals = np.full(len(rows), -1)
    for clip, row in enumerate(rows):
        kept = np.flatnonzero(originals[:clip] < 0)
        cosines = rows[kept] @ row
        if len(kept) and cosines.max() >= threshold:
            originals[clip] = kept[cosines.argmax()]
    return originals


@pytest.mark.parametrize("cluster_clips", [1000, 40])
@pytest.mark.parametrize("threshold", [0.6, 0.97])
def test_the_result_is_that_of_all_pairs(cluster_clips, threshold):
    rows = make_embeddings(300, 60, noise=0.03)
    result = find_near_duplicates(rows, threshold=threshold, cluster_clips=cluster_clips)
    expected = find_by_all_pairs(rows, threshold)
    if threshold == 0.97 or cluster_clips == 1000:
        np.testing.assert_array_equal(result.originals, expected)
    np.testing.assert_array_equal(np.isnan(result.similarities), result.originals < 0)
    if threshold == 0.97:
        np.testing.assert_array_equal(result.originals[300:], np.arange(60))


@pytest.mark.nightly
def test_many_clusters_miss_no_copies():
    rows = make_embeddings(6000, 500, noise=0.05)
    result = find_near_duplicates(rows, threshold=0.97, cluster_clips=100)
    expected = find_by_all_pairs(rows, 0.97)
    is_copy = expected >= 0
    assert is_copy.sum() > 400
    assert (result.originals[is_copy] == expected[is_copy]).mean(axis=0) >= 0.99
    assert (result.originals[~is_copy] < 0).all()


def test_rows_without_values_duplicate_nothing():
    rows = make_embeddings(4, 2, noise=0.0)
    rows[0], rows[4] = np.nan, 0.0
    result = find_near_duplicates(rows, threshold=0.9)
    assert result.originals.tolist() == [-1, -1, -1, -1, -1, 1]
    empty = find_near_duplicates(np.full((3, 4), np.nan, np.float32), threshold=0.9)
    assert (empty.originals == -1).all()


def test_frames_tell_a_second_take_from_a_copy():
    embeddings = np.ones((4, 3), np.float32)
    frames = np.random.default_rng(0).integers(0, 255, (8, 16, 16)).astype(np.uint8)
    other = np.random.default_rng(1).integers(0, 255, (8, 16, 16)).astype(np.uint8)
    thumbnails = [frames, frames[2:, :, ::-1], other, (frames // 2 + 60).astype(np.uint8)]
    result = find_near_duplicates(embeddings, thumbnails.__getitem__, threshold=0.9, min_match=0.9)
    assert result.originals.tolist() == [-1, 0, -1, 0]
    assert find_near_duplicates(embeddings, threshold=0.9).originals.tolist() == [-1, 0, 0, 0]


def make_thumbnails(count, *, seed=0):
    """Return thumbnails of 1 to 4 frames."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 255, (1 + clip % 4, 8, 8)).astype(np.uint8) for clip in range(count)]


def compute_match(first, second):
    """Return the match of two clips, frame by frame."""

    def correlate(one, other):
        return np.corrcoef(one.ravel(), other.ravel())[0, 1]

    scores = []
    for other in (second, second[:, :, ::-1]):
        table = np.array([[correlate(a, b) for b in other] for a in first])
        scores += [table.max(axis=0).mean(axis=0), table.max(axis=1).mean(axis=0)]
    return max(scores)


def normalize_frames(frames):
    rows = frames - frames.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    return rows / np.sqrt((rows**2).sum(axis=(1, 2), keepdims=True))


def test_frames_of_several_clips_are_matched_as_those_of_each():
    thumbnails = make_thumbnails(9)
    rows = [normalize_frames(each) for each in thumbnails]
    for first in range(4):
        expected = [compute_match(thumbnails[first], other) for other in thumbnails]
        np.testing.assert_allclose(compute_frame_matches(rows[first], rows), expected, atol=1e-5)


@pytest.mark.parametrize("cluster_clips", [1000, 100])
def test_copies_of_a_second_take_are_those_of_all_pairs_that_match(cluster_clips):
    # 600 clips of 3 scenes, of which embeddings tell nothing but the scene; thumbnails are those of 40 takes.
    generator = np.random.default_rng(0)
    scenes, takes = generator.integers(0, 3, 600), generator.integers(0, 40, 600)
    embeddings = np.eye(3, 8, dtype=np.float32)[scenes]
    thumbnails = make_thumbnails(40)
    result = find_near_duplicates(
        embeddings, lambda clip: thumbnails[takes[clip]], threshold=0.9, min_match=0.99, cluster_clips=cluster_clips
    )
    places = {}
    expected = [places.setdefault(pair, clip) for clip, pair in enumerate(zip(scenes, takes, strict=True))]
    expected = [-1 if original == clip else original for clip, original in enumerate(expected)]
    assert result.originals.tolist() == expected


@pytest.mark.slow
def test_thousands_of_alike_clips_are_decided_in_seconds_and_little_memory():
    count, frames = 2000, make_thumbnails(1)[0]

    def find():
        return find_near_duplicates(
            np.ones((count, 8), np.float32), lambda clip: frames, threshold=0.9, min_match=0.9
        ).originals

    find()  # compiles
    start = time.monotonic()
    assert find().tolist() == [-1] + [0] * (count - 1)
    assert time.monotonic() - start < 20  # all pairs took two minutes
    tracemalloc.start()
    try:
        find()
        assert tracemalloc.get_traced_memory()[1] < 40e6  # all pairs are 48 MB as numbers alone
    finally:
        tracemalloc.stop()


def test_thumbnails_are_read_of_clips_with_similar_embeddings_alone():
    embeddings, read = make_embeddings(300, 5, noise=0.0), set()

    def read_thumbnails(clip):
        read.add(clip)
        return np.arange(64, dtype=np.uint8).reshape(1, 8, 8)

    result = find_near_duplicates(embeddings, read_thumbnails, threshold=0.999, min_match=0.9)
    assert result.originals[300:].tolist() == [0, 1, 2, 3, 4]
    assert read == {*range(5), *range(300, 305)}


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_is_a_cosine(threshold):
    with pytest.raises(UserError, match=rf"threshold={threshold}.*such as 0\.97"):
        find_near_duplicates(np.ones((2, 3), np.float32), threshold=threshold)
