"""TFDS data sets written file by file, by any number of processes, into any folder that `etils.epath` opens.

A file is whole or absent, so that what a killed process left is finished by running it again. ArrayRecord writes and
reads local files only: where the folder lies on an object store (`gs://`, `s3://`), files are made here and copied
there, and copied here again when the first of their examples is read.
"""

import bisect
import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, file_adapters, writer

from dit_video.data.builder import SPLIT, open_records
from dit_video.errors import MissingError, UserError
from dit_video.files import atomic_path, read_json, write_json

FORMAT = file_adapters.FileFormat.ARRAY_RECORD
CACHE = Path("~/.cache/dit_video")
"""Where the files of remote data sets are copied to."""


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether a folder lies on an object store."""
    return "://" in os.fspath(folder)


def write_file(
    folder: epath.Path,
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
    with _local_file(_template(folder, name).sharded_filepath(shard_index=number, num_shards=files)) as path:
        writer.ExampleWriter(FORMAT).write(path, serialized())
    return count


def finish(folder: epath.Path, name: str, counts: Sequence[int], *, features: Mapping[str, Any]) -> None:
    """Make a data set of the files that are there: `tfds.builder_from_directory(folder)` reads them in their order.

    Args:
      folder: of the files.
      name: of the data set.
      counts: of examples in each file.
      features: as they were written.
    """
    template = _template(folder, name)
    paths = [template.sharded_filepath(shard_index=index, num_shards=len(counts)) for index in range(len(counts))]
    size = sum(path.stat().length for path in paths)
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(counts), num_bytes=size, filename_template=template)
    # Written here first, then copied: TFDS's files are whole or absent too. It looks for those of the records by name.
    with tempfile.TemporaryDirectory() as work:
        for path in paths:
            (Path(work) / path.name).touch()
        tfds.folder_dataset.write_metadata(
            data_dir=work,
            features=tfds.features.FeaturesDict(dict(features)),
            split_infos=[split],
            filename_template=template.replace(data_dir=epath.Path(work)),
            version="1.0.0",
            check_data=False,
        )
        for name in ("features.json", "dataset_info.json"):
            with _local_file(folder / name) as local:
                shutil.copyfile(Path(work) / name, local)


def remove_partial(folder: epath.Path) -> None:
    """Remove what killed processes left half written. (On an object store they leave nothing.)"""
    if not is_remote(folder):
        for path in Path(folder).glob(".*.partial.array_record*"):  # not the documents that another one writes
            path.unlink(missing_ok=True)


def write_document(path: epath.Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with _local_file(path) as local:
        write_json(local, value)


def read_document(path: epath.Path) -> Any:
    """Read JSON.

    Raises:
      MissingError: no file at `path`.
      UserError: the file is not JSON.
    """
    if not is_remote(path):
        return read_json(Path(path))
    if not path.exists():
        raise MissingError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fix or remove it") from error


def open_anywhere(folder: epath.Path, *, cache: Path | None = None, version: str = "") -> Sequence:
    """Random access to the examples of a data set in a local or remote folder.

    Args:
      folder: of the data set.
      cache: where files of a remote one are copied to, `~/.cache/dit_video` by default.
      version: of the data set's contents: copies of another version are not used.

    Raises:
      MissingError: no such folder.
      UserError: the folder holds no data set, or one whose files are damaged.
    """
    if not is_remote(folder):
        return open_records(Path(folder))
    return _Copied(folder, (cache or CACHE.expanduser()) / os.fspath(folder).replace("://", "/") / version)


class _Copied(Sequence[dict[str, Any]]):
    """A remote data set, of which a file is copied here when its first example is read."""

    def __init__(self, folder: epath.Path, local: Path):
        if not (folder / "dataset_info.json").exists():
            raise MissingError(f"no such data set: {folder}")
        self._remote, self._local = folder, local
        for name in ("features.json", "dataset_info.json"):
            _copy(folder / name, self._local / name)
        made = tfds.builder_from_directory(self._local)
        self._records, split = made.as_data_source(SPLIT), made.info.splits[SPLIT]
        self._names = [path.name for path in split.filepaths]
        self._ends = list(itertools.accumulate(split.shard_lengths))
        self._present: set[int] = set()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        file = bisect.bisect_right(self._ends, index)
        if file not in self._present:
            path = self._local / self._names[file]
            if not path.is_file():
                _copy(self._remote / path.name, path)
            self._present.add(file)
        return self._records[index]


def _template(folder: epath.Path, name: str) -> Any:
    return tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=SPLIT, filetype_suffix=FORMAT.file_suffix
    )


@contextlib.contextmanager
def _local_file(path: epath.Path) -> Iterator[Path]:
    """A local path to write to; the file is then at `path`, or nothing if that failed."""
    if not is_remote(path):
        with atomic_path(Path(path)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as work:
        local = Path(work) / path.name
        yield local
        path.parent.mkdir(parents=True, exist_ok=True)
        with local.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)


def _copy(source: epath.Path, target: Path) -> None:
    with atomic_path(target) as temporary, source.open("rb") as remote, temporary.open("wb") as local:
        shutil.copyfileobj(remote, local)
