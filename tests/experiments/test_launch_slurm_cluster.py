"""slurm.sh on a SLURM cluster of two nodes on this machine, which the tests start."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dit_video.training.hooks.logging import read_metrics
from support.devices import HANG, find_free_port, make_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "launch" / "slurm.sh"


class Cluster:
    """A SLURM cluster of two nodes on this machine; a folder holds its state and the logs of its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # JAX connects to the first node by its name, which must therefore resolve, and SLURM refuses "localhost".
        self.nodes = ("127.0.0.1", "127.0.0.2")
        self.config = folder / "slurm.conf"
        self.environment = {**make_environment(1), "SLURM_CONF": str(self.config)}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons, and wait until the nodes are idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        ports = f"{find_free_port()},{find_free_port()}"
        self.config.write_text(
            f"""ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={find_free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A requeued job waits for this time, 120 seconds by default.
AuthInfo=cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdTimeout=10
KillWait=5
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={",".join(self.nodes)} NodeAddr=127.0.0.1 NodeHostname={socket.gethostname()} Port={ports} CPUs=8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""
        )
        self._start_daemon("slurmctld", "-D", "-i", "-f", self.config)
        for node in self.nodes:
            self.start_node(node)
        self.wait_until(self._is_idle, "idle nodes")

    def _is_idle(self) -> bool:
        assert all(daemon.poll() is None for daemon in self._daemons), self._read_log()
        states = subprocess.run(["sinfo", "-h", "-o", "%t", "-p", "low"], env=self.environment, capture_output=True)
        return states.stdout.strip() == b"idle"

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start_daemon("slurmd", "-D", "-N", node, "-f", self.config)

    def stop_node(self, node: str) -> None:
        """End a node's daemon and all that it started there, as if its power was cut."""
        pid = int((self.folder / f"slurmd.{node}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.config}".encode()} <= set(environment):
                os.kill(int(process.name), signal.SIGKILL)

    def stop(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(["scancel", "-p", "low"], env=self.environment, check=False)
        time.sleep(1)
        for daemon in self._daemons:
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(30)

    def __call__(self, *command: object) -> str:
        """Return what a program of SLURM prints."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or command[0] == "sinfo", f"{command}: {done.stderr}{self._read_log()}"
        return done.stdout

    def submit(self, *arguments: object, options: tuple[str, ...] = (), **environment: str) -> "Job":
        """Submit slurm.sh with two nodes of two tasks."""
        log = self.folder / f"job-{time.monotonic_ns()}.log"
        size = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=2", "--time=10")
        command = ["sbatch", "--parsable", f"--output={log}", *size, *options, str(SCRIPT), *map(str, arguments)]
        number = subprocess.check_output(command, env=self.environment | environment, text=True, cwd=ROOT).strip()
        return Job(self, number, log)

    def wait_until(self, condition: Callable[[], bool], name: str, job: "Job | None" = None) -> None:
        deadline = time.monotonic() + HANG
        while not condition():
            log = job.log.read_text() if job is not None and job.log.exists() else self._read_log()
            assert time.monotonic() < deadline, f"no {name}:\n{log}"
            time.sleep(0.2)

    def _start_daemon(self, *command: object) -> None:
        # Its file descriptors are in the way of programs that wait for the end of the output.
        with (self.folder / "daemons.log").open("a") as log:
            line = [shutil.which(str(command[0])) or f"/usr/sbin/{command[0]}", *map(str, command[1:])]
            self._daemons.append(subprocess.Popen(line, stdout=log, stderr=log, env=self.environment))

    def _read_log(self) -> str:
        return (self.folder / "daemons.log").read_text()[-3000:]


class Job:
    """A job of a cluster."""

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster, self.number, self.log = cluster, number, log

    def field(self, name: str) -> str:
        """Return a field of the job, such as JobState."""
        return re.findall(rf"\b{name}=(\S+)", self.cluster("scontrol", "show", "job", self.number))[0]

    def wait_for_end(self) -> str:
        """Wait until the job does not run or wait any more; return its state."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.cluster.wait_until(lambda: self.field("JobState") in final, "end of the job", self)
        return self.field("JobState")

    def wait_for_line(self, text: str, count: int = 1) -> None:
        """Wait until a text is in the log as often."""
        self.cluster.wait_until(lambda: self.read().count(text) >= count, f"line {text!r}", self)

    def read(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if not (shutil.which("slurmctld") or Path("/usr/sbin/slurmctld").exists()):
        pytest.skip("needs SLURM (on Debian: slurmctld, slurmd and slurm-client)")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


TRAINING = """#!/usr/bin/env python3
import os, signal, sys, time
rank, start = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
def stop(*_):
    print(f"rank {rank} saves", flush=True)
    time.sleep(1)
    print(f"rank {rank} saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print(f"rank {rank} starts, restart {start}", flush=True)
if start >= int(os.environ["FINISHES"]):
    sys.exit(0)
end = os.environ["END"]
if end != "none" and rank == 1:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL) if end == "killed" else sys.exit(int(end))
time.sleep(3 if end != "none" else 600)
print(f"rank {rank} names the lost process", flush=True)
sys.exit(75 if end == "killed" else int(end))
"""
"""A stand-in for a training: rank 1 ends as told, or all wait; after FINISHES restarts, it finishes."""


@pytest.fixture
def submit(cluster, tmp_path) -> Callable[..., Job]:
    """Return a function that submits slurm.sh with a stand-in for the training."""
    program = tmp_path / "python"
    program.write_text(TRAINING.replace("/usr/bin/env python3", sys.executable))
    program.chmod(0o755)

    def submit(end: str, *options: str, finishes: int = 1, **environment: str) -> Job:
        path = f"{tmp_path}:{os.environ['PATH']}"
        return cluster.submit("config.py", options=options, PATH=path, END=end, FINISHES=str(finishes), **environment)

    return submit


def test_slurm_requeues_after_a_killed_task_whose_peers_still_report_it(submit):
    job = submit("killed")
    assert job.wait_for_end() == "COMPLETED"
    assert job.field("Restarts") == "1"
    log = job.read()
    assert "exit code 137 after 0 restarts" in log
    assert log.count("names the lost process") == 3


def test_a_job_near_its_time_limit_saves_and_is_requeued(submit):
    job = submit("none", "--time=2", "--signal=TERM@60")
    assert job.wait_for_end() == "COMPLETED"
    assert job.field("Restarts") == "1"
    assert job.read().count("saved") == 4


def test_a_preempted_job_saves_and_starts_again(cluster, submit):
    job = submit("none")
    job.wait_for_line("starts", 4)
    cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    assert job.wait_for_end() == "COMPLETED"
    assert job.field("Restarts") == "1"
    assert job.read().count("saved") == 4


def test_a_job_that_the_user_cancels_saves_and_stays_cancelled(submit):
    job = submit("none")
    job.wait_for_line("starts", 4)
    job.cluster("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    job.wait_for_line("saved", 4)
    assert job.field("Restarts") == "0"
    assert "requeued" not in job.read()


def test_a_job_may_be_stopped_with_all_its_time_for_the_save(submit):
    """`scancel` gives KillWait seconds to save; a signal to the step gives DIT_VIDEO_PREEMPTION_GRACE."""
    job = submit("none")
    job.wait_for_line("starts", 4)
    job.cluster("scontrol", "update", f"JobId={job.number}", "Requeue=0")
    job.cluster("scancel", "--signal=TERM", job.number)
    assert job.wait_for_end() == "FAILED"
    assert (job.field("Restarts"), job.field("ExitCode")) == ("0", "75:0")
    assert job.read().count("saved") == 4


def test_a_job_starts_again_after_a_node_is_lost(cluster, submit):
    job = submit("none")
    job.wait_for_line("starts", 4)
    lost = next(node for node in cluster.nodes if node != job.field("BatchHost"))
    cluster.stop_node(lost)
    job.cluster.wait_until(lambda: job.field("Restarts") == "1", "restart", job)
    cluster.start_node(lost)
    assert job.wait_for_end() == "COMPLETED"


def test_a_training_on_slurm_continues_after_a_killed_process(cluster, tiny_clips, tmp_path):
    """The script itself, with the processes that JAX detects from SLURM."""
    run = tmp_path / "run"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    arguments = ["tests/support/tiny.py", "--data", tiny_clips, "--workdir", run, "--denoiser.steps", "200"]
    job = cluster.submit(
        *arguments, "--save-every", "10", options=("--ntasks-per-node=1",), PATH=path, PYTHONPATH=f"{ROOT}:{ROOT}/tests"
    )
    metrics = run / "denoiser" / "metrics.jsonl"
    cluster.wait_until(lambda: (run / "denoiser" / "checkpoints").is_dir() and metrics.exists(), "steps", job)
    cluster.wait_until(lambda: any(entry["step"] > 20 for entry in read_metrics(metrics)), "steps", job)
    # The second process, so that the first one names it.
    (victim,) = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if is_process_of(process, str(run), "SLURM_PROCID=1")
    ]
    os.kill(victim, signal.SIGKILL)
    assert job.wait_for_end() == "COMPLETED", job.read()
    assert job.field("Restarts") == "1"
    log = job.read()
    assert "2 processes, found by SlurmCluster" in log
    assert "no answer from process 1 (" in log, log
    steps = [entry["step"] for entry in read_metrics(metrics)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 200
    assert (run / "report.html").is_file()


def is_process_of(process: Path, argument: str, variable: str) -> bool:
    """Return True if a process of /proc is a training with an argument and an environment variable."""
    try:
        command = (process / "cmdline").read_bytes().decode().split("\0")
        environment = (process / "environ").read_bytes().decode().split("\0")
    except (OSError, UnicodeDecodeError):
        return False
    return argument in command and variable in environment and any(word.endswith("train.py") for word in command[:4])
