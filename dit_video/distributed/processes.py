"""Several processes as one run: detection, connection, and checks that they run the same.

A script runs its work inside `initialize_distributed()`. It detects from the environment if the process is one of
several, connects them (`jax.distributed`), stops them if they were started with different configs or code, and monitors
them (`heartbeat`, `hang_watch`). A single process is only watched for trainings that hang.

Detection (`cluster_detection`), in this order:

    explicit     COORDINATOR_ADDRESS (host:port of process 0), NUM_PROCESSES, PROCESS_ID; also with JAX_ before them;
                 NUM_PROCESSES=1 alone for a single process
    otherwise    what JAX detects: SLURM steps, Open MPI, Cloud TPU VMs, TPUs on GKE (JobSet), Kubernetes jobs
"""

import contextlib
import itertools
import math
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.core.errors import EXIT_TRY_AGAIN, TransientError, UserError
from dit_video.distributed.cluster_detection import ProcessInfo, detect_processes
from dit_video.distributed.faults.hang_watch import HangWatch
from dit_video.distributed.faults.health import GRACE_SECONDS
from dit_video.distributed.faults.heartbeat import HeartbeatMonitor
from dit_video.distributed.faults.stacks import exit_now
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.faults.timeouts import TimeoutConfig

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
    with HeartbeatMonitor(timeouts) as monitor:
        monitor.compare({"config": config, "code": code})
        if jax.process_index() == 0:
            print(_describe_processes(info), file=sys.stderr)
        with HangWatch(
            timeouts,
            end=monitor.report_hang,
            is_waiting=lambda: monitor.is_other_busy,
            count_run_changes=lambda: monitor.num_changes,
        ):
            _connect_devices()
            yield


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
    takes none of them for slow, since all are at the same step.
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
            # `HeartbeatMonitor` should be first, since it names the lost process; JAX's heartbeat is the fallback. Its
            # last one may be half of its time old when a process dies, and it must not end the others while they read
            # the message.
            heartbeat_timeout_seconds=math.ceil(3 * (timeouts.max_silence + GRACE_SECONDS)),
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


def _describe_processes(info: ProcessInfo) -> str:
    devices = jax.devices()
    return (
        f"{jax.process_count()} processes, found by {info.source}; the first on {socket.gethostname()}; "
        f"{len(devices)} devices ({devices[0].device_kind}), {jax.local_device_count()} here"
    )
