"""Marks of parametrised tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mark_slow_except(quick: Collection, values: Iterable) -> list[Any]:
    """Return `values` as parameters of a test, all but those in `quick` marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def mark_nightly_except(sampled: Collection, values: Iterable) -> list[Any]:
    """Return values, tuples of several ones, as parameters of a slow test, all but `sampled` marked nightly."""
    tuples = {value: value if isinstance(value, tuple) else (value,) for value in values}
    return [
        value if value in sampled else pytest.param(*each, marks=pytest.mark.nightly) for value, each in tuples.items()
    ]
