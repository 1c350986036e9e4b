"""Reading of a metrics log that another process writes, continues after an interruption, or has not begun."""

import json
import math
import threading
from pathlib import Path
from typing import Any

Entry = dict[str, float]
"""Values of an entry of the log by name, with its `step`."""


class MetricsReader:
    """The entries of one log, of which every reading takes only what was appended since the last one.

    Lines that are no entries are skipped, as a page has to show the others. (`read_metrics`, by which a training
    resumes, refuses them.)
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._entries: list[Entry] = []
        self._position, self._inode = 0, -1

    def read(self) -> list[Entry]:
        """Return all entries; none if the log does not exist or cannot be read."""
        with self._lock:
            try:
                self._read_appended()
            except OSError:  # it does not exist yet, or is on a disk that has gone
                self._reset()
            return list(self._entries)

    def _read_appended(self) -> None:
        with self.path.open("rb") as file:
            # A training that resumes puts another file in place, without the entries that it will write again.
            status = self.path.stat()
            if status.st_ino != self._inode or status.st_size < self._position:
                self._reset()
                self._inode = status.st_ino
            file.seek(self._position)
            content = file.read()
        end = content.rfind(b"\n") + 1  # the last line may be half written
        self._position += end
        self._entries += filter(None, map(_parse_line, content[:end].split(b"\n")))


def _parse_line(line: bytes) -> Entry | None:
    """Return the numbers of an entry, with NaN for null; None for a line that is none."""
    try:
        document: dict[str, Any] = json.loads(line)
        step = float(int(document.pop("step")))
        values = {name: math.nan if value is None else value for name, value in document.items()}
        return {"step": step, **{name: float(value) for name, value in values.items() if _is_number(value)}}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
