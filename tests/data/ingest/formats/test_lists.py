"""Lists of clips, in CSV and JSON Lines: listed clips, rejected rows, and errors."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import Listing, list_clips
from support.clip_folders import LATIN, get_captions, write_files


@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl"])
def test_metadata_may_have_several_captions_for_a_clip(tmp_path, kind):
    rows = [
        ("b.mp4", 'a, "quoted"\nclip'),
        ("sub/a.mp4", "one"),
        ("./b.mp4", "two"),
        ("b.mp4", " two "),
        ("c.gif", ""),
    ]
    write_files(
        tmp_path, {"b.mp4": b"", "sub/a.mp4": b"", "c.gif": b"", "d.mp4": b"", "d.txt": "left out", ".h/e.mp4": b""}
    )
    if kind.endswith(".csv"):
        lines = [f'"{text}",x,{name}'.replace('"quoted"', '""quoted""') for name, text in rows]
        text = "\ufefftext,licence, file_name\r\n" + "\r\n".join(lines) + "\r\n\r\n.h is hidden,,.h/e.mp4\r\n"
    else:
        lines = [json.dumps({"file_name": name, "text": text, "fps": 3}) for name, text in rows]
        lines += ["", json.dumps({"file_name": ".h/e.mp4", "captions": [".h is hidden", ""], "text": None})]
        text = "\ufeff" + "\n".join(lines)
    write_files(tmp_path, {kind: text})
    listing = list_clips(tmp_path)
    assert get_captions(listing) == {
        "b.mp4": ('a, "quoted"\nclip', "two"),
        "sub/a.mp4": ("one",),
        "c.gif": (),
        ".h/e.mp4": (".h is hidden",),
    }
    assert list(get_captions(listing)) == ["b.mp4", "sub/a.mp4", "c.gif", ".h/e.mp4"]
    assert (listing.unlisted, listing.rejected, listing.format) == (("d.mp4",), (), "folder")


def listed(folder: Path, name: str) -> Listing:
    """List a folder with its list, or the list itself."""
    return list_clips(folder if name.startswith("metadata") else folder / name)


@pytest.mark.parametrize("metadata", ["metadata.csv", "clips.csv"])
def test_a_bad_row_of_csv_rejects_only_itself(tmp_path, metadata):
    """A row that names a clip but has an unusable caption rejects the clip, other rows only themselves."""
    rows = [
        b"path,text,fps",
        b'a.mp4,"first,',
        b'of two ""lines""",3',
        b",no name,3",
        b"b.mp4,red, and big,3",
        b"b.mp4",
        b"",
        b"gone.mp4,x,3",
        b"c.mp4," + LATIN + b",3",
        b"d.mp4,fine," + LATIN,  # a column that nobody reads
        b"d.mp4," + b"x" * 100_000 + b",3",
        b"d.mp4," + b"x" * 200_000 + b",3",
        b'e.mp4,say "no" or 5" wide,3',
        b'f.mp4,say "yes",3',
        b'b.mp4,"say "yes"",3',
        b"gone.mp4,y,3",
        LATIN + b".mp4,x,3",
        b"n\0.mp4,x,3",
        b"s,x,3",
        b'b.mp4,"never closed,3',
        b"a.mp4,last,3",
    ]
    write_files(tmp_path, {f"{name}.mp4": b"" for name in "abcdef"} | {"s/x.mp4": b"", metadata: b"\n".join(rows)})
    listing = listed(tmp_path, metadata)
    assert get_captions(listing) == {
        "a.mp4": ('first,\nof two "lines"', "last"),
        "e.mp4": ('say "no" or 5" wide',),
        "f.mp4": ('say "yes"',),
    }
    no_row = 'is not a valid CSV row ({}); write captions in double quotes, "" for a quote'
    columns = "fields: {}, columns: 3; put captions that hold commas in double quotes"
    assert listing.rejected == (
        (f"{metadata}, line 4", "names no file: its path is empty"),
        (f"{metadata}, line 5", columns.format(4)),
        (f"{metadata}, line 6", columns.format(1)),
        (f"{metadata}, line 12", no_row.format("field larger than field limit (131072)")),
        (f"{metadata}, line 15", no_row.format("',' expected after '\"'")),
        ("\\udce9t\\udce9.mp4", "line 17: its name is not UTF-8; rename it"),
        ("n\0.mp4", "line 18: its name holds a null byte"),
        (f"{metadata}, line 20", no_row.format("unexpected end of data")),
        ("gone.mp4", "line 8 names it, but it is not there"),
        ("c.mp4", "line 9: its caption is not UTF-8"),
        ("d.mp4", "line 11: its caption has 100,000 bytes, 65,536 is the limit"),
        ("s", "line 19: is not a regular file"),
    )
    json.dumps(listing.rejected, ensure_ascii=False).encode()


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "clips.jsonl"])
def test_a_bad_line_of_json_rejects_only_itself(tmp_path, metadata):
    lines = [
        b'{"path": "a.mp4", "text": "x"}',
        b'{"path": "b.mp4", "text": "x"}',
        b'{"path": "b.mp4", "text": "' + LATIN + b'"}',
        b'{"path": "c.mp4", "captions": {"en": "x"}}',
        b'{"path": "' + LATIN + b'.mp4", "text": "x"}',
        b'{"path": "n\\u0000.mp4", "text": "x"}',
        b'{"path": "s", "text": "x"}',
        json.dumps({"path": "d.mp4", "text": "x" * 100_000}).encode(),
        b'{"path": "a.mp4"',
        b'["a.mp4"]',
        b'{"text": "x"}',
        b'{"file_name": 3, "text": "x"}',
        b"\xff",
        b'{"path": "gone.mp4", "text": "x"}',
        b'{"path": "a.mp4", "text": "y"}',
    ]
    write_files(tmp_path, {f"{name}.mp4": b"" for name in "abcd"} | {"s/x.mp4": b"", metadata: b"\n".join(lines)})
    listing = listed(tmp_path, metadata)
    assert get_captions(listing) == {"a.mp4": ("x", "y")}
    rejected = dict(listing.rejected)
    assert rejected.pop(f"{metadata}, line 9").startswith("is not JSON (Expecting ',' delimiter")
    assert rejected.pop(f"{metadata}, line 13").startswith("is not JSON (")
    assert rejected == {
        "b.mp4": "line 3: its caption is not UTF-8",
        "c.mp4": "line 4: its captions is dict, not text",
        "\\udce9t\\udce9.mp4": "line 5: its name is not UTF-8; rename it",
        "n\0.mp4": "line 6: its name holds a null byte",
        "s": "line 7: is not a regular file",
        "d.mp4": "line 8: its caption has 100,000 bytes, 65,536 is the limit",
        f"{metadata}, line 10": 'is a list; write {"file_name": "…", "text": "…"}',
        f"{metadata}, line 11": 'names no file; write {"file_name": "…", "text": "…"}',
        f"{metadata}, line 12": 'names no file; write {"file_name": "…", "text": "…"}',
        "gone.mp4": "line 14 names it, but it is not there",
    }
    assert len(listing.rejected) == 12
    json.dumps(listing.rejected, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("metadata", "content", "message"),
    [
        (".csv", "file_name,title\na.mp4,x\n", "no column text, its first line is 'file_name,title'"),
        (".csv", "", "no column file_name and text"),
        (".csv", b"file_name," + LATIN + b"\na.mp4,x\n", r"no column text, its first line is .*\\udce9"),
        (".csv", "file_name,text\na.mp4,x\n".encode("utf-16"), "no column file_name and text.* in UTF-8"),
        (".csv", '"file_name,text\na.mp4,x\n', "no column file_name and text"),
        (".csv", "file_name,text\n", r"\.csv has no rows; write one for each clip, with its file_name and text"),
        (".csv", "file_name,text\nm.mp4,x\n,y\n", r"none of the 2 entries .*, line 3: names no file"),
        (".csv", "file_name,text\na.mp4/x.mp4,x\n", r"none of the 1 entries .*: a\.mp4/x\.mp4: line 2 names it, but"),
        (".tsv", "file_name\ttext\n\n", r"\.tsv has no rows"),
        (".jsonl", "", r"\.jsonl has no rows"),
        (".json", "[]", r"\.json has no rows"),
        (".jsonl", '{"file_name": "a.mp4", "title": "x"}\n', "no field text in any of its 1 objects"),
        (".jsonl", b"\xff\n{\n", r"none of the 2 entries .*\.jsonl, line 1: is not JSON"),
    ],
)
@pytest.mark.parametrize("stem", ["metadata", "clips"])
def test_unusable_lists_are_refused(tmp_path, stem, metadata, content, message):
    write_files(tmp_path, {"a.mp4": b"", stem + metadata: content})
    with pytest.raises(UserError, match=message):
        listed(tmp_path, stem + metadata)


def test_metadata_stays_inside_its_folder(tmp_path):
    rows = f"file_name,text\n../b.mp4,x\na.mp4,y\n{tmp_path}/in/a.mp4,z\n"
    write_files(tmp_path, {"in/a.mp4": b"", "b.mp4": b"", "in/metadata.csv": rows})
    listing = list_clips(tmp_path / "in")
    assert get_captions(listing) == {"a.mp4": ("y",)}
    assert listing.rejected == (
        ("../b.mp4", "line 2: lies outside the folder; use paths inside it"),
        (f"{tmp_path}/in/a.mp4", "line 4: lies outside the folder; use paths inside it"),
    )


def test_two_lists_in_a_folder_are_refused(tmp_path):
    write_files(tmp_path, {"a.mp4": b"", "metadata.csv": "file_name,text\na.mp4,x\n", "metadata.jsonl": ""})
    with pytest.raises(UserError, match=r"metadata\.csv and metadata\.jsonl; keep one"):
        list_clips(tmp_path)


def test_lists_of_open_sora_are_read(tmp_path, monkeypatch):
    columns = "path,id,relpath,num_frames,height,width,aspect_ratio,fps,resolution,text"
    write_files(tmp_path, {"data/a.mp4": b"a", "data/sub/b.mp4": b"", "data/more/B.AVI": b""})
    rows = [f"{tmp_path}/data/a.mp4,a,a.mp4,9,4,4,1.0,24,16,first", "sub/../sub/b.mp4,b,b.mp4,9,4,4,1.0,24,16,"]
    path = write_files(tmp_path, {"data/list.csv": "\n".join([columns, *rows, rows[0].replace("first", "second")])})
    listing = list_clips(path / "data" / "list.csv")
    assert get_captions(listing) == {"a.mp4": ("first", "second"), "sub/b.mp4": ()}
    assert (listing.format, listing.clips[0].read(), listing.unlisted) == ("table", b"a", ())
    monkeypatch.chdir(tmp_path / "data")
    assert list_clips("list.csv") == listing


def test_a_list_may_name_paths_outside_of_its_folder(tmp_path):
    write_files(tmp_path, {"x/one/a.mp4": b"", "x/two/a.mp4": b"", "lists/all.csv": "path,text\n../x/one/a.mp4,1\n"})
    assert get_captions(list_clips(tmp_path / "lists/all.csv")) == {"a.mp4": ("1",)}
    with (tmp_path / "lists/all.csv").open("a") as file:
        file.write(f"{tmp_path}/x/two/a.mp4,2\n")
    listing = list_clips(tmp_path / "lists/all.csv")
    assert get_captions(listing) == {"one/a.mp4": ("1",), "two/a.mp4": ("2",)}
    # What is not there changes no name.
    with (tmp_path / "lists/all.csv").open("a") as file:
        file.write("/nowhere/b.mp4,3\n")
    assert get_captions(list_clips(tmp_path / "lists/all.csv")) == get_captions(listing)
    # Wherever the clips and the list are moved together, names stay.
    shutil.copytree(tmp_path / "x", tmp_path / "moved" / "x")
    text = (tmp_path / "lists/all.csv").read_text().replace(str(tmp_path), str(tmp_path / "moved"))
    write_files(tmp_path / "moved", {"lists/all.csv": text})
    assert get_captions(list_clips(tmp_path / "moved/lists/all.csv")) == get_captions(listing)


@pytest.mark.parametrize(
    ("suffix", "first", "last"),
    [
        ("csv", "file_name,text\na.mp4,first\n", "b.mp4,last\n"),
        ("jsonl", '{"file_name": "a.mp4", "text": "first"}\n', '{"file_name": "b.mp4", "text": "last"}\n'),
    ],
)
def test_a_line_of_any_length_is_rejected_in_little_memory(tmp_path, suffix, first, last):
    """A line of 200 MiB in a list, and a quote in it that is never closed."""
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b""})
    with (tmp_path / f"list.{suffix}").open("wb") as file:
        file.write(first.encode() + b'"')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + last.encode())
    tracemalloc.start()
    listing = list_clips(tmp_path / f"list.{suffix}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 << 20
    assert get_captions(listing) == {"a.mp4": ("first",), "b.mp4": ("last",)}
    assert 1 <= len(listing.rejected) <= 51


def test_lines_after_a_bad_row_are_rows_again(tmp_path):
    """A quote that is not closed costs its own row, though it is closed in a later one."""
    write_files(tmp_path, {f"{name}.mp4": b"" for name in "abcd"})
    (tmp_path / "list.csv").write_text('file_name,text\na.mp4,"one\nb.mp4,two\nc.mp4,"three"\n\nd.mp4,"four\nlines"\n')
    listing = list_clips(tmp_path / "list.csv")
    assert get_captions(listing) == {"b.mp4": ("two",), "c.mp4": ("three",), "d.mp4": ("four\nlines",)}
    assert [name for name, _ in listing.rejected] == ["list.csv, line 2"]
