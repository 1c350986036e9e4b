"""Time of a step: lower bounds from the hardware's peak rates (roofline, doi:10.1145/1498765.1498785), and estimates.

An estimate divides each peak rate by the share of it that was measured, on this chip and for this kind of work.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from dit_video.core.hlo import CollectiveTraffic
from dit_video.planning.hardware import Topology


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Operations, memory traffic and collectives of a step on one device."""

    flops: float
    """FLOPs that are executed, including recomputation."""
    bytes: float
    """Bytes read from and written to the device's memory."""
    collectives: tuple[CollectiveTraffic, ...]
    attention_flops: float = 0.0
    """Part of `flops` that attention executes."""
    attention: str | None = None
    """Name of the attention backend; None without attention."""

    def repeat(self, count: int) -> "StepWork":
        """Return the work of several such steps."""
        collectives = tuple(
            replace(part, bytes=part.bytes * count, count=part.count * count) for part in self.collectives
        )
        flops, attention_flops = self.flops * count, self.attention_flops * count
        return replace(
            self, flops=flops, bytes=self.bytes * count, collectives=collectives, attention_flops=attention_flops
        )


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds that a step spends on computing, on memory traffic and on collectives."""

    compute: float
    memory: float
    collectives: float
    blocking: float = 0.0
    """Part of `collectives` on whose results the next product waits: exchanges of tokens, and sums over `tensor`."""

    @property
    def overlapped(self) -> float:
        """Return the seconds of a step if everything overlaps."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def apart(self) -> float:
        """Return the seconds of a step if devices compute nothing while they communicate."""
        return max(self.compute, self.memory) + self.collectives

    @property
    def scheduled(self) -> float:
        """Return the seconds of a step if only collectives of weights and gradients, and the ring, overlap."""
        return max(self.compute, self.memory, self.collectives - self.blocking) + self.blocking


PRODUCTS, MEMORY, COLLECTIVES = "products", "memory", "collectives"
"""Kinds of work besides attention, as keys of the tables: products of dense matrices, copies in the device's memory,
collectives."""


def name_attention_work(backend: str) -> str:
    """Return the kind of work of an attention backend, as a key of the tables."""
    return f"{backend} attention"


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """A share of a peak rate, and its source."""

    share: float
    """Executed operations, or bytes, per second, in units of the chip's peak."""
    source: str
    """Publication, or date and device of the measurement."""


@dataclass(frozen=True, kw_only=True)
class Efficiencies:
    """Efficiencies of a chip by kind of work."""

    by_work: Mapping[str, Efficiency] = field(default_factory=dict)

    def get_share(self, work: str) -> float | None:
        """Return the share of a kind of work; None if none is known."""
        return self.by_work[work].share if work in self.by_work else None

    def update(self, measured: "Efficiencies") -> "Efficiencies":
        """Return these efficiencies, with measured ones instead of published ones."""
        return Efficiencies(by_work={**self.by_work, **measured.by_work})


def compute_step_times(
    work: StepWork, topology: Topology, mesh: Mapping[str, int], *, devices_per_chip: int = 1
) -> StepTimes:
    """Return the times of a step on each device of a topology at the chips' peak rates: limits, which no run reaches.

    Collectives run one after the other, each on the links of one torus axis. Collectives of GPUs use NVLink if they
    stay inside its domain, else the network. Collectives between TPU slices use the network.
    """
    chip, collectives, blocking = topology.chip, 0.0, 0.0
    for part in work.collectives:
        bandwidth = chip.network_bandwidth if part.between_slices else get_link_bandwidth(topology, mesh, part.axes)
        seconds = part.bytes * devices_per_chip / bandwidth
        collectives += seconds
        blocking += seconds * (part.kind == "all-to-all" or "tensor" in part.axes)
    compute, memory = work.flops * devices_per_chip / chip.flops, work.bytes * devices_per_chip / chip.bandwidth
    return StepTimes(compute=compute, memory=memory, collectives=collectives, blocking=blocking)


def compute_expected_times(
    work: StepWork,
    efficiencies: Efficiencies,
    topology: Topology,
    mesh: Mapping[str, int],
    *,
    devices_per_chip: int = 1,
) -> StepTimes | None:
    """Return the expected times of a step, at measured shares of the chips' peak rates; `scheduled` is its seconds.

    Memory traffic and collectives count at their peak rates where no share of them is known.

    Returns:
      None if no share is known of the matrix products or of the attention.
    """
    limits = compute_step_times(work, topology, mesh, devices_per_chip=devices_per_chip)
    products = efficiencies.get_share(PRODUCTS)
    attention = 1.0
    if work.attention_flops:
        share = None if work.attention is None else efficiencies.get_share(name_attention_work(work.attention))
        if share is None:
            return None
        attention = share
    if products is None:
        return None
    memory, links = efficiencies.get_share(MEMORY) or 1.0, efficiencies.get_share(COLLECTIVES) or 1.0
    executed = (work.flops - work.attention_flops) / products + work.attention_flops / attention
    return StepTimes(
        compute=executed * devices_per_chip / topology.chip.flops,
        memory=limits.memory / memory,
        collectives=limits.collectives / links,
        blocking=limits.blocking / links,
    )


def get_link_bandwidth(topology: Topology, mesh: Mapping[str, int], axes: Iterable[str]) -> float:
    """Return the bytes per second that a chip receives from the others of its slice along some axes of the mesh.

    Devices of inner axes are adjacent, so that a group extends over its outermost axis and all axes inside it.
    """
    chip, names = topology.chip, list(mesh)
    if chip.nvlink_domain is None:
        return chip.link_bandwidth
    outermost = min((names.index(name) for name in axes if name in mesh), default=0)
    extent = math.prod(mesh[name] for name in names[outermost:])
    return chip.link_bandwidth if extent <= chip.nvlink_domain else min(chip.link_bandwidth, chip.network_bandwidth)
