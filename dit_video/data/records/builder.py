"""TFDS data sets in ArrayRecord files, written and read without TensorFlow, on one machine or by Apache Beam.

`Clips` is a `tfds.core.GeneratorBasedBuilder`, which runs as a plain generator on one machine and as a pipeline on a
cluster. Such a builder collects all examples before it writes them: on one machine in memory, and past 1 GB in files
that it opens through TensorFlow, which is not installed; with Beam it holds the examples of a whole file in a worker's
memory. So clips pass through it as *references* (a few hundred bytes: the example with the location of the clip instead
of its bytes), and the `ExampleWriter`, which a builder may choose, inserts the bytes when a record is written: one at a
time, in order. This works for up to about a million clips on one machine; use Beam for more.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import writer as tfds_writer
from tensorflow_datasets.core.utils.shard_utils import ShardConfig, get_shard_boundaries
from tensorflow_datasets.proto import tf_example_pb2

from dit_video.core.errors import MissingError, UserError
from dit_video.data.records.cluster import ERROR_FILE, BeamOptions, raise_worker_errors, save_worker_errors
from dit_video.data.records.reference import ClipReference

FORMAT = tfds.core.FileFormat.ARRAY_RECORD
SPLIT = "train"
SPLITS = (SPLIT, "validation", "test")
"""Standard splits, in the order in which their records are numbered; other splits follow by name."""
SHARD_BYTES = 1 << 30
"""Approximate size of one file of a data set of clips, in bytes."""

_WRITE_ERROR = re.compile(r"\b(?:open|write|close)\(\) failed: ([^;]+)")
"""Pattern of ArrayRecord's message (in an error without a type of its own) when the system refuses to write."""
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_bytes_feature() -> tfds.features.Tensor:
    """Return the TFDS feature of raw bytes."""
    return tfds.features.Tensor(shape=(), dtype=np.object_)


def sort_splits(splits: Iterable[str]) -> list[str]:
    """Return the splits in the order in which their records are numbered."""
    return sorted(set(splits), key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))


class _DatasetInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Do nothing: no bucket of TFDS describes these data, and looking would leave an empty temporary folder."""


# TFDS has no types, so mypy takes class keywords for those of `object`.
class Clips(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder of encoded clips with their metadata; the records of a split are in the order of its list.

    Args:
      features: features of a record; `clip` holds the bytes.
      records: for each split a file of JSON lines, one record per line, in which `clip` is a `ClipReference`.
      progress: called with the number of records written, in this process.
      beam: run as a pipeline of Apache Beam.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict] = {}
    """Downloads: none. (By default TFDS looks for a list of checksums with a package that it does not depend on.)"""

    def __init__(
        self,
        *,
        features: Mapping[str, Any],
        records: Mapping[str, Path],
        progress: Callable[[int], None] | None = None,
        beam: BeamOptions | None = None,
        **kwargs,
    ):
        self._record_features, self._records, self._progress, self._beam = features, records, progress, beam
        self._writer: _FetchingWriter | None = None
        super().__init__(**kwargs)

    @property
    def write_error(self) -> UserError | OSError | None:
        """Return the error of a record that could not be written in this process, if any."""
        return None if self._writer is None else self._writer.write_error

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict(self._record_features))
        return _DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(path) for split, path in self._records.items()}

    def _generate_examples(self, path: Path):
        if self._beam is None:
            return _read_lines(path)
        import apache_beam as beam

        return "Read" >> beam.io.ReadFromText(str(path)) | beam.Map(_parse_line)

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        note = None if self._beam is None else next(iter(self._records.values())).with_name(ERROR_FILE)
        self._writer = _FetchingWriter(None if self._beam else self._progress, note)
        return self._writer

    def _generate_splits(self, dl_manager, download_config):
        """Replace TFDS's sizes of splits, which count the bytes of references, by the sizes of the files."""
        splits = super()._generate_splits(dl_manager, download_config)
        sizes = [sum(path.stat().length for path in split.filepaths) for split in splits]
        return [split.replace(num_bytes=size) for split, size in zip(splits, sizes, strict=True)]

    def _log_download_bytes(self) -> None:
        """Log nothing, as nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Log nothing, as nothing is downloaded."""


class _FetchingWriter(tfds_writer.ExampleWriter):
    """A writer of records that replaces the reference in `clip` by the bytes that it refers to."""

    def __init__(self, progress: Callable[[int], None] | None, error_path: Path | None):
        super().__init__(file_format=FORMAT)
        self._progress, self._error_path, self._written = progress, error_path, 0
        self.write_error: UserError | OSError | None = None

    def write(self, path, examples):
        with contextlib.nullcontext() if self._error_path is None else save_worker_errors(self._error_path):
            try:
                super().write(path, ((key, self._insert_bytes(example)) for key, example in examples))
            except (UserError, OSError) as error:
                self.write_error = error
                raise
            except Exception as error:
                if (match := _WRITE_ERROR.search(str(error))) is None:
                    raise
                number = next((n for n in _DISK_FULL_ERRNOS if os.strerror(n) == match[1]), errno.EIO)
                self.write_error = OSError(number, match[1])
                raise self.write_error from error

    def _insert_bytes(self, serialized: bytes) -> bytes:
        example = tf_example_pb2.Example.FromString(serialized)
        (reference,) = example.features.feature["clip"].bytes_list.value
        example.features.feature["clip"].bytes_list.value[0] = ClipReference(*json.loads(reference)).read()
        self._written += 1
        if self._progress is not None:
            self._progress(self._written)
        # The features are a map without an order: by default the bytes differ from process to process.
        return example.SerializeToString(deterministic=True)


@dataclasses.dataclass(frozen=True)
class _ShardConfig(ShardConfig):
    """A shard configuration with files of about `SHARD_BYTES`, where TFDS would count the bytes of references."""

    mean_bytes: int = 0

    def get_number_shards(self, total_size: int, num_examples: int, uses_precise_sharding: bool = True) -> int:
        return count_shards(num_examples, self.mean_bytes)


@dataclasses.dataclass(eq=False)
class _DownloadConfig(tfds.download.DownloadConfig):
    mean_bytes: int = 0

    def get_shard_config(self) -> ShardConfig:
        return _ShardConfig(mean_bytes=self.mean_bytes)


def count_shards(num_records: int, mean_bytes: int) -> int:
    """Return the number of files for this number of records."""
    return max(1, min(num_records, round(num_records * mean_bytes / SHARD_BYTES)))


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        yield from map(_parse_line, file)


def _parse_line(line: str) -> tuple[int, dict[str, Any]]:
    key, example = json.loads(line)
    return key, {**example, "clip": json.dumps(example["clip"]).encode()}


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]], shards: int) -> None:
    """Write records with keys for which both of TFDS's writers put the same records into the same files.

    The writer on one machine cuts a list of n records into `shards` parts at round(n · i / shards). That of Beam puts
    key k into file trunc(k · shards / greatest key), which is s for every key s · m + position with m > n · shards.
    """
    n = len(records)
    ends = get_shard_boundaries(n, shards)
    shard = 0
    with path.open("w", encoding="utf-8") as file:
        for position, record in enumerate(records):
            shard += position == ends[shard]
            file.write(json.dumps((shard * 2 * n * shards + position, record)) + "\n")


def write_clips(
    folder: Path,
    *,
    features: Mapping[str, Any],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    mean_bytes: int,
    progress: Callable[[int], None] | None = None,
    beam: BeamOptions | None = None,
) -> None:
    """Write a data set of clips into `folder`, which must not exist yet.

    Args:
      folder: the data set; `folder.tfds` is used as a temporary folder, and removed.
      features: features of a record; `clip` is `make_bytes_feature()`.
      records: the examples of each split in order, at least one, in which `clip` is a `ClipReference`.
      mean_bytes: average size of a record.
      progress: called with the number of records written; not with Beam, which writes them elsewhere.
      beam: write with Apache Beam; its workers must be able to write `folder`, and to read the clips.

    Raises:
      ChangedError: a clip has changed since it was inspected.
      UserError: the Beam pipeline failed.
      OSError: the folder cannot be written.
    """
    work = folder.with_name(folder.name + ".tfds")
    try:
        work.mkdir(parents=True)
        lines = {split: work / f"{split}.jsonl" for split in sort_splits(records)}
        for split, path in lines.items():
            _write_lines(path, records[split], count_shards(len(records[split]), mean_bytes))
        options = {"data_dir": work, "file_format": FORMAT}
        dataset_builder = Clips(features=features, records=lines, progress=progress, beam=beam, **options)
        beam_options = {"beam_runner": beam.runner, "beam_options": beam.options} if beam else {}
        config = _DownloadConfig(mean_bytes=mean_bytes, **beam_options)
        tfds.disable_progress_bar()  # `progress` reports instead
        try:
            with contextlib.nullcontext() if beam is None else raise_worker_errors(work / ERROR_FILE):
                dataset_builder.download_and_prepare(download_config=config)
        except Exception as error:
            if dataset_builder.write_error is not None:  # TFDS wraps it in a message of its own
                raise dataset_builder.write_error from error
            raise
        Path(dataset_builder.data_dir).rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
