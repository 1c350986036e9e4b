"""Uploads: what is used of a file, and files that are no video, damaged, too large or hostile."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest

from dit_video.apps.studio import uploads
from dit_video.apps.studio.uploads import ClipFit, Uploads
from dit_video.core.errors import MissingError, UserError
from dit_video.video import Clip, encode

FIT = ClipFit(fps=8.0, max_frames=9, stride=4, multiple=(16, 16), area=16 * 32, planes=((16, 32), (32, 16), (16, 16)))


def make_clip(frames, height, width, fps=8.0):
    """Return a clip whose frames have a brightness of ten times their number."""
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10
    return Clip(np.broadcast_to(shades, (frames, height, width, 3)).copy(), fps=fps)


def make_png_header(width, height):
    """Return a PNG whose header claims a size, with little data."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def add(tmp_path):
    """Return a function that uploads bytes."""
    own = Uploads(tmp_path / "uploads", FIT)

    def upload(content, name, kind="clip"):
        path = tmp_path / f"upload.{name.rpartition('.')[2]}"
        path.write_bytes(content)
        return own.add(path, name, kind), own

    return upload


def test_a_clip_that_fits_is_used_as_it_is(add):
    clip = replace(make_clip(9, 16, 32), caption="a dot")
    described, own = add(encode(clip, "apng"), "clip.png")
    assert described["used"] == {"frames": 9, "height": 16, "width": 32}
    assert own.open_clip(described["upload"]) == clip
    assert described["files"]["png"] == f"media/uploads/{described['upload']}/clip.png"


def test_a_long_large_clip_is_sampled_at_the_model_s_rate_shortened_and_cropped(add):
    described, own = add(encode(make_clip(25, 90, 160, fps=16.0), "mp4"), "holiday.mp4")
    assert described["used"] == {"frames": 9, "height": 16, "width": 32}
    assert "160×90 at 16 fps; used: 9 frames of 32×16" in described["note"]
    clip = own.open_clip(described["upload"])
    assert clip.fps == 8
    # Every second frame of the file.
    np.testing.assert_allclose(clip.frames.mean(axis=(1, 2, 3)), np.arange(9) * 20, atol=4)


@pytest.mark.parametrize(
    ("size", "plane"),
    [((90, 160), (16, 32)), ((160, 90), (32, 16)), ((100, 100), (16, 16)), ((16, 48), (16, 48)), ((32, 16), (32, 16))],
)
def test_the_aspect_ratio_chooses_the_size(size, plane):
    assert FIT.choose_plane(*size) == plane


@pytest.mark.parametrize(("frames", "length"), [(1, 1), (4, 1), (5, 5), (8, 5), (9, 9), (500, 9)])
def test_lengths_fit_the_stride(frames, length):
    assert FIT.round_length(frames) == length


def test_an_image_keeps_its_size_and_a_video_s_first_frame_is_one(add):
    described, own = add(encode(make_clip(1, 50, 70), "png"), "cat.png", "image")
    assert described["used"] == {"frames": 1, "height": 50, "width": 70}
    assert list(described["files"]) == ["png"]
    described, own = add(encode(make_clip(5, 16, 32), "webm"), "clip.webm", "image")
    assert described["used"]["frames"] == 1
    assert own.open_clip(described["upload"]).frames.shape == (1, 16, 32, 3)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"This is no video.\n" * 100, "clip.mp4", "clip.mp4 is not a readable video"),
        (b"Good morning.\n" * 40, "notes.txt", "notes.txt is not a readable video"),  # ffmpeg draws it
        (b"", "empty.mp4", "empty.mp4"),
        (b"#!/bin/sh\nrm -rf /\n", "run.sh", "run.sh"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "list.ffconcat", "list.ffconcat"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "list.m3u8", "list.m3u8"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "x.svg", "x.svg"),
        (make_png_header(30_000, 30_000), "huge.png", "30000×30000 are too large"),
    ],
)
def test_what_is_no_video_is_refused_with_its_name_and_without_a_server_path(add, tmp_path, content, name, message):
    with pytest.raises(UserError) as error:
        add(content, name)
    assert message in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_truncated_clips_are_refused_or_used_up_to_the_damage(add):
    content = encode(make_clip(9, 64, 64), "mp4")
    with pytest.raises(UserError, match=r"cut\.mp4"):
        add(content[: len(content) // 2], "cut.mp4")


def test_a_decoder_that_is_ended_or_takes_too_long_is_a_message(add, monkeypatch):
    content = encode(make_clip(5, 16, 16), "mp4")
    monkeypatch.setattr(uploads, "DECODE_SECONDS", 0.01)
    with pytest.raises(UserError, match="took longer than"):
        add(content, "slow.mp4")
    monkeypatch.setattr(uploads, "DECODE_SECONDS", 60)
    monkeypatch.setattr(uploads.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="its decoder ended"):
        add(content, "crash.mp4")


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "", "0" * 15, "0" * 17, "0" * 16, "G" * 16])
def test_names_that_are_no_upload_of_this_user_do_not_exist(tmp_path, name):
    (tmp_path / "other").mkdir()
    with pytest.raises(MissingError):
        Uploads(tmp_path / "uploads", FIT).open_clip(name)


@pytest.mark.nightly
def test_the_oldest_uploads_make_room(add, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 2)
    content = encode(make_clip(1, 16, 16), "png")
    names = [add(content, "a.png")[0]["upload"] for _ in range(3)]
    _, own = add(content, "a.png")
    assert len(list(own.folder.iterdir())) == 2
    with pytest.raises(MissingError):
        own.open_clip(names[0])
