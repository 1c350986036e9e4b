import dataclasses
import gc
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.ndimage

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.resize import resize
from dit_video.curation import screening
from dit_video.curation.duplicates import drop_duplicates
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.ingest.screening import Borders, Shot
from dit_video.video import Clip, encode, probe
from support.encoded_clips import encode_resized
from support.hdr_videos import NITS, compute_hlg, compute_pq, encode_ramp
from support.screening import list_dropped, list_kept

MEASURE = ScreeningConfig(min_motion=0, max_black=1, max_frozen=1, max_letterbox=1, min_sharpness=0, duplicates=4)
"""Config with every measure and without limits."""


def greys(levels, height=32, width=48):
    """Return a plain frame for every level."""
    levels = np.asarray(levels, np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (len(levels), height, width, 3)).copy()


def drifting(count, height=96, width=128, *, seed=0, speed=2):
    """Return frames of light and dark spots that move sideways."""
    noise = np.random.default_rng(seed).random((height, width))
    smooth = scipy.ndimage.gaussian_filter(noise, 5, mode="wrap")
    picture = np.rint(40 + 200 * (smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.uint8)
    return np.stack([np.roll(picture, speed * index, axis=1) for index in range(count)])[..., None].repeat(3, axis=-1)


def lossless(frames, milliseconds, *, aspect=1):
    """Encode a lossless file with the frames at these times; `aspect` is a pixel's width to its height."""
    buffer = io.BytesIO()
    container, codec, pixel_format = ("matroska", "ffv1", "bgr0") if aspect == 1 else ("mov", "png", "rgb24")
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for picture, time in zip(frames, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def rotated(content):
    """Return an mp4 that players turn clockwise, as phones write portrait video."""
    offset = content.index(b"tkhd") + 4 + 4 + 20 + 16
    matrix = np.asarray([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return content[:offset] + matrix + content[offset + 36 :]


def mp4(frames, fps=8.0):
    return encode(Clip(frames, fps=fps), "mp4")


def screen_single_shot(content, config=MEASURE) -> Shot:
    screened = config.screen(content, "clip")
    ((shot, reason, *_),) = screened.shots
    assert not reason
    return shot


FILES = {
    "mp4": lambda: mp4(drifting(20), fps=24000 / 1001),
    "portrait": lambda: rotated(mp4(drifting(9))),
    "webm": lambda: encode(Clip(drifting(5, 33, 47), fps=30), "webm"),
    "gif": lambda: encode(Clip(drifting(6), fps=10), "gif"),
    "apng": lambda: encode(Clip(drifting(6), fps=10), "apng"),
    "image": lambda: encode(Clip(drifting(1), fps=1), "png"),
    "one frame": lambda: mp4(drifting(1)),
    "varying rate": lambda: lossless(drifting(5), [0, 40, 500, 520, 1000]),
    "wide pixels": lambda: lossless(drifting(5), 100 * np.arange(5), aspect=2),
    "long and thin": lambda: encode(Clip(np.zeros((2, 2, 3000, 3), np.uint8), fps=8), "mp4"),
}


@pytest.mark.parametrize("kind", FILES)
def test_video_infos_equal_those_of_probing(kind, monkeypatch):
    content = FILES[kind]()
    facts, measured = probe(content), screen_single_shot(content)
    expected = Shot(name="clip", start=0.0, **vars(facts))
    for name in ("frames", "fps", "seconds", "height", "width", "codec", "start", "name"):
        assert getattr(measured, name) == getattr(expected, name), name
    # Nothing is measured, and no picture is made, where no step asks for it.
    monkeypatch.setattr(screening, "ThumbnailMaker", None)
    assert screen_single_shot(content, ScreeningConfig()) == expected
    assert screen_single_shot(content, ScreeningConfig(min_size=2, max_seconds=3)) == expected


def test_a_file_is_decoded_once_and_one_frame_is_kept(monkeypatch):
    calls, frames, alive, probe = 0, [], [], screening.probe

    def counted(encoded, *, on_frame, **options):
        nonlocal calls
        calls += 1

        def look(time, frame):
            on_frame(time, frame)
            frames.append(time)
            if len(frames) % 10 == 1:
                alive.append(sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects()))

        return probe(encoded, on_frame=look, **options)

    monkeypatch.setattr(screening, "probe", counted)
    gc.collect()
    screen_single_shot(mp4(drifting(60), fps=30))
    assert calls == 1
    assert len(frames) == 60
    assert max(alive) <= alive[0] + 3


def test_once_frames_are_decoded_all_measures_are_taken():
    content = mp4(drifting(4))
    shot, measured = screen_single_shot(content, ScreeningConfig(max_black=1)), screen_single_shot(content)
    assert shot == dataclasses.replace(measured, letterbox=None)  # its samples take time of their own
    assert screen_single_shot(content, ScreeningConfig(measure=True)) == measured
    assert measured.letterbox == Borders(0, 0, 0, 0)
    probed = screen_single_shot(content, ScreeningConfig(min_seconds=0))
    assert (probed.motion, probed.black, probed.sharpness, probed.letterbox, probed.hash) == (None,) * 5


@pytest.mark.parametrize(("fps", "levels_a_second"), [(4.0, 24), (8.0, 48), (16.0, 96)])
def test_motion_is_the_change_of_luma_per_second(fps, levels_a_second):
    content = mp4(greys(20 + 6 * np.arange(33)), fps=fps)
    assert screen_single_shot(content).motion == pytest.approx(levels_a_second, rel=0.03)


def test_motion_depends_on_timestamps():
    levels, times = greys([50, 60, 70, 80, 90]), np.array([0, 125, 1000, 1500, 2000])
    # The last frame is shown as long as an average one, half a second or a quarter: samples until 2.375 s or 1.125 s.
    assert screen_single_shot(lossless(levels, times)).motion == pytest.approx(40 / 2.375)
    assert screen_single_shot(lossless(levels, times // 2)).motion == pytest.approx(40 / 1.125)


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_shots_depend_on_timestamps(detector):
    pytest.importorskip("scenedetect")
    frames = np.concatenate([greys([60] * 20), greys([200] * 10)])
    content = lossless(frames, np.concatenate([40 * np.arange(20), 1000 + 200 * np.arange(10)]))
    first, second = list_kept(ScreeningConfig(shots=detector).screen(content, "v"))
    assert (first.start, first.frames, first.seconds) == (0, 20, pytest.approx(0.76))
    assert (second.start, second.frames, second.seconds) == (pytest.approx(1.0), 10, pytest.approx(1.8))
    assert (first.fps, second.fps) == (pytest.approx(25), pytest.approx(5))


def test_high_dynamic_range_is_told_and_dropped_on_demand():
    for number, compute, transfer in ((16, compute_pq, "pq"), (18, compute_hlg, "hlg"), (1, compute_pq, "sdr")):
        content = encode_ramp(compute(NITS), number)
        assert screen_single_shot(content, ScreeningConfig()).transfer == transfer
        dropped = list_dropped(ScreeningConfig(drop_hdr=True).screen(content, "v"))
        assert dropped == ([] if transfer == "sdr" else [("v", f"transfer function '{transfer}' is HDR")])


def test_a_change_of_size_is_a_cut_and_without_cuts_an_error():
    pytest.importorskip("scenedetect")
    content = encode_resized(frames=8, fps=8)
    config = ScreeningConfig(shots="content", shot_threshold=255, max_letterbox=1.0)
    shots = list_kept(config.screen(content, "v"))
    sizes = [(shot.name, shot.start, shot.frames, shot.height, shot.width) for shot in shots]
    assert sizes == [("v#0", 0, 8, 96, 160), ("v#1", pytest.approx(1), 8, 160, 96)]
    np.testing.assert_allclose([shot.letterbox for shot in shots], [(24, 24, 56, 56), (56, 56, 24, 24)], atol=1)
    for config in (ScreeningConfig(), ScreeningConfig(max_frozen=1.0)):
        with pytest.raises(DecodeError, match=r"changes its frame size from 96x160 to 160x96 at 1\.00 s"):
            config.screen(content, "v")


def test_black_and_frozen_time_are_measured():
    # A second of black, two of one picture, one of movement.
    frames = np.concatenate([np.zeros((8, 96, 128, 3), np.uint8), drifting(1).repeat(16, axis=0), drifting(8, seed=3)])
    shot = screen_single_shot(lossless(frames, 125 * np.arange(32)))
    assert shot.black == pytest.approx(8 / 32)
    assert shot.frozen == pytest.approx(15 / 31)  # 31 steps from picture to picture; those of black last 7/8 s
    assert screen_single_shot(mp4(frames)).black == pytest.approx(8 / 32)  # in limited range, and lossy
    assert screen_single_shot(mp4(greys([40] * 5))).frozen == 1


def test_the_letterbox_is_in_displayed_pixels():
    frames = drifting(8, 90, 160) // 2 + 60
    frames[:, :12] = frames[:, 90 - 10 :] = frames[:, :, :6] = 0
    content = mp4(frames)
    shot = screen_single_shot(content)
    np.testing.assert_allclose(shot.letterbox, (12, 10, 6, 0), atol=1)
    # Clockwise: what was on the left is above, what was below is on the left.
    np.testing.assert_allclose(screen_single_shot(rotated(content)).letterbox, (6, 0, 10, 12), atol=1)
    share = 1 - 68 * 154 / (90 * 160)
    assert shot.letterbox.compute_area_share(90, 160) == pytest.approx(share, abs=0.02)
    assert screen_single_shot(content, ScreeningConfig(max_letterbox=share + 0.03)).letterbox == shot.letterbox
    ((_, reason),) = list_dropped(ScreeningConfig(max_letterbox=share - 0.03).screen(content, "a"))
    assert reason.startswith("letterbox 0.2")
    assert screen_single_shot(mp4(drifting(8))).letterbox == Borders(0, 0, 0, 0)
    wide = screen_single_shot(lossless(frames, 100 * np.arange(8), aspect=2))
    assert wide.width == 320
    np.testing.assert_allclose(wide.letterbox, (12, 10, 12, 0), atol=1)


def test_transparent_pixels_are_black():
    context = av.CodecContext.create("png", "w")
    context.height, context.width, context.pix_fmt, context.time_base = 64, 64, "rgba", Fraction(1, 1)
    image = np.full((64, 64, 4), 200, np.uint8)
    image[:16, :, 3] = 0
    frame = av.VideoFrame.from_ndarray(image, format="rgba")
    content = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    assert screen_single_shot(content).letterbox == Borders(16, 0, 0, 0)


def test_sharpness_tells_blur_at_any_size():
    frames = np.random.default_rng(0).integers(0, 256, (1, 36, 48, 3)).astype(np.uint8).repeat(6, axis=0)
    sharp = resize(frames, 144, 192)
    blurred = np.stack([scipy.ndimage.gaussian_filter(frame, (4, 4, 0)) for frame in sharp])
    values = [screen_single_shot(mp4(clip)).sharpness for clip in (sharp, resize(sharp, 288, 384), blurred)]
    assert values[1] == pytest.approx(values[0], rel=0.2)
    assert values[2] < values[0] / 10


def test_copies_are_near_duplicates_and_others_are_not():
    frames = drifting(24, 120, 160)
    contents = [
        mp4(frames),
        mp4(drifting(24, 120, 160, seed=1)),
        encode(Clip(resize(frames, 60, 80), fps=8), "webm", crf=40),
        encode(Clip(frames[::2], fps=4), "gif"),
        mp4(np.rint(frames * 0.8 + 20).astype(np.uint8)),
        mp4(greys([90] * 24)),
        mp4(greys([200] * 24)),
        mp4(frames[::-1].copy()),
    ]
    hashes = [screen_single_shot(content).hash for content in contents]
    assert drop_duplicates(hashes, distance=6) == [None, None, 0, 0, 0, None, None, None]
    assert hashes[5] is None  # a plain picture is like no other


IMAGE, CLIP = encode(Clip(drifting(1), fps=1), "png"), mp4(drifting(9))


@pytest.mark.parametrize(
    ("content", "limits", "reason"),
    [
        (CLIP, {"min_seconds": 1.2}, "duration 1.125 s is below 1.2"),
        (CLIP, {"max_seconds": 1}, "duration 1.125 s is above 1"),
        (CLIP, {"min_seconds": 1.125, "max_seconds": 1.125}, None),
        (IMAGE, {"min_seconds": 5, "min_motion": 9, "max_frozen": 0}, None),
        (CLIP, {"min_size": 97}, "size 96 px is below 97"),
        (CLIP, {"max_size": 95}, "size 96 px is above 95"),
        (IMAGE, {"min_size": 97}, "size 96 px is below 97"),
        (CLIP, {"min_size": 96, "max_size": 96}, None),
        (mp4(greys([90] * 9)), {"min_motion": 0.5}, "motion 0 levels/s is below 0.5"),
        (lossless(greys([50, 100]), [0, 125]), {"max_motion": 100}, "motion 400 levels/s is above 100"),
        (mp4(greys([0] * 9)), {"max_black": 0.5}, "black 1 of the time is above 0.5"),
        (mp4(greys([90] * 9)), {"max_frozen": 0.9}, "frozen 1 of the time is above 0.9"),
        (mp4(greys([90] * 9)), {"min_sharpness": 5}, "sharpness 0 levels² is below 5"),
        (CLIP, {"min_size": 97, "min_seconds": 9}, "size 96 px is below 97"),
    ],
)
def test_clips_beyond_a_limit_are_dropped_with_a_reason(content, limits, reason):
    screened = ScreeningConfig(**limits).screen(content, "a/b.mp4")
    assert list_dropped(screened) == ([] if reason is None else [("a/b.mp4", reason)])
    assert [shot.name for shot in list_kept(screened)] == (["a/b.mp4"] if reason is None else [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_black": 1.1}, r"max_black=1\.1 .* a share from 0 to 1"),
        ({"min_seconds": -1}, "min_seconds=-1"),
        ({"min_motion": float("nan")}, "min_motion=nan"),
        ({"min_size": 300, "max_size": 200}, "min_size=300 is above max_size=200"),
        ({"duplicates": 65}, "duplicates=65"),
        ({"shots": "content", "min_shot": 0.1}, "min_shot=0.1"),
        ({"shot_threshold": 30}, "set shots"),
    ],
)
def test_impossible_limits_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ScreeningConfig(**fields)


@pytest.mark.parametrize("config", [ScreeningConfig(), MEASURE], ids=["probed", "measured"])
@pytest.mark.parametrize(
    "content",
    [b"", b"no video", CLIP[: len(CLIP) // 2]],
    ids=["empty", "text", "cut"],
)
def test_unreadable_files_are_reported(content, config):
    with pytest.raises(DecodeError):
        config.screen(content, "clip")


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "varying rate"])
def test_damaged_files_are_judged_as_probing_does(kind):
    content, draw = FILES[kind](), np.random.default_rng(0)
    readable = 0
    for _ in range(30):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = draw.integers(0, len(damaged), draw.integers(1, 6))
        damaged[places] = draw.integers(0, 256, len(places))
        try:
            expected = screen_single_shot(damaged.tobytes(), ScreeningConfig())
        except DecodeError:
            with pytest.raises(DecodeError):
                MEASURE.screen(damaged.tobytes(), "clip")
        else:
            shot = screen_single_shot(damaged.tobytes())
            assert (shot.frames, shot.seconds, shot.height) == (expected.frames, expected.seconds, expected.height)
            readable += 1
    assert 0 < readable < 30


SHARED = Path(__file__).parents[2].parent / "shared" / "clips"


@pytest.mark.nightly
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real clips beside the checkout")
def test_real_clips_are_screened():
    pillars = screen_single_shot((SHARED / "crystal.webm").read_bytes())
    assert pillars.letterbox == Borders(0, 0, 8, 8)
    fading, walking = (
        screen_single_shot((SHARED / name).read_bytes()) for name in ("big_buck_bunny_clouds.mp4", "walk.mkv")
    )
    assert 0.1 < fading.black < 0.2
    assert walking.black == walking.frozen == 0
    assert 15 < walking.motion < 40 < fading.motion
    assert walking.sharpness > 100
    assert drop_duplicates([fading.hash, walking.hash, pillars.hash, walking.hash], distance=6) == [None, None, None, 1]
