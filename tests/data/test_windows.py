"""Windows of clips for the autoencoder: a function of seed and step, whatever is cached."""

from typing import NamedTuple

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.sizes import SizeLimits
from dit_video.data.windows import (
    Augmentation,
    ClipCrops,
    FittedWindows,
    WindowBatches,
    WindowConfig,
    Windows,
    composite,
)
from dit_video.tokens import Grid
from dit_video.video import Clip

LIMITS = SizeLimits(max_pixels=32 * 48, max_frames=9, multiple=Grid(4, 8, 8))
CONFIG = WindowConfig(size=Grid(5, 16, 16), batch=3)


def numbered(frames: int, height: int, width: int, number: int) -> np.ndarray:
    """Return frames whose red is the clip's number, green the frame's and blue the column's."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[..., 0] = number
    clip[..., 1] = np.arange(frames)[:, None, None]
    clip[..., 2] = np.arange(width)
    return clip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("windows")
    (root / "clips").mkdir()
    sizes = [(9, 32, 32), (9, 32, 48), (30, 32, 32), (3, 32, 32), (9, 8, 32), (5, 16, 16)]
    for number, (frames, height, width) in enumerate(sizes):
        clip = Clip(frames=numbered(frames, height, width, number), fps=10)
        clip.save(root / "clips" / f"{number}.apng")
    ingest(root / "clips", root / "data")
    return ClipSource(root / "data")


def take(source, count, *, seed=0, start_step=0, cache_bytes=1 << 30, threads=3, configs=(CONFIG,)):
    stretches = ClipCrops(source, LIMITS, cache_bytes=cache_bytes)
    batches = WindowBatches(stretches, configs, seed=seed, start_step=start_step, threads=threads)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def test_clips_without_a_window_are_left_out(source):
    windows = Windows(ClipCrops(source, LIMITS), CONFIG, seed=0)
    assert windows[0].shape == (3, 5, 16, 16, 3)
    assert windows[0].dtype == np.uint8
    assert windows.clips.tolist() == [0, 1, 2, 5]
    assert windows.excluded_clips == ("3.apng", "4.apng")


class Sizes(NamedTuple):
    """Training sizes of clips, as `ClipCrops` has them."""

    sizes: np.ndarray
    limits: SizeLimits


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({(17, 64, 64): 531, (1, 64, 64): 832}, {(9, 64, 64): 8, (1, 64, 64): 32}),
        ({(17, 96, 128): 30, (17, 128, 96): 5}, {(9, 48, 80): 8}),
        ({(17, 160, 64): 1, (17, 64, 160): 1}, {(9, 112, 32): 8, (9, 32, 112): 8}),
        ({(5, 32, 32): 1}, {(5, 32, 32): 32}),
        ({(17, 96, 128): 40, (1, 16, 16): 1, (0, 0, 0): 3}, {(9, 48, 80): 8, (1, 16, 16): 32}),
        ({(17, 16, 208): 1, (17, 208, 16): 1, (17, 64, 64): 8, (1, 64, 64): 8, (1, 16, 16): 1}, None),
    ],
)
def test_windows_are_fitted_to_the_clips(sizes, expected):
    """Every clip has room for one; rare sizes get one together."""
    limits = SizeLimits(max_pixels=96 * 128, max_frames=17, multiple=Grid(4, 16, 16))
    crops = Sizes(np.repeat(list(sizes), list(sizes.values()), axis=0), limits)
    windows = FittedWindows(pixels=64 * 64).choose(crops)
    assert len(windows) <= 4
    for size in crops.sizes[crops.sizes[:, 0] > 0]:
        assert any((window.size <= size).all() for window in windows), size
    for window in windows:
        assert window.size.h * window.size.w <= 64 * 64
        assert (window.size.t - 1) % 4 == window.size.h % 16 == window.size.w % 16 == 0
    if expected is not None:
        assert {tuple(window.size): window.batch for window in windows} == expected


def test_augmentation_of_fitted_windows_transposes_square_ones_alone():
    limits = SizeLimits(max_pixels=96 * 128, max_frames=17, multiple=Grid(4, 16, 16))
    crops = Sizes(np.repeat([(17, 64, 64), (17, 32, 128)], 9, axis=0), limits)
    windows = FittedWindows(augment=Augmentation(transpose=True), pixels=64 * 64).choose(crops)
    assert {window.augment.transpose for window in windows} == {True, False}
    assert all(window.augment.transpose == (window.size.h == window.size.w) for window in windows)


def test_windows_cannot_be_fitted_to_clips_without_a_size():
    crops = Sizes(np.zeros((3, 3), int), SizeLimits(max_pixels=256, max_frames=1, multiple=Grid(1, 16, 16)))
    with pytest.raises(UserError, match="no clip has a training size"):
        FittedWindows().choose(crops)


def test_window_sizes_alternate(source):
    image = WindowConfig(size=Grid(1, 8, 32), batch=2)
    taken = take(source, 6, configs=(CONFIG, image))
    assert [batch.shape for batch in taken] == [(3, 5, 16, 16, 3), (2, 1, 8, 32, 3)] * 3
    for one, other in zip(taken[::2], take(source, 3), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(taken[3:], take(source, 3, configs=(CONFIG, image), start_step=3), strict=True):
        np.testing.assert_array_equal(one, other)
    both = WindowBatches(ClipCrops(source, LIMITS), (CONFIG, image), seed=0)
    assert both.excluded_clips == frozenset()
    assert next(both).shape == (3, 5, 16, 16, 3)  # batches start at step 0 by default
    both.close()
    alone = WindowBatches(ClipCrops(source, LIMITS), (CONFIG,), seed=0)
    assert alone.excluded_clips == {"3.apng", "4.apng"}
    alone.close()


def test_windows_are_cut_out_of_clips(source):
    frames, columns = set(), set()
    for batch in take(source, 40):
        for window in batch:
            assert len(np.unique(window[..., 0])) == 1
            assert (np.diff(window[:, 0, 0, 1].astype(int)) == 1).all()
            assert (np.diff(window[0, 0, :, 2].astype(int)) == 1).all()
            if window[0, 0, 0, 0] == 2:
                frames.add(int(window[0, 0, 0, 1]))
            if window[0, 0, 0, 0] == 1:
                columns.add(int(window[0, 0, 0, 2]))
    assert max(frames) == 25  # the clip of 30 frames is used to its end, beyond max_frames
    assert len(frames) > 10
    assert len(columns) > 10


def test_every_clip_is_drawn_once_in_each_epoch(source):
    numbers = np.concatenate([batch[:, 0, 0, 0, 0] for batch in take(source, 8)])
    for epoch in numbers.reshape(-1, 4):
        assert sorted(epoch.tolist()) == [0, 1, 2, 5]
    assert len({tuple(epoch) for epoch in numbers.reshape(-1, 4).tolist()}) > 1


def test_windows_are_a_function_of_seed_and_step(source):
    batches = take(source, 6)
    for resumed, batch in zip(take(source, 2, start_step=4), batches[4:], strict=True):
        np.testing.assert_array_equal(resumed, batch)
    for uncached, batch in zip(take(source, 6, cache_bytes=0), batches, strict=True):
        np.testing.assert_array_equal(uncached, batch)
    for alone, batch in zip(take(source, 6, threads=1), batches, strict=True):
        np.testing.assert_array_equal(alone, batch)
    assert not np.array_equal(take(source, 1, seed=1)[0], batches[0])


class Counted(ClipSource):
    """A source that lists the clips read from it, without those of other readers' threads that are still ending."""

    def __getitem__(self, index):
        self.__dict__.setdefault("reads", []).append(index)
        return super().__getitem__(index)


def test_cached_clips_are_decoded_once(source):
    counted = Counted(source.folders[0])
    windows = Windows(ClipCrops(counted, LIMITS), CONFIG, seed=0)
    for number in range(60):
        windows[number]
    assert sorted(counted.reads) == [0, 1, 2, 2, 2, 2, 5]  # three short clips, and four stretches of the long one
    uncached = Counted(source.folders[0])
    windows = Windows(ClipCrops(uncached, LIMITS, cache_bytes=0), CONFIG, seed=0)
    for number in range(4):
        windows[number]
    assert len(uncached.reads) == 12


def test_a_data_set_smaller_than_a_batch_is_repeated(source):
    windows = Windows(ClipCrops(source.select(["5.apng"]), LIMITS), CONFIG, seed=0)
    np.testing.assert_array_equal(windows[0], np.stack([numbered(5, 16, 16, 5)] * 3))


def test_hosts_share_a_batch(source):
    whole = take(source, 4)
    stretches = ClipCrops(source, LIMITS)
    shares = [Windows(stretches, CONFIG, seed=0, host=host, hosts=3) for host in range(3)]
    for number, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([share[number] for share in shares]), batch)
    with pytest.raises(UserError, match=r"batch=3 .*hosts=2"):
        Windows(stretches, CONFIG, seed=0, hosts=2)


def test_a_damaged_clip_is_replaced_by_the_next_one(source, monkeypatch):
    whole, read = take(source, 6, cache_bytes=0), ClipSource.__getitem__
    monkeypatch.setattr(ClipSource, "__getitem__", lambda self, index: b"x" if index == 1 else read(self, index))
    for batch, before in zip(take(source, 6, cache_bytes=0), whole, strict=True):
        numbers, expected = batch[:, 0, 0, 0, 0], before[:, 0, 0, 0, 0]
        assert 1 not in numbers
        np.testing.assert_array_equal(numbers[expected != 1], expected[expected != 1])
    monkeypatch.setattr(ClipSource, "__getitem__", lambda self, index: b"x")
    with pytest.raises(UserError, match="8 clips in a row cannot be decoded"):
        Windows(ClipCrops(source, LIMITS), CONFIG, seed=0)[0]


def test_invalid_windows_are_refused(source):
    with pytest.raises(UserError, match=r"none of the 6 clips has a window of 17x16x16"):
        Windows(ClipCrops(source, LIMITS), WindowConfig(size=Grid(17, 16, 16), batch=1), seed=0)
    with pytest.raises(UserError, match="at least 1"):
        WindowConfig(size=Grid(1, 16, 16), batch=0)
    with pytest.raises(UserError, match="are not square"):
        WindowConfig(size=Grid(1, 16, 32), batch=1, augment=Augmentation(transpose=True))
    with pytest.raises(UserError, match=r"composite_prob=1\.5"):
        Augmentation(composite_prob=1.5)


def test_augmented_windows_are_views_of_clips(source):
    config = WindowConfig(size=Grid(5, 16, 16), batch=3, augment=Augmentation())
    plain = {0, 1, 2, 5}
    reversed_, mirrored, exchanged, zoomed = set(), set(), set(), set()
    for batch in take(source, 40, configs=(config,)):
        for window in batch.astype(int):
            red, green, blue = (window[..., channel] for channel in range(3))
            inverted = min(red.min(), green.min(), blue.min()) > 100
            colors = 255 - window if inverted else window
            # Which channel is which: one is constant, one follows time, one width.
            of_clip = next(c for c in range(3) if np.ptp(colors[..., c]) == 0 and colors[0, 0, 0, c] in plain)
            of_width = next(c for c in range(3) if np.abs(np.diff(colors[0, 0, :, c])).min() > 0)
            of_time = 3 - of_clip - of_width
            times, columns = np.diff(colors[:, 0, 0, of_time]), np.diff(colors[0, 0, :, of_width])
            assert set(times.tolist()) in ({1}, {-1})
            reversed_.add(int(times[0]))
            mirrored.add(bool(columns[0] < 0))
            zoomed.add(int(np.abs(columns).max()))
            exchanged.add((of_clip, of_time, of_width, inverted))
    assert reversed_ == {1, -1}
    assert mirrored == {True, False}
    assert zoomed == {1, 2}
    assert len(exchanged) == 12
    for resumed, batch in zip(
        take(source, 2, start_step=2, configs=(config,)), take(source, 4, configs=(config,))[2:], strict=True
    ):
        np.testing.assert_array_equal(resumed, batch)


def test_transposed_windows_swap_height_and_width(source):
    config = WindowConfig(size=Grid(5, 16, 16), batch=3, augment=Augmentation(transpose=True))
    turned = [
        bool(np.abs(np.diff(window[0].astype(int), axis=0)).max() > 0)  # columns differ, as these clips are made
        for batch in take(source, 20, configs=(config,))
        for window in batch
    ]
    assert 0.3 < np.mean(turned) < 0.7


def test_a_composite_shows_another_window_within_a_moving_blob():
    window, other = np.zeros((6, 32, 32, 3), np.uint8), np.full((6, 32, 32, 3), 200, np.uint8)
    moves = []
    for seed in range(20):
        both = composite(window, other, np.random.default_rng(seed))
        assert set(np.unique(both)) <= set(range(201))
        inside = both[..., 0] > 100
        assert (both[..., 0] == 0).mean() + (both[..., 0] == 200).mean() > 0.75  # edges apart it is one or the other
        if inside.all(axis=(1, 2)).any() or not inside.any(axis=(1, 2)).all():
            continue  # in some frames it lies beyond, or covers all
        centres = np.array([np.argwhere(frame).mean(axis=0) for frame in inside])
        moves.append(np.abs(np.diff(centres, axis=0)).max())
    assert len(moves) > 5
    assert np.median(moves) > 0.5
    np.testing.assert_array_equal(window, 0)  # which is not written to


def test_composites_have_the_configured_share(source):
    shares = {}
    for share in (0.0, 0.5):
        config = WindowConfig(size=Grid(5, 16, 16), batch=3, augment=Augmentation(composite_prob=share))
        batches = list(take(source, 30, configs=(config,)))
        # A clip's own channel is constant in its windows; with a blob of another clip none is.
        constant = [any(np.ptp(window[..., c]) == 0 for c in range(3)) for batch in batches for window in batch]
        shares[share] = 1 - np.mean(constant)
    assert shares[0.0] == 0
    assert 0.15 < shares[0.5] < 0.6  # a blob may lie beyond the window, or be of the same clip
