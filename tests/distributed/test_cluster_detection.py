import os

import pytest
from jax._src.clusters import GkeTpuCluster, K8sCluster, SlurmCluster, cloud_tpu_cluster

from dit_video.core.errors import EXIT_TRY_AGAIN, TransientError, UserError
from dit_video.distributed.processes import ProcessInfo, detect_processes

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
