"""Reading of the records of a run's time, of which every reading parses only the files that have changed."""

import threading
from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.training.goodput import GOODPUT_FOLDER, Attempt, RunTimes, list_attempt_files, parse_attempt, summarize


class TimesReader:
    """The times of one run, which another process records."""

    def __init__(self, run: Path):
        self._folder = run / GOODPUT_FOLDER
        self._parsed: dict[int, tuple[tuple[int, int], Attempt | None]] = {}
        """Versions of files and their attempts, by number."""
        self._lock = threading.Lock()

    def read(self) -> RunTimes:
        """Return where the time went; without attempts if there are no records, as of older versions."""
        with self._lock:
            try:
                files = [(number, Path(str(path))) for number, path in list_attempt_files(self._folder)]
                self._parsed = {number: self._parse(number, path) for number, path in files}
            except (UserError, OSError):  # replaced at this moment, or on a disk that has gone
                pass
            return summarize([attempt for _, attempt in self._parsed.values() if attempt is not None])

    def _parse(self, number: int, path: Path) -> tuple[tuple[int, int], Attempt | None]:
        status = path.stat()
        version = status.st_mtime_ns, status.st_size
        known = self._parsed.get(number)
        if known is not None and known[0] == version:
            return known
        return version, parse_attempt(path.read_text(encoding="utf-8", errors="replace"))
