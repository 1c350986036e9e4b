import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.curation.shots import HEIGHT, WIDTH, CutDetector, Span, detect_transitions, split_at_transitions
from dit_video.scenes.edits import DetectionScore, EditTransition, render_edited, score_transitions
from dit_video.video import Clip, decode, encode
from support.screening import list_dropped, list_kept

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
        ScreeningConfig(shots="content").screen(content, "a")


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_spans_cover_every_frame_once(cuts, more):
    frames = max([0, *cuts]) + more
    result = split_at_transitions([Span(cut, cut) for cut in sorted(cuts)], frames)
    assert [number for span in result for number in range(span.first, span.stop)] == list(range(frames))
    assert {span.first for span in result} == {0, *cuts}
    assert split_at_transitions([], 3) == (Span(0, 3),)


def test_transitions_belong_to_no_shot():
    spans = split_at_transitions([Span(5, 5), Span(10, 14), Span(18, 20)], 20)
    assert spans == (Span(0, 5), Span(5, 10), Span(14, 18))


@pytest.fixture(params=["content", "adaptive", "gradual"])
def detector(request):
    pytest.importorskip("scenedetect")
    return request.param


def test_cuts_are_found_to_the_frame(detector):
    cuts = CutDetector(detector)
    for picture in scenes(7, 11, 9, 5):
        cuts.add_frame(picture)
    assert [span.first for span in cuts.find_transitions()] == [7, 18, 27]
    assert cuts.find_transitions() == (Span(7, 7), Span(18, 18), Span(27, 27))


def test_a_file_without_a_cut_is_one_clip_with_its_own_name(detector):
    content = encode(Clip(scene(COLOURS[0], 20), fps=10), "mp4")
    screened = ScreeningConfig(shots=detector).screen(content, "a.mp4")
    probed = ScreeningConfig().screen(content, "a.mp4")
    (shot,), (expected,) = list_kept(screened), list_kept(probed)
    for name in ("name", "start", "frames", "fps", "seconds", "height", "width", "codec", "transfer"):
        assert getattr(shot, name) == getattr(expected, name), name
    assert screened.shots[0].stop == probed.shots[0].stop
    assert screened.facts == probed.facts
    image = encode(Clip(scene(COLOURS[0], 1), fps=1), "png")
    assert [shot.name for shot in list_kept(ScreeningConfig(shots=detector).screen(image, "a.png"))] == ["a.png"]


@pytest.mark.parametrize("fps", [10.0, 30000 / 1001])
def test_shots_are_time_ranges_of_the_file(detector, fps):
    frames = scenes(20, 31, 24)
    content = encode(Clip(frames, fps=fps), "mp4")
    screened = ScreeningConfig(shots=detector).screen(content, "a/b.mp4")
    assert list_dropped(screened) == []
    assert [shot.name for shot in list_kept(screened)] == ["a/b.mp4#0", "a/b.mp4#1", "a/b.mp4#2"]
    whole, first = decode(content).frames, 0
    for shot, count in zip(list_kept(screened), (20, 31, 24), strict=True):
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
    screened = ScreeningConfig(shots=detector).screen(content, "a")
    assert list_dropped(screened) == [("a#1", "shot of 0.4 s is below 0.5 s")]
    assert [judged.is_cut for judged in screened.shots] == [False, True, False]
    assert [shot.name for shot in list_kept(screened)] == ["a#0", "a#2"]
    assert len(list_kept(ScreeningConfig(shots=detector, min_shot=0.4).screen(content, "a"))) == 3


@pytest.mark.parametrize("fps", [10.0, 30000 / 1001])
def test_shots_are_shown_until_the_next_one(detector, fps):
    """The times of a file are those of its shots, none lost and none twice."""
    shots = ScreeningConfig(shots=detector).screen(encode(Clip(scenes(20, 31, 2, 24), fps=fps), "mp4"), "a").shots
    assert [judged.stop for judged in shots[:-1]] == [judged.shot.start for judged in shots[1:]]
    assert shots[-1].stop == pytest.approx(77 / fps, abs=1e-3)


def test_long_shots_are_cut_into_equal_parts(detector):
    content = encode(Clip(scenes(23, 20), fps=10), "mp4")
    shots = list_kept(ScreeningConfig(shots=detector, max_clip_seconds=1).screen(content, "a"))
    assert [(shot.name, shot.frames) for shot in shots] == [
        ("a#0", 8),
        ("a#1", 8),
        ("a#2", 7),
        ("a#3", 10),
        ("a#4", 10),
    ]
    shots = list_kept(ScreeningConfig(max_clip_seconds=3).screen(content, "a"))
    assert [shot.start for shot in shots] == pytest.approx([0, 2.2])


def test_shots_are_measured_each_by_itself(detector):
    still = np.broadcast_to(np.array(COLOURS[1], np.uint8), (20, 48, 64, 3))
    frames = np.concatenate([scene(COLOURS[0], 20), still, np.zeros((20, 48, 64, 3), np.uint8)])
    content = encode(Clip(frames, fps=10), "mp4")
    config = ScreeningConfig(shots=detector, min_motion=0, max_frozen=1, max_black=0.9, max_letterbox=1)
    screened = config.screen(content, "a")
    moving, held = list_kept(screened)
    assert list_dropped(screened) == [("a#2", "black 1 of the time is above 0.9")]
    assert moving.frozen == 0
    assert moving.motion > 5
    # The cut's difference belongs to neither.
    assert held.frozen == 1
    assert held.motion == pytest.approx(0, abs=0.5)
    assert moving.black == held.black == 0


def test_the_threshold_is_the_detectors(detector):
    content = encode(Clip(scenes(20, 20), fps=10), "mp4")
    # A change of all pixels by 255, and a ratio that PySceneDetect limits to 255.
    assert len(ScreeningConfig(shots=detector, shot_threshold=256).screen(content, "a").shots) == 1
    assert len(ScreeningConfig(shots=detector, shot_threshold=2).screen(content, "a").shots) > 1


def tiny(count: int, seed: int) -> np.ndarray:
    """Return a still picture of blocks, as often as asked."""
    picture = np.random.default_rng(seed).integers(20, 235, (HEIGHT, WIDTH, 3))
    return np.broadcast_to(picture, (count, HEIGHT, WIDTH, 3)).astype(np.float32)


def blend(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    weights = (np.arange(len(first)) + 1)[:, None, None, None] / (len(first) + 1)
    return first + weights * (second - first)


def detect(*parts: np.ndarray) -> tuple[Span, ...]:
    return detect_transitions(np.rint(np.concatenate(parts)).astype(np.uint8))


@pytest.mark.parametrize("length", [4, 9, 24, 60])
def test_a_dissolve_is_one_transition(length):
    (span,) = detect(tiny(40, 1), blend(tiny(length, 1), tiny(length, 2)), tiny(40, 2))
    assert 38 <= span.first <= 42
    assert 38 + length <= span.stop <= 42 + length


@pytest.mark.parametrize("black", [0, 3, 30])
def test_a_fade_through_black_is_one_transition(black):
    dark = np.zeros((12, HEIGHT, WIDTH, 3), np.float32)
    parts = tiny(40, 1), blend(tiny(12, 1), dark), np.zeros((black, *dark.shape[1:])), blend(dark, tiny(12, 2))
    (span,) = detect(*parts, tiny(40, 2))
    assert 38 <= span.first <= 42
    assert 62 + black <= span.stop <= 66 + black


def test_flashes_lights_and_motion_are_no_transitions():
    scenery = tiny(60, 1)
    white = np.full((2, HEIGHT, WIDTH, 3), 255.0)
    brighter = 0.7 * scenery + 60
    plane = np.random.default_rng(3).integers(20, 235, (HEIGHT, 3 * WIDTH, 3)).astype(np.float32)
    pan = np.stack([plane[:, shift : shift + WIDTH] for shift in range(2 * WIDTH)])
    assert detect(scenery, white, scenery) == ()
    assert detect(scenery, blend(scenery[:12], brighter[:12]), brighter) == ()
    assert detect(pan) == ()


@pytest.mark.slow
def test_long_videos_are_processed_in_parts():
    parts = [
        part for number in range(12) for part in (tiny(100, number), blend(tiny(10, number), tiny(10, number + 1)))
    ]
    spans = detect(*parts, tiny(60, 12))
    assert [round(span.first / 110, 1) for span in spans] == pytest.approx([n + 0.9 for n in range(12)], abs=0.11)


def test_detections_are_scored():
    truth = [EditTransition("cut", 10, 10), EditTransition("dissolve", 30, 40), EditTransition("fade", 60, 80)]
    score = score_transitions([(11, 11), (33, 36), (33, 40), (90, 95)], truth)
    assert score == DetectionScore({"cut": 1, "dissolve": 1}, {"fade": 1}, 2)
    assert score.f1 == pytest.approx(4 / 7)
    assert score.combine(score).f1 == score.f1


@pytest.mark.slow
def test_transitions_of_rendered_videos_are_detected():
    pytest.importorskip("scenedetect")
    score, dissolved, covered = DetectionScore({}, {}, 0), 0, 0
    for index in range(5):
        video = render_edited(index, seed=11, height=72, width=128, fps=16.0)
        cuts = CutDetector("gradual")
        for frame in video.frames:
            cuts.add_frame(frame)
        spans = cuts.find_transitions()
        score = score.combine(score_transitions(spans, video.transitions))
        inside = {number for span in spans for number in range(*span)}
        for _, first, stop in video.transitions:
            dissolved, covered = dissolved + stop - first, covered + len(inside & set(range(first, stop)))
    assert score.f1 >= 0.95
    assert covered > 0.85 * dissolved
