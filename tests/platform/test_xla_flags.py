"""XLA flags are set before JAX first computes."""

import os
import subprocess
import sys

import pytest

from dit_video.platform import xla_flags
from support.devices import PROGRAMS

FLAG = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize(
    ("before", "release", "after"),
    [
        ("", "0.10.2", f"{FLAG}-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"),
        ("--a=1", "0.10.2", f"--a=1 {FLAG}-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"),
        (f"{FLAG}mine", "0.10.2", f"{FLAG}mine"),
        ("--a=1", "0.11.0", "--a=1"),
    ],
)
def test_flags_are_added_once_for_old_releases_unless_they_are_set(monkeypatch, before, release, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(xla_flags, "version", lambda _: release)
    xla_flags.set_xla_flags()
    xla_flags.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == after


def test_this_release_of_xla_accepts_the_flags():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-P", str(PROGRAMS / "cpu_convolution.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
