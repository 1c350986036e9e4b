"""Programs on simulated devices, each in a process of its own: JAX fixes their number when it is imported.

The programs are files of `tests/support/programs`. Each prints `done` at its end.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent / "programs"

HANG = 900
"""Seconds until a process counts as hung. On a busy machine one may take a hundred times as long as on an idle one."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until another process or thread has made a condition true."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, f"not true after {HANG} s"
        time.sleep(0.02)


def check_on_eight_devices(program: str, *arguments: str) -> None:
    """Run a program on eight devices, with the project and its tests on the path, and check that it prints `done`.

    Args:
      program: File name below `tests/support/programs`.
    """
    command = [*_make_command(program), *arguments]
    environment = make_environment(8)
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANG)
    assert process.returncode == 0, process.stderr
    assert "done" in process.stdout


def run_together(program: str, *arguments: str, devices: int = 1) -> tuple[str, str]:
    """Run a program in two processes, of so many devices each, and return their outputs.

    The program calls `join_processes` after its imports, which makes JAX join the two into one run. It is run again
    where the two were not joined: another process took the port first, or one was too slow.

    Args:
      program: File name below `tests/support/programs`.
    """
    command = _make_command(program)
    for _ in range(4):
        codes, outputs = _run_both([*command, find_free_port()], arguments, make_environment(devices))
        if codes == [0, 0]:
            return outputs
        if not any(_NOT_JOINED.search(output) for output in outputs):
            break
    raise AssertionError("\n".join(f"process {k} ended with {codes[k]}:\n{outputs[k]}" for k in range(2)))


def join_processes() -> None:
    """Join this process and the other one of `run_together`, whose port and index are its first two arguments.

    To be called after all imports: within 30 seconds after one process has reached a collective operation the other
    has to, or Gloo's connection fails, and imports may take that long on a busy machine.
    """
    import jax

    def end(*error) -> None:
        # At an ordinary end a process waits for the other one, which may wait for this one in a collective operation.
        traceback.print_exception(*error)
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = end
    address, index = f"127.0.0.1:{sys.argv.pop(1)}", int(sys.argv.pop(1))
    jax.distributed.initialize(
        address,
        2,
        index,
        coordinator_bind_address=address,
        initialization_timeout=HANG,
        heartbeat_timeout_seconds=HANG,
        shutdown_timeout_seconds=HANG,
    )


_NOT_JOINED = re.compile("Failed to start RPC server|Gloo context initialization failed")


def _make_command(program: str) -> list[str]:
    return [sys.executable, "-P", str(PROGRAMS / program)]


def _run_both(command: list[str], arguments: Sequence[str], environment: dict[str, str]):
    """Return the exit codes and outputs of two processes. Where one fails or `HANG` is over, those left are killed."""
    with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
        files, processes, deadline = (first, second), [], time.monotonic() + HANG
        try:
            for index, file in enumerate(files):
                whole = [*command, str(index), *arguments]
                processes.append(subprocess.Popen(whole, env=environment, stdout=file, stderr=subprocess.STDOUT))
            while None in (codes := [process.poll() for process in processes]):
                if any(codes) or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
        codes = [process.wait() for process in processes]
        for file in files:
            file.seek(0)
        return codes, (first.read(), second.read())


def find_free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def make_environment(devices: int) -> dict[str, str]:
    """Return the environment of a process with so many simulated devices."""
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "tests")]),
        # gRPC would connect to the other process through a proxy.
        "no_proxy": "127.0.0.1,localhost",
    }
