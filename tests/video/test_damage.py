"""Files that are damaged, empty, of another kind, or that promise more than they hold."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dit_video.core.errors import DecodeError
from dit_video.tokens import Grid
from dit_video.video import VideoInfo, decode, probe
from dit_video.video.reader import MAX_PIXELS
from support.devices import HANG, PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
READS = [probe, decode, lambda content: decode(content, fps=8)]
X264 = {"codec": "libx264", "pixel_format": "yuv420p", "format": "mp4"}


def get_errors(content: bytes) -> list[str]:
    """Return the errors for an unreadable file, of probe, of decode at its rate and at another one."""
    said = []
    for read in READS:
        with pytest.raises(DecodeError) as caught:
            read(content)
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    return said


@pytest.fixture(scope="module")
def mp4(write_video, textured):
    return write_video(textured(12, 32, 48), **X264)


@pytest.fixture(scope="module")
def streamable(write_video, textured, tmp_path_factory):
    """Return an mp4 with its header first."""
    content = write_video(
        textured(40, 32, 48),
        **X264,
        options={"qp": "10", "g": "1"},
        path=tmp_path_factory.mktemp("fast") / "fast.mp4",
        container_options={"movflags": "+faststart"},
    )
    assert content.index(b"moov") < content.index(b"mdat")
    return content


def test_an_mp4_without_its_trailing_header_is_refused(mp4):
    assert mp4.index(b"mdat") < mp4.index(b"moov")
    for stop in (len(mp4) - 1_000, mp4.index(b"moov") + 100, mp4.index(b"moov") - 10, len(mp4) // 2):
        for reason in get_errors(mp4[:stop]):
            assert any(
                said in reason
                for said in ("not a readable", "no complete frame", "no readable video stream", "damaged at its start")
            ), reason


def test_an_mp4_cut_in_the_middle_says_where_it_ends(streamable):
    for reason in get_errors(streamable[: len(streamable) * 6 // 10]):
        assert "damaged after" in reason
        assert 0.5 < float(reason.split("damaged after ")[1].split(" s")[0]) < 3.5
    assert len(decode(streamable[: len(streamable) * 6 // 10], frames=5).frames) == 5  # earlier frames are complete


def test_empty_and_foreign_files_are_refused(tmp_path):
    for content in (
        b"",
        b"\0",
        bytes(100_000),
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"not a video\n" * 1000,
        "clip.mp4,ein Hündchen\n".encode("latin-1") * 99,
    ):
        get_errors(content)
        path = tmp_path / "text.mp4"
        path.write_bytes(content)
        for read in (probe, decode):
            with pytest.raises(DecodeError, match=r"text\.mp4 is (not a readable video or image|damaged at its start)"):
                read(path)


def test_a_file_without_read_permission_is_reported(tmp_path, mp4, monkeypatch):
    path = tmp_path / "locked.mp4"
    path.write_bytes(mp4)

    def refuse(*_: object, **__: object):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DecodeError, match=r"locked\.mp4 .*Permission denied"):
        probe(path)


def test_a_video_of_one_frame_is_decoded(write_video, textured):
    content = write_video(textured(1, 32, 48), **X264)
    assert probe(content).frames == len(decode(content).frames) == 1
    assert probe(content).seconds == 0
    assert decode(content, size=Grid(1, 16, 24)).frames.shape == (1, 16, 24, 3)
    assert decode(content, fps=8).fps == 8


def most_memory() -> int:
    """Return the peak memory of this process in bytes; all systems but macOS count in kilobytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def test_frames_of_impossible_size_are_refused_in_little_memory(write_video):
    """The header of a PNG promises 100,000 rows and columns, which are 40 GB."""
    image = write_video(np.zeros((1, 8, 8, 3), np.uint8), codec="png", format="image2pipe", pixel_format="rgb24")
    offset = image.index(b"IHDR") + 4
    huge = image[:offset] + struct.pack(">II", 100_000, 100_000) + image[offset + 8 :]
    before = most_memory()
    get_errors(huge)
    assert most_memory() - before < 300 << 20


def test_a_pixel_aspect_that_makes_frames_too_large_is_refused(write_video, textured):
    content = write_video(textured(1, 512, 2048), **X264, sample_aspect_ratio=Fraction(500))
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].sample_aspect_ratio == 500
    for read in (probe, decode):
        with pytest.raises(DecodeError, match=f"512x1024000 pixels, over the limit of {MAX_PIXELS}"):
            read(content)


# --- promises -------------------------------------------------------------------------------------------------------


def write(content: bytes, after: bytes, offset: int, value: int, order: str = ">") -> bytes:
    """Replace a number of four bytes at an offset after a name."""
    start = content.index(after) + 4 + offset
    return content[:start] + struct.pack(f"{order}I", value) + content[start + 4 :]


def read_within_limits(content: bytes, read, *, seconds: float = 20, megabytes: int = 300):
    """Return the result of reading or its error, after little memory and processor time."""
    started, before = time.process_time(), most_memory()
    try:
        result = read(content)
    except DecodeError as error:
        result = error
    assert time.process_time() - started < seconds
    assert most_memory() - before < megabytes << 20
    return result


@pytest.mark.parametrize("count", [10**9, 8 * 10**7, 10**6])
@pytest.mark.parametrize("read", READS)
def test_an_mp4_that_promises_frames_it_lacks_is_refused(mp4, count, read):
    """One size for all frames contradicts no table, and ffmpeg would make an index of them."""
    promised = write(write(write(mp4, b"stts", 8, count), b"stsz", 8, count), b"stsz", 4, 20)
    for content in (promised, write(promised, b"stsc", 12, count)):
        assert f"claims {count} frames of 20 bytes" in str(read_within_limits(content, read))


@pytest.mark.parametrize("read", READS)
def test_other_headers_that_promise_frames_are_bounded(mp4, write_video, textured, read):
    times = read_within_limits(write(mp4, b"stts", 8, 10**9), read)  # more times than frames, which are read
    assert isinstance(times, DecodeError) or getattr(times, "frames", None) is not None
    assert isinstance(read_within_limits(write(mp4, b"stsz", 8, 10**9), read), DecodeError)  # a table of that many
    assert isinstance(read_within_limits(write(mp4, b"stts", 12, 10**9), read), DecodeError)  # frames of a day
    avi = write_video(textured(12, 32, 48), codec="mjpeg", pixel_format="yuvj420p", format="avi")
    avi = write(write(avi, b"avih", 20, 10**9, "<"), b"strh", 36, 10**9, "<")
    result = read_within_limits(avi, read)
    assert (result.frames if isinstance(result, VideoInfo) else len(result.frames)) in (10, 12)


def test_a_gif_with_the_longest_frame_times_is_decoded(write_video, textured):
    """The longest time of a frame in a GIF is 65,535 hundredths of a second, 11 minutes."""
    content = bytearray(write_video(textured(4, 32, 48), codec="gif", format="gif", pixel_format="rgb8"))
    offset = 0
    while (offset := content.find(b"\x21\xf9\x04", offset + 1)) > 0:
        content[offset + 4 : offset + 6] = b"\xff\xff"
    assert probe(bytes(content)).seconds == pytest.approx(3 * 655.35)
    assert len(read_within_limits(bytes(content), lambda file: decode(file, fps=8)).frames) > 4 * 655 * 7


# --- damage in the middle -------------------------------------------------------------------------------------------

CODECS = {
    "h264": {**X264, "options": {"qp": "10", "bf": "0"}},
    "h264 in mkv": {**X264, "format": "matroska", "options": {"qp": "10", "bf": "0"}},
    "vp9": {"codec": "libvpx-vp9", "pixel_format": "yuv420p", "format": "webm", "options": {"crf": "4", "b": "0"}},
    "png": {"codec": "png", "pixel_format": "rgb24", "format": "mov"},
    "ffv1": {
        "codec": "ffv1",
        "pixel_format": "yuv420p",
        "format": "matroska",
        "options": {"level": "3", "slicecrc": "1"},
    },
    "mpeg4": {"codec": "mpeg4", "pixel_format": "yuv420p", "format": "mp4", "options": {"qmin": "1", "qmax": "2"}},
}


@pytest.mark.parametrize("codec", CODECS)
def test_a_corrupt_frame_in_the_middle_is_reported_with_its_time(write_video, textured, codec):
    """The error names the second, and earlier frames are decoded. VP9 checks the headers of frames alone."""
    content = write_video(textured(40, 48, 64), **CODECS[codec])
    with av.open(io.BytesIO(content)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        damaged = bytes(packets[20])
    offset = content.index(damaged)
    head = 0 if codec == "vp9" else len(damaged) // 8
    noise = np.random.default_rng(7).integers(0, 256, len(damaged) - head).astype(np.uint8).tobytes()
    broken = content[: offset + head] + noise + content[offset + len(damaged) :]
    for read in (probe, decode, lambda file: decode(file, fps=10), lambda file: decode(file, start=1.5)):
        with pytest.raises(DecodeError, match=r"damaged (at|after) (1\.9\d|2\.0\d) s"):
            read(broken)
    np.testing.assert_array_equal(decode(broken, frames=15).frames, decode(content, frames=15).frames)


# --- pictures that are cut, or overwritten in part --------------------------------------------------------------------

PICTURES = {
    "jpeg": {"quality": 90},
    "progressive jpeg": {"quality": 90, "progressive": True},
    "png": {},
    "webp": {"quality": 80},
    "lossless webp": {"lossless": True},
    "bmp": {},
    "tiff": {},
    "compressed tiff": {"compression": "tiff_lzw"},
    "gif": {},
    "avif": {},
    "animated gif": {"save_all": True, "duration": 80},
    "animated png": {"save_all": True, "duration": 80},
    "animated webp": {"save_all": True, "duration": 80},
    "avi of jpeg": {"codec": "mjpeg", "pixel_format": "yuvj420p", "format": "avi"},
    "mov of png": {"codec": "png", "pixel_format": "rgb24", "format": "mov"},
}


UNCHECKED = {"progressive jpeg", "webp", "lossless webp", "bmp", "tiff", "avif", "animated webp"}
"""Kinds without checksums, where zeros in the middle are as good as other pixels."""


@pytest.fixture(scope="module")
def pictures(write_video, textured):
    """Return files of each kind that are far larger than what a decoder reads to tell the kind."""
    frames = textured(8, 240, 320)
    images = [Image.fromarray(frame) for frame in frames]
    files = {}
    for kind, options in PICTURES.items():
        if "codec" in options:
            files[kind] = write_video(frames, **options)
            continue
        buffer = io.BytesIO()
        others = {"append_images": images[1:]} if "save_all" in options else {}
        images[0].save(buffer, format=kind.split()[-1], **options, **others)
        files[kind] = buffer.getvalue()
    return files


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_is_cut_short_is_refused(pictures, kind, share):
    """Decoders make up what is missing (JPEG, GIF), and say so only if they are asked to."""
    content = pictures[kind]
    get_errors(content[: round(len(content) * share)])


CONTAINERS = {
    "mkv": X264 | {"format": "matroska"},
    "webm": X264 | {"format": "webm", "codec": "libvpx-vp9"},
    "avi": X264 | {"format": "avi", "codec": "mpeg4"},
}


TRANSPORT = {"format": "mpegts", "rate": 25}
OVERWRITTEN = {
    "h264.ts": X264 | TRANSPORT,
    "h264.m2ts": X264 | TRANSPORT | {"container_options": {"mpegts_m2ts_mode": "1"}},
    "mpeg2.ts": TRANSPORT | {"codec": "mpeg2video", "pixel_format": "yuv420p"},
    "ffv1.mkv": {"codec": "ffv1", "pixel_format": "yuv420p", "format": "matroska"},
    "flv1.flv": {"codec": "flv", "pixel_format": "yuv420p", "format": "flv"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p", "format": "avi"},
}


@pytest.mark.parametrize("kind", OVERWRITTEN)
def test_a_video_of_which_a_part_is_overwritten_or_lost_is_refused(write_video, textured, kind):
    """ffmpeg goes on at the next packet that it can read, and decoders show something in place of lost frames."""
    content = write_video(textured(30, 48, 64), **OVERWRITTEN[kind])
    assert len(decode(content).frames) == 30
    length = len(content) // 20
    for start in range(6 * length, len(content) - 3 * length, length):
        with pytest.raises(DecodeError):
            probe(content[:start] + bytes(length) + content[start + length :])
    if size := {"h264.ts": 188, "h264.m2ts": 192}.get(kind):
        start = len(content) // 2 // size * size
        with pytest.raises(DecodeError, match="packets are missing at byte"):
            probe(content[:start] + content[start + size :])


def test_an_mp4_with_a_table_of_empty_frames_is_refused(mp4):
    """ffmpeg leaves them out."""
    last = mp4.index(b"stsz") + 16 + 4 * 11
    assert "its table has empty frames" in get_errors(mp4[:last] + bytes(4) + mp4[last + 4 :])[0]


def test_transport_streams_that_are_joined_are_read(write_video, textured):
    content = write_video(textured(12, 48, 64), **OVERWRITTEN["h264.ts"])
    later = write_video(textured(12, 48, 64), first=12, **OVERWRITTEN["h264.ts"])
    assert len(decode(content[188:] + later).frames) == 24


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_video_that_is_cut_short_is_refused(write_video, textured, kind, share):
    """ffmpeg shows the frames that are there, as if there were no more."""
    content = write_video(textured(24, 32, 48), **CONTAINERS[kind])
    assert len(decode(content).frames) == 24
    get_errors(content[: round(len(content) * share)])


def test_a_stream_without_an_end_is_read(write_video, textured):
    """Recorders of live video write no sizes, as they don't know them."""
    content = write_video(textured(24, 32, 48), **CONTAINERS["mkv"] | {"container_options": {"live": "1"}})
    start = content.index(b"\x18\x53\x80\x67")
    assert content[start + 4 : start + 12] == b"\x01" + b"\xff" * 7
    assert len(decode(content).frames) == 24


@pytest.mark.parametrize("kind", sorted(set(PICTURES) - UNCHECKED))
def test_a_picture_that_is_overwritten_is_refused(pictures, kind):
    """A twentieth is zero."""
    content = pictures[kind]
    start, length = round(len(content) * 0.6), len(content) // 20
    get_errors(content[:start] + bytes(length) + content[start + length :])


STILLS = [kind for kind in PICTURES if not kind.startswith(("animated", "avi of", "mov of"))]


@pytest.mark.parametrize("kind", [kind for kind in STILLS if kind != "avif"])
def test_what_follows_a_picture_is_not_read(pictures, write_video, textured, kind):
    """Phones append to their photos a map of brightness or depth, a preview, a video or bytes of their own."""
    content, expected = pictures[kind], decode(pictures[kind])
    assert len(expected.frames) == 1
    for tail in (
        pictures["jpeg"],
        pictures["progressive jpeg"] + pictures["png"],
        write_video(textured(2, 32, 48), codec="mjpeg", pixel_format="yuvj420p", format="image2pipe"),  # a smaller one
        write_video(textured(8, 32, 48), **X264),
        bytes(range(200)) * 20,
    ):
        assert decode(content + tail) == expected


@pytest.mark.parametrize(("kind", "end"), [("jpeg", 2), ("progressive jpeg", 2), ("gif", 1), ("animated gif", 1)])
def test_a_missing_end_marker_is_no_damage(pictures, kind, end):
    assert decode(pictures[kind][:-end]) == decode(pictures[kind])


# --- mutations ------------------------------------------------------------------------------------------------------

KINDS = {
    "h264.mp4": X264,
    "h264.mkv": {**X264, "format": "matroska"},
    "interlaced.mp4": {**X264, "options": {"flags": "+ilme+ildct", "x264-params": "tff=1"}},
    "vp8.webm": {"codec": "libvpx", "pixel_format": "yuv420p", "format": "webm", "options": {"deadline": "realtime"}},
    "vp9.webm": {
        "codec": "libvpx-vp9",
        "pixel_format": "yuva420p",
        "format": "webm",
        "options": {"deadline": "realtime", "cpu-used": "8"},
    },
    "gif": {"codec": "gif", "pixel_format": "rgb8", "format": "gif"},
    "apng": {"codec": "apng", "pixel_format": "rgb24", "format": "apng"},
    "png": {"codec": "png", "pixel_format": "rgb24", "format": "image2pipe"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p", "format": "avi"},
    "mpeg4.avi": {"codec": "mpeg4", "pixel_format": "yuv420p", "format": "avi"},
    "mpeg2.ts": {"codec": "mpeg2video", "pixel_format": "yuv420p", "format": "mpegts", "rate": 25},
}


def mutate(rng: np.random.Generator, content: bytes, other: bytes) -> bytes:
    data, length = bytearray(content), len(content)
    kind = rng.integers(6)
    if kind == 0:  # some bytes
        for offset in rng.integers(0, length, rng.integers(1, 30)):
            data[offset] = rng.integers(256)
    elif kind == 1:  # some bits of the header
        for offset in rng.integers(0, min(length, 400), rng.integers(1, 6)):
            data[offset] ^= 1 << rng.integers(8)
    elif kind == 2:  # the end is missing
        data = data[: rng.integers(1, length)]
    elif kind == 3:  # a part is missing, or stands twice
        first, last = sorted(rng.integers(0, length, 2))
        data[first:last] = b"" if rng.integers(2) else data[first:last] * 2
    elif kind == 4:  # numbers at limits
        for offset in rng.integers(0, min(length, 1500), 3):
            number = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000000])
            data[offset : offset + 4] = int(number).to_bytes(4, "big" if rng.integers(2) else "little")
    else:  # a part of another file
        first, offset = int(rng.integers(len(other))), int(rng.integers(length))
        data[offset : offset + 300] = other[first : first + 300]
    return bytes(data)


def survive(folder: Path, files: dict[str, bytes], count: int, seed: int) -> Counter[str]:
    """Count the outcomes of reading mutated files in another process, which shows a crash or a hang."""
    folder.mkdir()
    names = sorted(files)
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        name, other = names[index % len(names)], names[rng.integers(len(names))]
        (folder / f"{index:05d}-{name}").write_bytes(mutate(rng, files[name], files[other]))
    command = [sys.executable, "-X", "faulthandler", "-P", str(PROGRAMS / "decode_files.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = folder.parent / "log"
    with log.open("wb") as out:
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, env=environment, timeout=HANG + count, check=False
        )
    done = [json.loads(line) for line in log.read_text().splitlines()]
    last = done[-1][0] if done else "none"
    assert code.returncode == 0, f"after {last}: {code.returncode} {code.stderr.decode(errors='replace')[-3000:]}"
    assert len(done) == count
    return Counter(outcome for _, outcomes in done for outcome in outcomes)


@pytest.fixture(scope="module")
def originals(write_video, textured):
    return {
        name: write_video(textured(1 if name == "png" else 16, 32, 48, channels=4 if "vp9" in name else 3), **how)
        for name, how in KINDS.items()
    }


def test_mutated_files_decode_or_fail_cleanly(originals, tmp_path):
    outcomes = survive(tmp_path / "mutations", originals, 121, seed=1)
    assert set(outcomes) <= {"VideoInfo", "Clip", "DecodeError", "UserError"}
    # Neither all nor none of the files are damaged.
    assert all(outcomes[kind] >= 20 for kind in ("VideoInfo", "Clip", "DecodeError"))


@pytest.mark.slow
def test_a_thousand_mutated_files_decode_or_fail_cleanly(originals, tmp_path):
    outcomes = survive(tmp_path / "mutations", originals, 1001, seed=2)
    assert set(outcomes) <= {"VideoInfo", "Clip", "DecodeError", "UserError"}
    assert outcomes["DecodeError"] >= 500
