"""Platforms that programs are compiled for, and the memory of this machine."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""File with the limit of a container's memory on Linux; "max" for none."""


@dataclass(frozen=True)
class Platform:
    """Kind of device that a program is compiled for; it decides which kernels the program uses."""

    name: str = "cpu"
    """Name of the platform in JAX: cpu, gpu or tpu."""
    compute_capability: tuple[int, int] | None = None
    """Compute capability of an NVIDIA GPU, such as (9, 0) for Hopper; None for other devices."""

    @classmethod
    def from_device(cls, device: Any) -> "Platform":
        """Return the platform of a JAX device, which may be one that libtpu only describes."""
        capability = str(getattr(device, "compute_capability", ""))
        major, _, minor = capability.partition(".")
        is_nvidia = major.isdecimal() and minor.isdecimal()
        return cls(device.platform, (int(major), int(minor)) if is_nvidia else None)


def get_default_platform() -> Platform:
    """Return the platform of JAX's default devices."""
    name, device = jax.default_backend(), jax.devices()[0]
    # A program that is compiled for absent devices overrides the name.
    return Platform.from_device(device) if device.platform == name else Platform(name)


class MemoryLimits(NamedTuple):
    """Bytes of memory, None where unknown."""

    device: int | None
    """Memory of the default device that JAX may use; None for a CPU, whose memory is the machine's."""
    host: int | None
    """Memory of this machine, or of its container."""


def get_memory_limits() -> MemoryLimits:
    """Return the memory of JAX's default device and of this machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    try:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return MemoryLimits(statistics.get("bytes_limit"), None)
    with contextlib.suppress(OSError, ValueError):
        host = min(host, int(_CGROUP_LIMIT.read_text()))
    return MemoryLimits(statistics.get("bytes_limit"), host)
