"""The self-check names silent faults, and nothing in good runs; each fault changes a training without ending it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from experiment.self_check.faults import FAULTS

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = "attention_across_clips"
"""A fault of the variant of the training that the good run has."""


def run_harness(folder, *options):
    """Return the results of the harness, by the names of its cases."""
    results = folder / "faults.json"
    command = [sys.executable, ROOT / ".ci" / "fault_harness.py", "--json", results, "--folder", folder, *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text())["results"]


def test_the_catalogue_has_sixty_faults_of_all_layers():
    assert len(FAULTS) >= 60
    assert {fault.layer for fault in FAULTS.values()} == {"data", "rows", "model", "objective", "state"}
    assert all(fault.checks and fault.mistake.endswith(".") for fault in FAULTS.values())


@pytest.mark.slow
def test_a_good_run_has_no_problem_and_a_fault_is_named(tmp_path):
    results = run_harness(tmp_path, "--only", SAMPLE, "--good", "1")
    (good,) = (result for result in results.values() if result["kind"] == "good")
    assert good["problems"] == []
    assert {problem["check"] for problem in results[SAMPLE]["problems"]} & FAULTS[SAMPLE].checks


@pytest.fixture(scope="session")
def all_results(tmp_path_factory):
    """Return the results of all faults, compared with a run without a fault of each variant."""
    return run_harness(tmp_path_factory.mktemp("faults"), "--good", "20")


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_a_training_that_goes_on(all_results, name):
    result = all_results[name]
    assert "error" not in result
    assert result["effect"]


@pytest.mark.nightly
def test_nine_in_ten_faults_are_named_without_a_false_alarm(all_results):
    good = [result for result in all_results.values() if result["kind"] == "good"]
    assert len(good) == 20
    assert not any(result["problems"] for result in good)
    named = [
        name for name, fault in FAULTS.items() if {p["check"] for p in all_results[name]["problems"]} & fault.checks
    ]
    assert len(named) >= 55 / 60 * len(FAULTS)
