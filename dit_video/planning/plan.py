"""A plan: memory, time and communication of a step on a topology, as a table and as JSON."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dit_video.core.memory import format_bytes
from dit_video.planning.compiled_program import MemoryUsage
from dit_video.planning.efficiencies import COLLECTIVES, MEMORY, PRODUCTS, Efficiencies, name_attention_work
from dit_video.planning.hlo import CollectiveTraffic
from dit_video.planning.lower_bounds import Purpose, sum_collective_bytes
from dit_video.planning.roofline import StepTimes
from dit_video.planning.steps import Part
from dit_video.planning.topology import Topology

_ANALYTIC = "analytic: counted, not compiled"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, time and communication of a part of an experiment on a topology."""

    experiment: str
    part: Part
    topology: Topology
    devices: int
    mesh: dict[str, int]
    rows: int
    """Number of rows of a step, on all devices."""
    clips: tuple[int, ...]
    """Number of tokens of each clip of a row."""
    remat: str
    parameter_count: int
    method: Literal["compiled", "analytic"]
    fits: bool
    overflow: str | None
    """The compiler's reason, where the step does not fit."""
    memory: MemoryUsage
    limit: int
    """Number of bytes of a device's memory."""
    model_flops: int
    executed_flops: float
    hbm_bytes: float
    """Number of bytes that each device reads and writes in a step."""
    moved: tuple[CollectiveTraffic, ...]
    min_bytes_moved: dict[Purpose, float]
    """Lower bound on the bytes that must be moved for weights, over `fsdp` x `context`, and for attention, over
    `context`, where the program was compiled and trains all weights."""
    times: StepTimes | None
    """Times of a step at the chips' peak rates, which are limits; None where it does not fit."""
    attention: str | None
    """Name of the attention backend that was compiled or counted; None of a step without attention."""
    efficiencies: Efficiencies
    """Shares of the peak rates that are expected."""
    expected: StepTimes | None
    """Expected times of a step, whose seconds are `scheduled`; None where it does not fit, or shares are unknown."""
    compile_seconds: float
    unknown_loops: int
    device_peak: int | None
    """Peak memory of this process's devices, where the step is planned and run on them."""
    steps: int
    price: float | None
    """Price of a chip for an hour, in dollars."""
    warning: str | None = None
    """Warning about slices that do not lie along `data`."""

    @property
    def seconds(self) -> float | None:
        """Return the seconds of a step by the roofline with everything overlapping: a lower bound."""
        return None if self.times is None else self.times.overlapped

    def mfu(self, seconds: float) -> float:
        """Return the share of the chips' peak that the model's own operations use, if a step takes `seconds`."""
        return self.model_flops / (seconds * self.topology.num_chips * self.topology.chip.flops)

    @property
    def intensity(self) -> float | None:
        """Return the operations per byte of a device's memory traffic; None of a program that was not compiled."""
        return self.executed_flops / self.devices / self.hbm_bytes if self.hbm_bytes else None

    def chip_hours(self, seconds: float) -> float:
        """Return the chip-hours of all steps, if each takes `seconds`."""
        return self.steps * seconds * self.topology.num_chips / 3600

    def to_json(self) -> dict[str, Any]:
        """Return the whole plan, in bytes, operations and seconds."""
        chip = dataclasses.asdict(self.topology.chip)
        plan = dataclasses.asdict(self) | {"topology": str(self.topology), "chip": chip, "intensity": self.intensity}
        plan |= {"expected": None, "efficiencies": plan["efficiencies"]["by_work"]}
        for name, _, seconds in self._list_seconds():
            hours = self.chip_hours(seconds)
            price = None if self.price is None else self.price * hours
            plan[name] = {"seconds": seconds, "mfu": self.mfu(seconds), "chip_hours": hours, "price": price}
        return plan

    def _list_seconds(self) -> Iterator[tuple[str, str, float]]:
        """Yield the name, the label and the seconds of each time of a step."""
        if self.times is not None:
            yield "overlapped", "limit, all at once", self.times.overlapped
            yield "apart", "limit, one by one", self.times.apart
        if self.expected is not None:
            yield "expected", "expected", self.expected.scheduled

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        chip = self.topology.chip
        mesh = " ".join(f"{name}={size}" for name, size in self.mesh.items() if size > 1) or "one device"
        yield f"{self.experiment}: {self.part}, {self.parameter_count / 1e9:.3g} billion parameters"
        clips = " + ".join(f"{self.clips.count(size)}x{size:,}" for size in dict.fromkeys(self.clips))
        rows = f"{self.rows} rows" + (f" of {clips} tokens" if self.part != "autoencoder" else "")
        remat = f"; remat {self.remat}" if self.part == "denoiser" else ""
        attention = "" if self.attention is None else f"; {self.attention} attention"
        yield f"  on {self.topology}, {self.devices} devices, mesh {mesh}; {rows}{remat}{attention}"
        verdict = "fits" if self.fits else "does not fit"
        method = f"compiled in {self.compile_seconds:.0f} s" if self.method == "compiled" else _ANALYTIC
        yield f"  {verdict}: {format_bytes(self.memory.peak)} of {format_bytes(self.limit)} on each device ({method})"
        if self.overflow:
            yield f"    {self.overflow}"
        for name in ("parameters", "optimizer", "ema", "other", "activations", "temporary"):
            yield f"    {name:<12} {format_bytes(getattr(self.memory, name)):>10}"
        if self.device_peak is not None:
            yield f"    {'measured':<12} {format_bytes(self.device_peak):>10}"
        operations = f"{self.model_flops / 1e12:,.4g} TFLOP of the model, {self.executed_flops / 1e12:,.4g} executed"
        yield f"  operations     {operations}"
        if self.intensity is not None:
            traffic = f"{format_bytes(self.hbm_bytes)} on each device, {self.intensity:.0f} operations a byte"
            yield f"  memory traffic {traffic}"
        if self.unknown_loops:
            yield f"    {self.unknown_loops} loops with data-dependent length are counted as one iteration"
        for part in self.moved:
            axes = " x ".join(part.axes).replace("part of x ", "part of ")
            network = " between slices" if part.between_slices else ""
            yield f"  {part.kind:<18} over {axes:<18} {format_bytes(part.bytes):>10}, {part.count} times{network}"
        for purpose, lower_bound in self.min_bytes_moved.items():
            moved_bytes = sum_collective_bytes(purpose, self.moved)
            ratio = f"{moved_bytes / lower_bound:.2f} times the least"
            yield f"  in all for {purpose:<19} {format_bytes(moved_bytes):>10}, {ratio}"
        if self.warning:
            yield f"  warning: {self.warning}"
        if self.times is not None:
            yield from self._format_times(self.times)
        yield f"  hardware: {chip.source}{self._price_source()}"

    def _format_times(self, times: StepTimes) -> Iterator[str]:
        unit, units = ("batch", "batches") if self.part == "sampler" else ("step", "steps")
        for label, each in (("limits of", times), ("expected", self.expected)):
            if each is not None:
                shares = f"{each.compute:.4g} computing, {each.memory:.4g} memory, {each.collectives:.4g} collectives"
                yield f"  {label} seconds a {unit}: {shares}"
        workload = f"{self.steps:,} {unit if self.steps == 1 else units}"
        for _, label, seconds in self._list_seconds():
            hours = self.chip_hours(seconds)
            cost = "" if self.price is None else f", ${_format_number(self.price * hours)} at ${self.price:.2f} an hour"
            needs = f"{workload}: {_format_number(hours)} chip-hours{cost}"
            yield f"    {label:<20} {seconds:.4g} s, MFU {self.mfu(seconds):.1%}; {needs}"
        yield from self._format_efficiencies()

    def _format_efficiencies(self) -> Iterator[str]:
        """Yield what the expected times assume, or why there are none."""
        kinds = ["convolutions"] if self.part == "autoencoder" else [PRODUCTS]
        if self.attention is not None:
            kinds.append(name_attention_work(self.attention))
        unknown = [work for work in kinds if self.efficiencies.get_share(work) is None]
        if unknown:
            chip, works = self.topology.chip.name, " and ".join(unknown)
            yield f"    nothing is expected: no speed of {works} on {chip} is known. Use --calibrate on one"
            return
        for work in (*kinds, MEMORY, COLLECTIVES):
            if (each := self.efficiencies.by_work.get(work)) is not None:
                yield f"    {work} at {each.share:.1%} of the peak: {each.source}"
            else:
                yield f"    {work} at the peak, as no speed is known"

    def _price_source(self) -> str:
        chip = self.topology.chip
        if self.price is None:
            return f"; no public price of {chip.name} is known: set one with --price"
        return f"; price: {chip.price_source}" if self.price == chip.hourly_price else ""


def _format_number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
