"""Links, pipes, and files that may not be read."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import ListingOptions, list_clips
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
    options = ListingOptions(follow_links=True)
    listing = list_clips(source, options=options)
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
    listing = list_clips(source, options=options)
    assert get_captions(listing) == {"outside/c.mp4": ("by its other name",)}
    assert dict(listing.rejected)["pipe.mp4"] == "line 3: is not a regular file"


LINK_OUT = "is a link out of the source; if it is meant, ingest it with tools/ingest.py --follow-links"


def test_links_out_of_the_source_are_rejected(tmp_path):
    """Downloaded files may link to secrets of who ingests them."""
    write_files(tmp_path, {"secret": "password", "other/c.mp4": b"", "tars/t.tar": b""})
    source = write_files(tmp_path / "source", {"0.mp4": b"", "1.mp4": b"", "1.txt": "one", "sub/2.mp4": b""})
    links = {"0.txt": "../secret", "a.mp4": "../other/c.mp4", "sub/b.mp4": "../../other/c.mp4", "folder": "../other"}
    for name, target in links.items():
        (source / name).symlink_to(target)
    (source / "inside.mp4").symlink_to("sub/2.mp4")
    listing = list_clips(source)
    assert get_captions(listing) == {"1.mp4": ("one",), "inside.mp4": (), "sub/2.mp4": ()}
    assert dict(listing.rejected) == {
        "0.mp4": f"'0.txt' {LINK_OUT}",
        **dict.fromkeys(("a.mp4", "sub/b.mp4", "folder"), LINK_OUT),
    }
    write_files(source, {"metadata.csv": "file_name,text\n1.mp4,one\nfolder/c.mp4,x\na.mp4,x\n"})
    listing = list_clips(source)
    assert get_captions(listing) == {"1.mp4": ("one",)}
    assert [name for name, _ in listing.rejected] == ["folder/c.mp4", "a.mp4", "folder"]
    allowed = list_clips(source, options=ListingOptions(follow_links=True))
    assert list(get_captions(allowed)) == ["1.mp4", "folder/c.mp4", "a.mp4"]


@pytest.mark.parametrize(
    ("link", "format"),
    [("metadata.csv", "auto"), ("MSRVTT_data.json", "msrvtt"), ("trainlist01.txt", "ucf101"), ("t.tar", "webdataset")],
)
def test_lists_and_tars_that_are_links_out_of_the_source_are_refused(tmp_path, link, format):
    write_files(tmp_path, {"elsewhere": b"file_name,text\na.mp4,x\n"})
    source = write_files(tmp_path / "source", {"a.mp4": b"", "classInd.txt": b"", "testlist01.txt": b""})
    (source / link).symlink_to("../elsewhere")
    with pytest.raises(UserError, match=rf"{link}:? is a link out of the source; if it is meant, ingest"):
        list_clips(source, format=format)


def test_a_snapshot_of_hugging_faces_cache_links_to_its_blobs(tmp_path):
    """The layout of huggingface_hub: the files of a commit are links to blobs, named by their hashes."""
    cache = write_files(tmp_path / "datasets--a--b", {"blobs/1f": b"abc", "blobs/2e": b"a caption", "refs/main": "c0"})
    write_files(tmp_path, {"secret": "password", "datasets--x--y/blobs/3d": b""})
    snapshot = cache / "snapshots" / "c0" / "train"
    snapshot.mkdir(parents=True)
    for name, target in {
        "0.mp4": "../../../blobs/1f",
        "0.txt": "../../../blobs/2e",
        "1.mp4": "../../../../secret",
    }.items():
        (snapshot / name).symlink_to(target)
    (snapshot / "2.mp4").symlink_to("../../../../datasets--x--y/blobs/3d")
    for source, prefix in ((snapshot.parent, "train/"), (snapshot, "")):
        listing = list_clips(source)
        assert get_captions(listing) == {f"{prefix}0.mp4": ("a caption",)}
        assert listing.clips[0].read() == b"abc"
        assert dict(listing.rejected) == {f"{prefix}{name}": LINK_OUT for name in ("1.mp4", "2.mp4")}


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
