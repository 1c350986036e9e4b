"""Detection of a source's format."""

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.data.ingest.formats import ListingOptions, list_clips
from support.clip_folders import get_captions, write_files


@pytest.mark.parametrize("format", ["auto", "table", "webdataset", "folder", "ucf101", "msrvtt"])
def test_a_clip_file_is_no_source(tmp_path, format):
    write_files(tmp_path, {"clip.mp4": b""})
    with pytest.raises(UserError, match=r"clip\.mp4 is a file.*; give the folder"):
        list_clips(tmp_path / "clip.mp4", format=format)


def test_a_folder_is_refused_where_a_table_is_expected(tmp_path):
    with pytest.raises(UserError, match="give the list itself"):
        list_clips(tmp_path, format="table")


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        (("a.mp4", "b.tar"), ("folder", "webdataset")),
        (("metadata.csv", "ucfTrainTestlist/trainlist02.txt"), ("folder", "ucf101")),
        (("MSRVTT_data.json", "trainlist01.txt", "a.tar.gz"), ("msrvtt", "ucf101", "webdataset")),
        (("metadata.jsonl", "x/test_videodatainfo.json"), ("folder", "msrvtt")),
    ],
)
def test_ambiguous_sources_are_refused(tmp_path, files, kinds):
    write_files(tmp_path, dict.fromkeys(files, b""))
    choice = rf"choose one with tools/ingest\.py {tmp_path} DATA --format ({'|'.join(kinds)})"
    with pytest.raises(UserError, match=rf"may be read as .*; {choice}, or separate them") as caught:
        list_clips(tmp_path)
    assert all(repr(kind) in str(caught.value) for kind in kinds)
    assert "\n" not in str(caught.value)


def test_the_format_argument_overrides_detection(tmp_path):
    write_files(tmp_path, {"a.mp4": b"", "msrvtt.mp4": b"", "msrvtt.json": "{}", "b.tar": b""})
    assert list(get_captions(list_clips(tmp_path, format="folder"))) == ["a.mp4", "msrvtt.mp4"]
    with pytest.raises(UserError, match=r"b\.tar: is not a tar"):
        list_clips(tmp_path, format="webdataset")


def test_a_list_with_another_name_is_not_ignored_silently(tmp_path):
    write_files(
        tmp_path, {"a.mp4": b"", "other.csv": "a,b\n1,2\n", "bad.jsonl": b"\xff", "clips.csv": "path,text\na.mp4,x\n"}
    )
    assert get_captions(list_clips(tmp_path)) == {"a.mp4": ("x",)}
    write_files(tmp_path, {"a.txt": "y"})
    with pytest.raises(
        UserError,
        match=r"with caption files and the list clips\.csv; ingest it with tools/ingest\.py --list-path clips\.csv",
    ):
        list_clips(tmp_path)
    named = list_clips(tmp_path, options=ListingOptions(list_path="clips.csv"))
    assert get_captions(named) == {"a.mp4": ("x",)}
    (tmp_path / "a.txt").unlink()
    write_files(tmp_path, {"sub/more.jsonl": '{"path": "../a.mp4", "text": "z"}'})
    with pytest.raises(
        UserError, match=r"holds the lists clips\.csv and sub/more\.jsonl; ingest one of them with tools/ingest\.py"
    ):
        list_clips(tmp_path)
    with pytest.raises(MissingError, match=r"list_path='no\.csv' is invalid: .* holds no such file"):
        list_clips(tmp_path, options=ListingOptions(list_path="no.csv"))
    (tmp_path / "a.mp4").rename(tmp_path.with_suffix(".mp4"))
    with pytest.raises(UserError, match=r"no clips, but a list of clips; give .*clips\.csv"):
        list_clips(tmp_path)
