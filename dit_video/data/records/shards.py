"""TFDS data sets in ArrayRecord files, written file by file without TensorFlow, into a folder or at an address.

Any number of processes may write files, each atomically, so the work of a killed process is completed by running it
again. ArrayRecord writes local files only: for a data set at an address (`gs://`, `s3://`, …), files are written on
this machine and uploaded, and a file is downloaded again when the first of its examples is read.
"""

import bisect
import contextlib
import errno
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, writer
from upath import UPath

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import atomic_path
from dit_video.core.storage import StoragePath, download, upload

SPLIT = "train"
SPLITS = (SPLIT, "validation", "test")
"""Standard splits, in the order in which their records are numbered; other splits follow by name."""
_FORMAT = tfds.core.FileFormat.ARRAY_RECORD
_WRITE_ERROR = re.compile(r"\b(?:open|write|close)\(\) failed: ([^;]+)")
"""Pattern of ArrayRecord's message (in an error without a type of its own) when the system refuses to write."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_bytes_feature() -> tfds.features.Tensor:
    """Return the TFDS feature of raw bytes."""
    return tfds.features.Tensor(shape=(), dtype=np.object_)


def sort_splits(splits: Iterable[str]) -> list[str]:
    """Return the splits in the order in which their records are numbered."""
    return sorted(set(splits), key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))


def get_default_cache() -> Path:
    """Return the folder to which remote files are copied: `dit_video` in `$XDG_CACHE_HOME` (by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video"


def write_file(
    folder: StoragePath,
    name: str,
    number: int,
    num_files: int,
    *,
    features: Mapping[str, Any],
    examples: Iterable[Mapping[str, Any]],
    split: str = SPLIT,
) -> None:
    """Write one file of a split of the data set `name` atomically.

    Raises:
      OSError: the file cannot be written, for example because the disk is full.
    """
    feature_dict = tfds.features.FeaturesDict(dict(features))
    serializer = example_serializer.ExampleSerializer(feature_dict.get_serialized_info())

    def serialized() -> Iterator[tuple[int, bytes]]:
        for key, example in enumerate(examples):
            message = serializer.get_tf_example(feature_dict.encode_example(example))
            # By default the order of a message's fields differs from process to process.
            yield key, message.SerializeToString(deterministic=True)

    file = _make_template(name, split).sharded_filepath(shard_index=number, num_shards=num_files)
    # Not TFDS's ShardWriter, which keeps all examples of a file in memory to count them.
    with _open_local_file(folder / file.name) as path:
        try:
            writer.ExampleWriter(_FORMAT).write(path, serialized())
        except Exception as error:
            if isinstance(error, UserError | OSError) or (match := _WRITE_ERROR.search(str(error))) is None:
                raise
            code = next((code for code in DISK_FULL_ERRNOS if os.strerror(code) == match[1]), errno.EIO)
            raise OSError(code, match[1]) from error


def write_metadata(
    folder: StoragePath, name: str, counts: Mapping[str, Sequence[int]], *, features: Mapping[str, Any]
) -> None:
    """Write TFDS's metadata for existing files, which `tfds.builder_from_directory(folder)` then reads in order.

    Args:
      folder: folder of the files.
      name: name of the data set.
      counts: number of examples of each file, for each split.
      features: features with which the files were written.
    """
    # Written to a temporary folder and then copied, so that the metadata files are complete or absent too. TFDS looks
    # for the files of records by name, so empty ones stand in for them.
    with tempfile.TemporaryDirectory() as work:
        splits = []
        for split, lengths in counts.items():
            template = _make_template(name, split, Path(work))
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
            check_data=False,
        )
        for file in _METADATA_FILES:
            with _open_local_file(folder / file) as local:
                shutil.copyfile(Path(work) / file, local)


def remove_partial_files(folder: StoragePath) -> None:
    """Remove incomplete files of killed processes, which leave none at addresses."""
    if isinstance(folder, Path):
        for path in folder.glob(".*.partial.array_record*"):  # not the JSON files that another process may be writing
            path.unlink(missing_ok=True)


def open_records(folder: Path | epath.Path) -> Sequence[Any]:
    """Open a data set for random access to the examples of all splits, in the order of `sort_splits`.

    Raises:
      MissingError: the folder does not exist.
      UserError: the folder holds no data set, or its files are damaged.
    """
    if not folder.is_dir():
        raise MissingError(f"no such data set: {folder}")
    try:
        dataset_builder = tfds.builder_from_directory(folder)
        return dataset_builder.as_data_source("+".join(sort_splits(dataset_builder.info.splits)))
    except Exception as error:  # TFDS raises many types, depending on which file is missing or damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} is not a readable TFDS data set ({reason}). Write it again.") from error


def open_dataset(folder: StoragePath, *, cache: Path | None = None, version: str = "") -> Sequence[Any]:
    """Open a local or remote data set for random access to the examples of all splits, in the order of `sort_splits`.

    Args:
      folder: folder or address of the data set.
      cache: folder to which remote files are copied when they are first read; `get_default_cache()` if None.
      version: version of the contents of the data set: copies of another version are not used.

    Raises:
      MissingError: the folder does not exist.
      UserError: the folder holds no data set, its files are damaged, or it cannot be reached.
    """
    if isinstance(folder, Path):
        return open_records(folder)
    return _RemoteRecords(folder, (cache or get_default_cache()) / str(folder).replace("://", "/") / version)


class _RemoteRecords(Sequence[dict[str, Any]]):
    """A remote data set, whose files are copied to this machine when their first example is read."""

    def __init__(self, folder: UPath, local: Path):
        try:
            for name in _METADATA_FILES:
                download(folder / name, local / name)
        except MissingError as error:
            raise MissingError(f"no such data set: {folder}. Check the address.") from error
        self._remote, self._local = folder, local
        self._records = open_records(local)
        dataset_builder = tfds.builder_from_directory(local)
        splits = [dataset_builder.info.splits[name] for name in sort_splits(dataset_builder.info.splits)]
        self._names = [path.name for split in splits for path in split.filepaths]
        self._ends = list(itertools.accumulate(length for split in splits for length in split.shard_lengths))
        self._present: set[int] = set()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        file = bisect.bisect_right(self._ends, index)
        if file not in self._present:
            path = self._local / self._names[file]
            if not path.is_file():
                download(self._remote / path.name, path)
            self._present.add(file)
        return self._records[index]


_METADATA_FILES = ("features.json", "dataset_info.json")
"""Names of TFDS's metadata files, in the folder of the records."""


def _make_template(dataset: str, split: str, folder: Path = Path()) -> Any:
    return tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=dataset, split=split, filetype_suffix=_FORMAT.file_suffix
    )


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
