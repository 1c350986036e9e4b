"""What is known of inspected clips, kept beside the destination while a data set is being made.

A run that is killed continues where it was: a line is written for every clip, and whole lines outlive the process.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import av

from dit_video import configs
from dit_video.data.ingest.inspection import Inspected
from dit_video.data.ingest.listing import Listed
from dit_video.errors import UserError

FILE = "journal.jsonl"
_VERSION = 1


class Journal:
    """The verdicts of a folder's journal; a context manager that holds its lock.

    A verdict is found again for a clip of the same name, place in its file, size and time of change, under the same
    settings and decoder.

    Args:
      folder: holds the journal; made where it isn't there.
      settings: dataclasses and scalars; all that a verdict depends on, beside the clip.

    Raises:
      UserError: another process has the journal, or the file system has no locks.
    """

    def __init__(self, folder: Path, settings: Any):
        known = json.dumps([_VERSION, av.__version__, configs.to_json(settings)], sort_keys=True)
        self._settings = hashlib.sha256(known.encode()).hexdigest()[:16]
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

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, clip: Listed) -> Inspected | None:
        """A clip's verdict, if it is known."""
        value = self._known.get(self._key(clip))
        return None if value is None else Inspected.from_json(value)

    def put(self, clip: Listed, inspected: Inspected) -> None:
        """Write a verdict down."""
        line = json.dumps({"clip": self._key(clip), "inspected": inspected.to_json()})
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def _key(self, clip: Listed) -> str:
        try:
            changed = os.stat(clip.path).st_mtime_ns
        except OSError:
            changed = -1
        return json.dumps([self._settings, clip.name, clip.offset, clip.size, changed])

    def _read(self) -> dict[str, dict]:
        """The whole lines. What a killed process left of a last one is cut off."""
        self._file.seek(0)
        known, end = {}, 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                entry = json.loads(line)
                Inspected.from_json(entry["inspected"])
                known[entry["clip"]] = entry["inspected"]
            except (ValueError, KeyError, TypeError):
                continue  # damaged, or of another version: inspected again
        self._file.truncate(end)
        return known
