"""TFDS data sets written file by file, by any number of processes, into a folder or at an address.

Files are written atomically, so the work of a killed process is completed by running it again. ArrayRecord writes local
files only: for a data set at an address (`gs://`, `s3://`, …), files are written on this machine and uploaded, and a
file is downloaded again when the first of its examples is read.
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
from tensorflow_datasets.core import example_serializer, writer
from upath import UPath

from dit_video.core.errors import MissingError
from dit_video.core.files import atomic_path
from dit_video.core.storage import StoragePath, download, upload
from dit_video.data.records.builder import FORMAT, SPLIT, open_records, sort_splits


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
) -> None:
    """Write one file of the data set `name` atomically."""
    feature_dict = tfds.features.FeaturesDict(dict(features))
    serializer = example_serializer.ExampleSerializer(feature_dict.get_serialized_info())

    def serialized() -> Iterator[tuple[int, bytes]]:
        for key, example in enumerate(examples):
            message = serializer.get_tf_example(feature_dict.encode_example(example))
            # By default the order of a message's fields differs from process to process.
            yield key, message.SerializeToString(deterministic=True)

    # Not TFDS's ShardWriter, which keeps all examples of a file in memory to count them.
    with _open_local_file(folder / _get_file_name(name, number, num_files)) as path:
        writer.ExampleWriter(FORMAT).write(path, serialized())


def write_metadata(folder: StoragePath, name: str, counts: Sequence[int], *, features: Mapping[str, Any]) -> None:
    """Write TFDS's metadata for existing files, which `tfds.builder_from_directory(folder)` then reads in order.

    Args:
      folder: folder of the files.
      name: name of the data set.
      counts: number of examples of each file.
      features: features with which the files were written.
    """
    names = [_get_file_name(name, number, len(counts)) for number in range(len(counts))]
    size = sum((folder / file).stat().st_size for file in names)
    # Written to a temporary folder and then copied, so that the metadata files are complete or absent too. TFDS looks
    # for the files of records by name, so empty ones stand in for them.
    with tempfile.TemporaryDirectory() as work:
        template = _make_template(name, Path(work))
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
        for name in _METADATA_FILES:
            with _open_local_file(folder / name) as local:
                shutil.copyfile(Path(work) / name, local)


def remove_partial_files(folder: StoragePath) -> None:
    """Remove incomplete files of killed processes, which leave none at addresses."""
    if isinstance(folder, Path):
        for path in folder.glob(".*.partial.array_record*"):  # not the JSON files that another process may be writing
            path.unlink(missing_ok=True)


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


def _get_file_name(dataset: str, number: int, num_files: int) -> str:
    return _make_template(dataset, Path()).sharded_filepath(shard_index=number, num_shards=num_files).name


def _make_template(dataset: str, folder: Path) -> Any:
    return tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=dataset, split=SPLIT, filetype_suffix=FORMAT.file_suffix
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
