"""Code on simulated devices: their number is fixed before JAX is imported, so it runs in a process of its own."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

HANG = 900
"""Seconds after which a process hangs. On a busy machine one may take a hundred times as long as on an idle one."""


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for what another process or thread does."""
    until = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < until, f"not true after {HANG} s"
        time.sleep(0.02)


def check_on_eight_devices(code: str, *arguments: str) -> None:
    """Run code that prints `done` at its end, with the project and its tests on the path."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=_environment(8), capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout


def run_together(imports: str, code: str, *arguments: str, devices: int = 1) -> tuple[str, str]:
    """Run code in two processes, of so many devices each, that JAX joins into one run; gives what each printed.

    The two are joined between `imports` and `code`: within 30 seconds after one has reached a collective operation the
    other has to, or Gloo's connection fails, and imports may take that long on a busy machine. They are run again where
    that happened all the same, and where another program was faster to take the port.
    """
    script = _JOIN.format(imports=textwrap.dedent(imports), code=textwrap.dedent(code), seconds=HANG)
    for _ in range(4):
        codes, outputs = _both([sys.executable, "-c", script, _free_port()], arguments, _environment(devices))
        if codes == [0, 0]:
            return outputs
        if not any(_NOT_JOINED.search(output) for output in outputs):
            break
    raise AssertionError("\n".join(f"process {k} ended with {codes[k]}:\n{outputs[k]}" for k in range(2)))


_JOIN = """
import os, sys, traceback
import jax
port, index = sys.argv.pop(1), int(sys.argv.pop(1))
{imports}

def end(*error):
    # At an ordinary end a process waits for the other one, which may wait for this one in a collective operation.
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)

sys.excepthook = end
jax.distributed.initialize(
    "127.0.0.1:" + port,
    2,
    index,
    coordinator_bind_address="127.0.0.1:" + port,
    initialization_timeout={seconds},
    heartbeat_timeout_seconds={seconds},
    shutdown_timeout_seconds={seconds},
)
{code}
"""
_NOT_JOINED = re.compile("Failed to start RPC server|Gloo context initialization failed")


def _both(command: list[str], arguments: tuple[str, ...], environment: dict[str, str]):
    """How two processes ended, and what they printed. Where one fails or `HANG` is over, what still runs is killed."""
    with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
        files, processes, until = (first, second), [], time.monotonic() + HANG
        try:
            for index, file in enumerate(files):
                whole = [*command, str(index), *arguments]
                processes.append(subprocess.Popen(whole, env=environment, stdout=file, stderr=subprocess.STDOUT))
            while None in (codes := [process.poll() for process in processes]):
                if any(codes) or time.monotonic() > until:
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
        codes = [process.wait() for process in processes]
        for file in files:
            file.seek(0)
        return codes, (first.read(), second.read())


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _environment(devices: int) -> dict[str, str]:
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "tests")]),
        # gRPC would ask a proxy for the way to the other process.
        "no_proxy": "127.0.0.1,localhost",
    }
