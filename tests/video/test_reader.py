"""Times of frames in containers with and without timestamps, and files that a file may open."""

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dit_video.core.errors import DecodeError, UserError
from dit_video.video import decode, probe
from dit_video.video.decode import deinterlace
from dit_video.video.reader import Video

COUNT = 40
LEVELS = (20 + 5 * np.arange(COUNT)).astype(np.uint8)


def make_numbered_frames(count: int = COUNT) -> np.ndarray:
    """Return frames of a plain grey of 20 + 5 i, but for a corner, so that encoders skip none."""
    frames = np.broadcast_to(LEVELS[:count, None, None, None], (count, 32, 48, 3)).copy()
    frames[:, :8, :8] = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3))
    return frames


def numbers(clip) -> list[int]:
    return [round((float(frame[12:, 12:].mean()) - 20) / 5) for frame in clip.frames]


X264 = {"codec": "libx264", "pixel_format": "yuv420p", "options": {"qp": "2", "g": "10"}}
MPEG = {"codec": "mpeg2video", "pixel_format": "yuv420p", "options": {"qmin": "1", "qmax": "2", "b": "9M", "g": "10"}}
FILES = {
    "mp4": {**X264, "format": "mp4"},
    "mov": {**X264, "format": "mov"},
    "mkv": {**X264, "format": "matroska"},
    "flv": {**X264, "format": "flv"},
    "ts": {**X264, "format": "mpegts"},
    "h264 in avi": {**X264, "format": "avi"},  # decoding timestamps alone
    "h264 alone": {**X264, "format": "h264"},  # none
    "mpeg": {**MPEG, "rate": 25, "format": "vob"},
    "mpeg with b": {**MPEG, "rate": 25, "format": "vob", "max_b_frames": 2},
    "mpeg2 alone": {**MPEG, "rate": 25, "format": "mpeg2video", "max_b_frames": 2},
    "avi": {"codec": "mjpeg", "pixel_format": "yuvj420p", "format": "avi", "options": {"qmin": "1", "qmax": "1"}},
    "mpeg4 in avi": {
        "codec": "mpeg4",
        "pixel_format": "yuv420p",
        "format": "avi",
        "max_b_frames": 2,
        "options": {"qmin": "1", "qmax": "1", "g": "10"},
    },
    "vp8": {
        "codec": "libvpx",
        "pixel_format": "yuv420p",
        "format": "webm",
        "options": {"deadline": "realtime", "crf": "4", "b": "9M", "g": "10"},
    },
    "vp9": {
        "codec": "libvpx-vp9",
        "pixel_format": "yuv420p",
        "format": "webm",
        "options": {"deadline": "realtime", "cpu-used": "8", "crf": "4", "b": "0", "g": "10"},
    },
    "gif": {"codec": "gif", "pixel_format": "gray", "format": "gif"},
    "apng": {"codec": "apng", "pixel_format": "rgb24", "format": "apng"},
}


@pytest.fixture(scope="module", params=FILES)
def file(request, write_video):
    return write_video(make_numbered_frames(), **FILES[request.param]), FILES[request.param].get("rate", 10)


def test_every_frame_comes_once_in_order(file):
    content, rate = file
    clip, facts = decode(content), probe(content)
    assert numbers(clip) == list(range(COUNT))
    assert clip.fps == facts.fps == pytest.approx(rate)
    assert facts.frames == COUNT
    assert facts.seconds == pytest.approx((COUNT - 1) / rate, abs=2e-3)


def test_inexact_frames_have_the_same_times(file):
    content, _ = file
    with Video(content) as exact, Video(content, is_exact=False) as fast:
        pairs = list(zip(exact.read_frames(), fast.read_frames(), strict=True))
    assert len(pairs) == COUNT
    assert [one.time for one, _ in pairs] == [other.time for _, other in pairs]
    for one, other in pairs:
        pictures = (timed.frame.to_ndarray(format="gray").astype(float) for timed in (one, other))
        assert abs(next(pictures) - next(pictures)).mean() < 2


def test_any_start_gives_the_frame_shown_then(file):
    content, rate = file
    for first in (0, 1, 9, 10, 11, 19, 25, 30, 31, 38):
        assert numbers(decode(content, start=(first + 0.4) / rate, frames=2)) == [first, first + 1]
    assert numbers(decode(content, start=(COUNT - 0.6) / rate)) == [COUNT - 1]


def test_a_rate_samples_frames_by_time(file):
    content, rate = file
    assert numbers(decode(content, fps=rate / 2, frames=20)) == list(range(0, COUNT, 2))
    assert numbers(decode(content, fps=rate / 2, start=20 / rate, frames=3)) == [20, 22, 24]
    assert numbers(decode(content, fps=2 * rate, start=30 / rate, frames=4)) == [30, 30, 31, 31]


def test_a_recording_that_begins_between_key_frames_starts_at_the_first_one(write_video):
    """In a part of a broadcast, time counts from the first key frame, and nothing before it can be decoded."""
    options = {**X264["options"], "bf": "0", "sc_threshold": "0"}
    content = write_video(make_numbered_frames(), **{**X264, "options": options}, format="mpegts")
    parts = [content[offset : offset + 188] for offset in range(0, len(content), 188)]
    keys = [offset for offset, part in enumerate(parts) if part[3] & 0x20 and part[4] and part[5] & 0x40]
    assert len(keys) == 4
    cut = b"".join(parts[(keys[0] + keys[1]) // 2 :])
    with av.open(io.BytesIO(cut)) as container:
        previous = next(container.demux(video=0))
        assert not previous.is_keyframe
    assert numbers(decode(cut)) == list(range(10, COUNT))
    assert numbers(decode(cut, start=1.54, frames=2)) == [25, 26]
    assert probe(cut).seconds == pytest.approx(2.9, abs=2e-3)


def test_empty_packets_repeat_a_frame(write_video):
    """In AVI an empty packet shows the frame before it for longer, although a decoder would end there."""
    content = write_video(make_numbered_frames(20), codec="mjpeg", pixel_format="yuvj420p", format="avi")
    source, out = io.BytesIO(content), io.BytesIO()
    with av.open(source) as read, av.open(out, "w", format="avi") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for index, packet in enumerate(packet for packet in read.demux(video=0) if packet.size):
            empty = index in (7, 8)
            if not empty:
                packet.stream = stream
                write.mux(packet)
    # Frames 7 and 8 are left out, so the muxer writes packets of no bytes in their places.
    result = decode(out.getvalue())
    assert numbers(result) == [*range(7), *range(9, 20)]
    assert numbers(decode(out.getvalue(), fps=10)) == [*range(7), 6, 6, *range(9, 20)]


@pytest.mark.parametrize("gap", [3_601_000, 10**9])
def test_timestamps_that_jump_are_refused(write_video, gap):
    times = [0, 100, 200, 200 + gap, 300 + gap]
    content = write_video(make_numbered_frames(5), pixel_format="bgr0", times=times)
    for read in (probe, decode, lambda file: decode(file, fps=8)):
        with pytest.raises(DecodeError, match=r"jump from 0\.20 s"):
            read(content)


def test_a_frame_may_stand_for_minutes(write_video):
    content = write_video(make_numbered_frames(3), times=[0, 100, 600_100])
    assert probe(content).seconds == pytest.approx(600.1)
    assert numbers(decode(content, fps=1 / 100, frames=7)) == [0, 1, 1, 1, 1, 1, 1]


def test_joined_recordings_whose_clock_is_set_back_are_refused(write_video):
    part = write_video(make_numbered_frames(), **X264, format="mpegts")
    with pytest.raises(DecodeError, match="jump"):
        decode(part + part)


def test_a_clip_larger_than_memory_is_refused(write_video, monkeypatch):
    monkeypatch.setattr(sys.modules[decode.__module__], "MAX_BYTES", 10 * 32 * 48 * 3)
    content = write_video(make_numbered_frames(20), **X264, format="mp4")
    assert len(decode(content, frames=10).frames) == 10
    with pytest.raises(UserError, match="use fewer frames"):
        decode(content)


# --- what a file may open -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a%02d.mp4", "12:30.mp4", "file:x.mp4", "-i.mp4", "ü ☃.mp4", "concat:a|b.mp4"])
def test_a_name_is_no_pattern_and_no_address(write_video, tmp_path, monkeypatch, name):
    content = write_video(make_numbered_frames(3), **X264, format="mp4")
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, Path(name)):
        assert probe(path) == probe(content)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG", ".png", ".mp4"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_a_photo_is_the_same_by_its_path_and_by_its_bytes(tmp_path, format, suffix):
    """A photo is larger than the 2 kB that ffmpeg looks at first, where suffixes would win over content."""
    path = tmp_path / f"photo{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).resize((320, 240)).save(path, format)
    assert path.stat().st_size > 4096
    clip = decode(path)
    assert clip.frames.shape == (1, 240, 320, 3)
    np.testing.assert_array_equal(clip.frames, decode(path.read_bytes()).frames)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".jpg"])
def test_a_video_is_the_same_by_its_path_and_by_its_bytes(file, tmp_path, suffix):
    content, _ = file
    path = tmp_path / f"video{suffix}"
    path.write_bytes(content)
    assert probe(path) == probe(content)


@pytest.mark.parametrize("kind", ["m3u8", "concat"])
def test_a_playlist_opens_no_other_file(write_video, tmp_path, kind):
    """A text with the name of a video must not show another file, nor open an address."""
    secret = tmp_path / "secret.ts"
    secret.write_bytes(write_video(make_numbered_frames(5), **X264, format="mpegts"))
    text = {
        "m3u8": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\n{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {secret.name}\n",
    }[kind]
    path = tmp_path / "clip.mp4"
    path.write_text(text)
    for source in (path, text.encode()):
        for read in (probe, decode):
            with pytest.raises(DecodeError):
                read(source)


def test_a_cover_is_no_video(write_video):
    """A song with a cover picture is sound alone, and a film with one is the film, in either order."""
    cover = next(packets(write_video(make_numbered_frames(1), codec="mjpeg", pixel_format="yuvj420p", format="avi")))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=8000, layout="mono")
        picture = output.add_stream_from_template(cover.stream)
        picture.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in [*sound.encode(frame), *sound.encode(None)]:
            output.mux(packet)
        cover.stream = picture
        output.mux(cover)
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(DecodeError, match="no readable video stream"):
        decode(buffer.getvalue())


def packets(content: bytes):
    container = av.open(io.BytesIO(content))
    yield from (packet for packet in container.demux(video=0) if packet.size)


def test_times_never_fall(file):
    content, _ = file
    with Video(content) as video:
        times = [timed.time for timed in deinterlace(video.read_frames(), video.name)]
    assert times == sorted(times)
    assert times[0] == 0


def test_the_default_of_several_video_streams_is_read():
    """The first one here is small and has one frame, as previews in files of cameras."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        for size, disposition in (((16, 16), av.stream.Disposition(0)), ((48, 32), av.stream.Disposition.default)):
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height = size
            stream.pix_fmt, stream.disposition = "yuv420p", disposition
        for stream, frames in zip(container.streams.video, (1, 8), strict=True):
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(np.zeros((stream.height, stream.width, 3), np.uint8), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    info = probe(file.getvalue())
    assert (info.width, info.height, info.frames) == (48, 32, 8)
