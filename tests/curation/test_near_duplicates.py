"""Near-duplicates equal those of a comparison of all pairs, in one cluster and in many."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.curation.near_duplicates import find_near_duplicates


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
    result = find_near_duplicates(embeddings, thumbnails, threshold=0.9, min_match=0.9)
    assert result.originals.tolist() == [-1, 0, -1, 0]
    assert find_near_duplicates(embeddings, threshold=0.9).originals.tolist() == [-1, 0, 0, 0]


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_is_a_cosine(threshold):
    with pytest.raises(UserError, match=rf"threshold={threshold}.*such as 0\.97"):
        find_near_duplicates(np.ones((2, 3), np.float32), threshold=threshold)
