"""What is known of inspected clips, kept beside the destination while a data set is being made.

A run that is killed continues where it was: a line is written for every clip, and whole lines outlive the process.
Workers on other machines have a part of the journal each, as no file is written by two of them.

A verdict is kept with the time at which its file was changed before it was read, and found again as long as that holds:
it is always one of the bytes that lie there. Reasons that may pass are not kept, so that a later run tries again.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import av

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import Listed
from dit_video.data.ingest.inspection import Inspected

FILE = "journal.jsonl"
PARTS = "parts"
"""The folder of the workers' parts."""
_VERSION = 2


class Journal:
    """The verdicts of a folder's journal; a context manager that holds its lock.

    A verdict is found again for a clip of the same name, place in its file, size and time of change, under the same
    settings and decoder.

    Args:
      folder: holds the journal; made where it isn't there.
      settings: dataclasses and scalars; all that a kept verdict depends on, beside the clip.

    Raises:
      UserError: another process has the journal, or the file system has no locks.
    """

    def __init__(self, folder: Path, settings: Any):
        known = json.dumps([_VERSION, av.__version__, config_json.to_json(settings)], sort_keys=True)
        self.settings = hashlib.sha256(known.encode()).hexdigest()[:16]
        """What stands for them in a line."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = (folder / FILE).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"another process is filling {folder}; wait for it, or name another destination"
                ) from error
            raise UserError(
                f"{folder} cannot be locked ({error.strerror}); name a destination on a file system with locks"
            ) from error
        self._known = self._read()
        self._take_over()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, clip: Listed) -> Inspected | None:
        """A clip's verdict, if it is known of the bytes that lie there now."""
        verdict = self._known.get(_key(self.settings, clip))
        try:
            return verdict if verdict and verdict.modified == os.stat(clip.path).st_mtime_ns else None
        except OSError:
            return None

    def put(self, clip: Listed, inspected: Inspected) -> None:
        """Write a verdict down, unless its reason may pass."""
        if not inspected.passing:
            self._write(_line(self.settings, clip, inspected))

    def forget(self, clips: Iterable[Listed]) -> None:
        """Have clips inspected again: what was known of them does not hold, whatever the time of change says."""
        for clip in clips:
            self._write(_line(self.settings, clip, None))

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def _read(self) -> dict[str, Inspected]:
        """The whole lines. What a killed process left of a last one is cut off."""
        self._file.seek(0)
        known, end = _parse(self._file)
        self._file.truncate(end)
        return {key: verdict for key, verdict in known.items() if verdict is not None}

    def _take_over(self) -> None:
        """What workers wrote for a run that was killed."""
        for path in _parts(self.folder):
            with path.open("rb") as file:
                for line in file:
                    known, _ = _parse([line])
                    kept = {key: verdict for key, verdict in known.items() if verdict and not verdict.passing}
                    if kept:
                        self._write(line)
                        self._known.update(kept)
            path.unlink()


class Part:
    """A journal file of one worker, in the folder of the run's journal.

    Args:
      folder: the journal's; on a disk that all workers share.
      settings: `Journal.settings`.
    """

    def __init__(self, folder: Path, settings: str):
        self._settings = settings
        (folder / PARTS).mkdir(exist_ok=True)
        self._file = (folder / PARTS / f"{uuid.uuid4().hex}.jsonl").open("ab")

    def put(self, clip: Listed, inspected: Inspected) -> None:
        """Write a verdict down: it outlives this process, though not yet this machine."""
        self._file.write(_line(self._settings, clip, inspected))
        self._file.flush()

    def sync(self) -> None:
        """Have all of it on the shared disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_parts(folder: Path, settings: str, clips: Iterable[Listed]) -> list[Inspected | None]:
    """The verdicts that workers wrote down, also those whose reason may pass; None where there is none."""
    found: dict[str, Inspected | None] = {}
    for path in _parts(folder):
        with path.open("rb") as file:
            found.update(_parse(file)[0])
    return [found.get(_key(settings, clip)) for clip in clips]


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / PARTS).glob("*.jsonl"))


def _key(settings: str, clip: Listed) -> str:
    return json.dumps([settings, clip.name, clip.offset, clip.size])


def _line(settings: str, clip: Listed, inspected: Inspected | None) -> bytes:
    known = None if inspected is None else inspected.to_json()
    return json.dumps({"clip": _key(settings, clip), "inspected": known}).encode() + b"\n"


def _parse(lines: Iterable[bytes] | BinaryIO) -> tuple[dict[str, Inspected | None], int]:
    """What whole lines say, the last one of each clip, and how many bytes they have. None is forgotten."""
    known: dict[str, Inspected | None] = {}
    end = 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            entry = json.loads(line)
            key, value = entry["clip"], entry["inspected"]
            known[key] = None if value is None else Inspected.from_json(value)
        except (ValueError, KeyError, TypeError):
            continue  # damaged, or of another version: inspected again
    return known, end
