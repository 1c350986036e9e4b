"""Parallelism of a training or a sampler, and the device mesh that follows from it, with the usual axis names."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np

from dit_video.core.errors import UserError, check_at_least, check_whole

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
"""A mesh of devices, or an abstract one with its sizes only."""

AXES = ("data", "fsdp", "tensor", "context")

ContextAttention = Literal["ulysses", "ring"]


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Configuration of the number of slices along each axis of the mesh, for devices in several slices.

    Devices of a slice are connected by the fast interconnect (ICI), slices by the data centre's network (DCN). The
    number of slices along an axis divides the axis; the rest of the axis lies inside the slices.

    Raises:
      UserError: If a number is not whole, or below 1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in AXES}
        check_whole(**counts)
        check_at_least(1, **counts)


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Configuration of a mesh: number of devices along each axis, and the method of context-parallel attention.

    A size of -1 (at most one) stands for all remaining devices.

    Raises:
      UserError: If a size is not whole, or neither -1 nor positive, if more than one is -1, or if there is no such
        `context_attention`.
    """

    data: int = -1
    """Devices with copies of the parameters; they share the rows of the batch."""
    fsdp: int = 1
    """Devices that share the rows of the batch, the parameters and the optimizer state."""
    tensor: int = 1
    """Devices that share heads and hidden widths."""
    context: int = 1
    """Devices that share the tokens of a row."""
    context_attention: ContextAttention = "ulysses"
    """Method of attention among tokens of a row on several devices: `ulysses` gives each device all tokens of some
    heads (arXiv 2309.14509), `ring` passes keys and values from device to device (arXiv 2310.01889)."""
    slices: Slices | None = None
    """Arrangement of several slices, as in TPU pods. None divides the outermost axes that allow it, `context` and
    `tensor` last, since these communicate the most. Any axis but `data` is warned of: see `describe_slow_axes`."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in AXES}
        check_whole(**sizes)
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"{name}={size} is invalid: an axis has 1 device or more. Use -1 for the others.")
        if len(free := [name for name, size in sizes.items() if size == -1]) > 1:
            raise UserError(f"{'=-1, '.join(free)}=-1 is invalid: only one axis can be -1. Use sizes for all but one.")
        if self.context_attention not in (methods := get_args(ContextAttention)):
            rule = f"it must be one of {', '.join(methods)}"
            raise UserError(f"context_attention={self.context_attention!r} is invalid: {rule}. Use {methods[0]!r}.")


def make_mesh(parallel: Parallelism, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return the mesh of `devices` (all of the run by default), in Auto mode, `data` outermost.

    Warns if slices do not lie along `data`; see `describe_slow_axes`.

    Raises:
      UserError: If the axes do not divide the number of devices, or the devices' slices do not fit the axes.
    """
    devices = list(jax.devices() if devices is None else devices)
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if (slices := _count_slices(devices)) > 1:
        if message := describe_slow_axes(count_axis_slices(parallel, len(devices), slices)):
            warnings.warn(message, stacklevel=2)
        return jax.sharding.Mesh(arrange_hybrid_mesh(parallel, devices), AXES, axis_types=types)
    # `jax.make_mesh` refuses mesh axes that split an axis of a TPU's torus, except on v5e.
    from jax.experimental import mesh_utils

    sizes = _resolve_sizes(parallel, len(devices))
    array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES, axis_types=types)


def arrange_hybrid_mesh(parallel: Parallelism, devices: Sequence[Any]) -> np.ndarray:
    """Return devices of several slices in mesh order, with slices as the outer part of each axis.

    Raises:
      UserError: As `make_mesh`.
    """
    # Imported here because runs on a single slice don't need it.
    from jax.experimental import mesh_utils

    sizes, count = _resolve_sizes(parallel, len(devices)), _count_slices(devices)
    if len(devices) % count:
        rule = f"they are no whole number for each of {count} slices. Use all devices of each slice."
        raise UserError(f"{len(devices)} devices are invalid: {rule}")
    outer = _split_slices(parallel.slices, sizes, count)
    inner = tuple(size // part for size, part in zip(sizes, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def count_axis_slices(parallel: Parallelism, devices: int, slices: int) -> dict[str, int]:
    """Return the number of slices along each axis of the mesh of so many devices.

    Raises:
      UserError: If the axes do not divide the number of devices, or the slices do not fit the axes.
    """
    sizes = _resolve_sizes(parallel, devices)
    return dict(zip(AXES, _split_slices(parallel.slices, sizes, slices), strict=True))


def get_axis_slices(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Return the number of slices along each axis of a mesh of devices."""
    lines = {name: np.moveaxis(mesh.devices, axis, -1) for axis, name in enumerate(mesh.axis_names)}
    return {name: _count_slices(line.reshape(-1, line.shape[-1])[0]) for name, line in lines.items()}


_SLOW_TRAFFIC = {
    "fsdp": "weights are gathered over the data centre's network (DCN) in each layer",
    "tensor": "activations are summed over the data centre's network (DCN) in each layer",
    "context": "tokens are exchanged over the data centre's network (DCN) in each layer",
}


def describe_slow_axes(slices: Mapping[str, int]) -> str | None:
    """Return a warning if slices do not lie along `data`, whose devices communicate once a step; else None.

    Args:
      slices: Number of slices along each axis.
    """
    slow = [
        f"{count} slices lie along {axis}, so {_SLOW_TRAFFIC[axis]}"
        for axis, count in slices.items()
        if axis != "data" and count > 1
    ]
    if not slow:
        return None
    return f"{', and '.join(slow)}. Use a mesh whose data is a multiple of {math.prod(slices.values())}."


def _count_slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _split_slices(requested: Slices | None, sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the number of slices along each axis of these sizes."""
    mesh = _format_sizes(sizes)
    if requested is not None:
        counts = tuple(getattr(requested, name) for name in AXES)
        if math.prod(counts) != count:
            rule = f"these are {math.prod(counts)}, there are {count}. Use data={count}."
            raise UserError(f"slices {_format_sizes(counts)} are invalid: {rule}")
        for name, size, part in zip(AXES, sizes, counts, strict=True):
            if size % part:
                fix = _suggest_data_size(sizes, count)
                raise UserError(f"{part} slices do not divide {name}={size} of the mesh {mesh}. {fix}")
        return counts
    # Axes in the order of their communication, the least first: slices have the slow network between them.
    remaining, slices = count, dict.fromkeys(AXES, 1)
    for name in ("data", "fsdp", "context", "tensor"):
        slices[name] = math.gcd(sizes[AXES.index(name)], remaining)
        remaining //= slices[name]
    if remaining > 1:
        raise UserError(f"{count} slices do not divide the axes of the mesh {mesh}. {_suggest_data_size(sizes, count)}")
    return tuple(slices.values())


def _suggest_data_size(sizes: tuple[int, ...], count: int) -> str:
    """Return advice with a size of `data` that the slices divide."""
    smallest = math.lcm(sizes[0], count)
    return f"Use a mesh whose data is a multiple of {count}, such as data={smallest}."


def _format_sizes(sizes: tuple[int, ...]) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))


def _resolve_sizes(parallel: object, count: int) -> tuple[int, ...]:
    """Return the size of every axis, in the order of `AXES`."""
    if not isinstance(parallel, Parallelism):
        rule = "it must be a Parallelism, from which the mesh is made"
        raise UserError(f"parallel={parallel!r} is invalid: {rule}. Use Parallelism(data=2, context=4) or the like.")
    sizes = {name: getattr(parallel, name) for name in AXES}
    requested = _format_sizes(tuple(sizes.values()))
    remaining = count
    for name, size in sizes.items():
        if size == -1:
            continue
        if remaining % size:
            divisors = " or ".join(str(divisor) for divisor in range(1, remaining + 1) if remaining % divisor == 0)
            rest = f"the {remaining} of {count} devices that are left for it"
            available = f"the {count} devices" if remaining == count else rest
            raise UserError(f"mesh {requested}: {name}={size} does not divide {available}. Use {name}={divisors}.")
        remaining //= size
    if -1 in sizes.values():
        return tuple(remaining if size == -1 else size for size in sizes.values())
    if remaining != 1:
        fix = f"Use data={sizes['data'] * remaining}, or -1 for all remaining ones."
        raise UserError(f"mesh {requested} uses {math.prod(sizes.values())} of {count} devices. {fix}")
    return tuple(sizes.values())


def make_abstract_mesh(parallel: Parallelism, count: int) -> jax.sharding.AbstractMesh:
    """Return a mesh of `count` devices that need not exist: enough to shard shapes.

    Raises:
      UserError: If the axes do not divide the number of devices.
    """
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.AbstractMesh(_resolve_sizes(parallel, count), AXES, axis_types=types)


def parse_parallelism(text: str, base: Parallelism = Parallelism()) -> Parallelism:
    """Parse sizes such as `fsdp=8,context=4`, and perhaps `context_attention=ring`.

    Unnamed axes have size 1, except for `data`, which takes the rest. Without its name, `context_attention` is that of
    `base`; nothing else of it is kept.

    Raises:
      UserError: If an axis does not exist or its size is not an integer, or if there is no such `context_attention`.
    """
    values: dict[str, Any] = {"context_attention": base.context_attention}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name == "context_attention":
            values[name] = value
        elif name in AXES and re.fullmatch(r"-?\d+", value):
            values[name] = int(value)
        else:
            fix = f"{','.join(f'{axis}=1' for axis in AXES)},context_attention=ring"
            raise UserError(f"--parallel {part} is invalid: it must be AXIS=SIZE or context_attention=…. Use {fix}")
    if "data" not in values and -1 in values.values():
        values["data"] = 1
    return Parallelism(**values)


def format_parallelism(parallel: Parallelism) -> str:
    """Return the text of sizes above 1, and of a ring among them, as `parse_parallelism` reads it."""
    parts = [f"{name}={getattr(parallel, name)}" for name in AXES if getattr(parallel, name) > 1] or ["data=1"]
    if parallel.context > 1 and parallel.context_attention != Parallelism.context_attention:
        parts.append(f"context_attention={parallel.context_attention}")
    return ",".join(parts)
