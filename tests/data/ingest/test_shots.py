import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.data.ingest.quality_filter import ScreeningConfig, screen
from dit_video.data.ingest.shots import CutDetector, Span, split_at_cuts
from dit_video.video import Clip, decode, encode

COLOURS = [(90, 10, 10), (120, 230, 140), (20, 30, 120), (250, 240, 120)]


def scene(colour, count, height=48, width=64):
    """Return frames in which a square of a complementary colour moves over a plain background."""
    frames = np.broadcast_to(np.array(colour, np.uint8), (count, height, width, 3)).copy()
    for index, frame in enumerate(frames):
        frame[10:20, 5 + index % 40 : 15 + index % 40] = 255 - np.array(colour)
    return frames


def scenes(*counts):
    return np.concatenate([scene(colour, count) for colour, count in zip(COLOURS, counts, strict=False)])


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    content = encode(Clip(scene(COLOURS[0], 4), fps=10), "mp4")
    with pytest.raises(UserError, match=r"pip install -e '\.\[ingest\]'"):
        screen(content, "a", ScreeningConfig(shots="content"))


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_spans_cover_every_frame_once(cuts, more):
    frames = max([0, *cuts]) + more
    result = split_at_cuts(cuts, frames)
    assert [number for span in result for number in range(span.first, span.stop)] == list(range(frames))
    assert {span.first for span in result} == {0, *cuts}
    assert split_at_cuts([], 3) == (Span(0, 3),)


@pytest.fixture(params=["content", "adaptive"])
def detector(request):
    pytest.importorskip("scenedetect")
    return request.param


def test_cuts_are_found_to_the_frame(detector):
    cuts = CutDetector(detector)
    for picture in scenes(7, 11, 9, 5):
        cuts.add_frame(picture)
    assert cuts.frame_numbers == [7, 18, 27]


def test_a_file_without_a_cut_is_one_clip_with_its_own_name(detector):
    content = encode(Clip(scene(COLOURS[0], 20), fps=10), "mp4")
    screened = screen(content, "a.mp4", ScreeningConfig(shots=detector))
    assert screened == screen(content, "a.mp4", ScreeningConfig())
    assert len(screened.shots) == 1
    image = encode(Clip(scene(COLOURS[0], 1), fps=1), "png")
    assert [shot.name for shot in screen(image, "a.png", ScreeningConfig(shots=detector)).shots] == ["a.png"]


@pytest.mark.parametrize("fps", [10.0, 30000 / 1001])
def test_shots_are_time_ranges_of_the_file(detector, fps):
    frames = scenes(20, 31, 24)
    content = encode(Clip(frames, fps=fps), "mp4")
    screened = screen(content, "a/b.mp4", ScreeningConfig(shots=detector))
    assert screened.dropped == ()
    assert [shot.name for shot in screened.shots] == ["a/b.mp4#0", "a/b.mp4#1", "a/b.mp4#2"]
    whole, first = decode(content).frames, 0
    for shot, count in zip(screened.shots, (20, 31, 24), strict=True):
        assert shot.frames == count
        assert shot.start == pytest.approx(first / fps, abs=1e-4)
        assert shot.seconds == pytest.approx((count - 1) / fps, abs=1e-4)
        assert shot.fps == pytest.approx(fps)
        assert (shot.height, shot.width, shot.codec) == (48, 64, "h264")
        part = decode(content, start=shot.start, frames=count).frames
        np.testing.assert_array_equal(part, whole[first : first + count])
        first += count


def test_short_shots_are_dropped_and_names_stay(detector):
    content = encode(Clip(scenes(20, 4, 20), fps=10), "mp4")
    screened = screen(content, "a", ScreeningConfig(shots=detector))
    assert screened.dropped == (("a#1", "shot of 0.4 s is below 0.5 s"),)
    assert [shot.name for shot in screened.shots] == ["a#0", "a#2"]
    assert len(screen(content, "a", ScreeningConfig(shots=detector, min_shot=0.4)).shots) == 3


def test_shots_are_measured_each_by_itself(detector):
    still = np.broadcast_to(np.array(COLOURS[1], np.uint8), (20, 48, 64, 3))
    frames = np.concatenate([scene(COLOURS[0], 20), still, np.zeros((20, 48, 64, 3), np.uint8)])
    content = encode(Clip(frames, fps=10), "mp4")
    config = ScreeningConfig(shots=detector, min_motion=0, max_frozen=1, max_black=0.9, max_letterbox=1)
    screened = screen(content, "a", config)
    moving, held = screened.shots
    assert screened.dropped == (("a#2", "black 1 of the time is above 0.9"),)
    assert moving.frozen == 0
    assert moving.motion > 5
    # The cut's difference belongs to neither.
    assert held.frozen == 1
    assert held.motion == pytest.approx(0, abs=0.5)
    assert moving.black == held.black == 0


def test_the_threshold_is_the_detectors(detector):
    content = encode(Clip(scenes(20, 20), fps=10), "mp4")
    # A change of all pixels by 255, and a ratio that PySceneDetect limits to 255.
    assert len(screen(content, "a", ScreeningConfig(shots=detector, shot_threshold=256)).shots) == 1
    assert len(screen(content, "a", ScreeningConfig(shots=detector, shot_threshold=2)).shots) > 1
