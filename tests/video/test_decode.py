import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.tokens import Grid
from dit_video.video import Clip, VideoInfo, decode, encode, probe
from support.encoded_clips import encode_resized


def make_numbered_clip(count, *, fps=10.0, height=16, width=32):
    """Return a clip whose frame i is a plain grey of 4 + 8 i."""
    levels = (4 + 8 * np.arange(count)).astype(np.uint8)
    return Clip(np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy(), fps=fps)


def numbers(clip):
    return [round((float(frame.mean()) - 4) / 8) for frame in clip.frames]


def container(frames, *, times=None, format="matroska", codec="ffv1", pixel_format="bgr0", rate=10, tags=None):
    """Return a file with the frames at `times` in milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for index, pixels_of_frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of_frame, format="rgb24" if pixels_of_frame.ndim == 3 else "gray")
            frame = frame.reformat(format=pixel_format)
            frame.pts, frame.time_base = (index * 1000 // rate if times is None else times[index]), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "apng"])
def test_probe_reports_what_decode_gives(format, tmp_path):
    path = tmp_path / f"clip.{format}"
    make_numbered_clip(12).save(path)
    facts, clip = probe(path), decode(path)
    assert (facts.frames, facts.height, facts.width) == clip.frames.shape[:3] == (12, 16, 32)
    assert facts.fps == clip.fps == pytest.approx(10)
    assert probe(path.read_bytes()) == facts


def test_images_have_a_rate_of_one(tmp_path):
    clip = Clip(np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3)).astype(np.uint8), fps=8)
    clip.save(tmp_path / "image.png")
    assert decode(tmp_path / "image.png").fps == 1.0
    assert probe(tmp_path / "image.png") == VideoInfo(height=9, width=7, frames=1, fps=1.0, seconds=0.0, codec="png")


def test_jpeg_images_are_decoded():
    frames = np.full((1, 16, 24, 3), (200, 90, 30), np.uint8)
    context = av.CodecContext.create("mjpeg", "w")
    context.height, context.width, context.pix_fmt, context.time_base = 16, 24, "yuvj444p", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(frames[0], format="rgb24").reformat(format="yuvj444p", dst_colorspace="ITU601")
    content = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    back = decode(content)
    assert back.fps == 1.0
    assert np.abs(back.frames.astype(int) - frames).max() <= 4


def test_frames_and_start_choose_the_frames():
    content = encode(make_numbered_clip(20), "mp4")
    assert numbers(decode(content)) == list(range(20))
    assert numbers(decode(content, frames=4)) == [0, 1, 2, 3]
    assert numbers(decode(content, start=0.5, frames=3)) == [5, 6, 7]
    assert numbers(decode(content, start=0.55, frames=3)) == [5, 6, 7]  # frame 5 is shown at 0.55 s
    assert numbers(decode(content, start=1.75)) == [17, 18, 19]
    assert numbers(decode(content, start=1.95)) == [19]
    assert decode(content, start=0.5, frames=3).fps == 10


def test_a_rate_samples_frames_by_time():
    content = encode(make_numbered_clip(20), "mp4")
    assert numbers(decode(content, fps=5)) == list(range(0, 20, 2))
    assert numbers(decode(content, fps=4)) == [0, 2, 5, 7, 10, 12, 15, 17]  # the frame at or before 0, .25, .5 …
    assert numbers(decode(content, fps=20, frames=5)) == [0, 0, 1, 1, 2]
    assert numbers(decode(content, fps=5, start=0.9, frames=3)) == [9, 11, 13]
    assert decode(content, fps=4).fps == 4
    assert len(decode(content, fps=20).frames) == 40


def test_a_varying_rate_is_sampled_by_its_timestamps():
    times = [0, 100, 150, 700, 750, 1000]
    content = container(make_numbered_clip(6).frames, times=times)
    expected = [max(index for index, time in enumerate(times) if time <= moment) for moment in range(0, 1000, 125)]
    assert numbers(decode(content, fps=8, frames=8)) == expected
    assert numbers(decode(content, start=0.4, frames=3)) == [2, 3, 4]


def test_time_counts_from_the_first_frame():
    content = container(make_numbered_clip(6).frames, times=[5000 + 100 * index for index in range(6)])
    assert numbers(decode(content)) == list(range(6))
    assert numbers(decode(content, start=0.2, frames=2)) == [2, 3]
    assert numbers(decode(content, fps=5, frames=3)) == [0, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 13}, "has 12 frames from 0 s on, but 13 were requested"),
        ({"size": Grid(13, 8, 8)}, "has 12 frames"),
        ({"size": Grid(4, 0, 8)}, "at least 1"),
        ({"frames": 0}, "at least 1"),
        ({"size": Grid(4, 8, 8), "frames": 5}, "disagree"),
        ({"start": 1.2}, "ends before 1.2 s"),
        ({"start": 99.0}, "ends before 99 s"),
        ({"start": -1.0}, "start"),
        ({"fps": 0.0}, "fps"),
        ({"start": 1.0, "frames": 3}, "has 2 frames from 1 s on, but 3 were requested"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        decode(encode(make_numbered_clip(12), "mp4"), **arguments)
    assert not isinstance(caught.value, DecodeError)


def test_a_missing_file_is_refused(tmp_path):
    for function in (decode, probe):
        with pytest.raises(MissingError, match="none"):
            function(tmp_path / "none.mp4")


def test_sound_alone_is_no_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    with pytest.raises(DecodeError, match="no readable video stream"):
        decode(buffer.getvalue())


@pytest.mark.parametrize("space", ["ITU601", "ITU709"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_the_matrix_and_range_of_the_stream(space, full):
    """The file holds Y'CbCr values computed by the equations of BT.601 and BT.709, in limited and full range."""
    red, blue = {"ITU601": (0.299, 0.114), "ITU709": (0.2126, 0.0722)}[space]
    rgb = np.asarray((220, 120, 40)) / 255
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    cb, cr = (rgb[2] - luma) / (2 - 2 * blue), (rgb[0] - luma) / (2 - 2 * red)
    black, luma_range, chroma_range = (0, 255, 255) if full else (16, 219, 224)
    planes = black + luma_range * luma, 128 + chroma_range * cb, 128 + chroma_range * cr
    content = raw_yuv(planes, matrix=1 if space == "ITU709" else 6, range_=2 if full else 1)
    assert np.abs(decode(content).frames[0, 8, 8].astype(int) - (220, 120, 40)).max() <= 2


def test_unspecified_colour_is_bt601_when_small():
    planes = 16 + 219 * 0.299, 128 - 224 * 0.299 / 1.772, 128 + 224 * 0.5  # pure red in BT.601
    content = raw_yuv(planes, matrix=2, range_=0)
    assert np.abs(decode(content).frames[0, 8, 8].astype(int) - (255, 0, 0)).max() <= 2


def raw_yuv(planes, *, matrix, range_):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv444p"
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, range_
        frame = av.VideoFrame(16, 16, "yuv444p")
        for plane, value in zip(frame.planes, planes, strict=True):
            plane.update(bytes([round(value)]) * plane.buffer_size)
        frame.colorspace, frame.color_range, frame.pts = matrix, range_, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


CLIPS = Path(__file__).parents[2].parent / "shared" / "clips"


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no folder of real clips beside the checkout")
@pytest.mark.parametrize("name", ["bird.mkv", "big_buck_bunny_rope.webm", "rabbit320.mp4"])
def test_real_clips_are_decoded_from_any_start(name):
    facts = probe(CLIPS / name)
    middle = facts.frames // 2
    whole = decode(CLIPS / name, frames=middle + 2)
    part = decode(CLIPS / name, start=(middle + 0.2) / facts.fps, frames=2)
    np.testing.assert_array_equal(part.frames, whole.frames[middle : middle + 2])
    assert decode(CLIPS / name, size=Grid(5, 48, 64), fps=8).frames.shape == (5, 48, 64, 3)


def test_frames_that_change_their_size_are_no_clip_but_each_part_is_one():
    content, changes = encode_resized(frames=8, fps=8), {}
    message = r"changes its frame size from 96x160 to 160x96 at 1\.00 s, and a clip has one; cut the file there"
    for read in (probe, decode, lambda content: decode(content, size=Grid(16, 64, 64))):
        with pytest.raises(DecodeError, match=message):
            read(content)
    info = probe(content, on_resize=changes.__setitem__)
    assert (info.height, info.width, info.frames, changes) == (96, 160, 16, {8: (160, 96)})
    for part in ({"frames": 8}, {"start": 1.0}):
        frames = decode(content, **part).frames
        assert len(frames) == 8
        assert [np.ptp(np.flatnonzero((frames[-1, :, :, 0] > 128).any(axis))) + 1 for axis in (0, 1)] == [48, 48]
