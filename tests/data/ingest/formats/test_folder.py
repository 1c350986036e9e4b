"""Folders of clips with their captions."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.data.ingest.formats import MEDIA, list_clips
from support.clip_folders import LATIN, get_captions, write_files


def test_captions_are_read_from_files_next_to_the_clips(tmp_path):
    write_files(
        tmp_path,
        {
            "b.mp4": "bytes of b",
            "b.txt": "\ufeff a caption\r\nof two  lines \n",
            "A.MP4": b"",
            "A.TXT": "upper case",
            "sub/c.webm": b"c",
            "sub/c.json": json.dumps({"caption": "one", "text": None, "captions": ["two", " one ", ""], "fps": 30}),
            "sub/c.caption": "zero",
            "d.png": b"",
            "d.txt": " \n",
            "e.dots.gif": b"",
            "e.dots.txt": "dotted",
            "e.txt": "of no clip",
            "sub/d.mov": b"",
            "sub/d.json": json.dumps({"fps": 30}),
            ".cache/hidden.mp4": b"",
            "._b.mp4": b"",
            "notes.md": "no clip",
            "f.mov": b"",
            "f.mov.txt": "by its whole name",
        },
    )
    listing = list_clips(tmp_path)
    assert get_captions(listing) == {
        "A.MP4": ("upper case",),
        "b.mp4": ("a caption\r\nof two  lines",),
        "d.png": (),
        "e.dots.gif": ("dotted",),
        "sub/c.webm": ("zero", "one", "two"),
        "f.mov": ("by its whole name",),
        "sub/d.mov": (),
    }
    assert list(get_captions(listing)) == sorted(get_captions(listing))
    assert (listing.format, listing.rejected) == ("folder", ())
    assert listing.unlisted == ("e.txt", "notes.md", "sub/d.json")
    clip = listing.clips[1]
    assert (clip.size, clip.offset, clip.split, clip.read()) == (10, None, "train", b"bytes of b")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("b.txt", LATIN, r"'b\.txt' is not UTF-8"),
        ("b.json", b'{"text": "' + LATIN + b'"}', r"'b\.json' is not UTF-8"),
        ("b.json", "{", r"'b\.json' is not JSON"),
        ("b.json", "[" * 100_000, r"'b\.json' is not JSON"),
        ("b.json", "[1]", r"'b\.json' holds a list"),
        ("b.json", '{"text": 3}', "its text is int, not text"),
        ("b.json", '{"captions": ["a", ["b"]]}', "its captions is list, not text"),
        ("b.json", r'{"text": "\ud800"}', "its caption is not UTF-8"),
        ("b.txt", "x" * 100_000, "its caption has 100,000 bytes, 65,536 is the limit"),
        ("b.txt", "é" * 32_769, "its caption has 65,538 bytes"),
        ("b.txt", b" " * (17 << 20), r"'b\.txt' has 17,825,792 bytes, 16,777,216 is the limit of a caption file"),
    ],
)
def test_a_clip_with_a_bad_caption_file_is_rejected(tmp_path, name, content, reason):
    write_files(tmp_path, {"a.mp4": b"", "a.txt": "fine", "b.mp4": b"", name: content})
    listing = list_clips(tmp_path)
    assert get_captions(listing) == {"a.mp4": ("fine",)}
    ((rejected, why),) = listing.rejected
    assert rejected == "b.mp4"
    assert re.search(reason, why), why


def test_the_longest_caption_is_kept(tmp_path):
    write_files(tmp_path, {"a.mp4": b"", "a.txt": "x" * 65_536 + "\n"})
    assert len(list_clips(tmp_path).clips[0].captions[0]) == 65_536


def test_names_may_contain_any_characters(tmp_path):
    write_files(tmp_path, {"a.mp4": b"", "é \n日本.mp4": b""})
    assert [clip.name for clip in list_clips(tmp_path).clips] == ["a.mp4", "é \n日本.mp4"]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_names_that_are_not_utf8_are_rejected(tmp_path):
    write_files(tmp_path, {"a.mp4": b""})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mp4")).write_bytes(b"")
    listing = list_clips(tmp_path)
    assert [clip.name for clip in listing.clips] == ["a.mp4"]
    assert listing.rejected == (("\\udce9.mp4", "its name is not UTF-8; rename it"),)


def test_a_large_folder_is_listed_without_a_call_for_each_file(tmp_path, monkeypatch):
    """There are no calls for each name that a clip's captions might have."""
    write_files(tmp_path, {f"{i % 10}/{i}{suffix}": "x" for i in range(1000) for suffix in (".mp4", ".md", ".txt")})
    looks: list[str] = []
    real = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *args, **kwargs: (looks.append(str(path)), real(path, *args, **kwargs))[1]
    )
    listing = list_clips(tmp_path)
    assert len(listing.clips) == 1000
    assert all(clip.captions == ("x",) for clip in listing.clips)
    assert len([path for path in looks if path.startswith(str(tmp_path))]) <= 20


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no such folder or file"):
        list_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no clips"):
        list_clips(tmp_path / "empty")
    write_files(tmp_path, {"only/a.mp4": b"", "only/a.txt": LATIN})
    with pytest.raises(UserError, match=r"none of the 1 entries .* can be used \(first: a\.mp4: 'a\.txt' is not UTF-8"):
        list_clips(tmp_path / "only")


def test_all_suffixes_are_found(tmp_path):
    write_files(tmp_path, {f"a{suffix.upper()}": b"" for suffix in MEDIA})
    listing = list_clips(tmp_path)
    assert len(listing.clips) == len(MEDIA) - 1 == 27
    assert listing.rejected == (("a.JXL", "is JPEG XL, which no installed decoder reads; convert it to PNG"),)
