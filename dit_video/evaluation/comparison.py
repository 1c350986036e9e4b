"""Comparison of evaluations by one protocol: several models, or checkpoints of one model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.evaluation.measure import METRICS_FILE
from dit_video.evaluation.metrics.metric import MetricDescription, MetricValue
from dit_video.evaluation.protocol import check_comparable

_STEP = re.compile(r"(?:^|[_-])step[_-]?(\d+)$|^(\d+)$")


class Comparison(NamedTuple):
    """Values of several evaluations by one protocol."""

    names: tuple[str, ...]
    """Name of each evaluation: the part of its path that tells it from the others."""
    steps: tuple[int, ...] | None
    """Training step of each evaluation, if all paths end with one, such as `step_2000`."""
    descriptions: Mapping[str, MetricDescription]
    """Descriptions of the values that all evaluations have, by name."""
    values: Mapping[str, tuple[MetricValue, ...]]
    """Value of each evaluation, by name."""
    left_out: tuple[str, ...]
    """Names of values that some evaluations lack."""

    def find_best(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the evaluations whose value may be the best: its interval reaches the best value's."""
        better = self.descriptions[name].is_higher_better
        known = [number for number, each in enumerate(self.values[name]) if each.value is not None]
        if better is None or not known:
            return ()
        values = self.values[name]
        best = sorted(known, key=lambda number: values[number].value or 0.0, reverse=better)[0]
        return tuple(number for number in known if number == best or _overlap(values[number], values[best]))

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON."""
        rows = {
            name: [
                {"value": each.value, "interval": each.interval and list(each.interval), "examples": each.count}
                for each in values
            ]
            for name, values in self.values.items()
        }
        return {"names": list(self.names), "steps": self.steps, "values": rows, "left_out": list(self.left_out)}


def compare(paths: Sequence[str | Path], *, ignored: Sequence[str] = ()) -> Comparison:
    """Read evaluations and compare them.

    Args:
      paths: Folders of `metrics.json`, or the files.
      ignored: Names of the recorded protocols' parts that may differ, since they are what is compared.

    Raises:
      MissingError: If a file does not exist.
      UserError: If there are fewer than two evaluations, one is given twice, a file has no protocol or is damaged,
        protocols differ (the message names the fields), numbers of samples differ by more than the clips that may be
        left out, or a network's weights differ.
    """
    files = [Path(path) if Path(path).is_file() else Path(path) / METRICS_FILE for path in paths]
    if len(files) < 2:
        raise UserError("a comparison needs at least two results. Name their folders")
    for file in files:
        if not file.is_file():
            raise MissingError(f"no such result: {file}. Make it with experiments/evaluate.py")
    if len({file.resolve() for file in files}) < len(files):
        raise UserError(f"results={[*map(str, paths)]} are invalid: one is named twice. Name different results")
    records = [read_json(file) for file in files]
    names = _shorten([str(file.parent) for file in files])
    for file, record in zip(files, records, strict=True):
        _check_record(file, record)
    # Weights are compared for the shared values only.
    omitted = ("weights", *ignored)
    protocols = [{part: each["protocol"][part] for part in each["protocol"] if part not in omitted} for each in records]
    for name, protocol, record in zip(names[1:], protocols[1:], records[1:], strict=True):
        check_comparable(protocols[0], protocol, names=(names[0], name))
        _check_counts(records[0], record, names=(names[0], name))
    results = [{each["name"]: each for each in record["results"]} for record in records]
    shared = [name for name in results[0] if all(name in each for each in results)]
    if not shared:
        raise UserError(f"{' and '.join(names)} have no value in common. Evaluate them with the same metrics")
    _check_weights(names, records, shared)
    descriptions = {name: _read(MetricDescription, results[0][name]) for name in shared}
    values = {name: tuple(_read(MetricValue, each[name]) for each in results) for name in shared}
    left_out = tuple(dict.fromkeys(name for each in results for name in each if name not in shared))
    return Comparison(tuple(names), _find_steps(names), descriptions, values, left_out)


def format_comparison(comparison: Comparison) -> str:
    """Return the values as a text table: a row for each value, a star where it may be the best."""
    rows = [["", *comparison.names]]
    for name, about in comparison.descriptions.items():
        best = comparison.find_best(name)
        cells = [
            about.format_estimate(each) + (" *" if number in best and len(best) < len(comparison.names) else "")
            for number, each in enumerate(comparison.values[name])
        ]
        rows.append([about.label, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if comparison.left_out:
        lines.append(f"not of all evaluations: {', '.join(comparison.left_out)}")
    return "\n".join(lines)


def _overlap(first: MetricValue, second: MetricValue) -> bool:
    if first.interval is None or second.interval is None:
        return first.value == second.value
    return first.interval[0] <= second.interval[1] and second.interval[0] <= first.interval[1]


def _check_record(file: Path, record: Any) -> None:
    """Check that a file holds a protocol and results.

    Raises:
      UserError: If the file lacks either of them.
    """
    if not isinstance(record, dict) or "protocol" not in record or "results" not in record:
        raise UserError(f"{file} has no protocol: it is of an older version or no result. Evaluate again")
    protocol, results = record["protocol"], record["results"]
    needed = {"name", "label", "value", "interval", "count"}
    if not (isinstance(protocol, dict) and isinstance(protocol.get("weights", {}), dict) and isinstance(results, list)):
        raise UserError(f"{file} is damaged: its protocol or results are no such things. Evaluate again")
    if not all(isinstance(each, dict) and needed <= each.keys() for each in results):
        raise UserError(f"{file} is damaged: a result has not all of {', '.join(sorted(needed))}. Evaluate again")


def _check_counts(first: Mapping[str, Any], second: Mapping[str, Any], *, names: tuple[str, str]) -> None:
    """Check that equally many samples were measured, apart from clips that the protocol allows to leave out.

    Raises:
      UserError: If the numbers differ by more.
    """
    counts = [record["samples"] for record in (first, second) if isinstance(record.get("samples"), int)]
    config = first["protocol"].get("config")
    share = config.get("max_unreadable", 0.0) if isinstance(config, dict) else 0.0
    if len(counts) == 2 and max(counts) - min(counts) > share * max(counts):
        raise UserError(
            f"{names[0]} and {names[1]} are not comparable: samples is {counts[0]} there and {counts[1]} here (there: "
            f"{names[0]}). Evaluate both with --count {min(counts)}"
        )


def _check_weights(names: Sequence[str], records: Sequence[Mapping[str, Any]], shared: Sequence[str]) -> None:
    first, *others = [record["protocol"].get("weights", {}) for record in records]
    for name, weights in zip(names[1:], others, strict=True):
        for values in first:
            is_shared = values in weights and any(value in shared for value in values.split(", "))
            if is_shared and weights[values] != first[values]:
                raise UserError(
                    f"{names[0]} and {name} are not comparable: {values} is of {', '.join(first[values])} there and of "
                    f"{', '.join(weights[values])} here. Use the same weights"
                )


def _read(cls: type[Any], result: Mapping[str, Any]) -> Any:
    """Return a description or a value of a metric, of the fields that a result has."""
    fields = {name: value for name, value in result.items() if name in cls.__dataclass_fields__}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _shorten(paths: Sequence[str]) -> list[str]:
    """Return the paths without the parts that all of them begin and end with."""
    parts = [Path(path).parts for path in paths]
    start, end = 0, 0
    shortest = min(map(len, parts))
    while start < shortest - 1 and len({each[start] for each in parts}) == 1:
        start += 1
    while end < shortest - start - 1 and len({each[len(each) - 1 - end] for each in parts}) == 1:
        end += 1
    return ["/".join(each[start : len(each) - end]) for each in parts]


def _find_steps(names: Sequence[str]) -> tuple[int, ...] | None:
    matches = [_STEP.search(name) for name in names]
    if not all(matches):
        return None
    return tuple(int(next(filter(None, match.groups()))) for match in matches if match is not None)
