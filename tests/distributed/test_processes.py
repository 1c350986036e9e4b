import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.heartbeat import TimeoutConfig
from dit_video.distributed.processes import ProcessInfo, detect_processes
from support.devices import HANG, PROGRAMS, find_free_port, make_environment

EXPLICIT = {"COORDINATOR_ADDRESS": "node0:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "2"}
EXPLICIT_INFO = ProcessInfo(source="the environment", count=4, index=2, address="node0:1234")
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[03-05]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def clean_environment(monkeypatch):
    """Remove all variables by which JAX could detect other processes."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, None),
        (EXPLICIT, EXPLICIT_INFO),
        ({f"JAX_{name}": value for name, value in EXPLICIT.items()}, EXPLICIT_INFO),
        ({**EXPLICIT, "NUM_PROCESSES": "1", "PROCESS_ID": "0"}, None),
        (SLURM, ProcessInfo(source="SlurmCluster", count=3)),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, ProcessInfo(source="OmpiCluster", count=2)),
        ({**SLURM, **EXPLICIT}, EXPLICIT_INFO),
    ],
)
def test_processes_are_detected_from_the_environment(clean_environment, environment, processes):
    for name, value in environment.items():
        clean_environment.setenv(name, value)
    assert detect_processes() == processes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PROCESS_ID": ""}, "PROCESS_ID not set, though other variables"),
        ({"COORDINATOR_ADDRESS": ""}, "COORDINATOR_ADDRESS not set"),
        ({"PROCESS_ID": "4"}, "PROCESS_ID=4, NUM_PROCESSES=4 is invalid: .* Use PROCESS_ID from 0"),
        ({"NUM_PROCESSES": "two"}, "PROCESS_ID=2, NUM_PROCESSES=two is invalid"),
        ({"COORDINATOR_ADDRESS": "node0"}, "COORDINATOR_ADDRESS=node0 is invalid: it must be host:port"),
    ],
)
def test_an_incomplete_or_invalid_environment_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        detect_processes({**EXPLICIT, **changes})


def test_a_timeout_below_a_second_is_refused():
    with pytest.raises(UserError, match=r"max_silence=0\.5 is invalid: .* Use max_silence=1"):
        TimeoutConfig(max_silence=0.5)


def start(index: int, port: str, case: str, *, lost_process: int | None = None, **options: Any) -> subprocess.Popen:
    """Start a process of a run of two; the options are `config`, `code` and times of `TimeoutConfig`."""
    timeouts = {
        "startup": options.pop("startup", 600),
        "max_silence": options.pop("max_silence", 15),
        "max_lag": options.pop("max_lag", 600),
    }
    arguments = json.dumps({**options, "timeouts": timeouts, "lost_process": lost_process})
    place = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index)}
    bind = {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    return subprocess.Popen(
        [sys.executable, str(PROGRAMS / "run_process.py"), case, arguments],
        env={**make_environment(1), **place, **bind},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_both(case: str, **options: Any) -> list[subprocess.Popen]:
    port = find_free_port()
    return [start(index, port, case, **options) for index in range(2)]


def wait_for_all(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Return the exit code and the outputs of each process."""
    try:
        outputs = [process.communicate(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def get_own_lines(out: str) -> list[str]:
    """Return the lines that a process printed itself."""
    return [line for line in out.splitlines() if "Gloo" not in line]


def test_two_processes_are_one_run():
    """Process 1 leaves first, and waits for the other."""
    processes = start_both("wait in first process", config={"steps": 5}, code={"commit": "a"})
    for code, out, err in (ended := wait_for_all(processes)):
        assert code == 0, err
        assert get_own_lines(out) == ["joined [0, 1]", "left"]
    assert "2 processes, found by the environment; the first on" in ended[0][2]
    assert "2 devices (cpu), 1 here" in ended[0][2]
    assert "found by" not in ended[1][2]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_process_with_another_config_is_refused_at_the_start():
    port = find_free_port()
    configs = [{"denoiser": {"steps": steps}, "seed": 0} for steps in (5, 6)]
    differing = [start(index, port, "join", config=config) for index, config in enumerate(configs)]
    for code, out, err in wait_for_all(differing):
        assert code == 2, err
        assert get_own_lines(out) == []
        message = (
            f"error: process 1 ({os.uname().nodename}, pid {differing[1].pid}) was started with another config than"
        )
        assert f"{message} process 0 ({os.uname().nodename}, pid {differing[0].pid})" in err
        assert "config.denoiser.steps is 6 there and 5 here" in err


@pytest.mark.slow
def test_a_process_that_writes_for_longer_than_the_patience_does_not_end_the_run():
    for code, out, err in wait_for_all(start_both("write in first process", max_lag=5)):
        assert code == 0, err
        assert get_own_lines(out) == ["joined [0, 1]", "left"]


HANGS = {
    "killed": ("kill", 1, "has sent no heartbeat for 15 s"),
    "stopped": ("stop", 1, "has sent no heartbeat for 15 s"),
    "slow": ("sleep", 1, "has been behind the others for 20 s"),
    "failed": ("fail", 1, "has ended (UserError: the disk is full)"),
    "the first is killed": ("kill", 0, "which keeps the run together, is gone"),
    "the first is stopped": ("stop", 0, "has not answered for 15 s"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_a_lost_process_is_named_in_time(how):
    case, index, message = HANGS[how]
    processes = start_both(case, lost_process=index, max_lag=20)
    lost, other = processes[index], processes[1 - index]
    try:
        assert other.stdout is not None
        while other.stdout.readline() != "joined [0, 1]\n":
            assert other.poll() is None
        began = time.monotonic()
        _, err = other.communicate(timeout=HANG)
        took = time.monotonic() - began
        assert other.returncode in (
            (EXIT_TRY_AGAIN,) if index == 1 or "stopped" in how else (EXIT_TRY_AGAIN, -signal.SIGABRT)
        ), err
        assert f"error: process {index} ({os.uname().nodename}, pid {lost.pid})" in err
        assert message in err
        assert took < 120  # 15 alone; on a busy machine everything takes longer
        if how == "failed":
            _, err = lost.communicate(timeout=HANG)
            assert lost.returncode == 2
            assert "error: the disk is full" in err
    finally:
        lost.kill()
        other.kill()
        lost.wait()


@pytest.mark.slow
def test_a_run_whose_other_process_never_starts_ends_after_the_timeout():
    process = start(0, find_free_port(), "join", startup=5)
    ((code, _, err),) = wait_for_all([process])
    assert code == EXIT_TRY_AGAIN, err
    assert "error: the 2 processes of the run did not find each other within 5 s" in err
