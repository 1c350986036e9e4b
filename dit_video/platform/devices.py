"""Platforms that programs are compiled for."""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Platform:
    """Kind of device that a program is compiled for, by which it chooses its kernels."""

    name: str = "cpu"
    """Name of the platform in JAX: cpu, gpu or tpu."""
    compute_capability: tuple[int, int] | None = None
    """Compute capability of an NVIDIA GPU, such as (9, 0) for Hopper; None of other devices."""

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
