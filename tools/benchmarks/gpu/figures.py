"""Figures of the GPU benchmark: the JSON that they are written to as each appears, and their table."""

import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.timer import TimeBudget
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.platform.xla_flags import get_flags

FORMAT = 1
"""Format of the JSON."""
NOT_RUN = "not run on a GPU"
DETAILS = "details"
"""Name under which a case yields what is not in the table."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the table."""

    name: str
    unit: str = ""
    target: str = ""
    """Required value, and in brackets the one that is aimed for; empty for a figure that is only reported."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Figures that are measured together, in a process of their own, whose peak memory is therefore theirs."""

    name: str
    figures: tuple[Figure, ...]
    measure: Callable[[TimeBudget], Iterator[tuple[str, Any]]]
    """Function that yields names of figures and their values, each as soon as it is known."""
    flags: tuple[str, ...] = ()
    """Flags of XLA of its process, besides those of all."""


def count_clips(clips: int) -> str:
    """Return the number of clips of a row as text."""
    return f"{clips} clip{'s' if clips > 1 else ''} a row"


def describe_machine() -> dict[str, Any]:
    """Return the machine, the date and the flags of XLA that figures are recorded with."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "flags": get_flags(),
    }


class Document:
    """The JSON of all parts, to which figures of several runs are added.

    Raises:
      UserError: If the file holds no figures, or if it is of a rehearsal and this is not, or the reverse.
    """

    def __init__(self, path: Path, *, is_small: bool):
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "small": is_small, "parts": {}}
        if path.exists():
            self.content = read_figures(path)
            if self.content["small"] != is_small:
                kind, other = ("full", "small")[:: -1 if self.content["small"] else 1]
                raise UserError(
                    f"--json {path} is invalid: its figures are of {kind} sizes, these are of {other} ones. Use "
                    "another file."
                )

    def record_platform(self, platform: str) -> None:
        """Write the platform, whose cases the table lists."""
        self.content["platform"] = platform
        self._write()

    def add(self, part: str, name: str, value: Any, machine: Mapping[str, Any]) -> None:
        """Write a figure, instead of an older one of this name."""
        self._get_part(part)["figures"][name] = {"value": value, **machine}
        self._write()

    def add_details(self, part: str, case: str, details: Mapping[str, Any]) -> None:
        """Write what a case measured besides the figures."""
        self._get_part(part)[DETAILS].setdefault(case, {}).update(details)
        self._write()

    def mark_unmeasured(self, part: str, case: Case, reason: str) -> None:
        """Write why the figures of a case that are not there were not measured."""
        content = self._get_part(part)
        for figure in case.figures:
            content["figures"].setdefault(figure.name, {"value": None, "reason": reason})
        self._write()

    def forget(self, part: str, case: Case) -> None:
        """Remove the figures of a case that is measured again."""
        content = self._get_part(part)
        content[DETAILS].pop(case.name, None)
        for figure in case.figures:
            content["figures"].pop(figure.name, None)

    def is_measured(self, part: str, case: Case) -> bool:
        """Return True if all figures of a case have values."""
        figures = self._get_part(part)["figures"]
        return all(figures.get(figure.name, {}).get("value") is not None for figure in case.figures)

    def _get_part(self, part: str) -> dict[str, Any]:
        return self.content["parts"].setdefault(part, {"figures": {}, DETAILS: {}})

    def _write(self) -> None:
        write_json(self.path, self.content)


def read_figures(path: Path) -> dict[str, Any]:
    """Read the JSON of figures.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file holds no figures.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        rule = f"it must be a JSON of tools/gpu_benchmark.py, of format {FORMAT}"
        raise UserError(f"{path} is invalid: {rule}. Use such a file, or another name for a new one.")
    return content


def format_table(cases: Mapping[str, list[Case]], content: Mapping[str, Any]) -> str:
    """Return the Markdown table of all parts' figures, those that were not measured included."""
    lines = ["| part | figure | measured | target | machine |", "|---|---|---|---|---|"]
    for part, part_cases in cases.items():
        measured_figures = content.get("parts", {}).get(part, {}).get("figures", {})
        for figure in (figure for case in part_cases for figure in case.figures):
            entry = measured_figures.get(figure.name, {})
            machine = ""
            if entry.get("value") is not None:
                measured = _format_value(entry["value"], figure.unit)
                small = ", small sizes" if content.get("small") else ""
                machine = f"{entry['device']}, jax {entry['jax']}, {entry['date']}{small}"
            else:
                measured = f"not measured: {entry['reason']}" if "reason" in entry else NOT_RUN
            lines.append(f"| {part} | {figure.name} | {measured} | {figure.target} | {machine} |")
    return "\n".join(lines)


def _format_value(value: Any, unit: str) -> str:
    if not isinstance(value, float | int):
        return str(value)
    number = f"{100 * value:.1f}" if unit == "%" else f"{value:,.4g}"
    return f"{number} {unit}".strip()
