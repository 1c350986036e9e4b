"""The device mesh, with the field's axis names."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from dit_video.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each axis. At most one axis is -1: it takes the devices that the others leave.

    Raises:
      UserError: a size that is neither -1 nor positive, or more than one -1.
    """

    data: int = -1
    """copies of the parameters; rows of the batch are split"""
    fsdp: int = 1
    """rows of the batch are split, and so are parameters and optimizer state"""
    tensor: int = 1
    """heads and hidden widths are split"""
    context: int = 1
    """tokens of a row are split"""

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size != -1 and size < 1:
                raise UserError(f"a mesh axis has 1 or more devices, or -1 for those left; {name}={size} was given")
        if len(free := [name for name, size in dataclasses.asdict(self).items() if size == -1]) > 1:
            raise UserError(f"only one mesh axis can be -1, {' and '.join(free)} are; give the size of all but one")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `devices` (all of the run by default), in Auto mode, `data` outermost.

    Raises:
      UserError: the axes do not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(config, len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """The size of every axis, in the order of `AXES`."""
    given = {name: getattr(config, name) for name in AXES}
    asked = " x ".join(f"{name}={size}" for name, size in given.items())
    left = count
    for name, size in given.items():
        if size == -1:
            continue
        if left % size:
            divisors = " or ".join(str(divisor) for divisor in range(1, left + 1) if left % divisor == 0)
            of = f"the {count} devices" if left == count else f"the {left} of {count} devices that are left for it"
            raise UserError(f"mesh {asked}: {name}={size} does not divide {of}; use {name}={divisors}")
        left //= size
    if -1 in given.values():
        return tuple(left if size == -1 else size for size in given.values())
    if left != 1:
        raise UserError(
            f"mesh {asked} uses {math.prod(given.values())} of {count} devices; "
            f"use data={given['data'] * left}, or -1 for all that are left"
        )
    return tuple(given.values())


def abstract_mesh(config: MeshConfig, count: int) -> jax.sharding.AbstractMesh:
    """The mesh of so many devices that are not there: enough to lay shapes out on.

    Raises:
      UserError: the axes do not divide the number of devices.
    """
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.AbstractMesh(_sizes(config, count), AXES, axis_types=types)
