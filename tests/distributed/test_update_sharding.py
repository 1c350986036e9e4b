"""The work of an update is divided over devices, and its values are those of one device."""

import subprocess
import sys

import pytest

from support.devices import HANG, PROGRAMS, check_on_eight_devices, make_environment


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_matrices_and_accumulated_gradients_are_divided_over_devices():
    check_on_eight_devices("divided_updates.py")


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_tpus_divide_the_matrices_of_muon():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-P", str(PROGRAMS / "muon_for_tpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=make_environment(1), timeout=HANG, check=False)
    assert "done" in done.stdout, done.stderr
