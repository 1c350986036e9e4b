"""Goodput of a run: the share of its time that was spent on training steps that were kept.

Every microsecond from the first start of a run to its newest record has one category. The names are those of
`ml-goodput-measurement`, the library of MaxText and others: time of steps that were kept is goodput, all other is
badput of a category. The library itself keeps its records in Google Cloud Logging, reads them from there again, and
needs three packages of Google Cloud; here they are files in the folder of the run, `goodput/ATTEMPT.jsonl`.

An attempt is one start of the run: a process and, with several, the others that run together with it. Its file has a
line that describes the attempt, and one for each stretch of its time, `TimeRecord`. Lines are only added, also when the
run resumes, unlike in the log of metrics. `training.time_recorder` writes it.

Which steps were lost follows from where later attempts resumed: steps of a training behind that step were taken
again. The time between the newest record of an attempt and the start of the next one is idle. Clocks of machines are
read only there; one that was set back makes it zero, and not negative.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, StoragePathLike, convert_storage_errors, read_range, to_storage_path

GOODPUT_FOLDER = "goodput"
"""Name of the folder of the records in the folder of a run."""
STEP, LOST, IDLE = "step", "lost", "idle"
STARTUP, RESTORE, COMPILE, DATA, SAVE = "startup", "restore", "compile", "data", "save"
EVALUATION, REPORT = "evaluation", "report"
HOOK, STAGE = "hook/", "stage/"
"""Prefixes of the categories of hooks and of stages, which the name follows."""
_GROUPS = {
    STEP: "goodput",
    DATA: "data",
    COMPILE: "compile",
    SAVE: "checkpoints",
    RESTORE: "checkpoints",
    STARTUP: "startup",
    EVALUATION: "stages",
    REPORT: "stages",
    LOST: "restarts",
    IDLE: "restarts",
}
GROUPS = ("goodput", "data", "compile", "checkpoints", "monitoring", "stages", "startup", "restarts")
"""Groups of categories; each has a metric in the log."""


def get_group(category: str) -> str:
    """Return the group of a category."""
    return _GROUPS.get(category, "monitoring" if category.startswith(HOOK) else "stages")


@dataclass(frozen=True, kw_only=True)
class TimeRecord:
    """A stretch of the time of an attempt."""

    microseconds: Mapping[str, int]
    """Time by category, which adds up to the length of the stretch."""
    training: str = ""
    """Name of the training that it belongs to; empty outside of trainings."""
    start_step: int = 0
    """Number of steps of the training before it."""
    step: int = 0
    """Number of steps of the training at its end."""

    @property
    def length(self) -> int:
        """Return the whole time in microseconds."""
        return sum(self.microseconds.values())


@dataclass(frozen=True, kw_only=True)
class SlowHost:
    """A process that was slower than the others for several entries of the log."""

    process: int
    host: str
    cause: str
    """Part of its work that is slow: "data", or a device, such as "device 3"."""
    ratio: float
    """Its time over the median of all."""
    step: int


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run, from the start of its first process to its newest record."""

    number: int
    begin: int
    """Time of day of the start of the first process, in microseconds."""
    host: str = ""
    """Name of the host of the first process."""
    process_count: int = 1
    records: tuple[TimeRecord, ...] = ()
    ending: str = ""
    """Kind of its end: "finished", "stopped", "interrupted" or "failed"; empty if it goes on, or was killed."""
    slow_hosts: tuple[SlowHost, ...] = ()

    @property
    def end(self) -> int:
        """Return the time of day of the newest record, in microseconds, by the clock of the start."""
        return self.begin + sum(record.length for record in self.records)


@dataclass(frozen=True, kw_only=True)
class AttemptTimes:
    """Where the time of an attempt went, and of the idle time before it."""

    attempt: Attempt
    microseconds: Mapping[str, int]
    """Time by category, with `lost` and the `idle` time before the attempt."""
    kept_steps: int
    lost_steps: int

    @property
    def length(self) -> int:
        """Return the length of the attempt in microseconds, without the idle time before it."""
        return sum(self.microseconds.values()) - self.microseconds.get(IDLE, 0)


@dataclass(frozen=True, kw_only=True)
class RunTimes:
    """Where the time of a run went: the sum of its attempts and of the idle times between them."""

    attempts: tuple[AttemptTimes, ...] = ()
    """Attempts in the order of their starts."""
    microseconds: Mapping[str, int] = field(default_factory=dict)
    """Time by category, which adds up to `total`."""

    @property
    def total(self) -> int:
        """Return the time from the first start to the newest record, in microseconds."""
        return sum(self.microseconds.values())

    @property
    def goodput(self) -> float | None:
        """Return the share of the time of steps that were kept; None before there is any time."""
        return self.microseconds.get(STEP, 0) / self.total if self.total else None

    @property
    def lost_steps(self) -> int:
        """Return the number of steps that were taken again."""
        return sum(each.lost_steps for each in self.attempts)

    @property
    def kept_steps(self) -> int:
        """Return the number of steps of all trainings that were kept."""
        return sum(each.kept_steps for each in self.attempts)


def summarize(attempts: Sequence[Attempt]) -> RunTimes:
    """Return where the time of a run went, from the records of all its attempts in the order of their starts."""
    limits: dict[str, int] = {}  # the step of each training from which a later record goes on
    results = []
    for number in reversed(range(len(attempts))):
        attempt = attempts[number]
        times = Counter[str]()
        kept_steps = lost_steps = 0
        for record in reversed(attempt.records):
            lost, kept = _count_steps(record, limits)
            kept_steps, lost_steps = kept_steps + kept, lost_steps + lost
            times.update(_move_lost(record, lost, kept, limits))
            if record.training:
                limits[record.training] = min(limits.get(record.training, record.start_step), record.start_step)
        if number:
            times[IDLE] += max(0, attempt.begin - attempts[number - 1].end)
        results.append(AttemptTimes(attempt=attempt, microseconds=times, kept_steps=kept_steps, lost_steps=lost_steps))
    results.reverse()
    whole = Counter[str]()
    for result in results:
        whole.update(result.microseconds)
    return RunTimes(attempts=tuple(results), microseconds=whole)


def _count_steps(record: TimeRecord, limits: Mapping[str, int]) -> tuple[int, int]:
    """Return the numbers of lost and of kept steps of a record."""
    limit = limits.get(record.training, record.step)
    kept = max(0, min(record.step, limit) - record.start_step)
    return record.step - record.start_step - kept, kept


def _move_lost(record: TimeRecord, lost: int, kept: int, limits: Mapping[str, int]) -> dict[str, int]:
    """Return the times of a record, with lost steps in a category of their own."""
    times = dict(record.microseconds)
    if lost + kept:
        # A resume from the middle of a record, such as from an older checkpoint, loses a share of it.
        moved = times.get(STEP, 0) * lost // (lost + kept)
    else:  # a step that had not ended, unless its training went on behind it
        moved = times.get(STEP, 0) if record.start_step >= limits.get(record.training, record.step + 1) else 0
    if moved:
        times[STEP] -= moved
        times[LOST] = moved
    return times


def compute_metrics(microseconds: Mapping[str, int]) -> dict[str, float]:
    """Return `goodput` and `badput_GROUP`, shares of the time so far that add up to 1, and `run_seconds`, this time."""
    total = sum(microseconds.values())
    if not total:
        return {}
    groups = dict.fromkeys(GROUPS, 0)
    for category, value in microseconds.items():
        groups[get_group(category)] += value
    goodput = groups.pop("goodput")
    shares = {f"badput_{group}": value / total for group, value in groups.items()}
    return {"goodput": goodput / total, **shares, "run_seconds": total / 1e6}


# Files


def describe_attempt(attempt: Attempt) -> dict[str, Any]:
    """Return the first line of an attempt's file, as JSON."""
    values = {"attempt": attempt.number, "begin": attempt.begin, "host": attempt.host}
    return {**values, "processes": attempt.process_count}


def describe_record(record: TimeRecord) -> dict[str, Any]:
    """Return the line of a record, as JSON."""
    steps = {"training": record.training, "start_step": record.start_step, "step": record.step}
    return {**(steps if record.training else {}), "microseconds": dict(record.microseconds)}


def parse_attempt(text: str) -> Attempt | None:
    """Return the attempt in the text of its file; None if the first line describes no attempt.

    Lines that are not complete or hold something else, such as a last one that is half written, are left out. A record
    that is open counts only until the next one.
    """
    header, *lines = (_parse_line(line) for line in text.split("\n"))
    try:
        begin, number = int(header["begin"]), int(header["attempt"])
    except (KeyError, TypeError, ValueError):
        return None
    records, slow_hosts, ending, is_open = list[TimeRecord](), list[SlowHost](), "", False
    for line in lines:
        try:
            if "microseconds" in line:
                record = _parse_record(line)
                if is_open:
                    records.pop()
                records.append(record)
                is_open, ending = bool(line.get("is_open")), ""
            elif "slow_host" in line:
                slow_hosts.append(SlowHost(**line["slow_host"]))
            elif "ending" in line:
                ending = str(line["ending"])
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return Attempt(
        number=number,
        begin=begin,
        host=str(header.get("host", "")),
        process_count=header.get("processes", 1),
        records=tuple(records),
        ending=ending,
        slow_hosts=tuple(slow_hosts),
    )


def _parse_line(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _parse_record(line: Mapping[str, Any]) -> TimeRecord:
    times = {str(name): int(value) for name, value in line["microseconds"].items()}
    steps = {"start_step": int(line["start_step"]), "step": int(line["step"])} if line.get("training") else {}
    return TimeRecord(microseconds=times, training=str(line.get("training", "")), **steps)


def list_attempt_files(folder: StoragePathLike) -> list[tuple[int, StoragePath]]:
    """Return the numbers and files of the attempts in the folder of a run's records; none if it does not exist.

    Raises:
      UserError: If an address cannot be reached.
    """
    folder = to_storage_path(folder)
    with convert_storage_errors(folder):
        if not folder.is_dir():
            return []
        paths: Iterable[StoragePath] = list(folder.iterdir())
    return sorted(
        ((int(path.stem), path) for path in paths if path.suffix == ".jsonl" and path.stem.isdigit()),
        key=lambda item: item[0],
    )


def read_attempts(folder: StoragePathLike) -> tuple[Attempt, ...]:
    """Return the attempts in the folder of a run's records, in the order of their starts; none if there are none."""
    attempts = []
    for _, path in list_attempt_files(folder):
        try:
            attempt = parse_attempt(read_range(path).decode(errors="replace"))
        except (UserError, OSError):  # replaced at this moment, or gone
            continue
        if attempt is not None:
            attempts.append(attempt)
    return tuple(attempts)


def read_run_times(run: StoragePathLike) -> RunTimes:
    """Return where the time of the run in this folder went; without attempts for a run of an older version."""
    return summarize(read_attempts(to_storage_path(run) / GOODPUT_FOLDER))
