"""Data sets of clips, written on one machine or by Apache Beam.

The records of a file are listed first, with the location of each clip instead of its bytes (a few hundred bytes each).
The file is then written from its list, so that a process holds the bytes of one clip at a time.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_video.data.records.cluster import ERROR_FILE, BeamOptions, raise_worker_errors, save_worker_errors
from dit_video.data.records.reference import ClipReference
from dit_video.data.records.shards import sort_splits, write_file, write_metadata

SHARD_BYTES = 1 << 30
"""Approximate size of one file of a data set of clips, in bytes."""
_NAME = "clips"


class _File(NamedTuple):
    """A file of the data set, and the list of its records in JSON lines."""

    split: str
    number: int
    num_files: int
    records: Path


def write_clips(
    folder: Path,
    *,
    features: Mapping[str, Any],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    mean_bytes: int,
    progress: Callable[[int], None] = lambda done: None,
    beam: BeamOptions | None = None,
) -> None:
    """Write a data set of clips into `folder`, which must not exist yet.

    Args:
      folder: the data set; `folder.lists` is used as a temporary folder, and removed.
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
    lists = folder.with_name(folder.name + ".lists")
    shutil.rmtree(lists, ignore_errors=True)  # left by a killed process
    folder.mkdir(parents=True)
    try:
        lists.mkdir()
        files, counts = [], {}
        for split in sort_splits(records):
            num_files = count_shards(len(records[split]), mean_bytes)
            counts[split] = [len(part) for part in np.array_split(np.arange(len(records[split])), num_files)]
            lines = (json.dumps(record) + "\n" for record in records[split])
            for number, length in enumerate(counts[split]):
                file = _File(split, number, num_files, lists / f"{split}-{number}.jsonl")
                file.records.write_text("".join(itertools.islice(lines, length)), "utf-8")
                files.append(file)
        if beam is None:
            done = itertools.count(1)
            for file in files:
                _write(file, folder, features, lambda: progress(next(done)))
        else:
            import apache_beam

            write = functools.partial(_write_as_worker, folder=folder, features=features)
            options = {"runner": beam.runner, "options": beam.options}
            with raise_worker_errors(lists / ERROR_FILE), apache_beam.Pipeline(**options) as pipeline:
                _ = pipeline | apache_beam.Create(files) | apache_beam.Reshuffle() | apache_beam.Map(write)
        write_metadata(folder, _NAME, counts, features=features)
    finally:
        shutil.rmtree(lists, ignore_errors=True)


def count_shards(num_records: int, mean_bytes: int) -> int:
    """Return the number of files for this number of records."""
    return max(1, min(num_records, round(num_records * mean_bytes / SHARD_BYTES)))


def _write(file: _File, folder: Path, features: Mapping[str, Any], count: Callable[[], None]) -> None:
    """Write a file of the data set, and call `count` for every record."""

    def examples() -> Iterator[dict[str, Any]]:
        with file.records.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                yield {**record, "clip": ClipReference(*record["clip"]).read()}
                count()

    write_file(folder, _NAME, file.number, file.num_files, features=features, examples=examples(), split=file.split)


def _write_as_worker(file: _File, folder: Path, features: Mapping[str, Any]) -> None:
    with save_worker_errors(file.records.with_name(ERROR_FILE)):
        _write(file, folder, features, lambda: None)
