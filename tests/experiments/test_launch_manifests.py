"""Manifests for Kubernetes, Ray and SkyPilot fit their hardware, our exit codes, JAX's detection and their schemas.

The schemas are checked where they are: `CRDS=FOLDER` names a folder with the custom resource definitions
`jobset.x-k8s.io_jobsets.yaml` (of kubernetes-sigs/jobset) and `ray.io_rayjobs.yaml` (of ray-project/kuberay).
"""

import itertools
import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.processes import detect_processes
from dit_video.training.preemption import get_machine_grace

LAUNCH = Path(__file__).resolve().parents[2] / "experiments" / "launch"
JOBSETS = ("jobset_tpu.yaml", "jobset_tpu_slices.yaml", "jobset_gpu.yaml")
SCHEMAS = {"JobSet": "jobset.x-k8s.io_jobsets.yaml", "RayJob": "ray.io_rayjobs.yaml"}


def read(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def job_of(document: Any) -> Any:
    (replicated,) = document["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(document: Any) -> Any:
    (container,) = job_of(document)["template"]["spec"]["containers"]
    return container


def options_of(document: Any) -> dict[str, str]:
    """Return the options of the training."""
    pairs = (argument.removeprefix("--").partition("=") for argument in container_of(document)["args"][1:])
    return {name: value for name, _, value in pairs}


def pod_environments(document: Any) -> list[dict[str, str]]:
    """Return the environments of all pods, in the order of jobs and pods, as Kubernetes and JobSet make them."""
    name, spec = document["metadata"]["name"], document["spec"]
    (replicated,) = spec["replicatedJobs"]
    environments = []
    for job, pod in itertools.product(range(replicated["replicas"]), range(job_of(document)["completions"])):
        annotations = {"batch.kubernetes.io/job-completion-index": str(pod)}
        if coordinator := spec.get("coordinator"):
            host = f"{name}-{coordinator['replicatedJob']}-{coordinator['jobIndex']}-{coordinator['podIndex']}.{name}"
            annotations["jobset.sigs.k8s.io/coordinator"] = host
        environment: dict[str, str] = {}
        for variable in container_of(document)["env"]:
            if "value" in variable:
                value = variable["value"]
                for previous in re.findall(r"\$\((\w+)\)", value):  # which Kubernetes inserts
                    value = value.replace(f"$({previous})", environment[previous])
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                value = annotations[re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)[1]]
            environment[variable["name"]] = value
        if "google.com/tpu" in container_of(document)["resources"]["limits"]:
            environment |= make_tpu_environment(document, job, pod)
        environments.append(environment)
    return environments


def make_tpu_environment(document: Any, job: int, pod: int) -> dict[str, str]:
    """Return what GKE adds to a pod with TPUs."""
    name, (replicated,) = document["metadata"]["name"], document["spec"]["replicatedJobs"]
    hosts = [f"{name}-{replicated['name']}-{job}-{k}.{name}" for k in range(job_of(document)["completions"])]
    environment = {"TPU_WORKER_ID": str(pod), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
    if replicated["replicas"] > 1:
        environment["MEGASCALE_COORDINATOR_ADDRESS"] = f"{name}-{replicated['name']}-0-0.{name}"
        environment["MEGASCALE_NUM_SLICES"] = str(replicated["replicas"])
        environment["MEGASCALE_SLICE_ID"] = str(job)
    return environment


@pytest.mark.parametrize("name", JOBSETS)
def test_the_mesh_has_the_devices_of_the_hosts(name):
    document = read(name)
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, (replicated,) = job_of(document), document["spec"]["replicatedJobs"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    ((resource, of_a_host),) = container_of(document)["resources"]["limits"].items()
    options = options_of(document)
    sizes = {key: int(value) for key, value in options.items() if key.startswith("parallel.")}
    assert math.prod(sizes.values()) == replicated["replicas"] * job["completions"] * of_a_host
    if resource == "google.com/tpu":
        topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert job["completions"] * of_a_host == math.prod(map(int, topology.split("x")))
    # Slices are the outermost part of the mesh, along `data`.
    assert sizes.get("parallel.data", 1) % replicated["replicas"] == 0


@pytest.mark.parametrize("name", JOBSETS)
def test_only_a_user_error_is_final(name):
    document = read(name)
    policy, job = document["spec"]["failurePolicy"], job_of(document)
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    codes = {"containerName": container_of(document)["name"], "operator": "In", "values": [UserError.code]}
    assert rule["onExitCodes"] == codes
    assert options_of(document)["stopped-code"] == str(EXIT_TRY_AGAIN)


@pytest.mark.parametrize("name", JOBSETS)
def test_a_run_ends_by_itself_before_it_is_killed(name):
    document = read(name)
    grace = job_of(document)["template"]["spec"]["terminationGracePeriodSeconds"]
    for environment in pod_environments(document):
        assert 1 <= get_machine_grace(environment) < grace


@pytest.mark.parametrize("name", JOBSETS)
def test_a_run_outlives_the_pods(name):
    document = read(name)
    pod = job_of(document)["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(document)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert "persistentVolumeClaim" in volumes[mounts["/runs"]]
    assert options_of(document)["workdir"].startswith("/runs/")


def test_the_processes_of_gpu_nodes_find_each_other():
    document = read("jobset_gpu.yaml")
    processes = [detect_processes(environment) for environment in pod_environments(document)]
    assert [process.index for process in processes] == list(range(len(processes)))
    assert {process.count for process in processes} == {job_of(document)["completions"]}
    port = container_of(document)["ports"][0]["containerPort"]
    assert {process.address for process in processes} == {f"dit-video-node-0-0.dit-video:{port}"}
    assert document["spec"]["network"]["enableDNSHostnames"]


@pytest.mark.parametrize("name", ["jobset_tpu.yaml", "jobset_tpu_slices.yaml"])
def test_jax_detects_the_processes_of_tpus(name, monkeypatch):
    """JAX's cluster is private, and tells that a new version reads other variables."""
    from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

    monkeypatch.setattr(GkeTpuCluster, "wait_for_coordinator", lambda *_: None)  # asks for the name's address
    environments = pod_environments(read(name))
    processes = []
    for environment in environments:
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            if "MEGASCALE_NUM_SLICES" not in environment:  # JAX would ask the metadata server
                patch.setenv("MEGASCALE_NUM_SLICES", "")
                patch.setenv("MEGASCALE_SLICE_ID", "")
                patch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "")
            address = GkeTpuCluster.get_coordinator_address(60, None)
            processes.append((GkeTpuCluster.get_process_id(), GkeTpuCluster.get_process_count(), address))
    ports = [port["containerPort"] for port in container_of(read(name))["ports"]]
    address = processes[0][2]
    assert processes == [(index, len(environments), address) for index in range(len(environments))]
    assert address.startswith("dit-video-slice-0-0.dit-video:")
    assert int(address.rpartition(":")[2]) in ports


def test_a_skypilot_job_is_recovered_as_other_files_restart():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert {EXIT_TRY_AGAIN, 134, 137} <= set(recovery["recover_on_exit_codes"])
    assert UserError.code not in recovery["recover_on_exit_codes"]
    assert recovery["max_restarts_on_errors"] == 0  # counts exit codes that are not in the list
    (volume,) = task["volumes"]
    assert f"--workdir {volume}/" in task["run"]
    assert get_machine_grace(task["envs"]) < 30
    gpus = task["num_nodes"] * int(task["resources"]["accelerators"].rpartition(":")[2])
    assert f"--parallel.fsdp {gpus} " in task["run"]


def test_the_manifest_of_ray_has_the_nodes_that_the_job_asks_for():
    document = yaml.safe_load((LAUNCH / "ray_job.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    spec = document["spec"]
    line = shlex.split(spec["entrypoint"])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    nodes, gpus = int(line[line.index("--nodes") + 1]), int(line[line.index("--gpus") + 1])
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert int(line[line.index("--parallel.fsdp") + 1]) == nodes * gpus
    (claim, *_) = group["template"]["spec"]["volumes"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert line[line.index("--workdir") + 1].startswith(mounts[claim["name"]])


# Schemas of custom resource definitions.


def make_strict(schema: Any) -> Any:
    """Return a JSON schema of a definition's schema that refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [make_strict(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    strict = {key: make_strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), Mapping) and "type" in schema and not is_open:
        strict.setdefault("additionalProperties", False)
    return strict


def schema_of(kind: str) -> dict[str, Any]:
    """Return the schema of a kind from the folder CRDS."""
    if not (folder := os.environ.get("CRDS")):
        pytest.skip("needs custom resource definitions (CRDS=FOLDER)")
    definition = yaml.safe_load((Path(folder) / SCHEMAS[kind]).read_text())
    versions = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]}
    schema = make_strict(versions["v1alpha2" if kind == "JobSet" else "v1"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def list_errors(document: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema_of(document["kind"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("name", [*JOBSETS, "ray_job.yaml"])
def test_manifests_fit_the_schemas_of_their_definitions(name):
    assert list_errors(read(name)) == []
