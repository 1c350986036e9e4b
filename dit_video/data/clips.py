"""Random access to the encoded clips of ingested data sets."""

import copy
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from etils import epath

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.files import write_json
from dit_video.core.storage import (
    StoragePath,
    StoragePathLike,
    convert_storage_errors,
    is_remote,
    read_document,
    to_storage_path,
)
from dit_video.data.records import shards

INDEX = "index.json"
VERSION = 2

_SERVICE_ERROR = re.compile("Permanent error|Retry policy exhausted|Retry loop")
"""Start of ArrayRecord's message (in an error without a type of its own) when `gs://` refuses or is unreachable."""


class ClipInfo(NamedTuple):
    """Metadata of a clip, which is a file or one shot of it; known without decoding."""

    name: str
    """Path of the clip in the folder that was ingested, with forward slashes; unique in the data set."""
    captions: tuple[str, ...]
    """Captions of the clip, in any number; a clip without captions trains the unconditional model."""
    height: int
    """Height as displayed: upright, with square pixels."""
    width: int
    frames: int
    fps: float
    """Average frame rate."""
    seconds: float
    """Time from the first frame to the last, in seconds."""
    start: float = 0.0
    """Start of this clip in seconds after the file's first frame."""
    record: int = 0
    """Number of the data set's record that holds the bytes."""
    split: str = "train"

    @property
    def caption(self) -> str:
        """Return the first caption; empty if there is none."""
        return self.captions[0] if self.captions else ""


class ClipSource:
    """A random-access source of the encoded clips of an ingested data set, or of several ones in sequence.

    If there are several data sets, the name of a clip begins with that of its data set: `ucf/v_YoYo_g01_c01.avi`. Each
    process opens the files at its first read, so a source can be pickled to workers.

    Records at `gs://` are read one by one by ArrayRecord itself. From any other address a whole file is copied to this
    machine when its first record is read, so that in the end this machine needs room for the whole data set.

    Args:
      folders: data set that `ingest` wrote: a folder or an address (`gs://…`, see `core.storage`), or several by name.
      cache: folder to which files at addresses are copied; `shards.get_default_cache()` if None.

    Raises:
      MissingError: a folder does not exist.
      UserError: a folder is not an ingested data set of this version, or cannot be reached.
    """

    def __init__(
        self, folders: StoragePathLike | Mapping[str, StoragePathLike], *, cache: str | os.PathLike | None = None
    ):
        named = {f"{name}/": path for name, path in folders.items()} if isinstance(folders, Mapping) else {"": folders}
        self.folders: tuple[StoragePath, ...] = tuple(map(to_storage_path, named.values()))
        infos: list[ClipInfo] = []
        self._dataset_numbers: list[int] = []
        self._cache = None if cache is None else Path(cache)
        self._versions: list[str] = []
        for number, (prefix, folder) in enumerate(zip(named, self.folders, strict=True)):
            clips = read_index(folder)
            # The version of the copies; local files are not copied.
            self._versions.append(hashlib.sha256(repr(clips).encode()).hexdigest()[:16] if is_remote(folder) else "")
            infos += [info._replace(name=prefix + info.name) for info in clips]
            self._dataset_numbers += [number] * len(clips)
        self.infos: tuple[ClipInfo, ...] = tuple(infos)
        self._records: dict[int, Sequence[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.infos)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """Return the encoded file of a clip, for `dit_video.video.decode`.

        Raises:
          MissingError, UserError: the data set cannot be opened or reached.
          DecodeError: the clip's record is damaged.
        """
        number, info = self._dataset_numbers[index], self.infos[index]
        if number not in self._records:
            self._records[number] = self._open_dataset(number)
        try:
            return self._records[number][info.record]["clip"]
        except (OSError, UserError):  # the file cannot be copied to this machine
            raise
        except Exception as error:  # ArrayRecord and protocol buffers raise many types on damaged bytes
            if _SERVICE_ERROR.match(str(error)):
                with convert_storage_errors(self.folders[number]):
                    raise
            raise DecodeError(f"the record of {info.name} is damaged ({error}). Ingest it again.") from error

    def column(self, name: str) -> np.ndarray:
        """Return one field of `ClipInfo` of all clips; numbers, such as `frames`, as an array of numbers."""
        return np.asarray([getattr(info, name) for info in self.infos])

    def _open_dataset(self, number: int) -> Sequence[Any]:
        folder = self.folders[number]
        if str(folder).startswith("gs://"):
            return shards.open_records(epath.Path(str(folder)))
        return shards.open_dataset(folder, cache=self._cache, version=self._versions[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": {}}

    @property
    def dataset_sizes(self) -> tuple[int, ...]:
        """Return the number of clips of each data set."""
        return tuple(self._dataset_numbers.count(number) for number in range(len(self.folders)))

    def select_datasets(self, numbers: Collection[int]) -> "ClipSource":
        """Return the clips of the data sets with these numbers; no others are counted by `dataset_sizes`."""
        kept = sorted(numbers)
        subset = self._compress([number in kept for number in self._dataset_numbers])
        subset._records = {}  # they are opened by number
        subset.folders = tuple(self.folders[number] for number in kept)
        subset._versions = [self._versions[number] for number in kept]
        subset._dataset_numbers = list(map(kept.index, subset._dataset_numbers))
        return subset

    def select_split(self, name: str) -> "ClipSource":
        """Return the clips of one split; there may be none."""
        return self._filter(lambda info: info.split == name)

    def select(self, names: Collection[str]) -> "ClipSource":
        """Return the clips with these names, in the data set's order.

        Raises:
          UserError: the source has no clip of some name.
        """
        included = self._check_names(names)
        return self._filter(lambda info: info.name in included)

    def exclude(self, names: Collection[str]) -> "ClipSource":
        """Return all clips but those with these names.

        Raises:
          UserError: the source has no clip of some name.
        """
        unwanted = self._check_names(names)
        return self._filter(lambda info: info.name not in unwanted)

    def _check_names(self, names: Collection[str]) -> frozenset[str]:
        if absent := sorted(frozenset(names) - {info.name for info in self.infos}):
            first = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
            examples = ", ".join(info.name for info in self.infos[:3])
            raise UserError(
                f"{', '.join(map(str, self.folders))} has no clip named {first} ({len(absent)} of {len(names)} names); "
                f"use names such as {examples}, or check in the ingest report whether the clip was skipped"
            )
        return frozenset(names)

    def _filter(self, is_kept: Callable[[ClipInfo], bool]) -> "ClipSource":
        return self._compress(list(map(is_kept, self.infos)))

    def _compress(self, is_kept: Sequence[bool]) -> "ClipSource":
        subset = copy.copy(self)
        subset._records = self._records  # opened files are shared
        subset.infos = tuple(itertools.compress(self.infos, is_kept))
        subset._dataset_numbers = list(itertools.compress(self._dataset_numbers, is_kept))
        return subset


def is_ingested(folder: StoragePathLike) -> bool:
    """Return True for an ingested data set, False for a folder of clips that are not ingested yet.

    Raises:
      UserError: the address cannot be reached.
    """
    return (to_storage_path(folder) / INDEX).is_file()


def write_index(folder: Path, infos: Sequence[ClipInfo], fingerprint: str) -> None:
    """Write the metadata of all clips, and the fingerprint of the source that they were ingested from."""
    columns = {name: [getattr(info, name) for info in infos] for name in ClipInfo._fields}
    write_json(folder / INDEX, {"version": VERSION, "fingerprint": fingerprint, "clips": columns})


def read_index(folder: StoragePath) -> tuple[ClipInfo, ...]:
    """Return the metadata of every clip, in the order of the records.

    Raises:
      MissingError: the folder does not exist.
      UserError: the folder is not an ingested data set of this version.
    """
    if not (folder / INDEX).is_file():  # checked before the folder, as object stores need not have folders
        if not folder.is_dir():
            raise MissingError(f"no such data set: {folder}. Check the path.")
        raise UserError(f"{folder} is not an ingested data set, as it has no {INDEX}. Use tools/ingest.py to make one.")
    index = read_document(folder / INDEX)
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX} is not of version {VERSION}. Ingest the clips again into another folder.")
    columns = index["clips"]
    columns["captions"] = map(tuple, columns["captions"])
    return tuple(map(ClipInfo, *(columns[name] for name in ClipInfo._fields)))
