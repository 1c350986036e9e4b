"""Ahead-of-time compilation of a step, for devices that need not be attached."""

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dit_video.core.hlo import Program, read_program
from dit_video.core.offload import HOST
from dit_video.core.platform.chips import find_chip
from dit_video.core.platform.xla_flags import get_compiler_options
from dit_video.core.trees import flatten


@dataclass(frozen=True, kw_only=True)
class MemoryUsage:
    """Memory of a step, in bytes on the device that needs the most."""

    parameters: int
    optimizer: int
    ema: int
    other: int
    """Bytes of other state and inputs: the batch, frozen weights, codebooks."""
    activations: int
    """Bytes that the forward pass saves for the backward pass; counted as `temporary` if layers are not scanned."""
    temporary: int
    """Bytes of temporaries: gradients, gathered weights, the layer being computed."""
    peak: int
    """Maximum of the bytes in use at any time."""

    @property
    def state(self) -> int:
        """Return the bytes that stay allocated between steps."""
        return self.parameters + self.optimizer + self.ema + self.other


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Memory and operations of a step, as the compiler reports them."""

    memory: MemoryUsage
    program: Program | None
    """Operations of the program; None if it does not fit into memory and was not compiled."""
    compile_seconds: float
    """Seconds that compilation took."""
    oom_message: str | None = None
    """Error message of the compiler if the program does not fit into memory, else None."""
    executable: jax.stages.Compiled | None = None
    """The compiled step, which runs where its devices are attached; None if it was not compiled."""


@contextlib.contextmanager
def override_default_backend(platform: str) -> Iterator[None]:
    """Override JAX's default backend in a context: layers choose their loops and kernels by it."""
    with _replace(jax, "default_backend", lambda: platform):
        yield


@contextlib.contextmanager
def assume_hopper() -> Iterator[None]:
    """Let JAX lower cuDNN's kernels as on a Hopper GPU, which it would ask for its version and its capability."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with (
        _replace(cudnn, "check_cudnn_version", lambda: 91500),
        _replace(cudnn, "check_compute_capability", lambda capability: True),
        _replace(cudnn, "is_cuda_compute_capability_equal", lambda capability: False),
    ):
        yield


@contextlib.contextmanager
def _replace(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of a module inside the context."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def compile_step(
    step: Callable[..., Any],
    arguments: tuple[PyTree, ...],
    mesh: jax.sharding.Mesh,
    *,
    slices: Mapping[str, int] | None = None,
    outer_trip_count: int = 1,
    max_outer_trip_count: int | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> CompiledStep:
    """Compile a jitted step for the devices of a mesh, and read its memory and operations.

    Args:
      step: Jitted function whose first argument is a state with parts named `step`, `params`, `ema` and `opt_state`
        (possibly one state per player), or bare parameters.
      arguments: Shapes and shardings of the arguments (`jax.ShapeDtypeStruct`).
      mesh: Mesh of attached devices, or of devices that libtpu describes.
      slices: Number of slices along each axis of the mesh; None for a single slice.
      outer_trip_count: Assumed iterations of an outermost loop with a data-dependent end; see `read_program`.
      max_outer_trip_count: Upper bound of that loop's iterations.
      compiler_options: Further options of XLA, besides those of runs.
    """
    platform, chip = mesh.devices.flat[0].platform, find_chip(mesh.devices.flat[0])
    options = get_compiler_options(chip.name) if platform == "tpu" and chip is not None else {}
    options |= compiler_options or {}
    start = time.perf_counter()
    with override_default_backend(platform):
        lowered = step.trace(*arguments).lower(lowering_platforms=(platform,))  # type: ignore[attr-defined]
    state_bytes = count_argument_bytes(arguments)
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason, required = parse_oom_message(str(error), argument_bytes=sum(state_bytes.values()))
        temporary = max(0, required - sum(state_bytes.values()))
        memory = MemoryUsage(**state_bytes, activations=0, temporary=temporary, peak=required)
        seconds = time.perf_counter() - start
        return CompiledStep(memory=memory, program=None, compile_seconds=seconds, oom_message=reason)
    seconds = time.perf_counter() - start
    trips: dict[str, Any] = {"outer_trip_count": outer_trip_count, "max_outer_trip_count": max_outer_trip_count}
    program = read_program(compiled.as_text(), dict(mesh.shape), slices=slices, **trips)
    analysis = compiled.memory_analysis()
    peak = compute_peak_memory(analysis)
    temporary = max(0, peak - sum(state_bytes.values()))
    activations = min(int(program.saved_bytes), temporary)
    memory = MemoryUsage(**state_bytes, activations=activations, temporary=temporary - activations, peak=peak)
    return CompiledStep(memory=memory, program=program, compile_seconds=seconds, executable=compiled)


def measure_peak_memory(step: Callable[..., Any], arguments: tuple[PyTree, ...]) -> int | None:
    """Run a step once on the devices of its arguments' shardings, with zeros, and return their peak memory in bytes.

    Returns None if the devices don't report it, as CPUs don't.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)

    def zeros() -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arguments)

    values = jax.jit(zeros, out_shardings=shardings)()
    devices = {device for sharding in jax.tree.leaves(shardings) for device in sharding.device_set}
    jax.block_until_ready(step(*values))
    stats = [device.memory_stats() for device in devices]
    return max(device_stats["peak_bytes_in_use"] for device_stats in stats) if all(stats) else None


def compute_peak_memory(analysis: Any) -> int:
    """Return a program's peak memory in bytes, from `compiled.memory_analysis()`.

    Donated arguments are counted once, as results take their place.
    """
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes


def count_argument_bytes(arguments: tuple[PyTree, ...]) -> dict[str, int]:
    """Return the bytes of a step's arguments on one device, by kind: parameters, optimizer, ema, other."""
    sizes = {"parameters": 0, "optimizer": 0, "ema": 0, "other": 0}
    for number, argument in enumerate(arguments):
        leaves = flatten(argument)
        bare_parameters = number == 0 and not any("step" in path.split("/")[:2] for path in leaves)
        for path, leaf in leaves.items():
            kind = "parameters" if bare_parameters else _classify_leaf(path) if number == 0 else "other"
            sizes[kind] += count_local_bytes(leaf)
    return sizes


def _classify_leaf(path: str) -> str:
    names = path.split("/")
    if "opt_state" in names:
        return "optimizer"
    if "ema" in names or "averages" in names:
        return "ema"
    return "parameters" if "params" in names else "other"


def count_local_bytes(leaf: Any) -> int:
    """Return the bytes of an array's shard on one device; 0 of an array in host memory."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and sharding.memory_kind == HOST:
        return 0
    shape = tuple(leaf.shape) if sharding is None else sharding.shard_shape(tuple(leaf.shape))
    return math.prod(shape) * leaf.dtype.itemsize


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


_SIZE_PATTERN = r"([\d.]+)\s*([KMGT]?)i?B?\b"
_TEMPORARY_PATTERN = rf"HLO temporaries \({_SIZE_PATTERN}\)"
_TOTAL_PATTERN = rf"(?:Used|allocate|requires?|needs?|total of)[^\d]{{0,40}}{_SIZE_PATTERN}"


def parse_oom_message(message: str, *, argument_bytes: int) -> tuple[str, int]:
    """Parse the compiler's out-of-memory message and return its main sentence and the required peak memory in bytes.

    Args:
      message: Message of the compiler's error.
      argument_bytes: Bytes of the program's arguments. XLA's TPU compiler leaves them out of the message if the
        temporaries alone exceed the memory.
    """
    lines = [line.strip().removeprefix("RESOURCE_EXHAUSTED: ") for line in message.splitlines()]
    for pattern, extra in ((_TEMPORARY_PATTERN, argument_bytes), (_TOTAL_PATTERN, 0)):
        for line in lines:
            if size := re.search(pattern, line):
                return line, int(float(size[1]) * _UNITS[size[2]]) + extra
    return lines[0], 0
