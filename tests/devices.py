"""Code on simulated devices: their number is fixed before JAX is imported, so it runs in a process of its own."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_HUNG = 300.0
"""Seconds that two processes have: against hanging only. On a busy machine they take a minute."""


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


def run_two_processes(code: str, *arguments: str, devices: int = 1) -> list[str]:
    """Run code in two processes that know each other: `port` and `index` are the first things in `sys.argv`.

    The port is free when it is chosen and may be taken a moment later, whereupon both wait for ever: then they start
    again at another one.

    Returns:
      What each printed; both end with 0.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "tests"), str(_ROOT / "tests" / "training")]),
    }
    outputs = ["", ""]
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(code), port, str(index), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(2)
        ]
        ended = _wait(processes)
        outputs = [process.communicate()[0] for process in processes]
        taken = any("already in use" in output for output in outputs)
        if ended and not taken:
            assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
            return outputs
    raise AssertionError("two processes hung, or found no port, three times:\n" + "\n".join(outputs))


def _wait(processes: Sequence[subprocess.Popen]) -> bool:
    """Whether all ended by themselves; those that hang are killed, and so is the other one of a process that failed."""
    deadline = time.monotonic() + _HUNG
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    ended = time.monotonic() <= deadline
    for process in processes:
        process.kill()
    return ended
