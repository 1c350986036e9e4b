import json
import subprocess
import sys

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.video import Clip, decode, encode
from dit_video.video.reader import Video
from support.devices import PROGRAMS, make_environment
from support.encoded_clips import compute_digests, make_pattern


@pytest.mark.parametrize("format", ["apng", "png", "webp"])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (7, 13), (1, 1)])
def test_lossless_formats_return_the_same_pixels(format, height, width):
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (1 if format == "png" else 4, height, width, 3)).astype(np.uint8)
    back = decode(encode(Clip(frames, fps=8), format, lossless=True))
    np.testing.assert_array_equal(back.frames, frames)


@pytest.mark.parametrize(
    ("format", "mean", "fps"),
    [("mp4", 2.0, 8), ("mov", 2.0, 8), ("webm", 2.0, 8), ("webp", 2.0, 8), ("gif", 8.0, 8.3333)],
)
def test_lossy_formats_return_nearly_the_same(format, mean, fps):
    clip = make_pattern()
    back = decode(encode(clip, format))
    assert back.frames.shape == clip.frames.shape
    assert back.fps == pytest.approx(fps, rel=1e-4)
    assert np.abs(back.frames.astype(int) - clip.frames).mean() < mean


def test_a_gif_lasts_as_long_as_its_clip():
    import io

    import av

    with av.open(io.BytesIO(encode(make_pattern(frames=16), "gif"))) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(16) / 8, atol=0.0051)


@pytest.mark.parametrize("format", ["mp4", "mov", "webm", "webp", "jpg"])
@pytest.mark.parametrize("colour", [(232, 50, 46), (48, 200, 80), (56, 96, 240), (240, 240, 240), (0, 0, 0)])
def test_colours_survive(format, colour):
    frames = np.broadcast_to(np.asarray(colour, np.uint8), (1 if format == "jpg" else 2, 32, 32, 3)).copy()
    back = decode(encode(Clip(frames, fps=8), format)).frames
    assert np.abs(back.astype(int) - frames).max() <= 2


def test_encoded_files_name_their_colour_space():
    import io

    import av

    for format in ("mp4", "webm"):
        with av.open(io.BytesIO(encode(make_pattern(), format))) as container:
            frame = next(container.decode(video=0))
            assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)
            assert frame.format.name == "yuv420p"


@pytest.mark.parametrize("format", ["mp4", "mov", "webm", "gif", "webp", "apng"])
@pytest.mark.parametrize("fps", [8.0, 30.0, 24000 / 1001, 1.0])
def test_encoding_keeps_the_rate_and_the_number_of_frames(format, fps):
    clip = Clip(make_pattern(frames=7).frames, fps=fps)
    back = decode(encode(clip, format))
    assert len(back.frames) == 7
    if format != "gif":  # in whole hundredths of a second; webp in whole thousandths
        assert back.fps == pytest.approx(fps, rel=2e-3 if format == "webp" else 1e-3)


def test_equal_frames_stay_frames_in_a_webp():
    still = Clip(make_pattern(frames=1).frames.repeat(4, axis=0), fps=30)
    with Video(encode(still, "webp")) as video:
        times = [timed.time for timed in video.read_frames()]
    np.testing.assert_allclose(times, np.arange(4) / 30, atol=0.00051)


@pytest.mark.parametrize("format", ["mp4", "mov", "webm", "gif", "webp", "apng"])
def test_one_frame_is_a_video_too(format):
    assert decode(encode(make_pattern(frames=1), format)).frames.shape == (1, 32, 48, 3)


def test_odd_sizes_are_refused_by_mp4_and_kept_by_other_formats():
    odd = Clip(make_pattern(height=31, width=45).frames, fps=8)
    for format in ("mp4", "mov"):
        with pytest.raises(UserError, match=rf"31x45 .* for {format} .*even height and width.*\.webp, \.gif or \.apng"):
            encode(odd, format)
    for format in ("webm", "gif", "webp", "apng"):
        assert decode(encode(odd, format)).frames.shape == odd.frames.shape
    assert decode(encode(odd[:1], "jpg")).frames.shape == (1, 31, 45, 3)


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_a_picture_is_of_one_frame(format):
    with pytest.raises(UserError, match=rf"5 frames .*{format}: use one frame, such as clip\[:1\], .*\.webp"):
        encode(make_pattern(), format)


def test_a_webp_has_at_most_16383_pixels_a_side():
    wide = Clip(np.zeros((1, 1, 16_384, 3), np.uint8), fps=1)
    with pytest.raises(UserError, match=r"1x16384 are invalid for webp: use at most 16383"):
        encode(wide, "webp")
    assert decode(encode(Clip(wide.frames[:, :, 1:], fps=1), "webp")).width == 16_383


@pytest.mark.parametrize("format", ["mp4", "mov", "webm", "gif", "jpg"])
def test_lossless_is_refused_where_it_is_not(format):
    with pytest.raises(UserError, match=f"lossless=True is invalid for {format}: use webp, apng, png"):
        encode(make_pattern(frames=1), format, lossless=True)


def test_crf_lowers_quality_and_is_checked():
    noise = Clip(np.random.default_rng(2).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8), fps=8)
    for format in ("mp4", "mov", "webm"):
        assert len(encode(noise, format, crf=40)) < 0.7 * len(encode(noise, format))
    with pytest.raises(UserError, match="only mp4, mov, webm have it"):
        encode(noise, "gif", crf=3)
    with pytest.raises(UserError, match=r"crf=99.*0 to 51"):
        encode(noise, "mp4", crf=99)


def test_bytes_are_a_function_of_the_clip():
    """Clips are encoded twice here and once in another process."""
    command = [sys.executable, "-P", str(PROGRAMS / "encoded_clips.py")]
    other = subprocess.run(command, env=make_environment(1), capture_output=True, text=True, check=True)
    assert compute_digests() == compute_digests() == json.loads(other.stdout)
