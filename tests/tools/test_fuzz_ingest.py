"""The command that sends mutated files through an ingest."""

import re

import pytest

TOOL = "tools/fuzz_ingest.py"


@pytest.mark.slow
def test_three_hundred_mutated_files_are_all_accounted_for(script):
    done = script(TOOL, 300, "--seed", 1, "--workers", 2, "--time-limit", 20)
    assert done.code == 0, done.err
    assert "300 files and " in done.out
    assert "; 0 lost;" in done.out
    (totals,) = (line for line in done.out.splitlines() if re.search(r"\ball\b", line))
    used, quarantined, slow, _, refused = map(int, re.findall(r"\d+", totals))
    assert used > 60
    assert quarantined > 60
    assert refused > 5
    assert slow == 0


def test_a_file_of_each_kind_has_an_outcome(script):
    done = script(TOOL, 14, "--seed", 2, "--workers", 1, "--time-limit", 20)
    assert done.code == 0, done.err
    (totals,) = (line for line in done.out.splitlines() if re.search(r"\ball\b", line))
    assert sum(map(int, re.findall(r"\d+", totals))) == 14
