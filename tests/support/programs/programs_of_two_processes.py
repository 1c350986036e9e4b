"""Compile programs in two processes with different homes; the arguments are the folders of the run and of the homes.

Prints the folder of the cache, the number of programs that were looked up there, and how many of them were found.
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import cache_key
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.core.platform import compilation_cache
from dit_video.distributed import Parallelism, make_mesh
from support.devices import join_processes

compilation_cache.MIN_COMPILE_SECONDS = 0.0


def hash_devices(hasher: Any, devices: np.ndarray) -> None:
    """Add the kinds of the devices to a key of the cache.

    JAX adds the topology, which on CPUs, unlike on GPUs and TPUs, is another one in each process.
    """
    for device in devices.flat:
        hasher.update(device.device_kind.encode())


def main() -> None:
    """Join the processes, and compile for the devices of both."""
    join_processes()
    if jax.default_backend() == "cpu":
        cache_key._hash_accelerator_config = hash_devices
    run_folder, homes = sys.argv[1:]
    os.environ["XDG_CACHE_HOME"] = f"{homes}/{jax.process_index()}"
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    folder = compilation_cache.enable_compilation_cache(run_folder=run_folder)
    sharding = NamedSharding(make_mesh(Parallelism(fsdp=2)), PartitionSpec("fsdp"))
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    for function in (lambda x: (jnp.sin(x) @ jnp.cos(x).T, x.sum()), lambda x: x * 2 + 1):
        jax.jit(function).lower(shape).compile()
    counts = [sum(name.endswith(end) for name in events) for end in ("/compile_requests_use_cache", "/cache_hits")]
    print("cache", folder, *counts)


if __name__ == "__main__":
    main()
