"""Records of data sets: ArrayRecord files that TFDS opens, whose records are read in place, also from buckets.

A file is written whole, by one process. The place of each record in it is kept in the data set's table, so that reading
a record is one request for its bytes alone. (ArrayRecord's own reader opens local files and `gs://`, and asks there for
all bytes from a record's first one on.) The files hold records uncompressed, as videos and latents are.

Format of the files: riegeli, doc/riegeli_records_file_format.md in github.com/google/riegeli. A file consists of
chunks, a record in each; a chunk is a header of 40 bytes and the data. At every multiple of 64 KiB a header of 24 bytes
interrupts it.
"""

import contextlib
import errno
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from dit_video.core.errors import DISK_FULL_ERRNOS, DecodeError, MissingError, UserError
from dit_video.core.files import atomic_path
from dit_video.core.storage import StoragePath, convert_storage_errors, upload
from dit_video.data.tables import Table

SPLITS = ("train", "validation", "test")
"""Standard splits, in their order; other splits follow by name."""
_FORMAT = tfds.core.FileFormat.ARRAY_RECORD
_TEMPLATE = "{DATASET}-{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"
_METADATA_FILES = ("features.json", "dataset_info.json")
_OPTIONS = "group_size:1,uncompressed"
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, struct.Struct("<5Q")
_WRITE_ERROR = re.compile(r"\b(?:open|write|close)\(\) failed: ([^;]+)")
"""Pattern of ArrayRecord's message (in an error without a type of its own) when the system refuses to write."""


class RecordPlace(NamedTuple):
    """Place of a record in a file."""

    offset: int
    """Offset of its first byte."""
    length: int
    """Number of bytes up to its last one, with the headers in between."""
    crc32: int
    """Checksum of these bytes."""


def make_bytes_feature() -> tfds.features.Tensor:
    """Return the TFDS feature of raw bytes."""
    return tfds.features.Tensor(shape=(), dtype=np.object_)


def sort_splits(splits: Iterable[str]) -> list[str]:
    """Return the splits in their order."""
    return sorted(set(splits), key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))


def get_part_name(split: str, number: int) -> str:
    """Return the name of a part of a data set, by which its rows and its records are called."""
    return f"{split}-{number:05d}"


def get_file_name(dataset: str, part: str) -> str:
    """Return the name of the file of a part's records."""
    return f"{dataset}-{part}.{_FORMAT.file_suffix}"


def write_records(
    path: StoragePath, features: Mapping[str, Any], examples: Iterable[Mapping[str, Any]]
) -> list[RecordPlace]:
    """Write a file of records atomically, and return the place of each.

    Raises:
      OSError: If the file cannot be written, for example because the disk is full.
      UserError: If the destination cannot be reached.
    """
    feature_dict = tfds.features.FeaturesDict(dict(features))
    serializer = example_serializer.ExampleSerializer(feature_dict.get_serialized_info())
    with _open_local_file(path) as local:
        checksums = []
        try:
            writer = array_record_module.ArrayRecordWriter(os.fspath(local), _OPTIONS)
            for example in examples:
                message = serializer.get_tf_example(feature_dict.encode_example(example))
                # By default the order of a message's fields differs from process to process.
                record = message.SerializeToString(deterministic=True)
                writer.write(record)
                checksums.append(zlib.crc32(record))
            writer.close()
        except Exception as error:
            if isinstance(error, UserError | OSError) or (match := _WRITE_ERROR.search(str(error))) is None:
                raise
            code = next((code for code in DISK_FULL_ERRNOS if os.strerror(code) == match[1]), errno.EIO)
            raise OSError(code, match[1]) from error
        with local.open("rb") as file:
            places = list(_locate_records(file, len(checksums)))
            _check_places(file, places, checksums)
        return places


class RecordReader:
    """A reader of records in a folder, which holds no open files, so that threads share it and workers receive it.

    Args:
      folder: Folder or address of the data set.
      features: Features with which the records were written.
    """

    def __init__(self, folder: StoragePath, features: Mapping[str, Any]):
        self._folder, self._features = folder, tfds.features.FeaturesDict(dict(features))

    def read(self, file: str, place: RecordPlace) -> dict[str, Any]:
        """Return an example.

        Raises:
          MissingError: If the file does not exist.
          UserError: If the file cannot be reached.
          DecodeError: If the record is damaged.
        """
        content = self._read_bytes(self._folder / file, place)
        if len(content) != place.length or zlib.crc32(content) != place.crc32:
            raise DecodeError(f"{self._folder / file} is damaged at byte {place.offset}")
        return self._features.deserialize_example_np(_strip_headers(content, place.offset))

    def _read_bytes(self, path: StoragePath, place: RecordPlace) -> bytes:
        offset, length, _ = place
        with convert_storage_errors(path):
            try:
                if isinstance(path, Path):
                    with path.open("rb", buffering=0) as file:
                        return os.pread(file.fileno(), length, offset)
                return path.fs.cat_file(path.path, start=offset, end=offset + length)
            except FileNotFoundError as error:
                raise MissingError(
                    f"no such file: {path}. The data set is incomplete: copy the file again, or write another data set."
                ) from error


def read_row(reader: RecordReader, table: Table, row: int, dataset: str) -> dict[str, Any]:
    """Return the record of a row of a table; raises like `RecordReader.read`."""
    place = RecordPlace(*(table.read_values(name, [row])[0] for name in RecordPlace._fields))
    return reader.read(get_file_name(dataset, table.get_part(row)), place)


def write_metadata(
    folder: StoragePath, name: str, counts: Mapping[str, Sequence[int]], *, features: Mapping[str, Any]
) -> None:
    """Write TFDS's metadata for existing files, which `tfds.builder_from_directory(folder)` then reads in order.

    Args:
      folder: Folder of the files.
      name: Name of the data set.
      counts: Number of examples of each file, for each split.
      features: Features with which the files were written.
    """
    # Written to a temporary folder and then copied, so that the metadata files are complete or absent too. TFDS looks
    # for the files of records by name, so empty ones stand in for them.
    with tempfile.TemporaryDirectory() as work:
        splits = []
        for split, lengths in counts.items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=work, template=_TEMPLATE, dataset_name=name, split=split, filetype_suffix=_FORMAT.file_suffix
            )
            paths = template.sharded_filepaths(len(lengths))
            for path in paths:
                path.touch()
            size = sum((folder / path.name).stat().st_size for path in paths)
            splits.append(
                tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
            )
        tfds.folder_dataset.write_metadata(
            data_dir=work,
            features=tfds.features.FeaturesDict(dict(features)),
            split_infos=splits,
            version="1.0.0",
            filename_template=_TEMPLATE,
            check_data=False,
        )
        for file in _METADATA_FILES:
            with _open_local_file(folder / file) as local:
                shutil.copyfile(Path(work) / file, local)


@contextlib.contextmanager
def _open_local_file(path: StoragePath) -> Iterator[Path]:
    """Yield a local path to write to; the file is then moved or uploaded to `path` if no error was raised."""
    if isinstance(path, Path):
        with atomic_path(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as work:
        local = Path(work) / path.name
        yield local
        upload(local, path)


def _locate_records(file: Any, count: int) -> Iterator[RecordPlace]:
    """Yield the places of the records of a local file, whose first chunk is the file's signature."""
    position = 0
    while count:
        start = position
        size, _, kind, decoded = _CHUNK_HEADER.unpack(_read_logical(file, start, _CHUNK_HEADER.size))[1:]
        position = _advance(start, _CHUNK_HEADER.size + size)
        if kind & 0xFF == ord("r"):
            offset = _advance(start, _CHUNK_HEADER.size + size - decoded)
            file.seek(offset)
            content = file.read(position - offset)
            yield RecordPlace(offset, position - offset, zlib.crc32(content))
            count -= 1


def _check_places(file: Any, places: Sequence[RecordPlace], checksums: Sequence[int]) -> None:
    """Check that each place holds its record, in case another version of ArrayRecord writes another format."""
    for (offset, length, _), checksum in zip(places, checksums, strict=True):
        file.seek(offset)
        if zlib.crc32(_strip_headers(file.read(length), offset)) != checksum:
            raise AssertionError(f"ArrayRecord wrote a format that dit_video does not read, at byte {offset}")


def _read_logical(file: Any, position: int, count: int) -> bytes:
    file.seek(position)
    return _strip_headers(file.read(_advance(position, count) - position), position)


def _advance(position: int, count: int) -> int:
    """Return the position after `count` bytes from a position on, which the headers of blocks interrupt."""
    while True:
        offset = max(position % _BLOCK, _BLOCK_HEADER)
        position, room = position - position % _BLOCK + offset, _BLOCK - offset
        if count <= room:
            return position + count
        position, count = position + room, count - room


def _strip_headers(content: bytes, offset: int) -> bytes:
    """Return the bytes of a file from an offset on without the headers of blocks."""
    first = -offset % _BLOCK
    if not offset % _BLOCK:
        content, first = content[_BLOCK_HEADER:], _BLOCK - _BLOCK_HEADER
    parts = [content[:first]]
    parts += [content[start + _BLOCK_HEADER : start + _BLOCK] for start in range(first, len(content), _BLOCK)]
    return b"".join(parts)
