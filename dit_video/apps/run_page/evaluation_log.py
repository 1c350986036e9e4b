"""Results of the evaluations during a training, by step."""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.evaluation.measure import METRICS_FILE

_FOLDER = re.compile(r"step_(\d{1,12})")

EvaluationCurves = dict[str, list[tuple[int, float]]]
"""Steps and values of each metric by its label, in the order of steps."""


def read_evaluations(folder: Path) -> EvaluationCurves:
    """Return the values in `step_STEP/metrics.json`; none of files that are missing or damaged."""
    curves: EvaluationCurves = {}
    try:
        paths = [(int(match[1]), path) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    except OSError:
        return {}
    for step, path in sorted(paths):
        for label, value in _read_results(path / METRICS_FILE):
            curves.setdefault(label, []).append((step, value))
    return curves


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
