"""Sources in buckets: every format gives the same listing as on this machine, and clips are read in place."""

import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry

from dit_video.core.errors import MissingError, UserError
from dit_video.data.ingest.formats import Listing, list_clips
from support.clip_folders import get_captions, write_files
from support.fake_bucket import CountingBucket


@pytest.fixture(params=["gs://bucket", "s3://bucket", "memory://bucket"])
def address(request, monkeypatch):
    """Return the address of an empty bucket."""
    for name in CountingBucket.protocol:  # as if gcsfs and s3fs were installed
        monkeypatch.setitem(_registry, name, CountingBucket)
    CountingBucket.store.clear()
    CountingBucket.pseudo_dirs[:] = [""]
    CountingBucket.calls.clear()
    fsspec.filesystem("memory").store.clear()
    return request.param


def upload(folder: Path, address: str) -> None:
    """Copy all files of a folder."""
    filesystem, root = fsspec.core.url_to_fs(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            filesystem.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    CountingBucket.calls.clear()


def make_tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make_parquet(columns: dict[str, list]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


SOURCES: dict[str, dict[str, str | bytes]] = {
    "folder": {
        **{"a.mp4": b"first", "a.txt": "one", "train/b c.webm": b"second", "train/b c.json": '{"caption": "two"}'},
        **{".hidden/x.mp4": b"", "notes.md": "", "val/d.png": b"", "val/d.png.txt": "three", "e.jxl": b""},
    },
    "folder of names that look like patterns": {
        **{"Title [ID].mp4": b"first", "Title [ID].txt": "one", "what?.mp4": b"second", "what?.txt": "two"},
        **{"[x]/*.mp4": b"third", "[x]/*.txt": "three", "[x]/b.mp4": b"fourth", "[x]/b.txt": "four"},
    },
    "folder with a list": {
        "train/a.mp4": b"1",
        "train/metadata.csv": "file_name,text\na.mp4,x\nz.mp4,y\n",
        "b.gif": b"",
    },
    "folder with Parquet": {
        "clips/a.mp4": b"1",
        "metadata.parquet": make_parquet({"file_name": ["clips/a.mp4"], "text": ["x"]}),
    },
    "folder with a list of another name": {"video/a.mp4": b"1", "OpenVid.csv": "video,caption\na.mp4,x\n"},
    "finetrainers": {"videos.txt": "v/a.mp4\nv/b.mp4\n", "prompts.txt": "x\ny\n", "v/a.mp4": b"1", "v/b.mp4": b"2"},
    "webdataset": {
        "0.tar": make_tar({"a.mp4": b"abc", "a.txt": b"x", "b.mp4": b"defg"}),
        "sub/1.tar": make_tar({"../c.mp4": b"", "d.gif": b"h"}),
        "2.tar": b"no tar",
    },
    "ucf101": {
        "UCF-101/JumpRope/v_JumpRope_g01_c01.avi": b"1",
        "UCF-101/JumpRope/v_JumpRope_g02_c01.avi": b"2",
        "lists/classInd.txt": "1 JumpRope\r\n",
        "lists/trainlist01.txt": "JumpRope/v_JumpRope_g01_c01.avi 1\r\n",
        "lists/testlist01.txt": "JumpRope/v_JumpRope_g02_c01.avi\r\n",
    },
    "msrvtt": {
        "videos/video0.mp4": b"1",
        "MSRVTT_data.json": json.dumps(
            {
                "videos": [{"video_id": "video0", "split": "validate"}, {"video_id": "video1", "split": "train"}],
                "sentences": [{"video_id": "video0", "caption": "x"}, {"video_id": "video0", "caption": "y"}],
            }
        ),
    },
}


def describe(listing: Listing, root: str) -> tuple:
    """Return everything of a listing, with paths inside the source."""
    clips = [clip._replace(path=os.path.relpath(clip.path, root)) for clip in listing.clips]
    return clips, listing.unlisted, listing.rejected, listing.format


@pytest.mark.parametrize("kind", SOURCES)
def test_a_folder_in_a_bucket_is_listed_as_on_this_machine(tmp_path, address, kind):
    folder = write_files(tmp_path / "source", SOURCES[kind])
    upload(folder, f"{address}/source")
    local, remote = list_clips(folder), list_clips(f"{address}/source")
    assert describe(remote, f"{address}/source") == describe(local, str(folder))
    assert [clip.read() for clip in remote.clips] == [clip.read() for clip in local.clips]
    if not address.startswith("memory"):
        assert CountingBucket.calls["find"] == 1


@pytest.mark.parametrize(("name", "kind"), [("0.tar", "webdataset"), ("list.csv", ""), ("list.jsonl", "")])
def test_a_single_list_or_tar_in_a_bucket_is_read(tmp_path, address, name, kind):
    rows = [{"file_name": "a b.mp4", "text": "x"}, {"file_name": "sub/c.mp4", "text": "y"}, {"path": "no.mp4"}]
    lists = {
        "list.csv": "file_name,text\na b.mp4,x\nsub/c.mp4,y\nno.mp4,z\n",
        "list.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }
    files = SOURCES[kind] if kind else {"a b.mp4": b"1", "sub/c.mp4": b"22", **lists}
    folder = write_files(tmp_path / "source", files)
    upload(folder, f"{address}/source")
    local, remote = list_clips(folder / name), list_clips(f"{address}/source/{name}")
    assert len(local.clips) == 2
    assert describe(remote, f"{address}/source") == describe(local, str(folder))
    assert [clip.read() for clip in remote.clips] == [clip.read() for clip in local.clips]


def test_lists_in_a_bucket_name_files_below_them(tmp_path, address):
    rows = [f"{address}/source/a.mp4", f"{address}/b.mp4", "../b.mp4", "/etc/passwd", "file:///etc/passwd", "a.mp4"]
    text = "path,text\n" + "".join(f"{row},{number}\n" for number, row in enumerate(rows))
    upload(write_files(tmp_path, {"source/list.csv": text, "source/a.mp4": b"1", "b.mp4": b""}), address)
    listing = list_clips(f"{address}/source/list.csv")
    assert get_captions(listing) == {"a.mp4": ("0", "5")}
    assert [name for name, _ in listing.rejected] == rows[1:5]
    assert all("lies outside of" in reason for _, reason in listing.rejected)


@pytest.mark.parametrize("address", ["gs://bucket"], indirect=True)
def test_tars_are_read_by_ranges(tmp_path, address):
    """Listing reads headers and captions, and a clip its own bytes."""
    files = {
        f"{number}.{suffix}": bytes(size) for number in range(20) for suffix, size in (("mp4", 500_000), ("txt", 9))
    }
    upload(write_files(tmp_path, {"shard.tar": make_tar(files)}), address)
    listing = list_clips(f"{address}/shard.tar")
    assert len(listing.clips) == 20
    assert CountingBucket.calls["bytes"] < 4 << 20
    CountingBucket.calls.clear()
    assert listing.clips[7].read() == bytes(500_000)
    assert CountingBucket.calls["bytes"] == 500_000


def test_missing_and_empty_sources_are_refused(tmp_path, address):
    with pytest.raises(MissingError, match=r"no such folder or file: .*bucket/nowhere"):
        list_clips(f"{address}/nowhere")
    upload(write_files(tmp_path, {"empty/notes.md": "x"}), address)
    with pytest.raises(UserError, match="holds no clips"):
        list_clips(f"{address}/empty")


@pytest.mark.parametrize("address", ["gs://bucket"], indirect=True)
def test_a_service_that_fails_later_makes_a_clip_unreadable(tmp_path, address, monkeypatch):
    upload(write_files(tmp_path, {"a.mp4": b"1"}), address)
    (clip,) = list_clips(address).clips

    def fail(*_, **__):
        raise RuntimeError("503: slow down")

    monkeypatch.setattr(CountingBucket, "cat_file", fail)
    with pytest.raises(OSError, match=r"gs://bucket/a\.mp4 cannot be opened \(503: slow down\)"):
        clip.read()
