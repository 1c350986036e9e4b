"""The kernel for TPU is compiled ahead of time, by the libtpu of the [tpu] extra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.devices import HANG, PROGRAMS

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "width"),
    [
        ("v5e:2x2", 64),
        *(pytest.param(each, 128, marks=pytest.mark.exhaustive) for each in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")),
    ],
)
def test_splash_compiles_for_a_topology(topology, width):
    """This takes a process of its own: one that has libtpu would look for TPUs from then on."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    command = [sys.executable, "-P", str(PROGRAMS / "splash_for_tpu.py"), topology, str(width)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        pattern, kernels, sorts, temporary = line.rsplit(" ", 3)
        assert int(kernels) >= 3, pattern  # forward, gradients of queries, gradients of keys and values
        # A token with a segment sees itself, so nothing needs a sort.
        assert int(sorts) == 0 or "CausalFrames" in pattern, pattern
        # One row a chip. Its scores alone would take 2 heads × 8192² × 4 bytes = 537 MB.
        assert int(temporary) < 60e6, pattern
