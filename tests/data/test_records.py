"""Files of records: TFDS reads them, and each record is read in place by its offset and length."""

import errno
import itertools
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.storage import to_storage_path
from dit_video.data import records
from dit_video.data.records import (
    RecordReader,
    get_file_name,
    get_part_name,
    make_bytes_feature,
    sort_splits,
    write_metadata,
    write_records,
)

FEATURES = {"clip": make_bytes_feature(), "name": tfds.features.Text(), "frames": np.int32}
BLOCK = 1 << 16
"""Bytes between the headers that interrupt a file."""
LENGTHS = (0, 1, 100, BLOCK - 200, BLOCK, 3 * BLOCK + 17, 5, 10 * BLOCK, 64)


def make_examples(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    return [{"clip": generator.bytes(n), "name": f"{i} ü.mp4", "frames": i} for i, n in enumerate(lengths)]


def test_records_are_those_that_tfds_reads(tmp_path):
    parts = {"train": [make_examples(), [], make_examples((7, 8))], "test": [make_examples((BLOCK,))]}
    places, counts = {}, {}
    for split, files in parts.items():
        for number, examples in enumerate(files):
            name = get_file_name("clips", get_part_name(split, number))
            places[name] = write_records(tmp_path / name, FEATURES, examples)
        counts[split] = list(map(len, files))
    write_metadata(tmp_path, "clips", counts, features=FEATURES)
    reader = RecordReader(tmp_path, FEATURES)
    builder = tfds.builder_from_directory(tmp_path)
    assert sort_splits(builder.info.splits) == ["train", "test"]
    for split, files in parts.items():
        records = builder.as_data_source(split)
        expected = [example for examples in files for example in examples]
        own = [
            reader.read(name, place)
            for number in range(len(files))
            for name in [get_file_name("clips", get_part_name(split, number))]
            for place in places[name]
        ]
        assert len(records) == len(own) == len(expected)
        for record, mine, example in zip(records, own, expected, strict=True):
            assert record["clip"] == mine["clip"] == example["clip"]
            assert record["name"].decode() == mine["name"].decode() == example["name"]
            assert record["frames"] == mine["frames"] == example["frames"]


def test_records_are_read_wherever_the_header_of_a_block_interrupts_them(tmp_path):
    """The first record moves all others through every place at the border of a block."""
    for shift in [*range(BLOCK - 200, BLOCK + 1), 2 * BLOCK - 24]:
        examples = make_examples((shift, 1, 30, 2 * BLOCK, 0, 3))
        places = write_records(tmp_path / "r.array_record", FEATURES, examples)
        for example, place in zip(examples, places, strict=True):
            assert RecordReader(tmp_path, FEATURES).read("r.array_record", place)["clip"] == example["clip"]


def test_places_do_not_overlap_and_hold_little_but_their_records(tmp_path):
    places = write_records(tmp_path / "r.array_record", FEATURES, make_examples())
    for place, after in itertools.pairwise(places):
        assert place.offset + place.length <= after.offset
    for place, length in zip(places, LENGTHS, strict=True):
        assert length < place.length < length + 200 + 24 * (2 + length // BLOCK)


def test_the_same_examples_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_records(tmp_path / name, FEATURES, make_examples())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_record_in_a_bucket_is_read_alone(memory):
    examples, folder = make_examples(), to_storage_path(memory)
    places = write_records(folder / "r.array_record", FEATURES, examples)
    for example, place in zip(examples, places, strict=True):
        assert RecordReader(folder, FEATURES).read("r.array_record", place)["clip"] == example["clip"]
    with pytest.raises(MissingError, match=r"no such file: memory://bucket/other\.array_record\. The data set is"):
        RecordReader(folder, FEATURES).read("other.array_record", places[0])


@pytest.mark.parametrize("damage", ["first byte", "last byte", "cut off"])
def test_a_damaged_record_is_refused_and_the_others_are_read(tmp_path, damage):
    examples, path = make_examples(), tmp_path / "r.array_record"
    places = write_records(path, FEATURES, examples)
    content, number = bytearray(path.read_bytes()), len(places) - 2
    offset, length, _ = places[number]
    if damage == "cut off":
        del content[offset + length - 1 :]
    else:
        content[offset if damage == "first byte" else offset + length - 1] ^= 1
    path.write_bytes(content)
    reader = RecordReader(tmp_path, FEATURES)
    with pytest.raises(DecodeError, match=rf"{path} is damaged at byte {offset}"):
        reader.read(path.name, places[number])
    for example, place in list(zip(examples, places, strict=True))[:number]:
        assert reader.read(path.name, place)["clip"] == example["clip"]


def test_a_file_that_does_not_exist_is_named_with_the_fix(tmp_path):
    places = write_records(tmp_path / "r.array_record", FEATURES, make_examples())
    with pytest.raises(MissingError, match=rf"no such file: {tmp_path}/s\.array_record\. .*: copy the file again"):
        RecordReader(tmp_path, FEATURES).read("s.array_record", places[0])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield from make_examples()
        raise UserError("a clip cannot be read")

    with pytest.raises(UserError, match="a clip cannot be read"):
        write_records(tmp_path / "r.array_record", FEATURES, broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    real = records.array_record_module.ArrayRecordWriter
    monkeypatch.setattr(records.array_record_module, "ArrayRecordWriter", lambda _, options: real("/dev/full", options))
    with pytest.raises(OSError, match="No space left on device") as error:
        write_records(tmp_path / "r.array_record", FEATURES, make_examples((1 << 22,)))
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_is_not_known_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_OPTIONS", "group_size:2,uncompressed")
    with pytest.raises(AssertionError, match="a format that dit_video does not read"):
        write_records(tmp_path / "r.array_record", FEATURES, make_examples((100, 100, 100)))
    assert list(tmp_path.iterdir()) == []


def test_splits_are_in_their_standard_order():
    assert sort_splits(["z", "test", "a", "train", "validation", "test"]) == ["train", "validation", "test", "a", "z"]
