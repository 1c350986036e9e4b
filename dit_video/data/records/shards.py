"""TFDS data sets written file by file, by any number of processes, into a folder or at an address.

A file is whole or absent, so that what a killed process left is finished by running it again. ArrayRecord writes local
files only: where a data set lies at an address (`gs://`, `s3://`, …), files are made here and copied there, and copied
here again when the first of their examples is read.
"""

import bisect
import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, file_adapters, writer
from upath import UPath

from dit_video.core.errors import MissingError
from dit_video.core.files import atomic_path
from dit_video.core.storage import Place, copy_here, copy_there
from dit_video.data.records.builder import SPLIT, in_order, open_records

FORMAT = file_adapters.FileFormat.ARRAY_RECORD


def default_cache() -> Path:
    """Where files from addresses are copied to: `dit_video` in `$XDG_CACHE_HOME`, which is `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video"


def write_file(
    folder: Place,
    name: str,
    number: int,
    files: int,
    *,
    features: Mapping[str, Any],
    examples: Iterable[Mapping[str, Any]],
) -> int:
    """Write one file of the data set `name`, whole or not at all; returns how many examples it holds."""
    described = tfds.features.FeaturesDict(dict(features))
    serializer = example_serializer.ExampleSerializer(described.get_serialized_info())
    count = 0

    def serialized() -> Iterator[tuple[int, bytes]]:
        nonlocal count
        for example in examples:
            message = serializer.get_tf_example(described.encode_example(example))
            # The default order of a message's fields is another one in every process.
            yield count, message.SerializeToString(deterministic=True)
            count += 1

    # Not TFDS's ShardWriter: that one keeps all examples of a file in memory, to count them.
    with _local_file(folder / _file_name(name, number, files)) as path:
        writer.ExampleWriter(FORMAT).write(path, serialized())
    return count


def finish(folder: Place, name: str, counts: Sequence[int], *, features: Mapping[str, Any]) -> None:
    """Make a data set of the files that are there: `tfds.builder_from_directory(folder)` reads them in their order.

    Args:
      folder: of the files.
      name: of the data set.
      counts: of examples in each file.
      features: as they were written.
    """
    names = [_file_name(name, number, len(counts)) for number in range(len(counts))]
    size = sum((folder / file).stat().st_size for file in names)
    # Written here first, then copied: TFDS's files are whole or absent too. It looks for those of the records by name.
    with tempfile.TemporaryDirectory() as work:
        template = _template(name, Path(work))
        split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(counts), num_bytes=size, filename_template=template)
        for file in names:
            (Path(work) / file).touch()
        tfds.folder_dataset.write_metadata(
            data_dir=work,
            features=tfds.features.FeaturesDict(dict(features)),
            split_infos=[split],
            filename_template=template,
            version="1.0.0",
            check_data=False,
        )
        for name in _METADATA:
            with _local_file(folder / name) as local:
                shutil.copyfile(Path(work) / name, local)


def remove_partial(folder: Place) -> None:
    """Remove what killed processes left half written. (At an address they leave nothing.)"""
    if isinstance(folder, Path):
        for path in folder.glob(".*.partial.array_record*"):  # not the documents that another one writes
            path.unlink(missing_ok=True)


def open_anywhere(folder: Place, *, cache: Path | None = None, version: str = "") -> Sequence[Any]:
    """Random access to the examples of a data set, of all its splits as `in_order` has them, wherever it lies.

    Args:
      folder: of the data set.
      cache: where files of one at an address are copied to, whole, when they are first read; `default_cache()` if None.
      version: of the data set's contents: copies of another version are not used.

    Raises:
      MissingError: no such folder.
      UserError: the folder holds no data set, or one whose files are damaged, or cannot be reached.
    """
    if isinstance(folder, Path):
        return open_records(folder)
    return _Copied(folder, (cache or default_cache()) / str(folder).replace("://", "/") / version)


class _Copied(Sequence[dict[str, Any]]):
    """A data set at an address, of which a file is copied here when its first example is read."""

    def __init__(self, folder: UPath, local: Path):
        try:
            for name in _METADATA:
                copy_here(folder / name, local / name)
        except MissingError as error:
            raise MissingError(f"no such data set: {folder}") from error
        self._remote, self._local = folder, local
        self._records = open_records(local)
        made = tfds.builder_from_directory(local)
        splits = [made.info.splits[name] for name in in_order(made.info.splits)]
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
                copy_here(self._remote / path.name, path)
            self._present.add(file)
        return self._records[index]


_METADATA = ("features.json", "dataset_info.json")
"""TFDS's, beside the records."""


def _file_name(dataset: str, number: int, files: int) -> str:
    return _template(dataset, Path()).sharded_filepath(shard_index=number, num_shards=files).name


def _template(dataset: str, folder: Path) -> Any:
    return tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=dataset, split=SPLIT, filetype_suffix=FORMAT.file_suffix
    )


@contextlib.contextmanager
def _local_file(path: Place) -> Iterator[Path]:
    """A local path to write to; the file is then at `path`, or nothing if that failed."""
    if isinstance(path, Path):
        with atomic_path(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as work:
        local = Path(work) / path.name
        yield local
        copy_there(local, path)
