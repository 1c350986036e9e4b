"""Marks of parametrised tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mark_slow_except(quick: Collection, values: Iterable) -> list[Any]:
    """Return `values` as parameters of a test, all but those in `quick` marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def mark_exhaustive_except(sampled: Collection[tuple], values: Iterable[tuple]) -> list[Any]:
    """Return tuples as parameters of a slow test, all but those in `sampled` marked exhaustive."""
    return [value if value in sampled else pytest.param(*value, marks=pytest.mark.exhaustive) for value in values]
