"""How long a step takes at the least, by what the hardware can do (roofline, doi:10.1145/1498765.1498785)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dit_video.distributed.planner.hardware import Topology
from dit_video.distributed.planner.hlo import Moved


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does on one device."""

    flops: float
    """executed"""
    bytes: float
    """read from its memory and written to it"""
    moved: tuple[Moved, ...]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step."""

    compute: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """If all goes on at once: no step is faster."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def apart(self) -> float:
        """If devices wait for collectives while they compute nothing."""
        return max(self.compute, self.memory) + self.collectives


def step_times(work: Work, topology: Topology, mesh: Mapping[str, int], *, devices_per_chip: int = 1) -> Times:
    """The times of a step on each device of a topology.

    Collectives of different axes follow each other, each on the links of one axis of a torus, whichever it is. Of GPUs
    those that stay inside a domain take NVLink, others the network.
    """
    chip = topology.chip
    return Times(
        compute=work.flops * devices_per_chip / chip.flops,
        memory=work.bytes * devices_per_chip / chip.bandwidth,
        collectives=sum(
            (part.bytes * devices_per_chip / link_of(topology, mesh, part.axes) for part in work.moved), start=0.0
        ),
    )


def link_of(topology: Topology, mesh: Mapping[str, int], axes: Iterable[str]) -> float:
    """Bytes a second that a chip gets from the others along these axes of the mesh.

    Axes that lie further in have their devices side by side: a group reaches as far as its outermost axis and all
    axes inside that.
    """
    chip, names = topology.chip, list(mesh)
    if chip.domain is None:
        return chip.link
    outermost = min((names.index(name) for name in axes if name in mesh), default=0)
    reach = 1
    for name in names[outermost:]:
        reach *= mesh[name]
    return chip.link if reach <= chip.domain else min(chip.link, chip.network)
