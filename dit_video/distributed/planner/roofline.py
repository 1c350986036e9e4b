"""Lower bounds on the time of a step from the hardware's peak rates (roofline, doi:10.1145/1498765.1498785)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dit_video.distributed.planner.hardware import Topology
from dit_video.distributed.planner.hlo import CollectiveTraffic


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Operations, memory traffic and collectives of a step on one device."""

    flops: float
    """FLOPs that are executed, including recomputation."""
    bytes: float
    """Bytes read from and written to the device's memory."""
    collectives: tuple[CollectiveTraffic, ...]


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds that a step spends on computing, on memory traffic and on collectives."""

    compute: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """Return the seconds of a step if everything overlaps: a lower bound."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def apart(self) -> float:
        """Return the seconds of a step if devices compute nothing while they communicate."""
        return max(self.compute, self.memory) + self.collectives


def compute_step_times(
    work: StepWork, topology: Topology, mesh: Mapping[str, int], *, devices_per_chip: int = 1
) -> StepTimes:
    """Return the times of a step on each device of a topology.

    Collectives run one after the other, each on the links of one torus axis. Collectives of GPUs use NVLink if they
    stay inside its domain, else the network.
    """
    chip, collectives = topology.chip, 0.0
    for part in work.collectives:
        collectives += part.bytes * devices_per_chip / get_link_bandwidth(topology, mesh, part.axes)
    compute, memory = work.flops * devices_per_chip / chip.flops, work.bytes * devices_per_chip / chip.bandwidth
    return StepTimes(compute=compute, memory=memory, collectives=collectives)


def get_link_bandwidth(topology: Topology, mesh: Mapping[str, int], axes: Iterable[str]) -> float:
    """Return the bytes per second that a chip receives from the others along some axes of the mesh.

    Devices of inner axes are adjacent, so that a group extends over its outermost axis and all axes inside it.
    """
    chip, names = topology.chip, list(mesh)
    if chip.nvlink_domain is None:
        return chip.link_bandwidth
    outermost = min((names.index(name) for name in axes if name in mesh), default=0)
    extent = math.prod(mesh[name] for name in names[outermost:])
    return chip.link_bandwidth if extent <= chip.nvlink_domain else min(chip.link_bandwidth, chip.network_bandwidth)
