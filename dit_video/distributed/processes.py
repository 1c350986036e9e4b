"""Several processes as one run: detection, connection, and checks that they run the same.

A script runs its work inside `initialize_distributed()`. It detects from the environment if the process is one of
several, connects them (`jax.distributed`), and stops them if they were started with different configs or code. JAX's
heartbeats end all of them if one is lost; `hang_watch` ends all if one hangs, or has ended with an error. A single
process is only watched for trainings that hang.

Detection (`cluster_detection`), in this order:

    explicit     COORDINATOR_ADDRESS (host:port of process 0), NUM_PROCESSES, PROCESS_ID; also with JAX_ before them;
                 NUM_PROCESSES=1 alone for a single process
    otherwise    what JAX detects: SLURM steps, Open MPI, Cloud TPU VMs, TPUs on GKE (JobSet), Kubernetes jobs
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.core import config_json
from dit_video.core.errors import EXIT_TRY_AGAIN, AgreedStop, GracefulStop, TransientError, UserError
from dit_video.distributed.faults.hang_watch import HangWatch
from dit_video.distributed.faults.stacks import exit_now
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.faults.timeouts import TimeoutConfig

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


_EXTRA_SECONDS = 60
"""Seconds by which JAX's timeout is longer than ours."""


@contextlib.contextmanager
def initialize_distributed(
    config: Any = None, *, code: Any = None, timeouts: TimeoutConfig | None = None
) -> Iterator[None]:
    """Connect this process with the others of its run inside the block, which all leave together.

    Call it before any computation: JAX initializes its devices then.

    Args:
      config: JSON that has to be equal in all processes.
      code: The version of the code, as JSON that has to be equal too.
      timeouts: How long other processes are waited for.

    Raises:
      TransientError: If the others do not start in time, the cluster does not answer, or the first process' port is
        in use.
      UserError: If the config or code of another process differs, or what the environment says is no run.
    """
    info = detect_processes()
    timeouts = timeouts or TimeoutConfig()
    if info is None:
        with HangWatch(timeouts):
            yield
        return
    _connect(info, timeouts)
    store = KeyValueStore("run")
    names = _compare_processes(store, {"config": config, "code": code}, timeouts)
    name = names[store.group.process_id]
    if jax.process_index() == 0:
        print(_describe_processes(info, names), file=sys.stderr)
    with HangWatch(timeouts, store, name=name) as watch:
        try:
            _connect_devices()
            yield
        except AgreedStop:  # All others stop, too, and may have more to close.
            store.meet("done")
            raise
        except BaseException as error:
            _end_with_error(error, store, watch, names, timeouts)
            raise
        store.meet("done")  # The others may have more to do, and are watched meanwhile.


def _compare_processes(store: KeyValueStore, settings: dict[str, Any], timeouts: TimeoutConfig) -> list[str]:
    """Return the names of all processes, and stop the run in all of them if one has different settings.

    Raises:
      TransientError: If some do not start in time.
      UserError: If one differs; the message names the first difference and the processes.
    """

    def meet(title: str, text: str, combine: Callable[[list[str]], str]) -> str:
        try:
            return store.meet(title, text, combine=combine, seconds=timeouts.startup)
        except TimeoutError as error:
            problem = f"no message from processes within {timeouts.startup:g} s: {error}"
            raise TransientError(f"{problem}. Start all processes again.") from error

    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    infos = json.loads(meet("hosts", json.dumps([socket.gethostname(), os.getpid(), digest]), _join))
    names = [f"process {index} ({host}, pid {pid})" for index, (host, pid, _) in enumerate(infos)]
    is_same = len({digest for *_, digest in infos}) == 1
    if not is_same and (difference := meet("settings", text, lambda texts: _describe_difference(names, texts))):
        raise UserError(difference)
    return names


def _join(texts: list[str]) -> str:
    return f"[{', '.join(texts)}]"


def _describe_difference(names: list[str], texts: list[str]) -> str:
    first, *others = map(json.loads, texts)
    for name, other in zip(names[1:], others, strict=True):
        for field in first:
            if difference := config_json.describe_difference(other.get(field), first[field], field):
                return (
                    f"{name} was started with another {field} than {names[0]}: {difference} (there is the former, here "
                    f"the latter). Use the same {field} for all processes."
                )
    return ""


def _end_with_error(
    error: BaseException, store: KeyValueStore, watch: HangWatch, names: list[str], timeouts: TimeoutConfig
) -> None:
    """End together with the others, which would wait for this process, and for which JAX would wait at exit.

    Returns if all others have ended with errors of their own, too.
    """
    code, is_of_others = _get_code(error), _is_lost_connection(error)
    if not is_of_others:  # Otherwise another one is the cause, and may say so itself.
        watch.tell(f"{names[store.group.process_id]} has ended ({type(error).__name__}: {error})", code)
    try:
        store.meet("failed", seconds=timeouts.grace)
        if not is_of_others:
            return
        if watch.cause:
            time.sleep(timeouts.grace)  # The watch ends this process, with the cause.
    except (TimeoutError, jax.errors.JaxRuntimeError) as missing:  # The first process, with the store, may be gone.
        if is_of_others and isinstance(missing, TimeoutError) and store.group.is_first:
            lost = ", ".join(names[int(index)] for index in str(missing).split(", "))
            print(f"error: no answer from {lost}; the others end, too. Start all processes again.", file=sys.stderr)
    if isinstance(error, UserError | KeyboardInterrupt):
        print(f"{'error' if isinstance(error, UserError) else 'stopped'}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    watch.leave(code)


_LOST_CONNECTION = re.compile(r"Gloo|\bDEADLINE_EXCEEDED\b|\bUNAVAILABLE\b")
"""Pattern of the messages of JAX's errors where other processes do not answer, or not in time."""


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether an error comes from another process; JAX raises Gloo's errors as a ValueError, too."""
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return is_of_jax and _LOST_CONNECTION.search(str(error)) is not None


def _get_code(error: BaseException) -> int:
    """Return the exit code of a process after an error."""
    if isinstance(error, UserError | GracefulStop):
        return error.code
    if _is_lost_connection(error):
        return EXIT_TRY_AGAIN
    return 130 if isinstance(error, KeyboardInterrupt) else 1


_turn_numbers = itertools.count()
_turns = threading.local()


def is_in_turn() -> bool:
    """Return True in a block of `main_process_first`, also if there is only one process.

    A call there for which all processes have to meet would never return: the others wait for the end of the block.
    """
    return getattr(_turns, "depth", 0) > 0


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the first process before the others.

    It can write files that the others read from a shared disk. All processes must reach the blocks in the same order.
    """
    if jax.process_count() == 1:
        with _take_turn():
            yield
        return
    store, name = KeyValueStore("turns"), str(next(_turn_numbers))
    # That process which JAX's devices number 0, and which writes files, need not be process 0 of the store.
    is_first = jax.process_index() == 0
    if not is_first:
        store.wait_for(name)  # No timeout: the heartbeat notices if the first process dies.
    with _take_turn():
        yield
    if is_first:
        store.write(name, "")


@contextlib.contextmanager
def _take_turn() -> Iterator[None]:
    _turns.depth = getattr(_turns, "depth", 0) + 1
    try:
        yield
    finally:
        _turns.depth -= 1


def wait_for_main_process() -> None:
    """Wait until the first process has reached this call: what it wrote before is there.

    The others do not wait in a collective operation, which some platforms end after a while. The heartbeat goes on, and
    takes none of them for lost.
    """
    with main_process_first():
        pass


def wait_for_all_processes() -> None:
    """Wait until all processes have reached this call, without a collective operation (see `wait_for_main_process`)."""
    if jax.process_count() > 1:
        KeyValueStore("meetings").meet(str(next(_turn_numbers)))


def _connect(info: ProcessInfo, timeouts: TimeoutConfig) -> None:
    # The training loop handles SIGTERM. JAX's service would catch it, and only report it when polled.
    jax.config.update("jax_enable_preemption_service", False)
    arguments: dict[str, Any] = {}
    if info.address is not None:
        arguments = {"coordinator_address": info.address, "num_processes": info.count, "process_id": info.index}
        arguments["cluster_detection_method"] = "deactivate"
    # JAX ends the process at its own timeout, without advice. Ours is shorter and prints some.
    timer = threading.Timer(timeouts.startup, _exit_after_timeout, (info, timeouts))
    timer.daemon = True
    timer.start()
    try:
        if info.address is not None and info.index == 0:
            _check_port(info.address)
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=math.ceil(timeouts.startup) + _EXTRA_SECONDS,
            heartbeat_timeout_seconds=math.ceil(timeouts.max_silence),
            shutdown_timeout_seconds=math.ceil(timeouts.max_silence),
        )
    except Exception as error:  # JAX raises many types for a failed connection.
        raise _make_connection_error(error, info, timeouts) from error
    finally:
        timer.cancel()


def _connect_devices() -> None:
    """Connect the devices of all processes, which are at the same point here, if they are CPUs.

    Gloo does it at the first collective operation, where it waits for 30 s only. The first steps of the
    processes, which each of them compiles, may be further apart on a busy machine.
    """
    if jax.default_backend() != "cpu":
        return
    devices = np.array(jax.devices())
    sharding = NamedSharding(Mesh(devices, ("devices",)), PartitionSpec("devices"))
    ones = jax.make_array_from_callback(devices.shape, sharding, lambda _: np.ones(1, np.float32))
    jax.jit(jnp.sum, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(ones).block_until_ready()


def _check_port(address: str) -> None:
    """Raise OSError if the port of the first process is in use, on which JAX may crash."""
    host, _, port = (os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f":{address.rpartition(':')[2]}").rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host.strip("[]"), int(port)))


def _make_connection_error(error: Exception, info: ProcessInfo, timeouts: TimeoutConfig) -> UserError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if "DEADLINE_EXCEEDED" in reason or isinstance(error, TimeoutError):
        return TransientError(f"{_format_not_found(info, timeouts)} ({reason})")
    address = info.address or "the address of the first process"
    if isinstance(error, jax.errors.JaxRuntimeError | OSError):
        advice = f"Start all of them again; check that {address} is free on its host and can be reached."
        return TransientError(f"the {info.count} processes of the run could not be connected ({reason}). {advice}")
    advice = f"Check {address} and the variables of {info.source}. A single process needs NUM_PROCESSES=1."
    return UserError(f"the {info.count} processes of the run cannot be connected ({reason}). {advice}")


def _format_not_found(info: ProcessInfo, timeouts: TimeoutConfig) -> str:
    return (
        f"the {info.count} processes of the run did not find each other within {timeouts.startup:g} s. Start all of "
        f"them, and check that {info.address or 'the first'} can be reached. A single process needs NUM_PROCESSES=1."
    )


def _exit_after_timeout(info: ProcessInfo, timeouts: TimeoutConfig) -> None:
    print(f"error: {_format_not_found(info, timeouts)}", file=sys.stderr, flush=True)
    exit_now(EXIT_TRY_AGAIN)


def _describe_processes(info: ProcessInfo, names: list[str]) -> str:
    """Describe the run in one line, and each process in one, as JAX's messages have their numbers alone."""
    devices = jax.devices()
    head = f"{len(names)} processes, found by {info.source}; {len(devices)} devices ({devices[0].device_kind})"
    return "\n  ".join([f"{head}, {jax.local_device_count()} here", *names])
