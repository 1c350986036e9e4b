import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import pytest
from jax._src.clusters import GkeTpuCluster, K8sCluster, SlurmCluster, cloud_tpu_cluster

from dit_video.core.errors import EXIT_TRY_AGAIN, TransientError, UserError
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.processes import (
    ProcessInfo,
    detect_processes,
    initialize_distributed,
    is_in_turn,
    main_process_first,
)
from support.devices import HANG, PROGRAMS, find_free_port, make_environment
from support.marks import mark_nightly_except


def start(index: int, port: str, case: str, *, lost_process: int | None = None, **options: Any) -> subprocess.Popen:
    """Start a process of a run of two; the options are `config`, `code` and times of `TimeoutConfig`."""
    timeouts = {
        "startup": options.pop("startup", 600),
        "max_silence": options.pop("max_silence", 15),
        "max_step": options.pop("max_step", 600),
        "max_idle": options.pop("max_idle", 600),
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


def test_a_block_in_turn_is_known_as_one():
    assert not is_in_turn()
    with main_process_first():
        assert is_in_turn()
        with main_process_first():
            pass
        assert is_in_turn()
    assert not is_in_turn()
    with pytest.raises(OSError, match="disk"), main_process_first():
        raise OSError("disk")
    assert not is_in_turn()


@pytest.mark.slow
def test_two_processes_are_one_run():
    """Process 1 leaves first, and waits for the other."""
    processes = start_both("wait in first process", config={"steps": 5}, code={"commit": "a"})
    for code, out, err in (ended := wait_for_all(processes)):
        assert code == 0, err
        assert get_own_lines(out) == ["joined [0, 1]", "left"]
    assert "2 processes, found by the environment; 2 devices (cpu), 1 here" in ended[0][2]
    assert f"process 1 ({os.uname().nodename}, pid" in ended[0][2]
    assert "found by" not in ended[1][2]


@pytest.mark.slow
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
@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_all_processes_end_with_the_code_of_a_mistake_of_the_user(index):
    """Any other code would make a cluster start the run again, though it would fail again."""
    processes = start_both("fail", lost_process=index)
    ended = wait_for_all(processes)
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "error: the disk is full" in ended[index][2]
    name = f"process {index} ({os.uname().nodename}, pid {processes[index].pid})"
    assert f"error: {name} has ended (UserError: the disk is full)" in ended[1 - index][2]
    assert "Correct that first" in ended[1 - index][2]


@pytest.mark.nightly  # it waits
def test_the_first_steps_of_two_processes_may_be_forty_seconds_apart():
    for code, out, err in wait_for_all(start_both("compile for long")):
        assert code == 0, err
        assert get_own_lines(out) == ["joined [0, 1]", "left"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param("lose connection", marks=pytest.mark.nightly), "lose connection in one"])
def test_processes_that_lose_their_connection_ask_for_another_start(case):
    """Both fail, or one does while the other waits for it."""
    for code, _, err in wait_for_all(start_both(case, lost_process=1)):
        assert code == EXIT_TRY_AGAIN, err
        assert "Gloo" in err


LOSSES = {
    "killed": ("kill", 1),
    "stopped": ("stop", 1),
    "the first is killed": ("kill", 0),
    "the first is stopped": ("stop", 0),
}
SAMPLED_LOSSES = ("killed",)


@pytest.mark.slow
@pytest.mark.parametrize("how", mark_nightly_except(SAMPLED_LOSSES, LOSSES))
def test_the_others_of_a_lost_process_end_in_time(how):
    """JAX ends them, or a collective operation of CPUs fails."""
    case, index = LOSSES[how]
    processes = start_both(case, lost_process=index)
    lost, other = processes[index], processes[1 - index]
    try:
        assert other.stdout is not None
        while other.stdout.readline() != "joined [0, 1]\n":
            assert other.poll() is None
        began = time.monotonic()
        _, err = other.communicate(timeout=HANG)
        took = time.monotonic() - began
        assert other.returncode in (EXIT_TRY_AGAIN, -signal.SIGABRT), err
        if other.returncode == EXIT_TRY_AGAIN and index == 1:
            assert f"error: no answer from process {index} ({os.uname().nodename}, pid {lost.pid})" in err
        assert took < 120  # 15 alone; on a busy machine everything takes longer
    finally:
        lost.kill()
        other.kill()
        lost.wait()


@pytest.mark.slow
@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_process_that_hangs_while_its_heartbeats_go_on_ends_all(index):
    ended = wait_for_all(start_both("hang", lost_process=index, max_step=5))
    for code, _, err in ended:
        assert code == EXIT_TRY_AGAIN, err
        assert "hangs: no step was finished for 5 s" in err
    assert "in hang" in ended[index][2]  # The stacks tell who waits for whom.
    assert "in hang" not in ended[1 - index][2]


@pytest.mark.nightly
def test_processes_that_all_hang_in_a_step_end_with_their_stacks():
    for code, _, err in wait_for_all(start_both("hang in all processes", max_step=5)):
        assert code == EXIT_TRY_AGAIN, err
        assert "hangs: no step was finished for 5 s" in err
        assert "in sleep_in_step" in err


@pytest.mark.slow
def test_processes_that_all_hang_before_the_first_step_end_with_their_stacks():
    """One only waits for the other, as at the end of its share of the work."""
    for code, _, err in wait_for_all(start_both("hang before training", max_idle=5)):
        assert code == EXIT_TRY_AGAIN, err
        assert "hangs: no progress was made for 5 s" in err
        assert "in hang_before_training" in err


@pytest.mark.slow
def test_the_progress_of_one_process_is_that_of_all_that_wait_for_it():
    for code, out, err in wait_for_all(start_both("encode in first process", max_idle=5, max_step=5)):
        assert code == 0, err
        assert get_own_lines(out) == ["joined [0, 1]", "left"]


@pytest.mark.nightly
def test_a_log_that_hangs_in_one_process_ends_all_after_the_time_of_a_step():
    ended = wait_for_all(start_both("log in first process", max_step=5))
    for code, _, err in ended:
        assert code == EXIT_TRY_AGAIN, err
        assert " hangs: " in err
    assert "in log_in_first_process" in ended[0][2]


@pytest.mark.nightly
def test_a_declared_phase_longer_than_a_step_may_take_does_not_end_the_run():
    for code, out, err in wait_for_all(start_both("save in first process", max_step=5)):
        assert code == 0, err
        assert get_own_lines(out) == ["joined [0, 1]", "left"]


@pytest.mark.nightly
def test_an_error_that_another_start_may_not_meet_asks_for_one():
    for index, (code, _, err) in enumerate(wait_for_all(start_both("fail for a while"))):
        assert code == EXIT_TRY_AGAIN, err
        assert ("error: the storage does not answer" in err) == (index == 1)
        assert ("has ended (TransientError: the storage does not answer)" in err) == (index == 0)


@pytest.mark.nightly
def test_processes_that_stop_together_wait_for_the_one_with_most_to_close():
    for code, _, err in wait_for_all(start_both("stop together")):
        assert code == EXIT_TRY_AGAIN, err
        assert "stopped: training" in err
        assert "has ended" not in err
        assert "hangs" not in err


@pytest.mark.slow
def test_a_run_whose_other_process_never_starts_ends_after_the_timeout():
    process = start(0, find_free_port(), "join", startup=5)
    ((code, _, err),) = wait_for_all([process])
    assert code == EXIT_TRY_AGAIN, err
    assert "error: the 2 processes of the run did not find each other within 5 s" in err


@pytest.mark.slow
def test_a_port_in_use_is_no_timeout():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        process = start(0, str(other.getsockname()[1]), "join")
        ((code, _, err),) = wait_for_all([process])
    assert code == EXIT_TRY_AGAIN, err
    assert "could not be connected (OSError: [Errno 98] Address already in use). Start all of them again" in err
    assert "within" not in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), EXIT_TRY_AGAIN, "each other within 9 s"),
        (jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server"), EXIT_TRY_AGAIN, "could not be connected"),
        (OSError("no route to host"), EXIT_TRY_AGAIN, "could not be connected"),
        (ValueError("coordinator_address should be defined."), 2, "cannot be connected"),
        (IndexError(), 2, r"cannot be connected \(IndexError\)"),
    ],
)
def test_errors_of_the_connection_ask_for_another_start_only_if_it_may_succeed(monkeypatch, error, code, message):
    def fail(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    environment = {"COORDINATOR_ADDRESS": "node0:1234", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as raised, initialize_distributed(timeouts=TimeoutConfig(startup=9.0)):
        pass
    assert raised.value.code == code
    assert ("within" in str(raised.value)) == ("DEADLINE" in str(error))


# Cluster detection


PREFIXES = ("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")
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
        if name.startswith(PREFIXES):
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
        ({"COORDINATOR_ADDRESS": "node0:99999"}, "COORDINATOR_ADDRESS=node0:99999 is invalid: .* up to 65535"),
    ],
)
def test_an_incomplete_or_invalid_environment_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        detect_processes({**EXPLICIT, **changes})


def test_one_process_is_named_by_their_number_alone(clean_environment):
    for name, value in SLURM.items():
        clean_environment.setenv(name, value)
    assert detect_processes({"NUM_PROCESSES": "1"}) is None


def answer_after(num_failures):
    """Return a class method that fails so many times, and then says that there are two processes."""
    errors = iter([ConnectionError("timed out")] * num_failures)

    def get_process_count(_cluster):
        for error in errors:
            raise error
        return 2

    return classmethod(get_process_count)


def test_a_cluster_that_does_not_answer_is_not_ignored(clean_environment, capsys):
    for name, value in SLURM.items():
        clean_environment.setenv(name, value)
    clean_environment.setattr(SlurmCluster, "get_process_count", answer_after(1000))
    with pytest.raises(
        TransientError, match=r"SlurmCluster .* ConnectionError: timed out\. .*NUM_PROCESSES=1"
    ) as error:
        detect_processes(seconds=0.5)
    assert error.value.code == EXIT_TRY_AGAIN
    clean_environment.setattr(SlurmCluster, "get_process_count", answer_after(1))
    assert detect_processes(seconds=5.0) == ProcessInfo(source="SlurmCluster", count=2)
    assert "SlurmCluster does not answer and is asked again: ConnectionError: timed out" in capsys.readouterr().err


def fail(_cluster):
    raise ConnectionError("403: the service account may not read jobs")


@pytest.mark.parametrize("method", ["is_env_present", "get_process_count"])
def test_a_pod_that_is_no_part_of_an_indexed_job_may_be_alone(clean_environment, capsys, method):
    """Such as a devcontainer: every pod has the variable, but not every one may ask Kubernetes."""
    clean_environment.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    clean_environment.setattr(K8sCluster, "is_env_present", classmethod(lambda _: True))
    clean_environment.setattr(K8sCluster, method, classmethod(fail))
    assert detect_processes(seconds=0.1) is None
    assert "runs alone" in capsys.readouterr().err
    clean_environment.setenv("JOB_COMPLETION_INDEX", "3")
    with pytest.raises(TransientError, match="K8sCluster"):
        detect_processes(seconds=0.1)


def test_a_pod_of_an_indexed_job_that_cannot_ask_for_the_others_says_so(clean_environment, capsys):
    clean_environment.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    clean_environment.setenv("JOB_COMPLETION_INDEX", "3")
    clean_environment.setattr(K8sCluster, "is_env_present", classmethod(lambda _: False))  # no package kubernetes
    assert detect_processes() is None
    assert "this pod is number 3 of an indexed job of Kubernetes and runs alone" in capsys.readouterr().err


def test_a_single_tpu_host_needs_no_metadata_server(clean_environment):
    """Such as a notebook on a TPU: its host is named, but there is no server to ask for slices."""
    clean_environment.setattr(GkeTpuCluster, "is_env_present", classmethod(lambda _: True))
    clean_environment.setattr(GkeTpuCluster, "_get_num_slices", staticmethod(lambda: fail(None)))
    clean_environment.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert detect_processes(seconds=0.1) is None
    clean_environment.setenv("TPU_WORKER_HOSTNAMES", "host0,host1")
    with pytest.raises(TransientError, match="GkeTpuCluster"):
        detect_processes(seconds=0.1)


@pytest.mark.parametrize(
    ("statuses", "result"),
    [
        ({}, None),  # no part of a TPU
        ({"agent-worker-number": 200, "worker-network-endpoints": 200}, 2),
        ({"agent-worker-number": 503}, "503"),
        ({"agent-worker-number": 200, "worker-network-endpoints": 503}, "503"),
    ],
)
def test_an_error_of_the_metadata_server_is_no_answer(clean_environment, statuses, result):
    """JAX takes an error for the absence of a TPU, and the page of an error for the name of a single host."""

    def get_metadata(key):
        status = statuses.get(key, 404)
        texts = {"agent-worker-number": "0", "worker-network-endpoints": "host0,host1"}
        return texts.get(key, "") if status == 200 else "an error page", status

    clean_environment.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    clean_environment.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)
    if isinstance(result, str):
        with pytest.raises(TransientError, match=f"GceTpuCluster .* HTTP status {result}"):
            detect_processes(seconds=0.1)
    else:
        processes = detect_processes(seconds=0.1)
        assert processes == (result and ProcessInfo(source="GceTpuCluster", count=result))
