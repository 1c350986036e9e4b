"""Report of a compiled step: attention kernels, dtypes of products, recomputation, collectives, and the peak of MFU."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.hlo import ATTENTION_KERNELS, AttentionCall, CollectiveTraffic, Program, read_program
from dit_video.core.memory import format_bytes
from dit_video.core.platform.chips import Chip, find_chip
from dit_video.core.platform.xla_flags import find_unchecked_release, get_flags
from dit_video.distributed.mesh import get_axis_slices
from dit_video.training.hooks.hook import Hook

PROGRAM_FILE = "program.json"
"""File of the report in the folder of a training."""
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """Report of a compiled step on each device, with warnings, such as of attention without its backend's kernel."""

    attention: dict[str, dict[str, int]]
    """Calls of kernels by use of attention, such as `self, Full: cudnn`; empty for attention in plain XLA."""
    kernels: dict[str, int]
    """Calls of all kernels by name."""
    products: dict[str, float]
    """Shares of the FLOPs of products by dtype."""
    recomputed: float
    """Share of the FLOPs of products that repeats the forward pass, as remat asks."""
    moved: tuple[CollectiveTraffic, ...] | None
    """Bytes that each device receives by collective and mesh axes; None of a program that was not compiled."""
    flags: dict[str, str]
    """Flags by environment variable."""
    peak: float | None
    """Peak FLOPs per second of a device, against which MFU is counted; None if it is unknown."""
    peak_source: str
    warnings: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the lines of a table."""
        for use, kernels in self.attention.items():
            yield f"attention      {use}, {_format_calls(kernels) or 'without a kernel'}"
        yield f"kernels        {_format_calls(self.kernels) or 'none'}"
        shares = [f"{share:.1%} {dtype}" for dtype, share in self.products.items()]
        yield f"products       {', '.join(shares) or 'none'}; {self.recomputed:.1%} recomputed"
        yield from map(format_traffic, self.moved or ())
        yield f"flags          {' '.join(self.flags.values()) or 'none'}"
        peak = "unknown, so that there is no MFU" if self.peak is None else f"{self.peak / 1e12:,.4g} TFLOP/s a device"
        yield f"peak           {peak}{self.peak_source and f': {self.peak_source}'}"
        for warning in self.warnings:
            yield f"warning: {warning}"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def get_metrics(self) -> dict[str, float]:
        """Return the numbers for the log of metrics."""
        metrics: dict[str, float] = {
            "program_kernel_calls": sum(self.kernels.values()),
            "program_recomputed": self.recomputed,
            **{f"program_products_{dtype.replace(' ', '_')}": share for dtype, share in self.products.items()},
        }
        for part in self.moved or ():
            name = f"program_bytes_{'_'.join(part.axes).replace(' ', '_')}"
            metrics[name] = metrics.get(name, 0.0) + part.bytes
        return metrics | ({} if self.peak is None else {"program_peak_flops": self.peak})

    def write(self, folder: Path) -> None:
        """Write `program.json` into the folder of a training."""
        write_json(folder / PROGRAM_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "ProgramReport | None":
        """Return the report of a training; None if it has none, or one that is damaged or of another version."""
        path = folder / PROGRAM_FILE
        if not path.is_file():
            return None
        try:
            values = read_json(path)
            if (moved := values["moved"]) is not None:
                moved = tuple(CollectiveTraffic(**each | {"axes": tuple(each["axes"])}) for each in moved)
            return cls(**values | {"moved": moved, "warnings": tuple(values["warnings"])})
        except (UserError, OSError, LookupError, TypeError):
            return None


def format_traffic(part: CollectiveTraffic) -> str:
    """Return the line of a collective in a table."""
    axes = " x ".join(part.axes).replace("part of x ", "part of ")
    network = " between slices" if part.between_slices else ""
    return f"{part.kind:<18} over {axes:<18} {format_bytes(part.bytes):>10}, {part.count} times{network}"


def describe_program(
    program: Program,
    mesh: Mapping[str, int],
    platform: str,
    chip: Chip | None,
    *,
    flags: Mapping[str, str | None] | None = None,
    is_compiled: bool = True,
) -> ProgramReport:
    """Return what a program runs on the devices of a mesh.

    Args:
      program: The program, as `read_program` read it.
      mesh: Sizes of the mesh's axes by name.
      platform: Name of its devices' platform in JAX.
      chip: Chip of its devices; None if it is not in the table.
      flags: Flags by environment variable; those of this process by default.
      is_compiled: False for a program that was lowered only: its collectives are not known.
    """
    parts = (*program.collectives.values(), *program.slice_transfers.values())
    moved = tuple(sorted(parts, key=lambda part: -part.bytes)) if is_compiled else None
    uses = sorted(program.attention.items())
    return ProgramReport(
        attention={f"{use.kind}, {use.pattern}: {use.backend}": dict(kernels) for use, kernels in uses},
        kernels=dict(_sort_by_value(program.kernels)),
        products={dtype: flops / program.flops for dtype, flops in _sort_by_value(program.product_flops)},
        recomputed=program.recomputed_flops / program.flops if program.flops else 0.0,
        moved=moved,
        flags={name: text for name, text in (get_flags() if flags is None else flags).items() if text},
        peak=None if chip is None else chip.flops / chip.device_count,
        peak_source="" if chip is None else chip.source,
        warnings=tuple(_find_problems(uses, mesh, moved, platform)),
    )


class ProgramLog(Hook):
    """Report of each program that a training compiles: on stderr, in `program.json`, and in the metrics after it."""

    first_process_only = True

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self._folder, self._mesh = folder, mesh
        self._printed: set[str] = set()
        self._metrics: dict[str, float] = {}

    def observe(self, compiled: jax.stages.Compiled) -> None:
        """Report a compiled step. Lines that an earlier program has, of a batch of other shapes, are left out."""
        shape, device = dict(self._mesh.shape), self._mesh.devices.flat[0]
        program = read_program(compiled.as_text() or "", shape, slices=get_axis_slices(self._mesh))
        report = describe_program(program, shape, device.platform, find_chip(device))
        report.write(self._folder)
        self._metrics = report.get_metrics()
        for line in report.lines():
            if line not in self._printed:
                print(f"  {line}", file=sys.stderr)
        self._printed.update(report.lines())

    def derive(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of the newest program, if it is new."""
        del values
        metrics, self._metrics = self._metrics, {}
        return metrics


def _find_problems(
    uses: Sequence[tuple[AttentionCall, Mapping[str, int]]],
    mesh: Mapping[str, int],
    moved: Sequence[CollectiveTraffic] | None,
    platform: str,
) -> Iterator[str]:
    for use, kernels in uses:
        wanted = ATTENTION_KERNELS.get(use.backend, ())
        name = f"{use.kind}-attention of the pattern {use.pattern}"
        if wanted and not any(kernel.startswith(wanted) for kernel in kernels):
            yield f"{name} was to be that of {use.backend}, but the program has none of its kernels"
        if use.backend == "chunked" and platform != "cpu":
            yield f"{name} has no kernel: this {platform.upper()} has none for its pattern, dtype or order of tokens"
    for axis, size in mesh.items():
        if moved is not None and size > 1 and not any(axis in part.axes for part in moved):
            yield f"the mesh axis {axis} has {size} devices, but nothing is moved along it"
    if (release := find_unchecked_release(platform)) is not None:
        yield f"no flags of XLA are set for {release}, with which none was checked"


def _format_calls(kernels: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count} times" for name, count in kernels.items())


def _sort_by_value(values: Mapping[str, _Number]) -> list[tuple[str, _Number]]:
    return sorted(values.items(), key=lambda item: -item[1])
