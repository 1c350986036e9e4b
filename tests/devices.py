"""Code on simulated devices: their number is fixed before JAX is imported, so it runs in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def check_on_eight_devices(code: str, *arguments: str, flags: str = "--xla_backend_optimization_level=0") -> None:
    """Run code that prints `done` at its end, with the project and its tests on the path.

    Without most optimisations, unless other `flags` are given: where models are tiny, compilation is what takes time.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "tests")]),
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout
