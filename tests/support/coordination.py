"""Processes of a run that are simulated by threads, on a real coordination service of JAX."""

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
from jax._src.lib import _jax

from dit_video.distributed.process_group import ProcessGroup

METHODS = ("key_value_set", "key_value_try_get", "key_value_dir_get", "key_value_delete")
"""Methods of JAX's client that are counted, and may fail."""


class RecordingClient:
    """A client of the service that counts its calls and what they return, and fails some of them."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        """Number of calls of each method."""
        self.num_texts = 0
        """Number of texts that were written or read."""
        self.num_failures = 0
        """Number of the next calls that fail, as where the network is interrupted."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.calls[name] += 1
                self.num_failures -= 1
                if self.num_failures >= 0:
                    raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
            result = method(*arguments, **options)
            with self._lock:
                self.num_texts += len(result) if name == "key_value_dir_get" else 1
            return result

        return call if name in METHODS else method


def connect(address: str, process_id: int) -> Any:
    """Return a connected client; all processes of the service have to connect at once."""
    client = _jax.get_distributed_runtime_client(address, process_id, init_timeout=120, heartbeat_timeout=600)
    client.connect()
    return client


def start_service(process_count: int) -> tuple[str, Any]:
    """Return the address of a new service and the service, which ends when it is freed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return address, _jax.get_distributed_runtime_service(address, process_count, heartbeat_timeout=600)


@contextmanager
def simulate_processes(count: int) -> Iterator[list[ProcessGroup]]:
    """Yield the groups of so many processes, as each sees it. They share a connection, and count their own calls."""
    address, service = start_service(1)
    client = connect(address, 0)
    try:
        yield [ProcessGroup(RecordingClient(client), process_id, count) for process_id in range(count)]
    finally:
        client.shutdown()
        service.shutdown()


def run_in_all(function: Callable[[ProcessGroup], Any], groups: list[ProcessGroup]) -> list[Any]:
    """Return the results of a function that all simulated processes call at once."""
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(function, groups))
