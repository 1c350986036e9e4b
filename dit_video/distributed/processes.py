"""Several processes as one run: detection, connection, and checks that they run the same.

A script runs its work inside `initialize_distributed()`. It detects from the environment if the process is one of
several, connects them (`jax.distributed`), stops them if they were started with different configs or code, and monitors
them (`heartbeat`). For a single process it does nothing.

Detection, in this order:

    explicit     COORDINATOR_ADDRESS (host:port of process 0), NUM_PROCESSES, PROCESS_ID; also with JAX_ before them
    otherwise    what JAX detects: SLURM steps, Open MPI, Cloud TPU VMs, TPUs on GKE (JobSet), Kubernetes jobs
"""

import contextlib
import itertools
import math
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.heartbeat import HeartbeatMonitor, TimeoutConfig
from dit_video.distributed.store import KeyValueStore

_EXTRA_SECONDS = 60
"""Seconds by which JAX's timeout is longer than ours."""
_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


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


def detect_processes(environment: Mapping[str, str] | None = None) -> ProcessInfo | None:
    """Return the process information from the environment; None for a single process.

    Raises:
      UserError: If only some of the explicit variables are set, or their values are invalid.
    """
    environment = os.environ if environment is None else environment
    variables = {name: environment.get(name) or environment.get(f"JAX_{name}") for name in _VARIABLES}
    if not any(variables.values()) or (variables["COORDINATOR_ADDRESS"] and not any(list(variables.values())[1:])):
        return _detect_with_jax()  # JAX also supports an address without the other variables.
    if missing := [name for name, value in variables.items() if not value]:
        missing_names, names = ", ".join(missing), ", ".join(_VARIABLES)
        raise UserError(f"{missing_names} not set, though other variables of several processes are. Set {names}.")
    address, count, index = (str(value) for value in variables.values())
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        rule = "both must be whole numbers. Use PROCESS_ID from 0 to NUM_PROCESSES - 1."
        raise UserError(f"PROCESS_ID={index}, NUM_PROCESSES={count} is invalid: {rule}")
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        rule = "it must be host:port of process 0. Use an address such as node0:1234."
        raise UserError(f"COORDINATOR_ADDRESS={address} is invalid: {rule}")
    if int(count) == 1:
        return None
    return ProcessInfo(source="the environment", count=int(count), index=int(index), address=address)


def _detect_with_jax() -> ProcessInfo | None:
    from jax._src import clusters  # Private; `jax.distributed.initialize` without arguments uses it.

    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # A missing Kubernetes package warns.
                if not cluster.is_env_present():
                    continue
            count = cluster.get_process_count()
        except Exception as error:  # A metadata server or an API may not answer.
            print(f"{cluster.__name__} could not be asked for other processes: {error}", file=sys.stderr)
            continue
        return ProcessInfo(source=cluster.__name__, count=count) if count > 1 else None
    return None


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
      UserError: If the others do not start in time, or their config or code differs.
    """
    info = detect_processes()
    if info is None:
        yield
        return
    timeouts = timeouts or TimeoutConfig()
    _connect(info, timeouts)
    with HeartbeatMonitor(timeouts) as peers:
        peers.compare({"config": config, "code": code})
        if jax.process_index() == 0:
            print(_describe_processes(info), file=sys.stderr)
        yield


_turn_numbers = itertools.count()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the first process before the others.

    It can write files that the others read from a shared disk. All processes must reach the blocks in the same order.
    """
    if jax.process_count() == 1:
        yield
        return
    turn = KeyValueStore(f"turn/{next(_turn_numbers)}")
    if jax.process_index() != 0:
        turn.wait_for({"done"}, math.inf)  # No timeout: the heartbeat notices if the first process dies.
    yield
    if jax.process_index() == 0:
        turn.write("done", "")


def wait_for_main_process() -> None:
    """Wait until the first process has reached this call: what it wrote before is there.

    The others do not wait in a collective operation, which some platforms end after a while. The heartbeat goes on, and
    takes none of them for slow, since all are at the same step.
    """
    with main_process_first():
        pass


def wait_for_all_processes() -> None:
    """Wait until all processes have reached this call, without a collective operation (see `wait_for_main_process`)."""
    if jax.process_count() == 1:
        return
    meeting = KeyValueStore(f"meeting/{next(_turn_numbers)}")
    meeting.write(str(jax.process_index()), "")
    meeting.wait_for({str(index) for index in range(jax.process_count())}, math.inf)


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
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=math.ceil(timeouts.startup) + _EXTRA_SECONDS,
            # `HeartbeatMonitor` should be first, since it names the lost process; JAX's heartbeat is the fallback.
            heartbeat_timeout_seconds=math.ceil(3 * timeouts.max_silence),
            shutdown_timeout_seconds=math.ceil(timeouts.max_silence),
        )
    except Exception as error:  # JAX raises many types for a failed connection.
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{_format_not_found(info, timeouts)} ({line})") from error
    finally:
        timer.cancel()


def _format_not_found(info: ProcessInfo, timeouts: TimeoutConfig) -> str:
    return (
        f"the {info.count} processes of the run did not find each other within {timeouts.startup:g} s. Start all of "
        f"them, and check that {info.address or 'the first'} can be reached."
    )


def _exit_after_timeout(info: ProcessInfo, timeouts: TimeoutConfig) -> None:
    print(f"error: {_format_not_found(info, timeouts)}", file=sys.stderr, flush=True)
    os._exit(EXIT_TRY_AGAIN)


def _describe_processes(info: ProcessInfo) -> str:
    devices = jax.devices()
    return (
        f"{jax.process_count()} processes, found by {info.source}; the first on {socket.gethostname()}; "
        f"{len(devices)} devices ({devices[0].device_kind}), {jax.local_device_count()} here"
    )
