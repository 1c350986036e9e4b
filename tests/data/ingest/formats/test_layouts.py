"""Published layouts of folders: none of their captions and splits is lost."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.engine import IngestConfig, ingest, plan_ingest
from dit_video.data.ingest.formats import ListColumns, ListingOptions, list_clips, warn_of_losses
from support.clip_folders import write_files


def write_parquet(path, /, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def get_facts(listing):
    """Return the captions and the split of every clip."""
    return {clip.name: (clip.captions, clip.split) for clip in listing.clips}


def test_folders_of_hugging_face_have_a_list_and_a_split_each(tmp_path):
    write_files(
        tmp_path,
        {
            "train/a.mp4": b"",
            "train/sub/b.mp4": b"",
            "train/left.mp4": b"",
            "train/metadata.csv": "file_name,text\na.mp4,red\nsub/b.mp4,green\n./a.mp4,also red\n",
            "test/a.mp4": b"",
            "test/metadata.jsonl": '{"file_name": "a.mp4", "text": "blue"}\n{"file_name": "no.mp4", "text": "x"}\n{}',
            "Dev/c.mp4": b"",
            "Dev/c.txt": "of no list",
        },
    )
    write_parquet(tmp_path / "validation/metadata.parquet", file_name=["d.mp4"], text=[["one", "two"]])
    write_files(tmp_path, {"validation/d.mp4": b""})
    listing = list_clips(tmp_path)
    assert get_facts(listing) == {
        "test/a.mp4": (("blue",), "test"),
        "train/a.mp4": (("red", "also red"), "train"),
        "train/sub/b.mp4": (("green",), "train"),
        "validation/d.mp4": (("one", "two"), "validation"),
        "Dev/c.mp4": (("of no list",), "validation"),
    }
    assert (listing.unlisted, listing.format) == (("train/left.mp4",), "folder")
    assert listing.rejected == (
        ("test/metadata.jsonl, line 3", 'names no file; write {"file_name": "…", "text": "…"}'),
        ("no.mp4", "test/metadata.jsonl, line 2 names it, but it is not there"),
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_column_of_splits_is_read_and_comes_before_the_folder(tmp_path, kind):
    rows = [("train/a.mp4", "x", "val"), ("b.mp4", "y", ""), ("c.mp4", "z", " Testing "), ("d.mp4", "w", "seven")]
    names, texts, splits = (list(column) for column in zip(*rows, strict=True))
    write_files(tmp_path, dict.fromkeys(names, b""))
    path = tmp_path / f"metadata.{kind}"
    objects = [{"file_name": name, "text": text, "split": split or None} for name, text, split in rows]
    match kind:
        case "csv":
            path.write_text("\n".join(map(",".join, [("file_name", "text", "split"), *rows])))
        case "jsonl":
            path.write_text("\n".join(map(json.dumps, objects)))
        case "json":
            path.write_text("\ufeff " + json.dumps(objects))
        case "parquet":
            write_parquet(path, file_name=names, text=texts, split=splits)
    listing = list_clips(tmp_path)
    assert get_facts(listing) == {
        "train/a.mp4": (("x",), "validation"),
        "b.mp4": (("y",), "train"),
        "c.mp4": (("z",), "test"),
    }
    ((name, reason),) = listing.rejected
    assert name == "d.mp4"
    assert reason.endswith(": its split 'seven' is unknown; use train, validation or test")
    assert {"csv": "line 5", "jsonl": "line 4", "json": "entry 4", "parquet": "row 4"}[kind] in reason


@pytest.mark.parametrize(("paths", "texts"), [("videos.txt", "prompt.txt"), ("video.txt", "captions.txt")])
def test_lists_of_paths_and_of_captions_are_read_line_by_line(tmp_path, paths, texts):
    files = {"videos/0.mp4": b"", "videos/1.mp4": b"", "videos/2.mp4": b""}
    write_files(tmp_path, files | {paths: "videos/1.mp4\nvideos/0.mp4\r\n", texts: "one, \n zero\n\n"})
    listing = list_clips(tmp_path)
    assert get_facts(listing) == {"videos/1.mp4": (("one,",), "train"), "videos/0.mp4": (("zero",), "train")}
    assert listing.unlisted == ("videos/2.mp4",)
    write_files(tmp_path, {texts: "one\nzero\ntwo\n"})
    with pytest.raises(UserError, match=rf"{paths} has 2 lines, .*{texts} has 3; write one path and one caption"):
        list_clips(tmp_path)


def test_a_text_file_that_is_called_like_a_list_and_like_a_clip_is_the_clip_s_caption(tmp_path):
    write_files(tmp_path, {"video.mp4": b"", "video.txt": "a", "prompt.mp4": b"", "prompt.txt": "b"})
    assert get_facts(list_clips(tmp_path)) == {"prompt.mp4": (("b",), "train"), "video.mp4": (("a",), "train")}


def test_the_list_of_openvid_names_files_in_another_folder(tmp_path):
    header = "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds"
    rows = ["a.mp4,A red ball.,5.1,3.0,0.99,static,90,30.0,3.0", "b.mp4,A cat.,4.9,2.0,0.98,pan_left,90,30.0,3.0"]
    rows += ["c.mp4,Twice.,5,1,1,static,90,30.0,3.0"]
    path = "data/train/OpenVid-1M.csv"
    clips = ("video/part1/a.mp4", "video/b.mp4", "video/c.mp4", "video/part1/c.mp4", "video/d.mp4")
    write_files(tmp_path, dict.fromkeys(clips, b"") | {path: "\n".join([header, *rows])})
    listing = list_clips(tmp_path)
    assert get_facts(listing) == {
        "video/part1/a.mp4": (("A red ball.",), "train"),
        "video/b.mp4": (("A cat.",), "train"),
    }
    assert listing.unlisted == ("video/c.mp4", "video/d.mp4", "video/part1/c.mp4")
    reason = "line 4: may be 'video/c.mp4' or 'video/part1/c.mp4'; write the path"
    assert listing.rejected == (("c.mp4", reason),)
    # A second list, of some of the same clips, makes it the user's choice.
    write_files(tmp_path, {"data/train/OpenVidHD.csv": f"{header}\n{rows[0]}"})
    with pytest.raises(UserError, match=r"holds the lists .*OpenVid-1M\.csv and .*OpenVidHD\.csv; ingest one of them"):
        list_clips(tmp_path)
    chosen = list_clips(tmp_path, options=ListingOptions(list_path="data/train/OpenVidHD.csv"))
    assert list(get_facts(chosen)) == ["video/part1/a.mp4"]


def test_columns_of_any_name_are_read(tmp_path):
    write_files(tmp_path, {"clips/a.mp4": b"", "clips/b.mp4": b""})
    names, short, dense = ["clips/a.mp4", "clips/b.mp4"], ["short a", "short b"], ["dense a", "dense b"]
    parts = ["train", "test"]
    write_parquet(tmp_path / "mira.parquet", clip=names, short_caption=short, dense_caption=dense, part=parts)
    columns = ListColumns(name="clip", captions=("dense_caption", "short_caption"), split="part")
    expected = {"clips/a.mp4": (("dense a", "short a"), "train"), "clips/b.mp4": (("dense b", "short b"), "test")}
    for source in (tmp_path, tmp_path / "mira.parquet"):
        assert get_facts(list_clips(source, options=ListingOptions(columns=columns))) == expected
    wrong = ListColumns(name="clip", captions=("dense_caption", "long_caption"), split="piece")
    with pytest.raises(UserError, match="has no column long_caption and piece, its first line is 'clip,short_caption"):
        list_clips(tmp_path / "mira.parquet", options=ListingOptions(columns=wrong))


ROW = {"a.mp4": "red", "sub/b.mp4": "blue"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # LTX-Video's trainer, Open-Sora-Plan, DiffSynth-Studio, musubi-tuner
        ("dataset.json", [{"caption": text, "media_path": name} for name, text in ROW.items()]),
        ("list.json", [{"path": name, "cap": [text], "fps": 24} for name, text in ROW.items()]),
        ("captions.json", [{"video": name, "prompt": text} for name, text in ROW.items()]),
        ("clips.jsonl", "\n".join(json.dumps({"image_path": name, "caption": text}) for name, text in ROW.items())),
        # an object, and one object a line
        ("captions.json", ROW),
        ("captions.json", {name: [text] for name, text in ROW.items()}),
        ("captions.json", {name: {"caption": text, "fps": 24} for name, text in ROW.items()}),
        ("metadata.json", ROW),
        ("metadata.json", {"version": 1, "data": [{"file_name": name, "text": text} for name, text in ROW.items()]}),
        ("metadata.json", "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in ROW.items())),
        # tabs
        ("metadata.tsv", "file_name\ttext\n" + "\n".join(f"{name}\t{text}" for name, text in ROW.items())),
        ("clips.tsv", 'path\tcaption\na.mp4\t"red"\nsub/b.mp4\tblue\n'),
    ],
)
def test_lists_of_the_field_are_read_in_a_folder_and_by_their_path(tmp_path, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    write_files(tmp_path, dict.fromkeys(ROW, b"") | {name: text})
    expected = {clip: ((text,), "train") for clip, text in ROW.items()}
    for source in (tmp_path, tmp_path / name):
        listing = list_clips(source)
        assert get_facts(listing) == expected
        assert listing.rejected == ()


@pytest.mark.parametrize(
    "files",
    [
        {"a.json": '{"prompt": "red"}', "sub/b.json": '{"cap": ["blue"], "fps": 24}'},
        {"captions/a.txt": "red", "captions/b.caption": "blue"},
        {"sub/captions/a.txt": "red", "captions/b.json": '{"caption": "blue"}', "README.txt": "of two clips"},
    ],
)
def test_caption_files_of_the_field_are_read(tmp_path, files):
    write_files(tmp_path, dict.fromkeys(ROW, b"") | files)
    assert get_facts(list_clips(tmp_path)) == {clip: ((text,), "train") for clip, text in ROW.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clips.csv", "id,description\na.mp4,x"),
        ("sub/clips.jsonl", '{"id": "a"}'),
        ("c.parquet", ""),
        ("clips.tsv", "id\tdescription\na.mp4\tx"),
        ("list.json", '[{"id": "a", "description": "x"}]'),
        ("metadata.json", '{"a": "x"}'),
        ("metadata.json", '{"videos": [{"path": "a.mp4"}], "texts": [{"caption": "x"}]}'),
        ("damaged.json", "{"),
        ("a.json", '{"description": "x"}'),
        ("labels/a.txt", "x"),
        ("captions/c.txt", "x"),
        ("captions.txt", "a.mp4|x"),
        ("captions.yaml", "a.mp4: x"),
        ("captions.xlsx", b"PK"),
        ("a.srt", "1"),
    ],
)
def test_no_clip_has_a_caption_while_a_text_is_not_read_is_an_error(tmp_path, name, content):
    write_files(tmp_path, {"a.mp4": b"", name: content})
    with pytest.raises(UserError, match=rf"clips without captions and {name}, .*; write the captions to metadata\.csv"):
        list_clips(tmp_path)
    write_files(tmp_path, {"a.txt": "x"})
    assert list_clips(tmp_path).unlisted == (name,)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", "path,text\nb.mp4,y"),
        ("captions.json", '{"b.mp4": "y"}'),
        ("sub/list.json", '[{"path": "b.mp4", "text": "y"}]'),
    ],
)
def test_a_list_of_the_captions_that_caption_files_lack_is_an_error(tmp_path, name, content):
    write_files(tmp_path, {"a.mp4": b"", "a.txt": "x", "b.mp4": b"", name: content})
    with pytest.raises(UserError, match=f"with caption files and the list {name}; ingest it with"):
        list_clips(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.json", '{"b.mp4": "y"}'),
        ("b.info.json", '{"path": "b.mp4", "text": "y"}'),
        ("info.json", '{"fps": 24}'),
        ("b.srt", "1"),
        ("notes.md", "y"),
    ],
)
def test_other_files_beside_caption_files_are_unlisted(tmp_path, name, content):
    write_files(tmp_path, {"a.mp4": b"", "a.txt": "x", "b.mp4": b"", name: content})
    assert list_clips(tmp_path).unlisted == (name,)


def test_captions_of_two_clips_of_one_name_in_a_folder_of_their_own_are_an_error(tmp_path):
    write_files(tmp_path, {"one/a.mp4": b"", "two/a.mp4": b"", "captions/a.txt": "x"})
    with pytest.raises(UserError, match=r"clips without captions and captions/a\.txt"):
        list_clips(tmp_path)


@pytest.mark.parametrize("files", [{}, {"README.md": "x", "LICENSE.txt": "x"}, {"a.txt": " \n"}, {"a.json": "{}"}])
@pytest.mark.filterwarnings("error")
def test_clips_may_have_no_captions(tmp_path, files):
    write_files(tmp_path, {"a.mp4": b""} | files)
    listing = list_clips(tmp_path)
    assert get_facts(listing) == {"a.mp4": ((), "train")}
    warn_of_losses(tmp_path, listing)


UNREAD = ["captions.md", "captions", "c.ndjson", "c.csv.gz", "c.json.gz", "c.pkl", "a.description", "a.prompt", "a.cap"]
UNREAD += ["a.tags", "a.docx", "sub/a.html"]


@pytest.mark.parametrize("name", UNREAD)
def test_files_that_are_not_read_are_named_where_no_clip_has_a_caption(tmp_path, name):
    write_files(tmp_path / "clips", {"a.mp4": b"", "b.mp4": b"", name: "x"})
    told = rf"no clip of {tmp_path}/clips has a caption, and these files are not read: {name}; .* metadata\.csv"
    with pytest.warns(UserWarning, match=told):
        folder = plan_ingest(tmp_path / "clips", tmp_path / "data", config=IngestConfig())
    assert folder.read_skipped()["unlisted"] == [name]


def test_a_few_of_many_files_that_are_not_read_are_named(tmp_path):
    write_files(tmp_path, {"a.mp4": b""} | dict.fromkeys(["1.npy", "2.npy", "3.npy", "4.npy"], b""))
    with pytest.warns(UserWarning, match=r"not read: 1\.npy, 2\.npy, 3\.npy, …; if"):
        warn_of_losses(tmp_path, list_clips(tmp_path))


def test_files_beside_a_list_without_captions_are_named(tmp_path):
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b"", "metadata.csv": "path,text\na.mp4,\n", "a.txt": "x"})
    listing = list_clips(tmp_path)
    assert (get_facts(listing), listing.unlisted) == ({"a.mp4": ((), "train")}, ("a.txt", "b.mp4"))
    with pytest.warns(UserWarning, match=r"not read: a\.txt; if"):
        warn_of_losses(tmp_path, listing)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([f"frame_{number:04}.png" for number in range(12)], "holds 12 images frame_#.png, which are a clip each"),
        ([f"{folder}/{number}.JPG" for folder in "ab" for number in range(20)], "holds 20 images a/#.JPG"),
        ([f"frame_{number:04}.png" for number in range(11)], None),
        ([f"{number}/a.png" for number in range(12)], None),
        ([f"{number}.gif" for number in range(12)], None),
        ([*(f"{number}.png" for number in range(12)), "a.mp4"], None),
        ([*(f"{number}.png" for number in range(12)), "0.txt"], None),
    ],
)
def test_numbered_frames_of_a_video_are_told(tmp_path, names, told, recwarn):
    write_files(tmp_path, dict.fromkeys(names, "x"))
    warn_of_losses(tmp_path, list_clips(tmp_path))
    assert [told in str(each.message) for each in recwarn] == ([] if told is None else [True])


def test_the_row_of_another_split_is_rejected_with_both(tmp_path):
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b""})
    write_files(tmp_path, {"metadata.csv": "path,text,split\na.mp4,x,train\na.mp4,y,test\nb.mp4,z,test\n"})
    listing = list_clips(tmp_path)
    assert get_facts(listing) == {"b.mp4": (("z",), "test")}
    assert listing.rejected == (("a.mp4", "line 3: is in the splits test and train; name it for one of them"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.parquet", b"PAR1 and no more", "is not a Parquet file"),
        ("metadata.json", b'[{"file_name": "a.mp4", "text": "x"}', "is not JSON"),
        ("metadata.json", b'[{"file_name": "a.mp4"}]', "has no field text in any of its 1 objects"),
    ],
)
def test_damaged_lists_are_refused(tmp_path, name, content, message):
    write_files(tmp_path, {"a.mp4": b"", name: content})
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path)


MEDIA = {"bytes": b"of a clip", "path": "a.mp4"}
"""A clip as Hugging Face's hub writes it into a table."""


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"video": [MEDIA], "text": ["x"]}, "video"),
        ({"video": [MEDIA]}, "video"),
        ({"video": [b"of a clip"], "text": ["x"]}, "video"),
        ({"video": [{"bytes": None, "path": "a.mp4"}], "text": ["x"]}, "video"),
        ({"image": [MEDIA], "text": ["x"]}, "image"),
        ({"mp4": [b"of a clip"], "json": [{"fps": 24}]}, "mp4"),
        ({"frames": [[MEDIA]], "text": ["x"]}, "frames"),
        ({"image": [MEDIA], "file_name": ["a.png"], "text": ["x"]}, "image"),
        ({"image": [MEDIA], "video": [MEDIA], "text": ["x"]}, "image, video"),
        ({"path": ["a.mp4"], "video": [{"bytes": b"of a clip"}], "text": ["x"]}, "video"),
    ],
)
@pytest.mark.parametrize(
    ("path", "others"),
    [
        ("data/train-00000-of-00001.parquet", {"README.md": "x", "dataset_infos.json": "{}"}),
        ("data/metadata.parquet", {}),
    ],
)
def test_media_in_a_table_are_refused_with_one_message(tmp_path, path, others, columns, names):
    write_files(tmp_path / "clips", others)
    write_parquet(tmp_path / "clips" / path, **columns)
    told = rf"{path} .* holds media or other bytes in its column {names}; .* docs/data\.md, Media in a table$"
    for source in (tmp_path / "clips", tmp_path / "clips" / path):
        with pytest.raises(UserError, match=told):
            ingest(source, tmp_path / "out")


@pytest.mark.parametrize("columns", [{"video": [MEDIA], "text": ["x"]}, {"video": [MEDIA]}])
def test_tables_of_media_beside_a_picture_are_refused(tmp_path, columns):
    write_files(tmp_path, {"preview.gif": b""})
    for number in range(2):
        write_parquet(tmp_path / f"data/train-{number}.parquet", **columns)
    with pytest.raises(UserError, match=r"train-0\.parquet .* holds media or other bytes in its column video"):
        list_clips(tmp_path)


def test_a_list_may_have_other_columns_of_bytes(tmp_path):
    write_files(tmp_path, {"a.mp4": b""})
    write_parquet(tmp_path / "list.parquet", file_name=["a.mp4"], text=["x"], embedding=[b"of x"])
    for source in (tmp_path, tmp_path / "list.parquet"):
        assert get_facts(list_clips(source)) == {"a.mp4": (("x",), "train")}
    write_parquet(tmp_path / "list.parquet", file_name=["a.mp4"], title=["x"], embedding=[b"of x"])
    with pytest.raises(UserError, match=r"clips without captions and list\.parquet, which is no list"):
        list_clips(tmp_path)
    with pytest.raises(UserError, match="has no column text"):
        list_clips(tmp_path / "list.parquet")
    write_parquet(tmp_path / "list.parquet", id=["a"], embedding=[b"of x"])
    write_files(tmp_path, {"a.txt": "y"})
    assert get_facts(list_clips(tmp_path)) == {"a.mp4": (("y",), "train")}
