"""Several processes as one run: where they are found, how they are joined, and that they run the same.

A script puts what it does into `joined()`. It finds out from the environment whether the process is one of several,
connects them (`jax.distributed`), stops them where they were started with different configs or code, and watches over
them (`peers`). For a process that is alone it does nothing.

What is looked for, in this order:

    explicit     COORDINATOR_ADDRESS (host:port of process 0), NUM_PROCESSES, PROCESS_ID; also with JAX_ before them
    otherwise    what JAX finds itself: SLURM steps, Open MPI, Cloud TPU VMs, TPUs on GKE (JobSet), Kubernetes jobs
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

from dit_video.core.errors import TRY_AGAIN, UserError
from dit_video.distributed.heartbeat import Patience, Peers
from dit_video.distributed.store import Store

_SPARE = 60
"""seconds by which JAX waits longer than we do"""
_NAMES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among those of its run."""

    found: str
    """what said so"""
    count: int
    index: int | None = None
    """None where JAX finds it out, with the address"""
    address: str | None = None
    """host:port of the first process"""


def detect(environment: Mapping[str, str] | None = None) -> Place | None:
    """The place that the environment gives this process; None for one that is alone.

    Raises:
      UserError: only some of the explicit variables are set, or they can't be.
    """
    environment = os.environ if environment is None else environment
    given = {name: environment.get(name) or environment.get(f"JAX_{name}") for name in _NAMES}
    if not any(given.values()) or (given["COORDINATOR_ADDRESS"] and not any(list(given.values())[1:])):
        return _found_by_jax()  # which knows an address alone, too
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(f"{', '.join(missing)} not set, though other variables of several processes are; set all three")
    address, count, index = (str(value) for value in given.values())
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"PROCESS_ID={index} and NUM_PROCESSES={count} must be whole numbers, the first one smaller")
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise UserError(f"COORDINATOR_ADDRESS={address} must be host:port of process 0, such as node0:1234")
    if int(count) == 1:
        return None
    return Place(found="the environment", count=int(count), index=int(index), address=address)


def _found_by_jax() -> Place | None:
    from jax._src import clusters  # private, but what `jax.distributed.initialize` uses without arguments

    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of a package for Kubernetes, which may not be wanted
                if not cluster.is_env_present():
                    continue
            count = cluster.get_process_count()
        except Exception as error:  # of a metadata server or an API that doesn't answer
            print(f"{cluster.__name__} was not asked for other processes: {error}", file=sys.stderr)
            continue
        return Place(found=cluster.__name__, count=count) if count > 1 else None
    return None


@contextlib.contextmanager
def joined(config: Any = None, *, code: Any = None, patience: Patience | None = None) -> Iterator[None]:
    """Be one of the run's processes inside the block, which all of them leave together.

    Call it before anything is computed: JAX takes its devices then.

    Args:
      config: JSON that has to be the same in all processes.
      code: the version of the code, JSON too, likewise.
      patience: how long others are waited for.

    Raises:
      UserError: the others did not come in time; their config or code is another.
    """
    place = detect()
    if place is None:
        yield
        return
    patience = patience or Patience()
    _connect(place, patience)
    with Peers(patience) as peers:
        peers.compare({"config": config, "code": code})
        if jax.process_index() == 0:
            print(_told(place), file=sys.stderr)
        yield


_turns = itertools.count()


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process do what is in the block before the others do it: make files that they find, on a disk that
    all have. All come to it in the same order."""
    if jax.process_count() == 1:
        yield
        return
    turn = Store(f"turn/{next(_turns)}")
    if jax.process_index() != 0:
        turn.wait_for({"done"}, math.inf)  # the first one is watched
    yield
    if jax.process_index() == 0:
        turn.write("done", "")


def _connect(place: Place, patience: Patience) -> None:
    # SIGTERM is the training loop's: JAX would take it, and tell nobody who doesn't ask.
    jax.config.update("jax_enable_preemption_service", False)
    given: dict[str, Any] = {}
    if place.address is not None:
        given = {"coordinator_address": place.address, "num_processes": place.count, "process_id": place.index}
        given["cluster_detection_method"] = "deactivate"
    # JAX ends the process when its own time is over, without a word on what is to be done.
    limit = threading.Timer(patience.start, _nobody, (place, patience))
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=math.ceil(patience.start) + _SPARE,
            # `Peers` is to be first, for it names who is lost; then JAX's own watch ends the process.
            heartbeat_timeout_seconds=math.ceil(3 * patience.silent),
            shutdown_timeout_seconds=math.ceil(patience.silent),
        )
    except Exception as error:  # of the connection; of JAX's many kinds
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{_not_found(place, patience)} ({line})") from error
    finally:
        limit.cancel()


def _not_found(place: Place, patience: Patience) -> str:
    return (
        f"the {place.count} processes of the run did not find each other within {patience.start:g} s; start all of "
        f"them, and see that {place.address or 'the first'} can be reached"
    )


def _nobody(place: Place, patience: Patience) -> None:
    print(f"error: {_not_found(place, patience)}", file=sys.stderr, flush=True)
    os._exit(TRY_AGAIN)


def _told(place: Place) -> str:
    devices = jax.devices()
    return (
        f"{jax.process_count()} processes, found by {place.found}; the first on {socket.gethostname()}; "
        f"{len(devices)} devices ({devices[0].device_kind}), {jax.local_device_count()} here"
    )
