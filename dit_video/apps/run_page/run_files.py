"""Reading of what a run has written, while another process writes it: logs, times, evaluations and grids."""

import functools
import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.evaluation.measure import METRICS_FILE
from dit_video.experiment.monitors import TILES_FILE
from dit_video.training.goodput import GOODPUT_FOLDER, Attempt, RunTimes, list_attempt_files, parse_attempt, summarize

Entry = dict[str, float]
"""Values of an entry of the log by name, with its `step`."""


class MetricsReader:
    """The entries of one log; every reading takes only what was appended since the last one.

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


@dataclass(kw_only=True)
class TimeUse:
    """Seconds of a training by what they were spent on."""

    steps: float = 0.0
    """Seconds of training steps."""
    data: float = 0.0
    """Seconds of waiting for data while the devices were idle."""
    compilation: float = 0.0
    """Seconds of compiling the step, once for each process and each new shape of a batch."""
    checkpoints: float = 0.0
    """Seconds in which the training waited for checkpoints."""
    hooks: dict[str, float] = field(default_factory=dict)
    """Seconds of validation, samples and others by the name of the hook."""
    restarts: float = 0.0
    """Seconds between processes, including steps that were taken again."""
    is_complete: bool = True
    """False if the log has entries of an older version, which record times of steps alone."""

    @property
    def monitoring(self) -> float:
        """Return the seconds of all hooks."""
        return math.fsum(self.hooks.values())

    @property
    def total(self) -> float:
        """Return the seconds from the first step's start to the newest entry."""
        return self.steps + self.data + self.compilation + self.checkpoints + self.monitoring + self.restarts

    @property
    def lost_share(self) -> float | None:
        """Return the share of the time that was not spent on steps; None before there is any."""
        return 1 - self.steps / self.total if self.total > 0 else None


class TimeUseCounter:
    """Sum of the times of one log, to which every reading of it adds only the new entries."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._use, self._count, self._newest = TimeUse(), 0, Entry(step=0.0)

    def update(self, entries: Sequence[Entry]) -> TimeUse:
        """Return where the time went up to the newest of these entries, which are all that the log has now."""
        is_continued = len(entries) >= self._count and (not self._count or entries[self._count - 1] is self._newest)
        if not is_continued:  # the log was cut
            self._restart()
        for entry in entries[self._count :]:
            _add_entry(self._use, entry, steps=entry["step"] - self._newest["step"])
            gap = _get_seconds(entry, "unix_seconds", math.nan) - _get_seconds(self._newest, "unix_seconds", math.nan)
            gap -= _get_seconds(entry, "interval_seconds")
            if gap > _MIN_GAP:  # False for NaN
                self._use.restarts += gap
            self._newest = entry
        self._count = len(entries)
        return replace(self._use, hooks=dict(self._use.hooks))


EvaluationCurves = dict[str, list[tuple[int, float]]]
"""Steps and values of each metric by its label, in the order of steps."""


def read_evaluations(folder: Path) -> EvaluationCurves:
    """Return the values in `step_STEP/metrics.json`; none of files that are missing or damaged."""
    curves: EvaluationCurves = {}
    try:
        paths = [(int(match[1]), path) for path in folder.iterdir() if (match := _EVALUATION_NAME.fullmatch(path.name))]
    except OSError:
        return {}
    for step, path in sorted(paths):
        for label, value in _read_results(path / METRICS_FILE):
            curves.setdefault(label, []).append((step, value))
    return curves


KINDS = ("samples", "reconstructions")
"""Names of folders of grids in the folder of a training."""


class GridTile(NamedTuple):
    """A clip in a grid."""

    text: str
    """Prompt, or name of the clip."""
    left: int
    """Distance from the grid's left edge in pixels."""
    top: int
    """Distance from the grid's upper edge in pixels."""


class GridFile(NamedTuple):
    """A grid of one step."""

    step: int
    path: Path
    version: int
    """Time of its last change in nanoseconds; another step's grid never has the same name."""

    @property
    def is_video(self) -> bool:
        """Return whether it is shown as a video rather than as an image."""
        return self.path.suffix in (".mp4", ".webm")


@dataclass(frozen=True, kw_only=True)
class GridSeries:
    """Grids of the same clips at several steps of a training."""

    training: str
    """Name of the training."""
    kind: str
    """One of `KINDS`."""
    files: tuple[GridFile, ...]
    """Grids by step; at least one."""
    size: tuple[int, int] | None
    """Height and width of a grid in pixels; None if it is not known where its clips lie."""
    tile_size: tuple[int, int]
    """Height and width of a clip in pixels."""
    tiles: tuple[GridTile, ...]
    """Clips of a grid; none if it is not known where they lie."""

    def get_url(self, file: GridFile) -> str:
        """Return the address of a grid."""
        return f"run/media/{self.training}/{self.kind}/{file.path.name}?v={file.version}"


def list_grids(run: Path, training: str) -> tuple[GridSeries, ...]:
    """Return the grids that a training has written.

    Args:
      run: Folder of the run; no file outside is listed.
      training: Name of the training's folder in it.
    """
    series = (_list_series(run, training, kind) for kind in KINDS)
    return tuple(each for each in series if each is not None)


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


_OWN_TIMES = frozenset(
    f"{name}_seconds"
    for name in ("first_batch", "first_step", "step", "interval", "compile", "save", "unix", "host", "run")
)
"""Times that the loop logs itself; all others are of hooks."""
_MIN_GAP = 1.0
"""Seconds between two entries, besides their interval, from which the run counts as interrupted."""


def _add_entry(use: TimeUse, entry: Entry, *, steps: float) -> None:
    wait = min(_get_seconds(entry, "data_wait"), 1.0)
    if "interval_seconds" not in entry:
        seconds = _get_seconds(entry, "step_seconds") * steps
        use.steps += (1 - wait) * seconds
        use.data += wait * seconds
        use.is_complete = False
        return
    interval = _get_seconds(entry, "interval_seconds")
    hooks = {name.removesuffix("_seconds"): _get_seconds(entry, name) for name in entry if _is_hook(name)}
    compilation, checkpoints = _get_seconds(entry, "compile_seconds"), _get_seconds(entry, "save_seconds")
    busy = sum(hooks.values()) + checkpoints
    timed = max(0.0, interval - busy - _get_seconds(entry, "first_step_seconds"))
    data = _get_seconds(entry, "first_batch_seconds") + wait * timed
    use.data += data
    use.compilation += compilation
    use.checkpoints += checkpoints
    use.steps += max(0.0, interval - busy - compilation - data)
    for name, seconds in hooks.items():
        use.hooks[name] = use.hooks.get(name, 0.0) + seconds


def _is_hook(name: str) -> bool:
    return name.endswith("_seconds") and name not in _OWN_TIMES


def _get_seconds(entry: Entry, name: str, default: float = 0.0) -> float:
    """Return a value that is finite and not negative, else the default."""
    value = entry.get(name, default)
    return value if math.isfinite(value) and value >= 0 else default


_EVALUATION_NAME = re.compile(r"step_(\d{1,12})")


def _read_results(path: Path) -> tuple[tuple[str, float], ...]:
    try:
        return _parse_results(path, path.stat().st_mtime_ns)
    except OSError:  # samples are measured still
        return ()


@functools.lru_cache(maxsize=4096)
def _parse_results(path: Path, _version: int) -> tuple[tuple[str, float], ...]:
    try:
        document: Mapping[str, Any] = read_json(path)
        pairs = [(str(each["label"]), each["value"]) for each in document["results"]]
        return tuple((label, float(value)) for label, value in pairs if value is not None and math.isfinite(value))
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return ()


_GRID_NAME = re.compile(r"(\d{1,12})\.(mp4|webm|png|gif|apng)")
"""Name of a grid: its step and format. Files that are being written have other names."""
_MAX_TILES, _MAX_TEXT = 64, 300
"""Maximum number of tiles, and of characters of their texts, that the page shows."""


def _list_series(run: Path, training: str, kind: str) -> GridSeries | None:
    folder, root = run / training / kind, run.resolve()
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return None
    files = []
    for path in paths:
        match = _GRID_NAME.fullmatch(path.name)
        try:
            if match is None or not path.is_file() or not path.resolve().is_relative_to(root):
                continue
            files.append(GridFile(int(match[1]), path, path.stat().st_mtime_ns))
        except OSError:  # it was just removed
            continue
    if not files:
        return None
    size, tile_size, tiles = _read_tiles(folder / TILES_FILE)
    return GridSeries(
        training=training, kind=kind, files=tuple(sorted(files)), size=size, tile_size=tile_size, tiles=tiles
    )


def _read_tiles(path: Path) -> tuple[tuple[int, int] | None, tuple[int, int], tuple[GridTile, ...]]:
    """Return the sizes of grid and tile, and the tiles; none of a file that is missing or invalid."""
    try:
        document: Mapping[str, Any] = read_json(path)
        sizes = [int(document[name]) for name in ("height", "width", "tile_height", "tile_width")]
        tiles = tuple(
            GridTile(str(each["text"])[:_MAX_TEXT], int(each["left"]), int(each["top"]))
            for each in document["tiles"][:_MAX_TILES]
        )
    except (UserError, OSError, ValueError, TypeError, KeyError, OverflowError):
        return None, (1, 1), ()
    if min(sizes) < 1 or any(min(tile.left, tile.top) < 0 for tile in tiles):
        return None, (1, 1), ()
    return (sizes[0], sizes[1]), (sizes[2], sizes[3]), tiles
