"""Journal of verdicts on inspected clips, kept next to the destination while a data set is being built.

A run that is killed continues where it stopped: one line is written per clip, and complete lines survive the process.
Each worker on another machine has its own part of the journal, so that no file has two writers.

A verdict is stored with the modification time that its file had before it was read, and reused while that time is
unchanged: it always belongs to the bytes that are there. Transient reasons are not stored, so that a later run tries
again.
"""

import contextlib
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
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection

JOURNAL_FILE = "journal.jsonl"
PARTS_FOLDER = "parts"
"""Folder of the workers' parts."""
_VERSION = 2


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Verdicts stored in a folder; a context manager that holds the folder's lock.

    A verdict is reused for a clip with the same name, offset in its file, size and modification time, under the same
    settings and version of the decoder.

    Args:
      folder: folder of the journal; created if it does not exist.
      settings: dataclasses and scalars, everything that a verdict depends on besides the clip.

    Raises:
      UserError: another process holds the journal, or the file system has no locks.
    """

    def __init__(self, folder: Path, settings: Any):
        identity = json.dumps([_VERSION, av.__version__, config_json.to_json(settings)], sort_keys=True)
        self.settings = hashlib.sha256(identity.encode()).hexdigest()[:16]
        """Hash of the settings, part of the key of every line."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = (folder / JOURNAL_FILE).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise UserError(f"another process is writing {folder}; wait for it, or use another folder") from error
            fix = "use a destination on a file system that supports locks"
            raise UserError(f"{folder} cannot be locked ({error.strerror}); {fix}") from error
        self._verdicts = self._read()
        self._merge_parts()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, clip: ListedClip) -> Inspection | None:
        """Return a clip's verdict if it belongs to the bytes that are there now, else None."""
        verdict = self._verdicts.get(_make_key(self.settings, clip))
        try:
            return verdict if verdict and verdict.modified == os.stat(clip.path).st_mtime_ns else None
        except OSError:
            return None

    def put(self, clip: ListedClip, verdict: Inspection) -> None:
        """Store a verdict, unless its reason is transient."""
        if not verdict.transient:
            self._write(_format_line(self.settings, clip, verdict))

    def forget(self, clips: Iterable[ListedClip]) -> None:
        """Mark clips as not inspected, because their verdicts are wrong although the modification time is unchanged."""
        for clip in clips:
            self._write(_format_line(self.settings, clip, None))

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def _read(self) -> dict[str, Inspection]:
        """Read all complete lines, and truncate an incomplete last line that a killed process left."""
        self._file.seek(0)
        verdicts, end = _parse_lines(self._file)
        self._file.truncate(end)
        return {key: verdict for key, verdict in verdicts.items() if verdict is not None}

    def _merge_parts(self) -> None:
        """Merge and remove the parts that the workers of a killed run wrote."""
        for path in _list_parts(self.folder):
            with path.open("rb") as file:
                for line in file:
                    verdicts, _ = _parse_lines([line])
                    permanent = {key: verdict for key, verdict in verdicts.items() if verdict and not verdict.transient}
                    if permanent:
                        self._write(line)
                        self._verdicts.update(permanent)
            path.unlink()


class JournalPart:
    """Journal file of one worker, in the folder of the run's journal.

    Args:
      folder: folder of the journal, on a disk that all workers share.
      settings: `Journal.settings`.
    """

    def __init__(self, folder: Path, settings: str):
        self._settings = settings
        (folder / PARTS_FOLDER).mkdir(exist_ok=True)
        self._file = (folder / PARTS_FOLDER / f"{uuid.uuid4().hex}.jsonl").open("ab")

    def put(self, clip: ListedClip, verdict: Inspection) -> None:
        """Store a verdict such that it survives this process, though not yet a crash of this machine."""
        self._file.write(_format_line(self._settings, clip, verdict))
        self._file.flush()

    def sync(self) -> None:
        """Flush all verdicts to the shared disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_parts(folder: Path, settings: str, clips: Iterable[ListedClip]) -> list[Inspection | None]:
    """Return the verdicts that workers stored, transient ones too; None for a clip without one."""
    verdicts: dict[str, Inspection | None] = {}
    for path in _list_parts(folder):
        with path.open("rb") as file:
            verdicts.update(_parse_lines(file)[0])
    return [verdicts.get(_make_key(settings, clip)) for clip in clips]


def _list_parts(folder: Path) -> list[Path]:
    return sorted((folder / PARTS_FOLDER).glob("*.jsonl"))


def _make_key(settings: str, clip: ListedClip) -> str:
    return json.dumps([settings, clip.name, clip.offset, clip.size])


def _format_line(settings: str, clip: ListedClip, verdict: Inspection | None) -> bytes:
    value = None if verdict is None else verdict.to_json()
    return json.dumps({"clip": _make_key(settings, clip), "inspected": value}).encode() + b"\n"


def _parse_lines(lines: Iterable[bytes] | BinaryIO) -> tuple[dict[str, Inspection | None], int]:
    """Return the last verdict on each clip in complete lines (None: forgotten), and the byte count of these lines."""
    verdicts: dict[str, Inspection | None] = {}
    end = 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            entry = json.loads(line)
            key, value = entry["clip"], entry["inspected"]
            verdicts[key] = None if value is None else Inspection.from_json(value)
        except (ValueError, KeyError, TypeError):
            continue  # damaged, or written by another version: the clip is inspected again
    return verdicts, end
