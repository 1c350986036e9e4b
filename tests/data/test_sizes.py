"""Training sizes: within the limits, never enlarged, with the same aspect ratio."""

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids, map_grids
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.sizes import (
    SizeLimits,
    compute_all_sampled_fps,
    count_all_sampled_frames,
    count_sampled_frames,
    explain_misfit,
    fit_size,
    fit_sizes,
    get_sampled_fps,
    hash_clips,
    read_fitted_clip,
)
from dit_video.tokens import Grid
from dit_video.video import Clip
from dit_video.video.background import BLACK

STRIDE = Grid(4, 16, 16)


def info(frames=17, height=480, width=640, fps=30.0):
    return ClipInfo("a.mp4", (), height, width, frames, fps, seconds=(frames - 1) / fps)


def limits(max_pixels=10**9, max_frames=10**6, multiple=STRIDE, fps=None):
    return SizeLimits(max_pixels=max_pixels, max_frames=max_frames, multiple=multiple, fps=fps)


@pytest.mark.parametrize(
    ("clip", "limit", "expected"),
    [
        (info(), limits(), (17, 480, 640)),
        (info(), limits(max_pixels=96 * 128), (17, 96, 128)),
        (info(frames=16), limits(), (13, 480, 640)),
        (info(frames=1), limits(), (1, 480, 640)),
        (info(frames=100), limits(max_frames=36), (33, 480, 640)),
        (info(frames=60), limits(fps=10.0), (17, 480, 640)),  # 20 frames at 10 fps
        (info(frames=9, fps=5.0), limits(fps=10.0), (9, 480, 640)),  # no frame is doubled
        (info(height=32, width=48), limits(multiple=Grid(4, 8, 8)), (17, 32, 48)),
        (info(height=720, width=1280), limits(max_pixels=144 * 256), (17, 144, 256)),
        (info(height=1280, width=720), limits(max_pixels=144 * 256), (17, 256, 144)),
    ],
)
def test_clips_get_the_largest_size_within_the_limits(clip, limit, expected):
    assert fit_size(clip, limit) == expected


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(16, 2200),
    width=st.integers(16, 2200),
    frames=st.integers(1, 500),
    max_pixels=st.integers(16 * 16, 10**6),
    max_frames=st.integers(1, 200),
    fps=st.sampled_from([None, 8.0, 24.0, 60.0]),
)
def test_fitted_sizes_never_exceed_the_limits(height, width, frames, max_pixels, max_frames, fps):
    clip, limit = info(frames, height, width), limits(max_pixels, max_frames, fps=fps)
    try:
        size = fit_size(clip, limit)
    except UserError:
        # Only where no size of one multiple along the short side keeps the shape.
        assert max(height, width) / min(height, width) > max_pixels / 256 - 1
        return
    assert size.t <= min(count_sampled_frames(clip, limit), max_frames)
    assert (size.t - 1) % 4 == 0
    assert size.t + 4 > min(count_sampled_frames(clip, limit), max_frames)
    assert size.h % 16 == size.w % 16 == 0
    assert size.h <= height
    assert size.w <= width
    assert size.h * size.w <= max_pixels
    ratio = width / height
    assert abs(size.w - size.h * ratio) <= 8 or abs(size.h - size.w / ratio) <= 8
    # The largest: with both sides a multiple longer, it breaks a limit.
    assert (size.h + 16) * (size.w + 16) > max_pixels or size.h + 16 > height or size.w + 16 > width


class MetadataSource(ClipSource):
    """Clips of which only the metadata is known."""

    infos = None

    def __init__(self, infos):
        self.infos, self._background = tuple(infos), BLACK

    def column(self, name):
        return np.asarray([getattr(one, name) for one in self.infos])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(8, 99), st.integers(8, 999)), min_size=1, max_size=20),
    fps=st.sampled_from([None, 8.0, 60.0]),
)
def test_sizes_of_all_clips_are_those_of_each(sizes, fps):
    infos, limit = [info(*size, fps=24.0) for size in sizes], limits(40 * 40, 33, fps=fps)
    source = MetadataSource(infos)
    expected = [(0, 0, 0) if explain_misfit(one, limit) else fit_size(one, limit) for one in infos]
    assert fit_sizes(source, limit, allow_misfits=True).tolist() == list(map(list, expected))
    assert count_all_sampled_frames(source, limit).tolist() == [count_sampled_frames(one, limit) for one in infos]
    assert compute_all_sampled_fps(source, limit).tolist() == [get_sampled_fps(one, limit) for one in infos]
    if (0, 0, 0) in expected:
        with pytest.raises(UserError, match=r"a\.mp4 has .* pixels"):
            fit_sizes(source, limit)


def test_distinct_sizes_are_found_in_order():
    grids = np.random.default_rng(0).integers(1, 4, (200, 3))
    distinct, first, kinds = find_distinct_grids(grids)
    assert distinct == sorted(set(map(tuple, grids.tolist())))
    np.testing.assert_array_equal(np.asarray(distinct)[kinds], grids)
    assert [grids.tolist().index(list(grid)) for grid in distinct] == first.tolist()
    calls = []
    mapped = map_grids(lambda grid: calls.append(grid) or Grid(*(2 * side for side in grid)), grids)
    np.testing.assert_array_equal(mapped, 2 * grids)
    assert calls == distinct


def test_the_hash_of_clips_depends_on_what_frames_depend_on():
    one = info()
    others = [one._replace(name="b"), one._replace(height=64), one._replace(fps=8.0), one._replace(seconds=9.0)]
    assert len({hash_clips(MetadataSource([each])) for each in (one, *others)}) == 5
    assert hash_clips(MetadataSource([one._replace(captions=("a",))])) == hash_clips(MetadataSource([one]))


def test_impossible_sizes_and_limits_are_refused():
    with pytest.raises(UserError, match="8x640 pixels, less than one multiple of 16x16"):
        fit_size(info(height=8), limits())
    with pytest.raises(UserError, match="keeps its aspect ratio"):
        fit_size(info(height=32, width=3200), limits(max_pixels=1024))
    with pytest.raises(UserError, match="max_pixels=100"):
        limits(max_pixels=100)
    with pytest.raises(UserError, match="max_frames=0"):
        limits(max_frames=0)
    with pytest.raises(UserError, match="fps=0"):
        limits(fps=0.0)
    with pytest.raises(UserError, match="multiple"):
        limits(multiple=Grid(0, 8, 8))


def test_fitted_clips_are_read_at_their_sizes(tmp_path):
    (tmp_path / "clips").mkdir()
    frames = np.repeat(np.arange(20, dtype=np.uint8) * 12, 32 * 32 * 3).reshape(20, 32, 32, 3)
    Clip(frames=frames, fps=20).save(tmp_path / "clips" / "a.apng")
    Clip(frames=frames[5:6], fps=20).save(tmp_path / "clips" / "b.png")
    ingest(tmp_path / "clips", tmp_path / "data")
    source = ClipSource(tmp_path / "data")
    limit = limits(max_pixels=16 * 16, max_frames=5, fps=10.0)
    assert get_sampled_fps(source.infos[0], limit) == 10
    clip = read_fitted_clip(source, 0, limit)
    assert clip.fps == 10
    assert clip.frames.shape == (5, 16, 16, 3)
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 24, 48, 72, 96]
    clip = read_fitted_clip(source, 0, limit, start=4)
    assert clip.frames[:, 0, 0, 0].tolist() == [96, 120, 144, 168, 192]
    assert read_fitted_clip(source, 1, limit).frames[:, 0, 0, 0].tolist() == [60]
    with pytest.raises(UserError, match=r"start=6 .* 5 are read"):
        read_fitted_clip(source, 0, limit, start=6)


def test_a_variable_rate_is_sampled_by_time(tmp_path):
    """A clip with ten frames in the first second and two in the second one is sampled every fifth of a second."""
    (tmp_path / "clips").mkdir()
    moments = [*range(0, 1000, 100), 1000, 1500, 2000]
    with av.open(str(tmp_path / "clips" / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.time_base = "bgr0", Fraction(1, 1000)
        for number, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    ingest(tmp_path / "clips", tmp_path / "data")
    source = ClipSource(tmp_path / "data")
    assert source.infos[0].seconds == pytest.approx(2.0)
    assert source.infos[0].frames == len(moments)
    assert source.infos[0].fps == pytest.approx(6.0)  # on average, not what the container says
    limit = limits(max_frames=9, fps=5.0, multiple=Grid(2, 16, 16))
    assert count_sampled_frames(source.infos[0], limit) == 11
    clip = read_fitted_clip(source, 0, limit, start=2)
    assert clip.frames[:, 0, 0, 0].tolist() == [40, 60, 80, 100, 100, 100, 110, 110, 120]
