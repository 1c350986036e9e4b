"""Links, pipes, and files that may not be read."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import list_clips
from support.clip_folders import get_captions, write_files


def test_linked_folders_are_listed_once_and_broken_links_rejected(tmp_path):
    write_files(
        tmp_path, {"source/real/a.mp4": b"abc", "source/b.mp4": b"", "elsewhere/c.mp4": b"", "elsewhere/d/e.mp4": b""}
    )
    source = tmp_path / "source"
    (source / "link.mp4").symlink_to("real/a.mp4")
    (source / "broken.mp4").symlink_to("nowhere.mp4")
    (source / "self.mp4").symlink_to("self.mp4")
    (source / "nothing").symlink_to("nowhere")
    (source / "outside").symlink_to(tmp_path / "elsewhere")
    (source / "later").symlink_to(tmp_path / "elsewhere")
    (source / "real" / "circle").symlink_to(source)
    (source / "1real").symlink_to("real")
    (source / "folder.mp4").mkdir()
    os.mkfifo(source / "pipe.mp4")
    listing = list_clips(source)
    assert [clip.name for clip in listing.clips] == [
        *("b.mp4", "later/c.mp4", "later/d/e.mp4", "link.mp4", "real/a.mp4"),
    ]
    assert {clip.name: clip.size for clip in listing.clips}["link.mp4"] == 3
    rejected = dict(listing.rejected)
    assert rejected.pop("self.mp4").startswith("cannot be read (")
    assert rejected == {
        "1real": "links to a folder that is listed already",
        "outside": "links to a folder that is listed already",
        "real/circle": "links to a folder that is listed already",
        "broken.mp4": "is a link to a file that does not exist",
        "pipe.mp4": "is not a regular file",
    }
    for name in ("b.txt", "pipe.tar", "pipe.csv"):
        os.mkfifo(source / name)
    assert dict(list_clips(source, format="folder").rejected)["b.mp4"] == "'b.txt' is not a regular file"
    with pytest.raises(UserError, match=r"pipe\.tar: is not a regular file"):
        list_clips(source, format="webdataset")
    with pytest.raises(UserError, match=r"pipe\.csv is not a regular file"):
        list_clips(source / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe\.tar is not a regular file"):
        list_clips(source / "pipe.tar")
    (source / "pipe.tar").unlink()
    write_files(source, {"metadata.csv": "file_name,text\noutside/c.mp4,by its other name\npipe.mp4,x\n"})
    listing = list_clips(source)
    assert get_captions(listing) == {"outside/c.mp4": ("by its other name",)}
    assert dict(listing.rejected)["pipe.mp4"] == "line 3: is not a regular file"


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Become another user, as root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except PermissionError:
        pytest.skip("may not become another user")
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_without_read_permission_are_rejected():
    source = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        files = {
            "a.mp4": b"",
            "a.txt": "captioned",
            "b.mp4": b"",
            "b.txt": "x",
            "shut/c.mp4": b"",
            "d.mp4": b"",
            "s/t.tar": b"",
            "l/l.csv": b"",
        }
        write_files(source, files)
        source.chmod(0o755)
        for name in ("b.txt", "shut", "d.mp4", "s/t.tar", "l/l.csv"):
            (source / name).chmod(0)
        with nobody():
            listing = list_clips(source, format="folder")
            with pytest.raises(OSError, match="Permission denied"):
                listing.clips[1].read()
            with pytest.raises(UserError, match=r"shut cannot be read \(Permission denied\)"):
                list_clips(source / "shut")
            with pytest.raises(UserError, match=r"t\.tar cannot be read \(Permission denied\)"):
                list_clips(source / "s" / "t.tar")
            with pytest.raises(UserError, match=r"none of the 1 entries .* t\.tar: cannot be read"):
                list_clips(source / "s")
            with pytest.raises(UserError, match=r"l\.csv cannot be read \(Permission denied\)"):
                list_clips(source / "l" / "l.csv")
        assert [clip.name for clip in listing.clips] == ["a.mp4", "d.mp4"]
        assert dict(listing.rejected) == {
            "b.mp4": "'b.txt' cannot be read (Permission denied)",
            "shut": "cannot be read (Permission denied)",
        }
    finally:
        (source / "shut").chmod(0o755)
        shutil.rmtree(source)
