"""Folders and lists of clips: what is listed, what is rejected, and what is an error."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_video.data.ingest import MEDIA, Listing, list_clips
from dit_video.errors import MissingError, UserError

LATIN = "été".encode("latin-1")


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(listing: Listing) -> dict[str, tuple[str, ...]]:
    """By name; in the listing's order, as a dict keeps it."""
    return {clip.name: clip.captions for clip in listing.clips}


def test_folder_with_caption_files(tmp_path):
    fill(
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
    assert captions(listing) == {
        "A.MP4": ("upper case",),
        "b.mp4": ("a caption\r\nof two  lines",),
        "d.png": (),
        "e.dots.gif": ("dotted",),
        "sub/c.webm": ("zero", "one", "two"),
        "f.mov": ("by its whole name",),
        "sub/d.mov": (),
    }
    assert list(captions(listing)) == sorted(captions(listing))
    assert (listing.format, listing.rejected) == ("folder", ())
    assert listing.unlisted == ("e.txt", "notes.md")
    clip = listing.clips[1]
    assert (clip.size, clip.offset, clip.split, clip.read()) == (10, None, "train", b"bytes of b")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("b.txt", LATIN, r"b\.txt is not UTF-8"),
        ("b.json", b'{"text": "' + LATIN + b'"}', r"b\.json is not UTF-8"),
        ("b.json", "{", r"b\.json is not JSON"),
        ("b.json", "[" * 100_000, r"b\.json is not JSON"),
        ("b.json", "[1]", r"b\.json holds a list"),
        ("b.json", '{"text": 3}', "its text is int, not text"),
        ("b.json", '{"captions": ["a", ["b"]]}', "its captions is list, not text"),
        ("b.json", r'{"text": "\ud800"}', "its caption is not UTF-8"),
        ("b.txt", "x" * 100_000, "its caption has 100,000 bytes, 65,536 is the limit"),
        ("b.txt", "é" * 32_769, "its caption has 65,538 bytes"),
        ("b.txt", b" " * (17 << 20), r"b\.txt has 17,825,792 bytes, 16,777,216 is the limit of a caption file"),
    ],
)
def test_a_bad_caption_file_sets_its_clip_aside(tmp_path, name, content, reason):
    fill(tmp_path, {"a.mp4": b"", "a.txt": "fine", "b.mp4": b"", name: content})
    listing = list_clips(tmp_path)
    assert captions(listing) == {"a.mp4": ("fine",)}
    ((rejected, why),) = listing.rejected
    assert rejected == "b.mp4"
    assert re.search(reason, why), why


def test_the_longest_caption_is_kept(tmp_path):
    fill(tmp_path, {"a.mp4": b"", "a.txt": "x" * 65_536 + "\n"})
    assert len(list_clips(tmp_path).clips[0].captions[0]) == 65_536


@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl"])
def test_metadata_with_several_captions(tmp_path, kind):
    rows = [
        ("b.mp4", 'a, "quoted"\nclip'),
        ("sub/a.mp4", "one"),
        ("./b.mp4", "two"),
        ("b.mp4", " two "),
        ("c.gif", ""),
    ]
    fill(tmp_path, {"b.mp4": b"", "sub/a.mp4": b"", "c.gif": b"", "d.mp4": b"", "d.txt": "left out", ".h/e.mp4": b""})
    if kind.endswith(".csv"):
        lines = [f'"{text}",x,{name}'.replace('"quoted"', '""quoted""') for name, text in rows]
        text = "\ufefftext,licence, file_name\r\n" + "\r\n".join(lines) + "\r\n\r\n.h is hidden,,.h/e.mp4\r\n"
    else:
        lines = [json.dumps({"file_name": name, "text": text, "fps": 3}) for name, text in rows]
        lines += ["", json.dumps({"file_name": ".h/e.mp4", "captions": [".h is hidden", ""], "text": None})]
        text = "\ufeff" + "\n".join(lines)
    fill(tmp_path, {kind: text})
    listing = list_clips(tmp_path)
    assert captions(listing) == {
        "b.mp4": ('a, "quoted"\nclip', "two"),
        "sub/a.mp4": ("one",),
        "c.gif": (),
        ".h/e.mp4": (".h is hidden",),
    }
    assert list(captions(listing)) == ["b.mp4", "sub/a.mp4", "c.gif", ".h/e.mp4"]
    assert (listing.unlisted, listing.rejected, listing.format) == (("d.mp4",), (), "folder")


@pytest.mark.parametrize("metadata", ["metadata.csv", "clips.csv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,title\na.mp4,x\n", "no column text, its first line is 'file_name,title'"),
        ("", "no column file_name and text"),
        ("file_name,text\na.mp4,x\nm1.mp4,x\nm2.mp4,x\nm3.mp4,x\nm4.mp4,x\n", r"names 5 .*4 of them .*\(m1\.mp4.*…\)"),
        ("file_name,text\na.mp4/x.mp4,x\n", r"1 of them .*\(a\.mp4/x\.mp4\)"),
        ("file_name,text\n,x\n", "line 2: file_name is empty"),
        ("path,text\n ,x\n", "line 2: path is empty"),
        ("file_name,text\n", "holds no clips"),
        ("file_name,text\na.mp4,red, and big\n", "line 2: 3 fields, but 2 columns"),
        ('file_name,text\na.mp4,"never closed\nb.mp4,lost\n', "not a CSV file"),
        ("file_name,text\na.mp4," + "x" * 200_000, r"not a CSV file \(line 2: field larger"),
        (b"file_name,text\na.mp4," + LATIN + b"\n", "not UTF-8 .* byte 21"),
    ],
)
def test_mistakes_in_a_csv_list(tmp_path, metadata, content, message):
    fill(tmp_path, {"a.mp4": b"", metadata: content})
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path if metadata == "metadata.csv" else tmp_path / metadata)


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "clips.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "a.mp4", "text": "x"}\n{"file_name"\n', "line 2 is not JSON"),
        ('{"file_name": "a.mp4", "text": "x"}\n["a.mp4"]\n', "line 2 is a list"),
        ('{"text": "x"}\n', "line 1 names no file"),
        ('{"file_name": 3, "text": "x"}\n', "line 1 names no file"),
        ('{"file_name": "a.mp4", "title": "x"}\n', "no field text in any of its 1 lines"),
        ('{"file_name": "m.mp4", "text": "x"}\n', r"1 of them .*\(m\.mp4\)"),
        ("", "holds no clips"),
        (b"\xff\n", "line 1 is not JSON"),
    ],
)
def test_mistakes_in_a_json_list(tmp_path, metadata, content, message):
    fill(tmp_path, {"a.mp4": b"", metadata: content})
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path if metadata == "metadata.jsonl" else tmp_path / metadata)


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "clips.jsonl"])
def test_a_bad_line_of_json_sets_its_clip_aside(tmp_path, metadata):
    lines = [
        b'{"path": "a.mp4", "text": "x"}',
        b'{"path": "b.mp4", "text": "x"}',
        b'{"path": "b.mp4", "text": "' + LATIN + b'"}',
        b'{"path": "c.mp4", "captions": {"en": "x"}}',
        b'{"path": "' + LATIN + b'.mp4", "text": "x"}',
        b'{"path": "n\\u0000.mp4", "text": "x"}',
        b'{"path": "s", "text": "x"}',
        json.dumps({"path": "d.mp4", "text": "x" * 100_000}).encode(),
    ]
    fill(tmp_path, {f"{name}.mp4": b"" for name in "abcd"} | {"s/x.mp4": b"", metadata: b"\n".join(lines)})
    listing = list_clips(tmp_path if metadata == "metadata.jsonl" else tmp_path / metadata)
    assert captions(listing) == {"a.mp4": ("x",)}
    assert dict(listing.rejected) == {
        "b.mp4": "its caption is not UTF-8",
        "c.mp4": "line 4: its captions is dict, not text",
        "\\udce9t\\udce9.mp4": "its name is not UTF-8; rename it",
        "n\0.mp4": "its name holds a null byte",
        "s": "is not a regular file",
        "d.mp4": "its caption has 100,000 bytes, 65,536 is the limit",
    }
    json.dumps(listing.rejected, ensure_ascii=False).encode()


def test_metadata_stays_inside_its_folder(tmp_path):
    fill(tmp_path, {"in/a.mp4": b"", "b.mp4": b"", "in/metadata.csv": "file_name,text\n../b.mp4,x\n"})
    with pytest.raises(UserError, match=r"\.\./b\.mp4, which lies outside the folder"):
        list_clips(tmp_path / "in")
    (tmp_path / "in" / "metadata.csv").write_text(f"file_name,text\n{tmp_path}/in/a.mp4,x\n")
    with pytest.raises(UserError, match="outside the folder"):
        list_clips(tmp_path / "in")


def test_two_lists(tmp_path):
    fill(tmp_path, {"a.mp4": b"", "metadata.csv": "file_name,text\na.mp4,x\n", "metadata.jsonl": ""})
    with pytest.raises(UserError, match=r"metadata\.csv and metadata\.jsonl; keep one"):
        list_clips(tmp_path)


def test_list_as_open_sora_writes_it(tmp_path, monkeypatch):
    columns = "path,id,relpath,num_frames,height,width,aspect_ratio,fps,resolution,text"
    fill(tmp_path, {"data/a.mp4": b"a", "data/sub/b.mp4": b"", "data/more/B.AVI": b""})
    rows = [f"{tmp_path}/data/a.mp4,a,a.mp4,9,4,4,1.0,24,16,first", "sub/../sub/b.mp4,b,b.mp4,9,4,4,1.0,24,16,"]
    path = fill(tmp_path, {"data/list.csv": "\n".join([columns, *rows, rows[0].replace("first", "second")])})
    listing = list_clips(path / "data" / "list.csv")
    assert captions(listing) == {"a.mp4": ("first", "second"), "sub/b.mp4": ()}
    assert (listing.format, listing.clips[0].read(), listing.unlisted) == ("table", b"a", ())
    monkeypatch.chdir(tmp_path / "data")
    assert list_clips("list.csv") == listing


def test_list_of_paths_outside_of_its_folder(tmp_path):
    fill(tmp_path, {"x/one/a.mp4": b"", "x/two/a.mp4": b"", "lists/all.csv": "path,text\n../x/one/a.mp4,1\n"})
    assert captions(list_clips(tmp_path / "lists/all.csv")) == {"a.mp4": ("1",)}
    with (tmp_path / "lists/all.csv").open("a") as file:
        file.write(f"{tmp_path}/x/two/a.mp4,2\n")
    listing = list_clips(tmp_path / "lists/all.csv")
    assert captions(listing) == {"one/a.mp4": ("1",), "two/a.mp4": ("2",)}
    # Wherever the clips and the list are moved together, names stay.
    shutil.copytree(tmp_path / "x", tmp_path / "moved" / "x")
    text = (tmp_path / "lists/all.csv").read_text().replace(str(tmp_path), str(tmp_path / "moved"))
    fill(tmp_path / "moved", {"lists/all.csv": text})
    assert captions(list_clips(tmp_path / "moved/lists/all.csv")) == captions(listing)


def test_links(tmp_path):
    fill(tmp_path, {"source/real/a.mp4": b"abc", "source/b.mp4": b"", "elsewhere/c.mp4": b"", "elsewhere/d/e.mp4": b""})
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
    assert dict(list_clips(source, format="folder").rejected)["b.mp4"] == "b.txt is not a regular file"
    with pytest.raises(UserError, match=r"pipe\.tar: is not a regular file"):
        list_clips(source, format="webdataset")
    with pytest.raises(UserError, match=r"pipe\.csv is not a regular file"):
        list_clips(source / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe\.tar is not a regular file"):
        list_clips(source / "pipe.tar")
    (source / "pipe.tar").unlink()
    fill(source, {"metadata.csv": "file_name,text\noutside/c.mp4,by its other name\npipe.mp4,x\n"})
    listing = list_clips(source)
    assert captions(listing) == {"outside/c.mp4": ("by its other name",)}
    assert dict(listing.rejected)["pipe.mp4"] == "is not a regular file"


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Root may read everything: be somebody else."""
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


def test_what_may_not_be_read():
    source = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        files = {
            "a.mp4": b"",
            "b.mp4": b"",
            "b.txt": "x",
            "shut/c.mp4": b"",
            "d.mp4": b"",
            "s/t.tar": b"",
            "l/l.csv": b"",
        }
        fill(source, files)
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
            "b.mp4": "b.txt cannot be read (Permission denied)",
            "shut": "cannot be read (Permission denied)",
        }
    finally:
        (source / "shut").chmod(0o755)
        shutil.rmtree(source)


def test_names_that_are_not_utf8(tmp_path):
    fill(tmp_path, {"a.mp4": b"", "é \n日本.mp4": b""})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mp4")).write_bytes(b"")
    listing = list_clips(tmp_path)
    assert [clip.name for clip in listing.clips] == ["a.mp4", "é \n日本.mp4"]
    assert listing.rejected == (("\\udce9.mp4", "its name is not UTF-8; rename it"),)


def test_a_large_folder_is_read_by_its_folders(tmp_path, monkeypatch):
    """No calls for each name that a clip's captions might have."""
    fill(tmp_path, {f"{i % 10}/{i}{suffix}": "x" for i in range(1000) for suffix in (".mp4", ".md", ".txt")})
    looks: list[str] = []
    real = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *args, **kwargs: (looks.append(str(path)), real(path, *args, **kwargs))[1]
    )
    listing = list_clips(tmp_path)
    assert len(listing.clips) == 1000
    assert all(clip.captions == ("x",) for clip in listing.clips)
    assert len([path for path in looks if path.startswith(str(tmp_path))]) <= 20


def test_no_source_or_an_empty_one(tmp_path):
    with pytest.raises(MissingError, match="no such folder or file"):
        list_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no clips"):
        list_clips(tmp_path / "empty")
    fill(tmp_path, {"only/a.mp4": b"", "only/a.txt": LATIN})
    with pytest.raises(UserError, match=r"none of the 1 entries .* can be used \(first: a\.mp4: a\.txt is not UTF-8"):
        list_clips(tmp_path / "only")


@pytest.mark.parametrize("format", ["auto", "table", "webdataset", "folder", "ucf101", "msrvtt"])
def test_a_file_that_is_no_source(tmp_path, format):
    fill(tmp_path, {"clip.mp4": b""})
    with pytest.raises(UserError, match=r"clip\.mp4 is a file.*; give the folder"):
        list_clips(tmp_path / "clip.mp4", format=format)


def test_folder_for_a_table(tmp_path):
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
def test_ambiguous_sources(tmp_path, files, kinds):
    fill(tmp_path, dict.fromkeys(files, b""))
    with pytest.raises(UserError, match=r"may be read as .*; say which as the format") as caught:
        list_clips(tmp_path)
    assert all(repr(kind) in str(caught.value) for kind in kinds)
    assert "\n" not in str(caught.value)


def test_a_format_is_chosen(tmp_path):
    fill(tmp_path, {"a.mp4": b"", "msrvtt.mp4": b"", "msrvtt.json": "{}", "b.tar": b""})
    assert list(captions(list_clips(tmp_path, format="folder"))) == ["a.mp4", "msrvtt.mp4"]
    with pytest.raises(UserError, match=r"b\.tar: is no tar"):
        list_clips(tmp_path, format="webdataset")


def test_a_list_of_another_name_is_not_overlooked(tmp_path):
    fill(tmp_path, {"a.mp4": b"", "other.csv": "a,b\n1,2\n", "bad.jsonl": b"\xff", "clips.csv": "path,text\na.mp4,x\n"})
    with pytest.raises(UserError, match=r"clips and the list clips\.csv; .* rename it to metadata\.csv, .* 'folder'"):
        list_clips(tmp_path)
    assert captions(list_clips(tmp_path, format="folder")) == {"a.mp4": ()}
    (tmp_path / "a.mp4").rename(tmp_path.with_suffix(".mp4"))
    with pytest.raises(UserError, match=r"no clips, but a list of them; give .*clips\.csv"):
        list_clips(tmp_path)


def test_all_suffixes_are_found(tmp_path):
    fill(tmp_path, {f"a{suffix.upper()}": b"" for suffix in MEDIA})
    assert len(list_clips(tmp_path).clips) == len(MEDIA) == 24
