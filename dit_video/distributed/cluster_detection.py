"""Detection of the processes of a run from the environment.

A cluster that is present and does not answer is not ignored: each of its processes would train alone, all into one
folder. It is asked again for a while, then the process ends, to be started again. Three of JAX's clusters also look
present where there is a single process, and may then be silent:

    K8sCluster       in every pod. Processes of a run are pods of an indexed job, which Kubernetes numbers
                     (JOB_COMPLETION_INDEX); another pod that gets no answer, such as one without a service account or
                     the permission to read jobs, is a single process.
    GkeTpuCluster    wherever TPU_WORKER_HOSTNAMES is set. A single name without MEGASCALE_NUM_SLICES is a single
                     process, and no metadata server is asked for slices.
    GceTpuCluster    on hosts with TPUs, once the metadata server has confirmed it. Without TPUs it is not present.
"""

import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from dit_video.core.errors import TransientError, UserError

PROCESS_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
"""Variables that say which process of a run this is; also with JAX_ before them."""
_MAX_PAUSE = 10.0
"""Longest pause between two questions to a cluster, in seconds."""


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """The position of this process among those of its run."""

    source: str
    """Source of this information."""
    count: int
    """Number of processes."""
    index: int | None = None
    """Number of this process; None if JAX detects it, with the address."""
    address: str | None = None
    """Address host:port of the first process."""


def detect_processes(environment: Mapping[str, str] | None = None, *, seconds: float = 60.0) -> ProcessInfo | None:
    """Return the process information from the environment; None for a single process.

    Args:
      environment: Environment variables; None for those of this process.
      seconds: Time for which a cluster that does not answer is asked again.

    Raises:
      TransientError: If a cluster is present and does not answer.
      UserError: If only some of the explicit variables are set, or their values are invalid.
    """
    environment = os.environ if environment is None else environment
    variables = {name: environment.get(name) or environment.get(f"JAX_{name}") for name in PROCESS_VARIABLES}
    if variables["NUM_PROCESSES"] == "1":
        return None
    if not any(variables.values()) or (variables["COORDINATOR_ADDRESS"] and not any(list(variables.values())[1:])):
        return _detect_with_jax(seconds)  # JAX also supports an address without the other variables.
    if missing := [name for name, value in variables.items() if not value]:
        missing_names, names = ", ".join(missing), ", ".join(PROCESS_VARIABLES)
        raise UserError(f"{missing_names} not set, though other variables of several processes are. Set {names}.")
    address, count, index = (str(value) for value in variables.values())
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        rule = "both must be whole numbers. Use PROCESS_ID from 0 to NUM_PROCESSES - 1."
        raise UserError(f"PROCESS_ID={index}, NUM_PROCESSES={count} is invalid: {rule}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:  # JAX aborts the process for such ports.
        rule = "it must be host:port of process 0, with a port up to 65535. Use an address such as node0:1234."
        raise UserError(f"COORDINATOR_ADDRESS={address} is invalid: {rule}")
    return ProcessInfo(source="the environment", count=int(count), index=int(index), address=address)


def _detect_with_jax(seconds: float) -> ProcessInfo | None:
    from jax._src import clusters  # Private; `jax.distributed.initialize` without arguments uses it.

    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method:
            continue
        count = _ask_for_count(cluster, seconds)
        if count is not None:
            return ProcessInfo(source=cluster.__name__, count=count) if count > 1 else None
    if _is_in_indexed_job():
        print(
            f"this pod is number {os.environ['JOB_COMPLETION_INDEX']} of an indexed job of Kubernetes and runs alone, "
            "since JAX needs the package kubernetes to find the other pods. To run them together, install it or set "
            f"{', '.join(PROCESS_VARIABLES)}; NUM_PROCESSES=1 silences this message.",
            file=sys.stderr,
        )
    return None


def _ask_for_count(cluster: Any, seconds: float) -> int | None:
    """Return the number of processes in a cluster; None if this process is not in one.

    Raises:
      TransientError: If the cluster is present and does not answer.
    """
    name, deadline, pause = cluster.__name__, time.monotonic() + seconds, 1.0
    while True:
        try:
            with warnings.catch_warnings(action="ignore"):  # A missing Kubernetes package warns.
                is_present = cluster.is_env_present()
            if name == "GceTpuCluster":
                _check_metadata_server(is_present=is_present)
            if not is_present:
                return None
            return 1 if name == "GkeTpuCluster" and _has_single_tpu_host() else cluster.get_process_count()
        except Exception as error:  # Many types: of HTTP clients, of Kubernetes, of malformed variables.
            line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            if name == "K8sCluster" and not _is_in_indexed_job():
                print(
                    f"Kubernetes could not be asked for other processes, so this one runs alone: {line}",
                    file=sys.stderr,
                )
                return None
            if time.monotonic() + pause > deadline:
                raise TransientError(
                    f"this process is in a cluster ({name} of JAX) that does not say how many processes there are: "
                    f"{line}. Start it again, set {', '.join(PROCESS_VARIABLES)}, or set NUM_PROCESSES=1 to run alone."
                ) from error
            print(f"{name} does not answer and is asked again: {line}", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, _MAX_PAUSE)


def _check_metadata_server(*, is_present: bool) -> None:
    """Raise if the server of a TPU host answers with an error, which JAX takes for "no cluster" or a host's name."""
    from jax._src.clusters import cloud_tpu_cluster as tpu  # Private, like the clusters.

    if not tpu.running_in_cloud_tpu_vm or "TPU_SKIP_MDS_QUERY" in os.environ:
        return
    key = "worker-network-endpoints" if is_present else "agent-worker-number"
    status = tpu.get_metadata(key)[1]
    if status != HTTPStatus.OK and (is_present or status != HTTPStatus.NOT_FOUND):
        raise ConnectionError(f"the metadata server answers the question for {key} with HTTP status {status}")


def _is_in_indexed_job() -> bool:
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()


def _has_single_tpu_host() -> bool:
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", ""))
    return "," not in hosts and "MEGASCALE_NUM_SLICES" not in os.environ
