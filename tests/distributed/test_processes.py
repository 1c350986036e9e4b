import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.heartbeat import TimeoutConfig
from dit_video.distributed.processes import ProcessInfo, detect_processes
from support.devices import HANG, _environment, _free_port

EXPLICIT = {"COORDINATOR_ADDRESS": "node0:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "2"}
GIVEN = ProcessInfo(source="the environment", count=4, index=2, address="node0:1234")
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
def alone(monkeypatch):
    """Whatever starts the tests, JAX finds no other processes."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (EXPLICIT, GIVEN),
        ({f"JAX_{name}": value for name, value in EXPLICIT.items()}, GIVEN),
        ({**EXPLICIT, "NUM_PROCESSES": "1", "PROCESS_ID": "0"}, None),
        (SLURM, ProcessInfo(source="SlurmCluster", count=3)),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, ProcessInfo(source="OmpiCluster", count=2)),
        ({**SLURM, **EXPLICIT}, GIVEN),
    ],
)
def test_the_environment_says_who_is_there(alone, environment, place):
    for name, value in environment.items():
        alone.setenv(name, value)
    assert detect_processes() == place


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
def test_an_environment_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        detect_processes({**EXPLICIT, **changes})


def test_too_little_patience():
    with pytest.raises(UserError, match=r"=0\.5 is invalid: .* Use 1 second"):
        TimeoutConfig(max_silence=0.5)


CODE = """
import os, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from dit_video.distributed.heartbeat import Patience, count_step
from dit_video.distributed.processes import joined
from dit_video.core.errors import UserError, script

index = int(os.environ["PROCESS_ID"])
everyone = lambda value: multihost_utils.process_allgather(np.asarray(value)).tolist()

@script
def main():
    with joined({CONFIG}, code={CODE}, patience=Patience(start={START}, silent={SILENT}, behind={BEHIND})):
        print("joined", everyone(index), flush=True)
{BODY}
        print("left", flush=True)

main()
"""


def start(index: int, port: str, body: str, **options: Any) -> subprocess.Popen:
    values = {"CONFIG": "None", "CODE": "None", "START": 600, "SILENT": 15, "BEHIND": 600, **options}
    code = CODE
    for name, value in values.items():
        code = code.replace(f"{{{name}}}", str(value))
    code = code.replace("{BODY}", textwrap.indent(textwrap.dedent(body), " " * 8))
    place = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index)}
    bind = {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**_environment(1), **place, **bind},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def both(body: str, **options: Any) -> list[subprocess.Popen]:
    port = _free_port()
    return [start(index, port, body, **options) for index in range(2)]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    try:
        outputs = [process.communicate(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def said(out: str) -> list[str]:
    """What a process printed itself."""
    return [line for line in out.splitlines() if "Gloo" not in line]


def test_two_processes_are_one_run():
    """Process 1 goes first, and waits for the other."""
    body = "time.sleep(3 * (1 - index))"
    for code, out, err in (ended := ends(both(body, CONFIG="{'steps': 5}", CODE="{'commit': 'a'}"))):
        assert code == 0, err
        assert said(out) == ["joined [0, 1]", "left"]
    assert "2 processes, found by the environment; the first on" in ended[0][2]
    assert "2 devices (cpu), 1 here" in ended[0][2]
    assert "found by" not in ended[1][2]


def test_another_config_is_found_at_the_start():
    differing = both("", CONFIG="{'denoiser': {'steps': 5 + index}, 'seed': 0}")
    for code, out, err in ends(differing):
        assert code == 2, err
        assert said(out) == []
        start = f"error: process 1 ({os.uname().nodename}, pid {differing[1].pid}) was started with another config than"
        assert f"{start} process 0 ({os.uname().nodename}, pid {differing[0].pid})" in err
        assert "config.denoiser.steps is 6 there and 5 here" in err


HANGS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", 1, "has sent no heartbeat for 15 s"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", 1, "has sent no heartbeat for 15 s"),
    "slow": ("time.sleep(600)", 1, "has been behind the others for 20 s"),
    "failed": ("raise UserError('the disk is full')", 1, "has ended (UserError: the disk is full)"),
    "the first is killed": ("os.kill(os.getpid(), signal.SIGKILL)", 0, "which keeps the run together, is gone"),
    "the first is stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", 0, "has not answered for 15 s"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_a_lost_process_is_named_in_time(how):
    what, who, message = HANGS[how]
    body = f"""
    everyone(0)
    if index == {who}:
        {what}
    count_step()
    count_step()
    everyone(1)
    """
    processes = both(body, BEHIND=20)
    lost, other = processes[who], processes[1 - who]
    try:
        assert other.stdout is not None
        while other.stdout.readline() != "joined [0, 1]\n":
            assert other.poll() is None
        began = time.monotonic()
        _, err = other.communicate(timeout=HANG)
        took = time.monotonic() - began
        assert other.returncode in (
            (EXIT_TRY_AGAIN,) if who == 1 or "stopped" in how else (EXIT_TRY_AGAIN, -signal.SIGABRT)
        ), err
        assert f"error: process {who} ({os.uname().nodename}, pid {lost.pid})" in err
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
def test_one_that_never_comes():
    process = start(0, _free_port(), "", START=5)
    ((code, _, err),) = ends([process])
    assert code == EXIT_TRY_AGAIN, err
    assert "error: the 2 processes of the run did not find each other within 5 s" in err
