"""Annotation is resumed, shared by processes and repeated for what changed only; no clip is lost."""

import errno
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.storage import to_storage_path
from dit_video.curation import annotate as annotation
from dit_video.curation.annotate import annotate, annotate_table, compute_keys
from dit_video.curation.annotator import AnnotationError, Annotator, Column, TableAnnotator
from dit_video.curation.annotators import ANNOTATORS, check_names
from dit_video.data.tables import Table, write_column
from support.annotated_clips import make_clip, open_clips

COUNT = 10


@dataclass(frozen=True, kw_only=True)
class Sizes(Annotator):
    """Number of bytes and of captions of each clip."""

    block_clips: ClassVar[int] = 3
    version: int = 1
    fails: tuple[str, ...] = ()
    breaks_at: str = ""
    reads: bool = False
    annotated: list[str] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        return "sizes"

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            "size": Column(type=pa.int64(), description="Size of the file.", unit="bytes"),
            "num_captions": Column(type=pa.float32(), description="Number of captions."),
        }

    @property
    def identity(self) -> str:
        return f"sizes {self.version}"

    @property
    def reads_captions(self) -> bool:
        return self.reads

    def annotate(self, clip) -> Mapping[str, Any]:
        name = clip.info.name
        if name == self.breaks_at:
            raise UserError("the server is gone")
        self.annotated.append(name)
        if name in self.fails:
            raise AnnotationError(f"{name} has no size")
        return {"size": len(clip.content), "num_captions": float(len(clip.info.captions))}


@pytest.fixture
def contents():
    return {f"{number}.mp4": make_clip(number) for number in range(COUNT)}


def read(folder):
    table = Table(folder)
    return {name: table.arrow(name).to_pylist() for name in ("size", "num_captions", "sizes_error")}


def test_all_clips_get_values_and_the_columns_describe_themselves(contents, tmp_path):
    source = open_clips(tmp_path, contents, {"3.mp4": ("a", "b")})
    seen = []
    report = annotate(source, Sizes(), progress=lambda done, total: seen.append((done, total)))
    assert (report.computed, report.failures, report.pending) == (COUNT, {}, 0)
    assert seen == [(done, COUNT) for done in range(1, COUNT + 1)]
    values = read(tmp_path)
    assert values["size"] == list(map(len, contents.values()))
    assert values["num_captions"] == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert values["sizes_error"] == [None] * COUNT
    schema = pa.parquet.read_schema(tmp_path / "columns" / "sizes.parquet")
    assert schema.field("size").metadata == {b"description": b"Size of the file.", b"unit": b"bytes"}
    names = {path.name for path in (tmp_path / "columns").iterdir()}
    assert names == {"sizes.parquet", "captions.parquet", "choice.parquet"}  # no partial results


def test_what_was_computed_before_a_failure_is_not_computed_again(contents, tmp_path):
    source = open_clips(tmp_path, contents)
    first = Sizes(breaks_at="5.mp4")
    with pytest.raises(UserError, match="the server is gone"):
        annotate(source, first)
    assert not (tmp_path / "columns" / "sizes.parquet").exists()
    second = Sizes()
    assert annotate(source, second).pending == 0
    # The clips of one block that were finished are kept, too.
    assert not set(first.annotated[:4]) & set(second.annotated)
    assert read(tmp_path)["size"] == list(map(len, contents.values()))


def test_processes_share_the_clips_and_the_last_one_writes(contents, tmp_path):
    source, annotated = open_clips(tmp_path, contents), []
    for shard in (1, 0, 2):
        annotator = Sizes()
        report = annotate(source, annotator, shard=shard, shards=3)
        annotated += annotator.annotated
        assert (tmp_path / "columns" / "sizes.parquet").exists() == (shard == 2) == (report.pending == 0)
    assert sorted(annotated) == sorted(contents)
    one = read(tmp_path)
    alone = tmp_path / "alone"
    annotate(open_clips(alone, contents), Sizes())
    assert (alone / "columns" / "sizes.parquet").read_bytes() == (tmp_path / "columns" / "sizes.parquet").read_bytes()
    assert read(alone) == one


def test_a_data_set_in_a_bucket_is_annotated_by_several_processes(contents, memory):
    source = open_clips(f"{memory}/data", contents)
    with pytest.raises(UserError, match="the server is gone"):
        annotate(source, Sizes(breaks_at="5.mp4"), shard=0, shards=1)
    annotated = []
    for shard in range(2):
        annotator = Sizes()
        annotate(source, annotator, shard=shard, shards=2)
        annotated += annotator.annotated
    assert 0 < len(annotated) < COUNT  # some are done
    assert len(annotated) == len(set(annotated))
    assert read(f"{memory}/data")["size"] == list(map(len, contents.values()))
    assert not [path.name for path in (to_storage_path(memory) / "data" / "columns").iterdir() if path.is_dir()]


def test_only_new_clips_are_computed(contents, tmp_path):
    names = list(contents)
    annotate(open_clips(tmp_path, {name: contents[name] for name in names[:6]}), Sizes())
    later = Sizes()
    source = open_clips(tmp_path, contents)
    report = annotate(source, later)
    assert sorted(later.annotated) == names[6:]
    assert (report.computed, source.reads) == (4, 4)
    assert read(tmp_path)["size"] == list(map(len, contents.values()))
    assert annotate(source, Sizes()).computed == 0


def test_changed_bytes_captions_and_versions_are_computed_again(contents, tmp_path):
    annotate(open_clips(tmp_path, contents), Sizes(reads=True))
    changed = contents | {"2.mp4": make_clip(99)}
    again = Sizes(reads=True)
    annotate(open_clips(tmp_path, changed, {"4.mp4": ("new",)}), again)
    assert sorted(again.annotated) == ["2.mp4", "4.mp4"]
    assert read(tmp_path)["num_captions"][4] == 1
    without_captions = Sizes()
    annotate(open_clips(tmp_path / "b", contents), without_captions)
    annotate(open_clips(tmp_path / "b", contents, {"4.mp4": ("new",)}), without_captions)
    assert len(without_captions.annotated) == COUNT
    newer = Sizes(reads=True, version=2)
    assert annotate(open_clips(tmp_path, changed), newer).computed == COUNT


def test_a_clip_without_values_has_the_reason(contents, tmp_path):
    source = open_clips(tmp_path, contents)
    report = annotate(source, Sizes(fails=("1.mp4",)))
    assert report.failures == {"1.mp4": "1.mp4 has no size"}
    values = read(tmp_path)
    assert values["size"][1] is None
    assert values["sizes_error"] == [None, "1.mp4 has no size", *[None] * 8]
    assert annotate(source, Sizes()).computed == 0
    again = Sizes()
    assert annotate(source, again, retry=True).computed == 1
    assert again.annotated == ["1.mp4"]
    assert read(tmp_path)["sizes_error"] == [None] * COUNT


def test_damaged_clips_are_counted_and_others_follow(contents, tmp_path):
    contents |= {"4.mp4": b"damaged", "7.mp4": contents["7.mp4"][:200]}
    report = annotate(open_clips(tmp_path, contents), ANNOTATORS["motion_vectors"]())
    assert sorted(report.failures) == ["4.mp4", "7.mp4"]
    table = Table(tmp_path)
    errors = table.arrow("motion_vectors_error").to_pylist()
    assert [error is not None for error in errors] == [name in report.failures for name in contents]
    assert table.arrow("camera").null_count == 2


def test_a_record_that_cannot_be_read_is_no_end(contents, tmp_path, monkeypatch):
    source = open_clips(tmp_path, contents)
    take = type(source).__getitem__

    def read_record(self, index):
        if index == 2:
            raise DecodeError("the record of 2.mp4 is damaged. Ingest it again.")
        return take(self, index)

    monkeypatch.setattr(type(source), "__getitem__", read_record)
    assert annotate(source, Sizes()).failures == {"2.mp4": "the record of 2.mp4 is damaged. Ingest it again."}


def test_a_full_disk_names_the_file(contents, tmp_path, monkeypatch):
    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = open_clips(tmp_path, contents)
    monkeypatch.setattr(pa.parquet, "write_table", fill)
    with pytest.raises(UserError, match=r"columns/sizes\.parts.*No space left on device.*[Ff]ree"):
        annotate(source, Sizes())
    monkeypatch.undo()
    assert annotate(source, Sizes()).pending == 0


def test_wrong_requests_say_what_to_do(contents, tmp_path):
    empty = open_clips(tmp_path / "empty", {})
    with pytest.raises(UserError, match=r"no clips.*another"):
        annotate(empty, Sizes())
    with pytest.raises(UserError, match=r"shard=3 of shards=3.*0 to 2"):
        annotate(open_clips(tmp_path, contents), Sizes(), shard=3, shards=3)
    with pytest.raises(UserError, match=r"'motion'.*motion_vectors, clip"):
        check_names(("motion",))
    with pytest.raises(UserError, match=r"no annotator.*motion_vectors"):
        check_names(())


@dataclass(frozen=True, kw_only=True)
class Ranks(TableAnnotator):
    """Rank of each clip by its size."""

    name: ClassVar[str] = "ranks"
    identity: ClassVar[str] = "ranks 1"
    needs: ClassVar[Mapping[str, str]] = {"size": "sizes"}
    columns: ClassVar[Mapping[str, Column]] = {"rank": Column(type=pa.int64(), description="Rank by size.")}

    def annotate_table(self, names, columns):
        sizes = columns["size"].to_pylist()
        return {"rank": [sorted(sizes).index(size) for size in sizes]}


def test_columns_of_columns_need_those_first(contents, tmp_path):
    source = open_clips(tmp_path, contents)
    with pytest.raises(UserError, match=r"no column size.*tools/annotate\.py .* sizes"):
        annotate_table(source, Ranks())
    annotate(source, Sizes())
    annotate_table(open_clips(tmp_path, contents), Ranks())
    table = Table(tmp_path)
    assert table["rank"].tolist() == [sorted(table["size"].tolist()).index(size) for size in table["size"].tolist()]


def test_values_of_other_clips_are_not_replaced_by_those_of_other_settings(contents, tmp_path):
    source = open_clips(tmp_path, contents)
    annotate(source, Sizes())
    one = source.select(["3.mp4"])
    with pytest.raises(UserError, match=r"sizes\.parquet has values of 9 clips by other settings.*--captions\.label"):
        annotate(one, Sizes(version=2))
    assert read(tmp_path)["size"] == list(map(len, contents.values()))
    assert annotate(one, Sizes()).computed == 0  # the same settings
    later = Sizes(version=2)
    annotate(source, later)
    assert len(later.annotated) == COUNT
    annotate_table(open_clips(tmp_path, contents), Ranks())
    with pytest.raises(UserError, match="ranks compares all 10 clips"):
        annotate_table(open_clips(tmp_path, contents).select(["3.mp4"]), Ranks())


def test_a_column_of_another_file_is_refused_before_anything_is_computed(contents, tmp_path):
    source = open_clips(tmp_path, contents)
    write_column(tmp_path, "mine", {"id": pa.array(source.column("id"), pa.uint64()), "size": [1] * COUNT})
    annotator = Sizes()
    with pytest.raises(UserError, match="has a column size already"):
        annotate(open_clips(tmp_path, contents), annotator)
    assert annotator.annotated == []
    write_column(tmp_path, "other", {"id": pa.array(source.column("id"), pa.uint64()), "rank": [1] * COUNT})
    with pytest.raises(UserError, match="has a column rank already"):
        annotate_table(open_clips(tmp_path, contents), Ranks())


@pytest.mark.parametrize("attempt", range(5))
def test_a_retry_before_the_columns_are_merged_replaces_failures(contents, tmp_path, attempt):
    """Whatever the names of the parts, which depend on the clips."""
    contents = {f"{attempt}-{name}": content for name, content in contents.items()}
    names = list(contents)
    source = open_clips(tmp_path, contents)
    with pytest.raises(UserError, match="the server is gone"):
        annotate(source, Sizes(fails=(names[1],), breaks_at=names[9]))
    report = annotate(source, Sizes(), retry=True)
    assert (report.failures, report.pending) == ({}, 0)
    assert read(tmp_path)["size"] == list(map(len, contents.values()))


@pytest.mark.parametrize("attempt", range(5))
def test_a_clip_that_changes_while_others_are_annotated_is_not_pending_forever(contents, tmp_path, attempt):
    contents = {f"{attempt}-{name}": content for name, content in contents.items()}
    names = list(contents)
    captions = dict.fromkeys(names, ("a",))
    with pytest.raises(UserError, match="the server is gone"):
        annotate(open_clips(tmp_path, contents, captions), Sizes(reads=True, breaks_at=names[9]))
    captions[names[1]] = ("b", "c")
    report = annotate(open_clips(tmp_path, contents, captions), Sizes(reads=True))
    assert report.pending == 0
    assert read(tmp_path)["num_captions"][1] == 2


def test_a_part_that_is_written_while_others_are_merged_is_kept(contents, tmp_path, monkeypatch):
    source, write = open_clips(tmp_path, contents), annotation.write_columns

    def write_with_another(folder, name, table, note):
        write(folder, name, table, note)
        if name == "sizes":  # another process ends at this moment
            monkeypatch.setattr(annotation, "write_columns", write)
            rows = [{"clip": 0, "id": source.infos[0].id, "size": 7, "num_captions": 7.0}]
            own = {"sizes_error": None, "sizes_key": int(compute_keys(source, Sizes())[0])}
            annotation.write_rows(folder, Sizes(), [row | own for row in rows])

    monkeypatch.setattr(annotation, "write_columns", write_with_another)
    annotate(source, Sizes())
    assert len(list((tmp_path / "columns" / "sizes.parts").iterdir())) == 1
    annotate(source, Sizes())
    assert read(tmp_path)["size"][0] == 7
    assert not (tmp_path / "columns" / "sizes.parts").exists()


def test_values_that_are_being_computed_are_kept_when_another_clip_ends_the_run(contents, tmp_path):
    started, ended = threading.Event(), threading.Event()

    @dataclass(frozen=True, kw_only=True)
    class Slow(Sizes):
        def annotate(self, clip):
            if clip.info.name == "0.mp4":
                started.set()
                assert ended.wait(20)
            elif clip.info.name == "1.mp4":
                assert started.wait(20)
                threading.Timer(0.3, ended.set).start()
                raise UserError("the server is gone")
            return super().annotate(clip)

    source = open_clips(tmp_path, contents)
    with pytest.raises(UserError, match="the server is gone"):
        annotate(source, Slow())
    later = Sizes()
    annotate(source, later)
    assert "0.mp4" not in later.annotated
