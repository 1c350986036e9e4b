"""An ingested data set: encoded clips by number."""

import hashlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.files import write_json
from dit_video.core.storage import Address, Place, is_remote, place, reaching, read_document
from dit_video.data.records import builder, shards

INDEX = "index.json"
VERSION = 2

_SERVICE = re.compile("Permanent error|Retry policy exhausted|Retry loop")
"""How begins what ArrayRecord says, in an error of no type of its own, where `gs://` refuses or can't be reached."""


class ClipInfo(NamedTuple):
    """What is known of a clip without decoding it: a file, or one shot of it."""

    name: str
    """Its path inside the folder it was ingested from, with forward slashes; unique in the data set."""
    captions: tuple[str, ...]
    """Any number; a clip without one trains the unconditional model."""
    height: int
    """As shown: upright, with square pixels."""
    width: int
    frames: int
    fps: float
    """on average"""
    seconds: float
    """of the last frame after the first"""
    start: float = 0.0
    """seconds after the file's first frame where this clip begins"""
    record: int = 0
    """Which of the data set's records holds its bytes."""
    split: str = "train"

    @property
    def caption(self) -> str:
        """The first one; empty without any."""
        return self.captions[0] if self.captions else ""


class ClipSource:
    """Random access to the encoded clips of an ingested data set, or of several one after the other.

    Of several data sets a clip's name begins with its data set's: `ucf/v_YoYo_g01_c01.avi`. The files are opened at the
    first read, in each process anew: a source can be pickled to workers.

    From `gs://` records are read one by one, as ArrayRecord itself does. From any other address a file is copied here,
    whole, when its first record is read; all of the data set needs as much room here as there.

    Args:
      folders: what `ingest` made: one folder, or several by name; addresses (`gs://…`) too, see `data.places`.
      cache: where files from addresses are copied to; `shards.default_cache()` if None.

    Raises:
      MissingError: no such folder.
      UserError: a folder is not an ingested data set of this version, or cannot be reached.
    """

    def __init__(self, folders: Address | Mapping[str, Address], *, cache: str | os.PathLike | None = None):
        named = (
            {f"{name}/": folder for name, folder in folders.items()} if isinstance(folders, Mapping) else {"": folders}
        )
        self.folders: tuple[Place, ...] = tuple(map(place, named.values()))
        infos: list[ClipInfo] = []
        self._sets: list[int] = []
        self._cache = None if cache is None else Path(cache)
        self._versions: list[str] = []
        for number, (prefix, folder) in enumerate(zip(named, self.folders, strict=True)):
            found = read_index(folder)
            # Of the copies; what lies here is read where it lies.
            self._versions.append(hashlib.sha256(repr(found).encode()).hexdigest()[:16] if is_remote(folder) else "")
            infos += [info._replace(name=prefix + info.name) for info in found]
            self._sets += [number] * len(found)
        self.infos: tuple[ClipInfo, ...] = tuple(infos)
        self._records: dict[int, Sequence[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.infos)

    def __getitem__(self, index: int) -> bytes:
        """The encoded file of a clip, as `dit_video.video.decode` takes it.

        Raises:
          MissingError, UserError: the data set can't be opened, or reached.
          DecodeError: the clip's record is damaged.
        """
        number = self._sets[index]
        if number not in self._records:
            self._records[number] = self._open(number)
        try:
            return self._records[number][self.infos[index].record]["clip"]
        except (OSError, UserError):  # of a file that can't be copied here
            raise
        except Exception as error:  # ArrayRecord and protocol buffers raise many types on damaged bytes
            if _SERVICE.match(str(error)):
                with reaching(self.folders[number]):
                    raise
            raise DecodeError(
                f"the record of {self.infos[index].name} is damaged ({error}); ingest it again"
            ) from error

    def _open(self, number: int) -> Sequence[Any]:
        folder = self.folders[number]
        if str(folder).startswith("gs://"):
            return builder.open_records(epath.Path(str(folder)))
        return shards.open_anywhere(folder, cache=self._cache, version=self._versions[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": {}}

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many of the clips each data set has."""
        return tuple(self._sets.count(number) for number in range(len(self.folders)))

    def split(self, name: str) -> "ClipSource":
        """The clips of one split; there may be none."""
        return self._subset([index for index, info in enumerate(self.infos) if info.split == name])

    def select(self, names: Collection[str]) -> "ClipSource":
        """The clips with these names, in the data set's order.

        Raises:
          UserError: a name that the source doesn't have.
        """
        self._check(names)
        wanted = frozenset(names)
        return self._subset([index for index, info in enumerate(self.infos) if info.name in wanted])

    def without(self, names: Collection[str]) -> "ClipSource":
        """All clips but those with these names.

        Raises:
          UserError: a name that the source doesn't have.
        """
        self._check(names)
        unwanted = frozenset(names)
        return self._subset([index for index, info in enumerate(self.infos) if info.name not in unwanted])

    def _check(self, names: Collection[str]) -> None:
        if absent := sorted(frozenset(names) - {info.name for info in self.infos}):
            shown = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
            known = ", ".join(info.name for info in self.infos[:3])
            raise UserError(
                f"{', '.join(map(str, self.folders))} has no clip named {shown} ({len(absent)} of {len(names)} names); "
                f"use names such as {known}, or look whether ingest set the clip aside"
            )

    def _subset(self, indices: Sequence[int]) -> "ClipSource":
        subset = object.__new__(ClipSource)
        subset.folders, subset._records = self.folders, self._records
        subset._cache, subset._versions = self._cache, self._versions
        subset.infos = tuple(self.infos[index] for index in indices)
        subset._sets = [self._sets[index] for index in indices]
        return subset


def is_ingested(folder: Address) -> bool:
    """Whether a folder is a data set, and not clips that are yet to be made one.

    Raises:
      UserError: an address that cannot be reached.
    """
    return (place(folder) / INDEX).is_file()


def write_index(folder: Path, infos: Sequence[ClipInfo], fingerprint: str) -> None:
    """Write what `ClipSource` knows of the clips without reading them, and what they were made of."""
    columns = {name: [getattr(info, name) for info in infos] for name in ClipInfo._fields}
    write_json(folder / INDEX, {"version": VERSION, "fingerprint": fingerprint, "clips": columns})


def read_index(folder: Place) -> tuple[ClipInfo, ...]:
    """The facts of every clip, in the order of the records.

    Raises:
      MissingError: no such folder.
      UserError: the folder is not an ingested data set of this version.
    """
    if not (folder / INDEX).is_file():  # asked first: not every address has folders
        if not folder.is_dir():
            raise MissingError(f"no such data set: {folder}")
        raise UserError(f"{folder} is not an ingested data set, it has no {INDEX}; make one with tools/ingest.py")
    index = read_document(folder / INDEX)
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX} is not of version {VERSION}; ingest the clips again into another folder")
    columns = index["clips"]
    columns["captions"] = map(tuple, columns["captions"])
    return tuple(map(ClipInfo, *(columns[name] for name in ClipInfo._fields)))
