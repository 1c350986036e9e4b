"""Exports are imported again as the same set, say what they hold, and are complete or absent."""

import csv
import errno
import hashlib
import json
import re
import tarfile

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq
import pytest
import yaml

from dit_video.core.errors import UserError
from dit_video.curation.export import EXPORT_FORMATS, ExportContents, export_clips
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.ingest.formats import list_clips
from dit_video.data.tables import write_column
from support.clip_tables import MemoryClips, make_clip_file, make_row, write_table
from support.huge_columns import make_huge_texts

FORMATS = list(EXPORT_FORMATS)
NAMES = ("train/beach/a.mp4", "train/b.mp4", "train/c.png", "test/d.mp4", "validation/e.mp4")


def make_clips(folder, names):
    """Return a data set with a kept clip of each name, and rows of other outcomes."""
    files = [make_clip_file(number, frames=1 if name.endswith("png") else 9) for number, name in enumerate(names)]
    captions = [[f"clip {number}, “quoted”, with a comma"] if number else [] for number in range(len(names))]
    rows = [
        make_row(
            name,
            content,
            captions=texts,
            motion=float(number),
            split=name.split("/")[0],
            frames=1 if name.endswith("png") else 9,
        )
        for number, (name, content, texts) in enumerate(zip(names, files, captions, strict=True))
    ]
    others = [
        make_row("train/dark.mp4", None, outcome="dropped", reason="black for 90 %"),
        make_row("train/broken.mp4", None, outcome="unreadable", reason="no moov"),
    ]
    write_table(folder, [*rows, *others])
    return MemoryClips(folder, lambda row: files[row])


@pytest.fixture
def clips(tmp_path):
    return make_clips(tmp_path / "data", NAMES)


def export(clips, folder, format, **options):
    export_clips(ExportContents.select(clips, title="Beach & sea", **options), folder, format)
    return folder


def describe_source(clips):
    """Return captions, split and hash of the payload of each kept clip."""
    table = clips.table
    columns = [table.arrow(name).to_pylist() for name in ("name", "captions", "split", "payload", "outcome")]
    rows = zip(*columns, strict=True)
    return {name: (tuple(texts), split, payload) for name, texts, split, payload, outcome in rows if outcome == "kept"}


def strip_tar(name):
    return re.sub(r"^(train|validation|test)/\d{5}\.tar/", "", name)


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_ingested_as_the_same_set(clips, tmp_path, format):
    folder = export(clips, tmp_path / "out", format)
    ingest(folder, tmp_path / "again")
    source = ClipSource(tmp_path / "again")
    described = {
        strip_tar(info.name): (info.captions, info.split, hashlib.sha256(source[index]).hexdigest())
        for index, info in enumerate(source.infos)
    }
    assert described == describe_source(clips)


@pytest.mark.parametrize("format", FORMATS)
def test_names_without_folders_of_splits_are_put_into_them_where_the_format_needs_them(tmp_path, format):
    names = ("beach/a.mp4", "b.mp4", "test/c.mp4")
    files = [make_clip_file(number) for number in range(3)]
    pairs = zip(names, files, ("train", "test", "train"), strict=True)
    write_table(
        tmp_path / "data", [make_row(name, content, split=split, captions=["x"]) for name, content, split in pairs]
    )
    folder = export(MemoryClips(tmp_path / "data", lambda row: files[row]), tmp_path / "out", format)
    splits = {strip_tar(clip.name): clip.split for clip in list_clips(folder).clips}
    if format == "videofolder":
        assert splits == {"train/beach/a.mp4": "train", "test/b.mp4": "test", "train/test/c.mp4": "train"}
    else:
        assert splits == {"beach/a.mp4": "train", "b.mp4": "test", "test/c.mp4": "train"}


@pytest.mark.parametrize("format", FORMATS)
def test_clips_with_several_captions_keep_them_in_their_order(tmp_path, format):
    file = make_clip_file(0)
    captions = ["short", "a longer one", "a third"]
    write_table(tmp_path / "data", [make_row("a.mp4", file, captions=captions)], parts=1)
    folder = export(MemoryClips(tmp_path / "data", lambda row: file), tmp_path / "out", format)
    if format == "csv":
        rows = list(csv.DictReader((folder / "metadata.csv").open()))
        assert [(row["path"], row["text"]) for row in rows] == [("a.mp4", text) for text in captions]
    (clip,) = list_clips(folder).clips
    assert list(clip.captions) == captions


def make_captioned_clips(folder):
    """Return clips with captions of the source and of a model, of the model alone, and without any."""
    files = [make_clip_file(number) for number in range(3)]
    names = ["a.mp4", "b.mp4", "c.mp4"]
    texts = [["by hand"], [], []]
    rows = [make_row(name, file, captions=each) for name, file, each in zip(names, files, texts, strict=True)]
    write_table(folder, rows)
    models = {
        "captions_long": pa.array([["a long one", "by hand"], ["another, “long” one"], None], pa.list_(pa.string())),
        "captions_short": pa.array(["short", "brief", None]),
        "captions_long_error": pa.array([None, None, "the server refused"]),
    }
    write_column(folder, "models", pa.table({"name": names, **models}))
    return MemoryClips(folder, files.__getitem__)


@pytest.mark.nightly
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ((), [("by hand", "a long one", "short"), ("another, “long” one", "brief"), ()]),
        (("captions_long",), [("a long one", "by hand"), ("another, “long” one",), ()]),
        (("captions_short", "captions"), [("short", "by hand"), ("brief",), ()]),
    ],
)
def test_captions_of_models_come_back_when_the_export_is_ingested(tmp_path, format, captions, expected):
    clips = make_captioned_clips(tmp_path / "data")
    folder = export(clips, tmp_path / "out", format, captions=captions)
    ingest(folder, tmp_path / "again")
    infos = ClipSource(tmp_path / "again").infos
    assert {strip_tar(info.name): info.captions for info in infos} == dict(
        zip(clips.table["name"].to_pylist(), expected, strict=True)
    )


def test_columns_of_captions_that_are_chosen_are_written_apart_too(tmp_path):
    clips = make_captioned_clips(tmp_path / "data")
    folder = export(clips, tmp_path / "out", "videofolder", captions=("captions_long",))
    table = pq.read_table(folder / "metadata.parquet")
    assert table["captions_long"].to_pylist() == clips.table["captions_long"].to_pylist()
    assert "captions_short" not in table.column_names
    assert re.search(r"^\| captions \| 3 \|", (folder / "README.md").read_text(), re.MULTILINE)


def test_columns_that_hold_no_captions_are_refused(clips):
    with pytest.raises(UserError, match=r"captions=nothing .*captions"):
        ExportContents.select(clips, title="x", captions=("nothing",))
    with pytest.raises(UserError, match=r"captions=motion .* captions"):
        ExportContents.select(clips, title="x", captions=("motion",))
    with pytest.raises(UserError, match="vectors=nothing"):
        ExportContents.select(clips, title="x", vectors=("nothing",))


def add_vectors(clips):
    """Return the clips with columns of vectors and bytes."""
    names = clips.table["name"].to_pylist()
    vectors = {
        "embedding": pa.array([[0.5] * 64] * len(names), pa.list_(pa.float16(), 64)),
        "thumbnails": pa.array([b"\1\2\xff"] * len(names), pa.large_binary()),
        "palette": pa.array([[1, 2]] * len(names), pa.list_(pa.int32())),
    }
    write_column(clips.table.folder, "vectors", pa.table({"name": names, **vectors}))
    return MemoryClips(clips.table.folder, clips.read)


@pytest.mark.parametrize("format", FORMATS)
def test_vectors_and_bytes_are_written_only_if_they_are_named(clips, tmp_path, format):
    clips = add_vectors(clips)
    folder = export(clips, tmp_path / "out", format)
    assert "embedding" not in "".join((folder / name).read_text() for name in ("README.md", "croissant.json"))
    contents = ExportContents.select(clips, title="x")
    assert "palette" in contents.columns
    assert not {"embedding", "thumbnails"} & set(next(iter(contents)).values)
    folder = export(clips, tmp_path / "named", format, vectors=("embedding", "thumbnails"))
    if format == "videofolder":
        first = pq.read_table(folder / "train" / "metadata.parquet").to_pylist()[0]
        assert (list(first["embedding"]), first["thumbnails"]) == ([0.5] * 64, b"\1\2\xff")
    elif format == "webdataset":
        first = json.loads((folder / "index.jsonl").read_text().splitlines()[0])
        assert (first["embedding"], first["thumbnails"]) == ([0.5] * 64, "AQL/")
    else:
        first = next(csv.DictReader((folder / "metadata.csv").open()))
        assert (json.loads(first["embedding"]), first["thumbnails"]) == ([0.5] * 64, "AQL/")
    ingest(folder, tmp_path / "again")
    assert len(ClipSource(tmp_path / "again")) == len(NAMES)


@pytest.mark.parametrize("format", FORMATS)
def test_captions_of_more_text_than_one_array_can_hold_are_exported(tmp_path, monkeypatch, format):
    names = [f"{number}.mp4" for number in range(6)]
    write_table(
        tmp_path / "data", [make_row(name, make_clip_file(0), motion=number % 2) for number, name in enumerate(names)]
    )
    write_column(tmp_path / "data", "models", {"name": names, "captions_long": ["x"] * 6})
    clips = MemoryClips(tmp_path / "data", lambda row: make_clip_file(0))
    read, huge = clips.table.arrow, make_huge_texts()
    monkeypatch.setattr(clips.table, "arrow", lambda name: huge if name == "captions_long" else read(name))
    contents = ExportContents.select(clips, title="x", where="motion < 1")
    assert contents.rows.tolist() == [0, 2, 4]  # of which each is short, and in a chunk of its own
    export_clips(contents, tmp_path / "out", format)
    assert list(contents.iter_captions()) == [("\0" * 4,)] * 3


def test_parts_of_a_file_become_files_of_their_own(tmp_path):
    names = ["a/talk.mkv#0", "a/talk.mkv#1"]
    files = [make_clip_file(number) for number in range(2)]
    write_table(tmp_path / "data", [make_row(*pair) for pair in zip(names, files, strict=True)])
    folder = export(MemoryClips(tmp_path / "data", lambda row: files[row]), tmp_path / "out", "videofolder")
    assert {path.name: path.read_bytes() for path in folder.glob("a/*")} == {
        "talk#0.mp4": files[0],
        "talk#1.mp4": files[1],
    }
    assert pq.read_table(folder / "metadata.parquet")["name"].to_pylist() == names


def test_lists_of_splits_have_the_same_types_whatever_is_missing(tmp_path):
    files = [make_clip_file(number) for number in range(2)]
    rows = [
        make_row("a.mp4", files[0], split="train", captions=["x"], hash=[1 << 63], motion=1.0),
        make_row("b.mp4", files[1], split="test", captions=[]),
    ]
    write_table(tmp_path / "data", rows)
    folder = export(MemoryClips(tmp_path / "data", lambda row: files[row]), tmp_path / "out", "videofolder")
    train, test = (pq.read_schema(folder / split / "metadata.parquet") for split in ("train", "test"))
    assert train.equals(test)


def test_csv_has_open_soras_columns_first_and_all_others_after(clips, tmp_path):
    folder = export(clips, tmp_path / "out", "csv")
    rows = list(csv.reader((folder / "metadata.csv").open()))
    assert rows[0][:2] == ["path", "text"]
    assert {"motion", "sharpness", "fps", "codec", "split", "source", "payload"} <= set(rows[0])
    assert len(rows) == 1 + len(NAMES)
    assert [row[rows[0].index("motion")] for row in rows[1:]] == ["0.0", "1.0", "2.0", "3.0", "4.0"]
    assert all((folder / row[0]).is_file() for row in rows[1:])


def test_a_tar_holds_each_clip_with_its_text_and_its_columns(clips, tmp_path):
    folder = export(clips, tmp_path / "out", "webdataset")
    with tarfile.open(folder / "train" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == [f"train/beach/a{end}" for end in (".mp4", ".txt", ".json")]
        document = json.load(tar.extractfile("train/b.json"))
        assert tar.extractfile("train/b.txt").read().decode() == document["captions"][0]
    assert document["motion"] == 1.0
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert index[3]["file_name"] == "test/00000.tar/test/d.mp4"


def test_a_condition_and_splits_choose_the_clips(clips, tmp_path):
    folder = export(clips, tmp_path / "out", "csv", where="motion >= 1 and frames > 1", splits=("train", "test"))
    assert sorted(clip.name for clip in list_clips(folder).clips) == ["test/d.mp4", "train/b.mp4"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_says_splits_license_and_what_columns_are_like(clips, tmp_path, format):
    text = (export(clips, tmp_path / "out", format, license="cc-by-4.0") / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "cc-by-4.0"
    assert fields["pretty_name"] == "Beach & sea"
    assert fields["size_categories"] == ["n<1K"]
    assert "| train | 3 |" in body
    assert re.search(r"^\| motion \| 5 \| 0 \| `.*[▁-█].*` \| .*50 %: 2", body, re.MULTILINE)
    files = fields["configs"][0]["data_files"]
    for entry in files:
        assert all(list((tmp_path / "out").glob(pattern)) for pattern in entry["path"])


def test_texts_of_a_data_set_are_no_markup_of_the_card(tmp_path):
    file, hostile = make_clip_file(0), "x|y](http://evil.example)<script>alert(1)</script>"
    write_table(tmp_path / "data", [make_row("a.mp4", file, codec=hostile)], parts=1)
    clips = MemoryClips(tmp_path / "data", lambda row: file)
    export_clips(ExportContents.select(clips, title=hostile, license=hostile), tmp_path / "out", "csv")
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n", 2)[1])["license"] == hostile
    assert "<script>" not in text.split("---\n", 2)[2]
    assert "y](" not in text.split("---\n", 2)[2]


@pytest.mark.parametrize("format", FORMATS)
def test_croissant_names_files_and_columns_that_exist(clips, tmp_path, format):
    folder = export(clips, tmp_path / "out", format)
    document = json.loads((folder / "croissant.json").read_text())
    assert document["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    lists, media = document["distribution"]
    assert all((folder / path).is_file() for path in lists["includes"])
    assert all(list(folder.glob(pattern)) for pattern in media["includes"])
    fields = document["recordSet"][0]["field"]
    columns = {field["source"]["extract"]["column"] for field in fields}
    path = folder / lists["includes"][0]
    read = {"csv": pcsv.read_csv, "videofolder": pq.read_table, "webdataset": pjson.read_json}[format]
    assert columns <= set(read(path).column_names)
    assert {field["name"]: field["dataType"] for field in fields}["motion"] == "sc:Float"


@pytest.mark.parity
@pytest.mark.parametrize("format", FORMATS)
def test_mlcroissant_reads_all_records(clips, tmp_path, format):
    mlcroissant = pytest.importorskip("mlcroissant")
    folder = export(clips, tmp_path / "out", format)
    dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))  # it validates
    records = list(dataset.records("records"))
    assert sorted(record["records/motion"] for record in records) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert {record["records/name"].decode() for record in records} == set(NAMES)


@pytest.mark.parity
@pytest.mark.parametrize("format", FORMATS)
def test_hugging_faces_datasets_reads_splits_and_captions(clips, tmp_path, format):
    datasets = pytest.importorskip("datasets")
    folder = export(clips, tmp_path / "out", format)
    splits = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    expected = {"train": 3, "test": 1, "validation": 1} if format != "csv" else {"train": 5}  # one table
    assert {name: len(rows) for name, rows in splits.items()} == expected
    texts = [text or "" for name in splits for text in splits[name]["txt" if format == "webdataset" else "text"]]
    assert sorted(texts) == sorted("".join(captions) for captions, _, _ in describe_source(clips).values())


def test_an_unknown_format_is_refused(clips, tmp_path):
    with pytest.raises(UserError, match=r"'parquet'.*videofolder, webdataset, csv"):
        export(clips, tmp_path / "out", "parquet")


def test_a_destination_with_files_is_refused_and_left_as_it_is(clips, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        export(clips, tmp_path / "out", "csv")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export(clips, tmp_path / "file", "csv")


@pytest.mark.parametrize(
    ("format", "names", "expected"),
    [
        ("videofolder", ("a.mp4", "A.mp4", "x/a.mp4"), ["a.mp4", "A_2.mp4", "x/a.mp4"]),
        ("csv", ("a.mp4", "A.MP4", "a_2.mp4"), ["a.mp4", "A_2.MP4", "a_2_2.mp4"]),
        ("webdataset", ("v.1.mp4", "v_1.mp4"), ["v_1.mp4", "v_1_2.mp4"]),
        ("webdataset", ("IMG_1.png", "IMG_1.mp4"), ["IMG_1.png", "IMG_1_2.mp4"]),  # a phone's photo and its video
    ],
)
def test_names_that_clash_get_numbers(tmp_path, format, names, expected):
    """A set of a phone has hundreds of such pairs, and each clip keeps its own file, name and caption."""
    files = [make_clip_file(number, frames=1 if name.endswith("png") else 9) for number, name in enumerate(names)]
    rows = [make_row(name, file, captions=[name]) for name, file in zip(names, files, strict=True)]
    write_table(tmp_path / "data", rows, parts=1)
    folder = export(MemoryClips(tmp_path / "data", files.__getitem__), tmp_path / "out", format)
    clips = {strip_tar(clip.name): clip for clip in list_clips(folder).clips}
    assert {name: clip.captions for name, clip in clips.items()} == {
        new: (name,) for name, new in zip(names, expected, strict=True)
    }
    assert [clips[name].read() for name in expected] == files


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/a.mp4", "x/../../a.mp4", "folder/"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    file = make_clip_file(0)
    write_table(tmp_path / "data", [make_row(name, file)], parts=1)
    with pytest.raises(UserError, match="no path inside"):
        export(MemoryClips(tmp_path / "data", lambda row: file), tmp_path / "out" / "deep", "videofolder")
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_said_and_leaves_nothing(clips, tmp_path, format):
    read, count = clips.read, []

    def read_until_full(row):
        count.append(row)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(row)

    clips.read = read_until_full
    with pytest.raises(UserError, match=r"No space left on device.*more space"):
        export(clips, tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_condition_that_selects_nothing_and_an_unknown_split_are_refused(clips):
    with pytest.raises(UserError, match=r"motion > 99.*wider"):
        ExportContents.select(clips, title="x", where="motion > 99")
    with pytest.raises(UserError, match="splits=dev"):
        ExportContents.select(clips, title="x", splits=("dev",))
