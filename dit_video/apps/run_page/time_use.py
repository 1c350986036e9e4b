"""Where the wall time of a training went, from the times in its log."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dit_video.apps.run_page.metrics_reader import Entry

_OWN_TIMES = frozenset(
    f"{name}_seconds"
    for name in ("first_batch", "first_step", "step", "interval", "compile", "save", "unix", "host", "run")
)
"""Times that the loop logs itself; all others are of hooks."""
_MIN_GAP = 1.0
"""Seconds between two entries, besides their interval, from which the run counts as interrupted."""


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
            gap = _get(entry, "unix_seconds", math.nan) - _get(self._newest, "unix_seconds", math.nan)
            gap -= _get(entry, "interval_seconds")
            if gap > _MIN_GAP:  # False for NaN
                self._use.restarts += gap
            self._newest = entry
        self._count = len(entries)
        return replace(self._use, hooks=dict(self._use.hooks))


def _add_entry(use: TimeUse, entry: Entry, *, steps: float) -> None:
    wait = min(_get(entry, "data_wait"), 1.0)
    if "interval_seconds" not in entry:
        seconds = _get(entry, "step_seconds") * steps
        use.steps += (1 - wait) * seconds
        use.data += wait * seconds
        use.is_complete = False
        return
    interval = _get(entry, "interval_seconds")
    hooks = {name.removesuffix("_seconds"): _get(entry, name) for name in entry if _is_hook(name)}
    compilation, checkpoints = _get(entry, "compile_seconds"), _get(entry, "save_seconds")
    busy = sum(hooks.values()) + checkpoints
    timed = max(0.0, interval - busy - _get(entry, "first_step_seconds"))
    data = _get(entry, "first_batch_seconds") + wait * timed
    use.data += data
    use.compilation += compilation
    use.checkpoints += checkpoints
    use.steps += max(0.0, interval - busy - compilation - data)
    for name, seconds in hooks.items():
        use.hooks[name] = use.hooks.get(name, 0.0) + seconds


def _is_hook(name: str) -> bool:
    return name.endswith("_seconds") and name not in _OWN_TIMES


def _get(entry: Entry, name: str, default: float = 0.0) -> float:
    """Return a value that is finite and not negative, else the default."""
    value = entry.get(name, default)
    return value if math.isfinite(value) and value >= 0 else default
