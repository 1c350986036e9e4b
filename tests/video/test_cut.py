"""Spans that are cut out of files: exactly their frames at their times, and their sound."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.video import decode, probe
from dit_video.video.cut import CutClip, TimeSpan, cut_clips, split_span
from dit_video.video.packets import probe_audio

YUV = {"pixel_format": "yuv420p"}
H264 = {"codec": "libx264", "format": "mp4", **YUV}
H265 = {"codec": "libx265", "format": "mp4", "pixel_format": "yuv420p10le"}
GROUPS = {"g": "8", "bf": "2", "sc_threshold": "0", "crf": "20", "x265-params": "log-level=0:open-gop=1"}
RATE = 48_000


def cut_clip(source, first: float, last: float, *, is_whole: bool = False, **options) -> CutClip:
    """Return one span of a file."""
    return next(cut_clips(source, [TimeSpan(first, last, is_whole)], **options))


def read_times(content: bytes) -> list[float]:
    times: list[float] = []
    probe(content, on_frame=lambda time, _: times.append(time))
    return times


def make_sound(seconds: float) -> np.ndarray:
    """Return a tone whose frequency rises, so that every moment differs from all others; noise is not decoded alike."""
    times = np.arange(int(seconds * RATE)) / RATE
    return 0.5 * np.sin(2 * np.pi * (200 * times + 700 * times**2)).astype(np.float32)[None]


def add_sound(video: bytes, codec: str, *, format: str = "mp4", delay: float = 0.0, seconds: float = 4.0) -> bytes:
    """Return a file with the video's packets and noise that begins `delay` seconds after the first frame."""
    buffer, samples = io.BytesIO(), make_sound(seconds)
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format=format) as output:
        pictures = output.add_stream_from_template(source.streams.video[0], opaque=True)
        sound = output.add_stream(codec, rate=RATE)
        sound.codec_context.layout, sound.bit_rate = "mono", 128_000
        if codec in ("flac", "libmp3lame"):
            sound.codec_context.format = "s16" if codec == "flac" else "fltp"
        size = sound.codec_context.frame_size or 1024
        packets = []
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = pictures
                packets.append(packet)
        for start in range(0, samples.shape[1], size):
            part = samples[:, start : start + size]
            kind = sound.codec_context.format.name
            data = part if kind.startswith("flt") else (part * 30000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format=kind, layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), start + round(delay * RATE)
            packets += sound.encode(frame)
        packets += sound.encode(None)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            output.mux(packet)
    return buffer.getvalue()


def read_sound(content: bytes) -> tuple[np.ndarray, float]:
    """Return the samples that a player hears, and the time of the first one after the first frame."""
    with av.open(io.BytesIO(content)) as container:
        frames = list(container.decode(audio=0))
        origin = container.streams.video[0].start_time * container.streams.video[0].time_base
    first = frames[0]
    samples = np.concatenate([frame.to_ndarray().astype(np.float32) for frame in frames], axis=1)
    return samples[0] / (1 if first.format.name.startswith("flt") else 30000), float(
        first.pts * first.time_base - origin
    )


def read_packets(content: bytes, kind: str) -> list[bytes]:
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.get({kind: 0})[0]
        return [bytes(packet) for packet in container.demux(stream) if packet.size]


def assert_cut(content: bytes, first: int, last: int, *, method: str = "copy", **options) -> bytes:
    """Assert that frames `first` to `last` of a file are those of the cut, at their times; return the cut."""
    times = read_times(content)
    clip = cut_clip(content, first=times[first], last=times[last], **options)
    assert clip.method == method
    expected = np.array(times[first : last + 1]) - times[first]
    np.testing.assert_allclose(read_times(clip.content), expected, atol=1e-5, rtol=0)
    if method == "copy":
        np.testing.assert_array_equal(decode(clip.content).frames, decode(content).frames[first : last + 1])
    return clip.content


@pytest.mark.parametrize(
    "kind",
    [
        {**H264, "options": GROUPS},
        {**H264, "options": {**GROUPS, "x264-params": "open-gop=1:b-pyramid=normal"}},
        {**H264, "options": GROUPS, "format": "mpegts"},
        {**H264, "options": GROUPS, "format": "matroska", "pixel_format": "yuv444p"},
        {**H264, "options": {**GROUPS, "g": "300"}},
        {**H265, "options": GROUPS},
        {"codec": "libvpx-vp9", "format": "webm", **YUV, "options": {"g": "8"}},
        {"codec": "mpeg4", "format": "avi", **YUV, "options": {"g": "8"}},
        {"codec": "mpeg4", "format": "mp4", **YUV, "options": {"g": "8", "bf": "2"}},
        {"codec": "mpeg2video", "format": "mpegts", **YUV, "rate": 25, "options": {"g": "8", "bf": "2"}},
        {"codec": "mjpeg", "format": "avi", "pixel_format": "yuvj420p"},
        {"codec": "libsvtav1", "format": "matroska", **YUV, "options": {"preset": "12", "svtav1-params": "keyint=8"}},
    ],
    ids=lambda kind: f"{kind['codec']}-{kind['format']}",
)  # fmt: skip
@pytest.mark.parametrize(("first", "last"), [(0, 11), (13, 29), (24, 39), (21, 21)])
def test_a_copy_has_exactly_the_frames_of_the_span(write_video, textured, kind, first, last):
    assert_cut(write_video(textured(40, 96, 128), **kind), first, last)


@pytest.mark.parametrize("codec", ["aac", "libopus", "libmp3lame", "flac", "ac3", "pcm_s16le"])
@pytest.mark.parametrize(("first", "last"), [(0, 11), (13, 29)])
def test_sound_is_copied_and_begins_with_the_pictures(write_video, textured, codec, first, last):
    format = "mov" if codec == "pcm_s16le" else "mp4"
    content = add_sound(write_video(textured(40, 64, 64), **H264, options=GROUPS), codec, format=format)
    result = assert_cut(content, first, last)
    check_sound(content, result, first / 10, (last + 1) / 10)


def check_sound(content: bytes, result: bytes, start: float, stop: float) -> None:
    """Assert that the result has sound packets of the file, and between these times its samples, to 1 ms."""
    packets, all_packets = read_packets(result, "audio"), read_packets(content, "audio")
    begin = all_packets.index(packets[0])
    assert packets == all_packets[begin : begin + len(packets)]
    (samples, offset), (all_samples, begins) = read_sound(result), read_sound(content)
    info = probe_audio(result)
    assert info is not None
    assert (info.rate, info.channels, info.offset) == (RATE, 1, pytest.approx(offset))
    assert offset == pytest.approx(max(begins - start, 0), abs=1e-3)
    assert len(samples) / RATE == pytest.approx(min(stop - start, 4 + begins - start) - offset, abs=0.1)
    heard = samples[2000:10000]
    energy = np.convolve(all_samples**2, np.ones(len(heard)), "valid")
    where = (energy - 2 * np.correlate(all_samples, heard)).argmin()  # where noise agrees with itself
    assert begins + (where - 2000) / RATE == pytest.approx(start + offset, abs=1e-3)
    np.testing.assert_allclose(heard, all_samples[where : where + 8000], atol=1e-2)


@pytest.mark.parametrize("delay", [0.35, -0.2])
def test_sound_that_begins_later_or_earlier_keeps_its_offset(write_video, textured, delay):
    video = write_video(textured(40, 64, 64), **H264, options=GROUPS, first=10)
    content = add_sound(video, "aac", delay=1 + delay)
    assert probe_audio(content).offset == pytest.approx(delay, abs=0.025)  # of the encoder
    check_sound(content, assert_cut(content, 2, 20), 0.2, 2.1)


def test_a_span_without_sound_has_none(write_video, textured):
    content = add_sound(write_video(textured(40, 64, 64), **H264, options=GROUPS), "aac", seconds=1.0)
    clip = cut_clip(content, first=2.0, last=3.0)
    assert (clip.method, clip.audio) == ("copy", None)
    assert probe_audio(clip.content) is None


@pytest.mark.parametrize(("codec", "format"), [("aac", "matroska"), ("pcm_mulaw", "avi"), ("ac3", "matroska")])
def test_encoded_pictures_keep_the_sound(write_video, textured, codec, format):
    content = write_video(textured(40, 64, 64), codec="mpeg4", format=format, **YUV)
    content = add_sound(content, codec, format=format)
    times = read_times(content)
    clip = cut_clip(content, first=times[13], last=times[29], mode="encode", crf=6, height=32, width=48)
    assert clip.method == "encode"
    assert decode(clip.content).frames.shape == (17, 32, 48, 3)
    np.testing.assert_allclose(read_times(clip.content), np.array(times[13:30]) - times[13], atol=1e-5)
    check_sound(content, clip.content, times[13], times[30])


@pytest.mark.parametrize("mode", ["copy", "encode"])
def test_sound_that_mp4_cannot_hold_is_encoded(write_video, textured, mode):
    video = write_video(textured(40, 64, 64), codec="mpeg4", format="asf", **YUV)
    content = add_sound(video, "wmav2", format="asf")
    clip = cut_clip(content, first=1.3, last=2.9, mode=mode)
    assert (clip.suffix, clip.audio.codec, clip.audio.rate) == (".mp4", "aac", 48_000)
    samples, offset = read_sound(clip.content)
    heard, expected = samples[4800:24000], make_sound(4.0)[0]
    energy = np.convolve(expected**2, np.ones(len(heard)), "valid")
    where = (energy - 2 * np.correlate(expected, heard)).argmin()
    assert where / RATE == pytest.approx(1.3 + offset + 0.1, abs=0.05)  # of the encoder of the source


def test_what_a_container_says_of_pictures_is_copied(write_video, textured):
    stream = {"sample_aspect_ratio": Fraction(4, 3)}
    colours = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    content = write_video(textured(30, 96, 128), **H265, options=GROUPS, **colours, **stream)
    with av.open(io.BytesIO(content)) as source:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mov") as output:
            turned = output.add_stream_from_template(source.streams.video[0], opaque=True)
            turned.set_display_rotation(90)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = turned
                    output.mux(packet)
    content = buffer.getvalue()
    assert decode(content, frames=1).frames.shape[1:3] == (171, 96)
    result = assert_cut(content, 11, 23)
    assert probe(result).transfer == "pq"


def test_varying_times_are_kept(write_video, textured):
    times = [0, 40, 41, 500, 900, 1000, 1033, 1067, 3000, 3001, 9000, 9040]
    content = write_video(textured(12, 64, 64), **{**H264, "format": "matroska"}, options=GROUPS, times=times)
    assert_cut(content, 2, 9)


def test_interlaced_frames_stay_so(write_video, textured):
    options = {**GROUPS, "x264-params": "tff=1"}
    content = write_video(textured(24, 96, 128), **H264, options=options)
    times = read_times(content)
    clip = cut_clip(content, first=times[8], last=times[20])
    assert clip.method == "copy"
    np.testing.assert_array_equal(decode(clip.content).frames[2:-2], decode(content).frames[10:19])


@pytest.mark.parametrize(
    "kind",
    [
        {**H264, "options": GROUPS, "format": "avi"},  # without presentation times
        {"codec": "libvpx", "format": "webm", **YUV, "options": {"g": "8"}},  # mp4 does not have VP8
        {"codec": "libvpx-vp9", "format": "webm", "pixel_format": "yuva420p"},
    ],
    ids=lambda kind: kind["codec"],
)
def test_what_cannot_be_copied_is_encoded(write_video, textured, kind):
    frames = textured(24, 64, 64, channels=4 if "yuva" in kind["pixel_format"] else 3)
    content = write_video(frames, **kind)
    result = assert_cut(content, 5, 20, method="encode", crf=4)
    difference = decode(result).frames.astype(int) - decode(content).frames[5:21]
    assert np.abs(difference).mean() < 6


def test_a_cropped_picture_is_encoded(write_video, textured, add_aperture):
    content = add_aperture(write_video(textured(24, 64, 96), **H264, options=GROUPS), 48, 1, 32, 1, 8, 1, 0, 1)
    assert decode(content).frames.shape == (24, 32, 48, 3)
    result = decode(assert_cut(content, 5, 20, method="encode", crf=4))
    assert np.abs(result.frames.astype(int) - decode(content).frames[5:21]).mean() < 6


def test_a_whole_file_is_returned_as_it_is(write_video, textured, tmp_path):
    content = add_sound(write_video(textured(12, 64, 64), **H264), "aac")
    clip = cut_clip(content, first=0.0, last=1.1, is_whole=True)
    assert (clip.content, clip.suffix, clip.method) == (content, ".mp4", "whole")
    assert clip.audio == probe_audio(content)
    (tmp_path / "a.mp4").write_bytes(content)
    assert cut_clip(tmp_path / "a.mp4", first=0.0, last=1.1, is_whole=True) == clip
    assert cut_clip(content, first=0.0, last=1.1, is_whole=True, mode="encode").method == "encode"


def test_many_spans_share_the_bytes_of_the_file(write_video, textured):
    """Copies take the share of their packets, and the frames between the key frame and the span, at most 7 here."""
    content = write_video(textured(80, 96, 128), **H264, options={**GROUPS, "crf": "12"})
    spans = [TimeSpan(k / 10, (k + 15) / 10) for k in range(0, 80, 16)]
    clips = list(cut_clips(content, spans))
    assert [clip.method for clip in clips] == ["copy"] * 5
    assert sum(len(clip.content) for clip in clips) < 1.1 * len(content)
    frames = np.concatenate([decode(clip.content).frames for clip in clips])
    np.testing.assert_array_equal(frames, decode(content).frames)
    sizes = [len(packet) for packet in read_packets(content, "video")]
    off_key = cut_clip(content, first=2.3, last=5.4)
    assert len(off_key.content) < sum(sizes[16:56]) + 5000
    assert list(cut_clips(content, spans)) == clips


def test_a_span_between_two_frames_is_refused(write_video, textured):
    content = write_video(textured(12, 64, 64), **H264)
    with pytest.raises(UserError, match=r"0\.52 s.*use times of its frames"):
        cut_clip(content, first=0.52, last=0.55)


@pytest.mark.parametrize(
    ("frames", "seconds", "lengths"), [(100, 20, [100]), (100, 4, [33, 34, 33]), (7, 0.05, [1] * 7)]
)
def test_windows_have_nearly_equal_lengths(frames, seconds, lengths):
    times = (np.arange(frames) / 10).tolist()
    windows = split_span(times, seconds)
    assert sorted(stop - first for first, stop in windows) == sorted(lengths)
    assert [frame for first, stop in windows for frame in range(first, stop)] == list(range(frames))


def test_windows_of_varying_times_are_not_longer_than_asked():
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.5, 400)).tolist()
    windows = split_span(times, 3)
    ends = [*(times[first] for first, _ in windows[1:]), times[-1]]
    assert all(end - times[first] <= 3 + 1e-5 for (first, _), end in zip(windows, ends, strict=True))
    assert split_span([], 3) == ()
    assert split_span([0.0], 3) == ((0, 1),)


def test_sound_of_several_spans_may_become_aac(write_video, textured):
    """A packet that one span was written with keeps its own times for the next one."""
    video = write_video(textured(40, 64, 64), codec="libvpx", format="webm", **YUV, options={"g": "8"})
    content = add_sound(video, "libopus", format="webm")
    times = read_times(content)
    spans = [TimeSpan(times[first], times[first + 9]) for first in (0, 10, 20)]
    cuts = list(cut_clips(content, spans))
    assert [cut.method for cut in cuts] == ["encode"] * 3  # mp4 does not have VP8
    for span, cut in zip(spans, cuts, strict=True):
        check_sound(content, cut.content, span.first, span.first + 1.0)


def test_a_span_in_a_long_group_of_pictures_is_encoded_if_a_copy_would_need_much_more(write_video, textured):
    content = write_video(textured(60, 64, 64), **H264, options={"g": "60", "sc_threshold": "0"})
    times = read_times(content)
    early, late = TimeSpan(times[0], times[49]), TimeSpan(times[50], times[59])
    assert [cut.method for cut in cut_clips(content, [early, late])] == ["copy", "copy"]
    cuts = list(cut_clips(content, [early, late], max_lead_in=0.5))
    assert [cut.method for cut in cuts] == ["copy", "encode"]
    assert [len(decode(cut.content).frames) for cut in cuts] == [50, 10]
    assert len(cuts[0].content) < len(content)
