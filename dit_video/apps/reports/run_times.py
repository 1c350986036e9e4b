"""Where the time of a run went, as a stacked bar and tables."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from dit_video.apps.reports.elements import render_template
from dit_video.training import goodput
from dit_video.training.goodput import AttemptTimes, RunTimes

_MAX_ATTEMPTS = 50
"""Maximum number of attempts in the table: the newest ones."""
_MIN_SHARE = 0.0005
"""Share of the whole time from which a part of a group has a row of its own."""
_GROUPS = {
    "goodput": ("training steps that were kept", "c0"),
    "data": ("waiting for data", "c1"),
    "compile": ("compilation", "c3"),
    "checkpoints": ("checkpoints", "c2"),
    "monitoring": ("monitoring", "c4"),
    "stages": ("other stages", "c6"),
    "startup": ("start of processes, opening data", "c7"),
    "restarts": ("restarts", "c5"),
}
"""Labels and classes of colours."""
_LABELS = {
    goodput.SAVE: "writing",
    goodput.RESTORE: "restoring",
    goodput.LOST: "steps that were taken again",
    goodput.IDLE: "not running",
    goodput.EVALUATION: "final evaluation",
    goodput.REPORT: "report",
}
HOOK_LABELS = {
    "validate": "validation",
    "sample": "samples",
    "reconstruct": "reconstructions",
    "evaluate": "evaluation",
    "snapshot": "snapshots of averages",
    "hook": "other monitoring",
}
"""Names of hooks for readers."""


class TimePart(NamedTuple):
    """A part of a time."""

    label: str
    colour: str
    """Class of its colour; empty for a part of the part before it."""
    duration: str
    share: float
    """Share of the whole time, from 0 to 1."""
    start: float
    """Sum of the shares before it."""


class AttemptRow(NamedTuple):
    """An attempt in the table."""

    number: int
    began: float
    """Time of day in seconds."""
    duration: str
    idle: str
    """Time before it in which nothing ran; empty if there was hardly any."""
    parts: tuple[TimePart, ...]
    """Parts of its time, with shares of the longest attempt's time."""
    kept_steps: int
    lost_steps: int
    goodput: float
    """Share of its time of steps that were kept."""
    ending: str


def format_duration(seconds: float) -> str:
    """Return a duration in two units at most: 5 ms, 45 s, 12 min, 3 h 20 min, 2 days 5 h."""
    if 0 < seconds < 0.1:
        return f"{max(1, round(1000 * seconds))} ms"
    if seconds < 90:
        return f"{max(0, round(seconds))} s" if seconds >= 10 or seconds == round(seconds) else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


def describe_category(category: str) -> str:
    """Return the name of a category for readers."""
    if category.startswith(goodput.HOOK):
        name = category.removeprefix(goodput.HOOK)
        return HOOK_LABELS.get(name, name)
    if category.startswith(goodput.STAGE):
        return f"stage {category.removeprefix(goodput.STAGE)}"
    return _LABELS.get(category, category)


def list_parts(microseconds: Mapping[str, int], *, total: int | None = None) -> tuple[TimePart, ...]:
    """Return the groups of categories that took any time, each with its larger categories after it.

    Args:
      microseconds: Time by category.
      total: Whole time, for the shares; the sum if None.
    """
    total = sum(microseconds.values()) if total is None else total
    parts, start = list[TimePart](), 0.0
    for group, (label, colour) in _GROUPS.items():
        members = {name: value for name, value in microseconds.items() if goodput.get_group(name) == group and value}
        if not total or not (seconds := sum(members.values())):
            continue
        parts.append(TimePart(label, colour, format_duration(seconds / 1e6), seconds / total, start))
        if list(members) not in ([goodput.STEP], [goodput.DATA], [goodput.COMPILE], [goodput.STARTUP]):
            for name, value in sorted(members.items(), key=lambda item: -item[1]):
                if value >= _MIN_SHARE * total:
                    duration = format_duration(value / 1e6)
                    parts.append(TimePart(describe_category(name), "", duration, value / total, start))
        start += seconds / total
    return tuple(parts)


def list_attempts(times: RunTimes) -> tuple[AttemptRow, ...]:
    """Return the newest attempts, in the order of their starts."""
    newest = times.attempts[-_MAX_ATTEMPTS:]
    longest = max((each.length for each in newest), default=0)
    return tuple(_make_row(each, longest, is_last=each is times.attempts[-1]) for each in newest)


def _make_row(each: AttemptTimes, longest: int, *, is_last: bool) -> AttemptRow:
    own = {name: value for name, value in each.microseconds.items() if name != goodput.IDLE}
    idle = each.microseconds.get(goodput.IDLE, 0) / 1e6
    return AttemptRow(
        number=each.attempt.number,
        began=each.attempt.begin / 1e6,
        duration=format_duration(each.length / 1e6),
        idle=format_duration(idle) if idle >= 1 else "",
        parts=tuple(part for part in list_parts(own, total=longest) if part.colour),
        kept_steps=each.kept_steps,
        lost_steps=each.lost_steps,
        goodput=own.get(goodput.STEP, 0) / each.length if each.length else 0.0,
        ending=each.attempt.ending or ("no end yet" if is_last else "killed"),
    )


def describe_slow_hosts(times: RunTimes) -> Iterator[str]:
    """Yield a sentence for each process that was slower than the others."""
    for each in times.attempts:
        for slow in each.attempt.slow_hosts:
            part = "between steps" if slow.cause == "data" else f"on its {slow.cause}"
            yield (
                f"Process {slow.process} ({slow.host}) was slow in attempt {each.attempt.number}, from step "
                f"{slow.step:,} on: {slow.ratio:.1f} times the median {part}."
            )


def render_run_times(times: RunTimes) -> Markup:
    """Return the bar and the tables of a run that has an attempt."""
    return render_template(
        "run_times.html.jinja",
        parts=list_parts(times.microseconds),
        total=format_duration(times.total / 1e6),
        attempts=list_attempts(times),
        attempt_count=len(times.attempts),
        slow_hosts=list(describe_slow_hosts(times)),
        format_time=_format_time,
    )


def format_run_times(times: RunTimes) -> str:
    """Return the tables as text."""
    lines = [f"{'part':40}{'time':>14}{'share':>9}"]
    for part in list_parts(times.microseconds):
        label = part.label if part.colour else f"  {part.label}"
        lines.append(f"{label:40}{part.duration:>14}{100 * part.share:>7.1f} %")
    columns = f"{'idle before':>14}{'time':>14}{'kept':>9}{'lost':>7}{'goodput':>10}  end"
    lines += ["", f"{'attempt':>7}  {'began':19}{columns}"]
    for row in list_attempts(times):
        columns = f"{row.idle or '-':>14}{row.duration:>14}{row.kept_steps:>9}{row.lost_steps:>7}"
        lines.append(f"{row.number:>7}  {_format_time(row.began):19}{columns}{100 * row.goodput:>8.1f} %  {row.ending}")
    lines += ["", *describe_slow_hosts(times)] if any(describe_slow_hosts(times)) else []
    whole = f"goodput {100 * (times.goodput or 0):.1f} % of {format_duration(times.total / 1e6)}"
    steps = f"{times.kept_steps:,} steps kept, {times.lost_steps:,} taken again"
    return "\n".join([*lines, "", f"{whole}; {steps}; attempts: {len(times.attempts)}"])


def make_run_times_document(times: RunTimes) -> dict[str, Any]:
    """Return where the time went as JSON: seconds by category, of the whole run and of each attempt."""
    return {
        "goodput": times.goodput,
        "total_seconds": times.total / 1e6,
        "kept_steps": times.kept_steps,
        "lost_steps": times.lost_steps,
        "seconds": _to_seconds(times.microseconds),
        "attempts": [
            {
                "attempt": each.attempt.number,
                "unix_seconds": each.attempt.begin / 1e6,
                "host": each.attempt.host,
                "processes": each.attempt.process_count,
                "ending": each.attempt.ending,
                "kept_steps": each.kept_steps,
                "lost_steps": each.lost_steps,
                "seconds": _to_seconds(each.microseconds),
                "slow_hosts": [vars(slow) for slow in each.attempt.slow_hosts],
            }
            for each in times.attempts
        ],
    }


def _to_seconds(microseconds: Mapping[str, int]) -> dict[str, float]:
    return {name: value / 1e6 for name, value in microseconds.items()}


def _format_time(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))
