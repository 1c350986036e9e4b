"""Transcoded files: the pictures of `decode`, at their times, in colours that all players read alike."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from dit_video.core.errors import DecodeError, UserError
from dit_video.tokens import Grid
from dit_video.video import decode, probe
from dit_video.video.encode import TimedPicture, encode_jpeg, encode_timed
from dit_video.video.reader import Video
from dit_video.video.transcode import transcode
from support.hdr_videos import NITS, compute_pq, encode_ramp

LOSSLESS = {"codec": "libx264", "format": "mov", "options": {"qp": "0"}}


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Return the PSNR of the worst frame in dB."""
    errors = ((first.astype(float) - second.astype(float)) ** 2).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / errors.max()))


def read_times(content: bytes) -> list[float]:
    times: list[float] = []
    probe(content, on_frame=lambda time, _: times.append(time))
    return times


@pytest.mark.parametrize(
    "kind",
    [
        {**LOSSLESS, "pixel_format": "yuv444p"},
        {**LOSSLESS, "pixel_format": "yuvj444p", "colorspace": 5, "color_range": 2},
        {**LOSSLESS, "pixel_format": "yuv444p", "colorspace": 9, "color_primaries": 9, "color_trc": 14},
        {**LOSSLESS, "pixel_format": "yuv444p", "sample_aspect_ratio": Fraction(2)},
        {"codec": "ffv1", "pixel_format": "yuv422p10le"},
        {"codec": "ffv1", "pixel_format": "yuva420p"},
        {"codec": "gif", "format": "gif", "pixel_format": "rgb8"},
    ],
    ids=lambda kind: "-".join(str(value) for value in kind.values() if isinstance(value, str | int)),
)
def test_transcoded_pictures_are_those_of_decode(write_video, textured, kind):
    """The PSNR is 36 dB, mostly limited by the half resolution of colours, which are always BT.709."""
    frames = textured(4, 96, 128, channels=4 if "yuva" in kind["pixel_format"] else 3)
    content = write_video(frames, **kind)
    result = transcode(content, height=48, width=64, average_fps=10, crf=6)
    expected = decode(content, size=Grid(4, 48, 64)).frames
    assert similarity(decode(result).frames, expected) > 36
    with av.open(io.BytesIO(result)) as container:
        (stream,) = container.streams
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 1, 1)
        assert (stream.sample_aspect_ratio or 1) == 1


def test_high_dynamic_range_becomes_standard():
    content = encode_ramp(compute_pq(NITS), 16)
    result = transcode(content, height=16, width=96, average_fps=8, crf=6)
    assert probe(result).transfer == "sdr"
    assert similarity(decode(result).frames, decode(content).frames) > 36


def test_varying_times_are_kept(write_video, textured):
    times = [0, 40, 41, 500, 900, 1000, 1033, 1067, 3000, 3001, 9000, 9040]
    content = write_video(textured(12, 64, 64), times=times)
    result = transcode(content, height=64, width=64, average_fps=probe(content).fps, crf=18)
    np.testing.assert_allclose(read_times(result), np.array(times) / 1000, atol=1e-5, rtol=0)
    assert similarity(decode(result).frames, decode(content).frames) > 30  # frames move, so swapped ones would differ


def test_the_last_frame_is_shown_as_long_as_before():
    picture = np.full((32, 32, 3), 90, np.uint8)
    content = encode_timed([TimedPicture(time, 1.5, picture) for time in (0.0, 0.25, 0.25, 1.0)], 3.0, crf=20)
    again = transcode(content, height=32, width=32, average_fps=3, crf=20)
    for encoded in (content, again):
        with Video(encoded) as video:
            frames = list(video.read_frames())
        assert [frame.time for frame in frames] == pytest.approx([0, 0.25, 0.25, 1], abs=1e-5)
        assert frames[2].time > frames[1].time
        assert frames[-1].duration == pytest.approx(1.5)
        assert len(decode(encoded, fps=4).frames) == 10


@pytest.mark.parametrize("fps", [4, 10, 24000 / 1001])
def test_transcoding_at_a_rate_samples_as_decode_does(write_video, textured, fps):
    """The times of frames vary, and a rate above that of the file repeats frames."""
    content = write_video(textured(12, 64, 64), times=[0, 40, 80, 500, 900, 940, 980, 1020, 1060, 1100, 1140, 1900])
    result = transcode(content, height=64, width=64, average_fps=6, fps=fps, crf=12)
    expected = decode(content, fps=fps)
    facts = probe(result)
    assert (facts.frames, facts.fps) == (len(expected.frames), pytest.approx(fps, rel=1e-5))
    np.testing.assert_allclose(read_times(result), np.arange(facts.frames) / fps, atol=1e-5, rtol=0)
    assert similarity(decode(result).frames, expected.frames) > 30


def test_the_same_file_gives_the_same_bytes(write_video, textured):
    content = write_video(textured(24, 128, 128), **LOSSLESS, pixel_format="yuv420p")
    first, *others = (transcode(content, height=96, width=96, average_fps=10, crf=23) for _ in range(4))
    assert all(other == first for other in others)
    assert transcode(content, height=96, width=96, average_fps=10, crf=24) != first


def test_odd_sizes_and_truncated_files_are_refused(write_video, textured):
    content = write_video(textured(4, 64, 64), **LOSSLESS, pixel_format="yuv420p")
    with pytest.raises(UserError, match=r"33x64 .*even height and width"):
        transcode(content, height=33, width=64, average_fps=10, crf=18)
    with pytest.raises(DecodeError):
        transcode(content[: len(content) // 2], height=32, width=32, average_fps=10, crf=18)


@pytest.mark.parametrize("size", [(48, 64), (33, 47), (1, 1)])
def test_an_encoded_jpeg_decodes_to_nearly_the_same_frame(textured, size):
    frames = textured(1, *size)
    content = encode_jpeg(frames[0])
    assert content == encode_jpeg(frames[0])
    facts = probe(content)
    assert (facts.height, facts.width, facts.codec, facts.fps) == (*size, "mjpeg", 1.0)
    assert similarity(decode(content).frames, frames) > 36  # pictures have noise
