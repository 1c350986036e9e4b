"""The processes of a training that `chaos_harness.py` disturbs, and what starts them again.

Each process stands for a machine with a disk of its own, `machine-INDEX`; the run is in a bucket alone. What manages
them is as simple as a cluster: once a process has ended, the others have to end by themselves in `MAX_END_SECONDS`, and
all are started again with the same command.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.devices import find_free_port

ROOT = Path(__file__).resolve().parents[1]
SILENCE = 10.0
"""Seconds without a heartbeat after which a process counts as lost."""
MAX_END_SECONDS = 60.0
"""Seconds that the others get after the first process has ended."""
KILLED = -signal.SIGKILL
POLL_SECONDS = 0.05


class LogEntry(NamedTuple):
    """A training step in the log of the first machine."""

    step: int
    time: float
    """Time of day in seconds."""


class Cluster:
    """The machines of one training."""

    def __init__(self, address: str, folder: Path, *, steps: int, count: int):
        """Name the machines; `start` starts their processes.

        Args:
          address: folder of the run in the bucket.
          folder: folder of the machines' disks.
          steps: number of steps of the training.
          count: number of processes.
        """
        self.address, self.folder, self.steps, self.count = address, folder, steps, count
        self.processes: list[subprocess.Popen] = []
        self.starts = 0
        """Number of times that all processes were started."""
        self.start_time = 0.0
        """Time of day of the last start."""
        self.start_seconds = 30.0
        """Time from a start to the first step, of the last start that was measured."""

    def get_disk(self, index: int) -> Path:
        return self.folder / f"machine-{index}"

    def start(self) -> None:
        """Start as many processes as the training has now."""
        self.starts += 1
        self.start_time = time.time()
        address = f"127.0.0.1:{find_free_port()}"
        command = [sys.executable, str(Path(__file__).with_name("chaos_training.py")), "train", self.address]
        command += ["--steps", str(self.steps), "--silence", str(SILENCE)]
        self.processes = []
        for index in range(self.count):
            disk = self.get_disk(index)
            disk.mkdir(parents=True, exist_ok=True)
            environment = {
                **make_environment(),
                "COORDINATOR_ADDRESS": address,
                "JAX_COORDINATOR_BIND_ADDRESS": address,
                "NUM_PROCESSES": str(self.count),
                "PROCESS_ID": str(index),
                "XDG_CACHE_HOME": str(disk),
            }
            with self._get_output(index).open("w") as output:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
                )

    @property
    def is_whole(self) -> bool:
        """True while all processes run, or are stopped."""
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600.0) -> bool:
        """Wait until a condition is true, and return True; return False if a process ends, or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if not self.is_whole:
                return False
            time.sleep(POLL_SECONDS)
        return False

    def wait_for_end(self, *, frozen: subprocess.Popen | None = None) -> tuple[list[int], int]:
        """Wait until all processes have ended, except one that is frozen, which is killed in the end.

        Returns:
          Their exit codes, and the number of processes that did not end by themselves.
        """
        others = [process for process in self.processes if process is not frozen]
        deadline = time.monotonic() + MAX_END_SECONDS
        while any(process.poll() is None for process in others) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        hung = sum(process.poll() is None for process in others)
        self.kill_all()
        return [process.wait() for process in self.processes], hung

    def kill_all(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                send_signal(process, signal.SIGKILL)
            process.wait()

    def lose_disk(self, index: int) -> None:
        """Remove the files of a machine, whose process has ended, as if another machine replaced it."""
        shutil.rmtree(self.get_disk(index))

    def read_log(self) -> list[LogEntry]:
        """Return the steps that the first machine has logged; none if it has no log."""
        entries = []
        for path in self.get_disk(0).glob("dit_video/runs/*/process-0/denoiser/metrics.jsonl"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    entry = json.loads(line)
                    entries.append(LogEntry(entry["step"], entry["unix_seconds"]))
        return entries

    def get_newest_step(self) -> int:
        return max((entry.step for entry in self.read_log()), default=0)

    def find_first_step(self, *, beyond: int, since: float) -> LogEntry | None:
        """Return the first step after some step that was logged since a time of day."""
        return next((entry for entry in self.read_log() if entry.step > beyond and entry.time > since), None)

    def read_outputs(self) -> list[str]:
        """Return what each process has printed since the last start; nothing if its disk was lost."""
        paths = map(self._get_output, range(self.count))
        return [path.read_text(errors="replace") if path.exists() else "" for path in paths]

    def _get_output(self, index: int) -> Path:
        return self.get_disk(index) / f"output-{self.starts:03}.txt"


def make_environment() -> dict[str, str]:
    """Return environment variables for short starts, which share compiled programs."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }


def send_signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to a process and those that it has started in its session, if it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, number)


def is_stopped(process: subprocess.Popen) -> bool:
    """Return whether a process is suspended."""
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"
