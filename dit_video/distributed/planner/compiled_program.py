"""A step compiled ahead of time, for devices that need not be there."""

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dit_video.core.trees import flatten
from dit_video.distributed.planner.hlo import Program, read_program


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device that holds the most."""

    parameters: int
    optimizer: int
    ema: int
    other: int
    """what else lies in the state or is given to each step: the batch, frozen weights, codebooks"""
    activations: int
    """what the forward pass keeps for the backward pass; where layers are no loop, it is in `temporary`"""
    temporary: int
    """what lives while the step runs: gradients, gathered weights, the layer that is computed"""
    peak: int
    """of all at once"""

    @property
    def state(self) -> int:
        """What lies there between steps."""
        return self.parameters + self.optimizer + self.ema + self.other


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What the compiler says of a step."""

    memory: Memory
    program: Program | None
    """None where the program does not fit, and so was not made"""
    seconds: float
    """it took to compile"""
    over: str | None = None
    """the compiler's reason why it does not fit"""


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Layers ask JAX which platform they run on, and choose loops and kernels by it: inside, it is this one."""
    here = jax.default_backend
    jax.default_backend = lambda: platform  # type: ignore[assignment]
    try:
        yield
    finally:
        jax.default_backend = here


def compile_step(
    step: Callable[..., Any],
    arguments: tuple[PyTree, ...],
    mesh: jax.sharding.Mesh,
    *,
    turns: int = 1,
    room: int | None = None,
) -> CompiledStep:
    """Compile a jitted step for the devices of a mesh, and read what came of it.

    Args:
      step: jitted; its first argument is a state, with parts named `step`, `params`, `ema` and `opt_state` (also inside
        of a player's), or bare parameters.
      arguments: shapes with their layout on the mesh (`jax.ShapeDtypeStruct`).
      mesh: of devices that are there, or that libtpu describes.
      turns: of an outermost loop that the data end; see `read_program`.
      room: for turns, that this loop has.
    """
    platform = mesh.devices.flat[0].platform
    began = time.perf_counter()
    with compiling_for(platform):
        lowered = step.trace(*arguments).lower(lowering_platforms=(platform,))  # type: ignore[attr-defined]
    parts = held(arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason, wanted = over_the_limit(str(error), arguments=sum(parts.values()))
        temporary = max(0, wanted - sum(parts.values()))
        memory = Memory(**parts, activations=0, temporary=temporary, peak=wanted)
        return CompiledStep(memory=memory, program=None, seconds=time.perf_counter() - began, over=reason)
    seconds = time.perf_counter() - began
    program = read_program(compiled.as_text(), dict(mesh.shape), turns=turns, room=room)
    analysis = compiled.memory_analysis()
    peak = peak_of(analysis)
    temporary = max(0, peak - sum(parts.values()))
    activations = min(int(program.kept), temporary)
    memory = Memory(**parts, activations=activations, temporary=temporary - activations, peak=peak)
    return CompiledStep(memory=memory, program=program, seconds=seconds)


def measured_peak(step: Callable[..., Any], arguments: tuple[PyTree, ...]) -> int | None:
    """Run a step once on the devices of its arguments' layouts, all of them zeros, and ask how much they held at most.

    None where devices do not tell, as CPUs do not.
    """
    layouts = jax.tree.map(lambda leaf: leaf.sharding, arguments)

    def zeros() -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arguments)

    made = jax.jit(zeros, out_shardings=layouts)()
    devices = {device for layout in jax.tree.leaves(layouts) for device in layout.device_set}
    jax.block_until_ready(step(*made))
    stats = [device.memory_stats() for device in devices]
    return max(each["peak_bytes_in_use"] for each in stats) if all(stats) else None


def peak_of(analysis: Any) -> int:
    """The most that a program holds at once, from `compiled.memory_analysis()`: results take the place of arguments
    that are given up, beside what is temporary."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def held(arguments: tuple[PyTree, ...]) -> dict[str, int]:
    """Bytes on one device of a step's arguments, by what they are."""
    parts = {"parameters": 0, "optimizer": 0, "ema": 0, "other": 0}
    for number, argument in enumerate(arguments):
        leaves = flatten(argument)
        parameters_alone = number == 0 and not any("step" in path.split("/")[:2] for path in leaves)
        for path, leaf in leaves.items():
            part = "parameters" if parameters_alone else _part(path) if number == 0 else "other"
            parts[part] += local_bytes(leaf)
    return parts


def _part(path: str) -> str:
    names = path.split("/")
    if "opt_state" in names:
        return "optimizer"
    if "ema" in names or "averages" in names:
        return "ema"
    return "parameters" if "params" in names else "other"


def local_bytes(leaf: Any) -> int:
    """Bytes of an array's part on one device."""
    layout = getattr(leaf, "sharding", None)
    shape = tuple(leaf.shape) if layout is None else layout.shard_shape(tuple(leaf.shape))
    return math.prod(shape) * leaf.dtype.itemsize


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?\b"
_TEMPORARY = rf"HLO temporaries \({_SIZE}\)"
_WHOLE = rf"(?:Used|allocate|requires?|needs?|total of)[^\d]{{0,40}}{_SIZE}"


def over_the_limit(message: str, *, arguments: int) -> tuple[str, int]:
    """What the compiler says where a program needs more memory than there is: the sentence, and bytes at the peak.

    Args:
      message: of the error.
      arguments: bytes of what the program is given. XLA's compiler for TPUs leaves them out where what is temporary
        is too much alone.
    """
    lines = [line.strip().removeprefix("RESOURCE_EXHAUSTED: ") for line in message.splitlines()]
    for pattern, beside in ((_TEMPORARY, arguments), (_WHOLE, 0)):
        for line in lines:
            if wanted := re.search(pattern, line):
                return line, int(float(wanted[1]) * _UNITS[wanted[2]]) + beside
    return lines[0], 0
