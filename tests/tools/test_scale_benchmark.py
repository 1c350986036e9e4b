"""A large table of clips is opened, fitted and planned in bounded time, and pickled to workers as a few paths."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scale(load_file):
    load_file(ROOT / "tools" / "benchmark.py")  # puts its folder on the path
    return importlib.import_module("benchmarks.scale")


@pytest.mark.slow
def test_a_hundred_thousand_clips_are_within_a_tenth_of_the_bounds_of_a_million(scale):
    figures = scale.measure(100_000, is_read=False)
    stages = figures["stages"]  # the time of the processor, as other tests may run at the same time
    assert figures["pickle_bytes"] < 100_000
    assert stages["open"]["cpu_seconds"] < 0.5
    assert stages["sizes"]["cpu_seconds"] < 0.2
    assert stages["worker opens"]["cpu_seconds"] < 0.1
    assert stages["first batch"]["cpu_seconds"] < 0.1
    assert max(stage["rss_mb"] for stage in stages.values()) - stages["imports"]["rss_mb"] < 300
