"""The device mesh, with the field's axis names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from dit_video.core.errors import UserError

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
"""A mesh of devices, or the sizes of one whose devices are not there"""

AXES = ("data", "fsdp", "tensor", "context")

ContextAttention = Literal["ulysses", "ring"]


@dataclass(frozen=True, kw_only=True)
class Slices:
    """How many slices lie along each axis of the mesh, where devices come in several of them.

    Inside a slice devices are joined by the fast interconnect (ICI), slices by the data centre's network (DCN). The
    number along an axis divides the axis: the rest of it lies inside the slices.

    Raises:
      UserError: a number below 1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise UserError(f"1 slice or more lies along a mesh axis; {name}={getattr(self, name)} was given")


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
    context_attention: ContextAttention = "ulysses"
    """How tokens of a row on several devices attend to each other: `ulysses` gives each device all tokens of some heads
    (arXiv 2309.14509), `ring` passes keys and values from device to device (arXiv 2310.01889)."""
    slices: Slices | None = None
    """Where several slices lie, as of TPU pods; None: along the outermost axes that they divide, `context` and
    `tensor` the last, for these move the most between devices"""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"a mesh axis has 1 or more devices, or -1 for those left; {name}={size} was given")
        if len(free := [name for name, size in sizes.items() if size == -1]) > 1:
            raise UserError(f"only one mesh axis can be -1, {' and '.join(free)} are; give the size of all but one")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `devices` (all of the run by default), in Auto mode, `data` outermost.

    Raises:
      UserError: the axes do not divide the number of devices, or the slices that these are of don't lie along them.
    """
    devices = list(jax.devices() if devices is None else devices)
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if _slice_count(devices) > 1:
        return jax.sharding.Mesh(hybrid(config, devices), AXES, axis_types=types)
    # Not `jax.make_mesh`, which refuses axes that are a part of one of a TPU's torus, but for v5e.
    from jax.experimental import mesh_utils

    laid = mesh_utils.create_device_mesh(_sizes(config, len(devices)), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(laid, AXES, axis_types=types)


def hybrid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Devices of several slices in the order of a mesh: along each axis slices are the outer part, their devices the
    inner one.

    Raises:
      UserError: as for `make_mesh`.
    """
    # Imported here, as no run on a single slice needs it.
    from jax.experimental import mesh_utils

    sizes, count = _sizes(config, len(devices)), _slice_count(devices)
    if len(devices) % count:
        raise UserError(f"{len(devices)} devices are no whole number for each of {count} slices; use all of each slice")
    outer = _slices(config.slices, sizes, count)
    inner = tuple(size // along for size, along in zip(sizes, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def _slice_count(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _slices(asked: Slices | None, sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """How many slices lie along each axis of these sizes."""
    mesh = _named(sizes)
    if asked is not None:
        along = tuple(getattr(asked, name) for name in AXES)
        if math.prod(along) != count:
            raise UserError(f"slices {_named(along)} are {math.prod(along)}, there are {count}; use data={count}")
        for name, size, part in zip(AXES, sizes, along, strict=True):
            if size % part:
                raise UserError(f"{part} slices do not divide {name}={size} of the mesh {mesh}; {_would(sizes, count)}")
        return along
    left, found = count, dict.fromkeys(AXES, 1)
    for name in ("data", "fsdp", "context", "tensor"):
        found[name] = math.gcd(sizes[AXES.index(name)], left)
        left //= found[name]
    if left > 1:
        raise UserError(f"{count} slices do not lie along the axes of the mesh {mesh}; {_would(sizes, count)}")
    return tuple(found.values())


def _would(sizes: tuple[int, ...], count: int) -> str:
    """A size of `data` that slices divide."""
    least = math.lcm(sizes[0], count)
    return f"use a mesh whose data is a multiple of {count}, such as data={least}"


def _named(sizes: tuple[int, ...]) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))


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
