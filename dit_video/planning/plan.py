"""Plans of experiments: memory, time and communication of a step on a topology, as a table and as JSON."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from dit_video.core.errors import UserError
from dit_video.core.hlo import CollectiveTraffic
from dit_video.core.memory import format_bytes
from dit_video.core.platform.chips import find_chip
from dit_video.core.trees import count_values as count
from dit_video.core.trees import flatten
from dit_video.distributed import MeshPartitioner, check_denoiser, make_abstract_partitioner, make_partitioner
from dit_video.distributed.mesh import AnyMesh, count_axis_slices, describe_slow_axes
from dit_video.experiment import Experiment, LoraAdapters, Student
from dit_video.planning.compiled_program import (
    CompiledStep,
    MemoryUsage,
    compile_step,
    count_argument_bytes,
    measure_peak_memory,
)
from dit_video.planning.costs import (
    Purpose,
    compute_min_collective_bytes,
    count_context_weights,
    estimate_step,
    read_step_work,
    sum_collective_bytes,
)
from dit_video.planning.efficiencies import find_efficiencies
from dit_video.planning.hardware import Topology
from dit_video.planning.planned_program import describe_planned_program
from dit_video.planning.roofline import (
    COLLECTIVES,
    MEMORY,
    PRODUCTS,
    Efficiencies,
    StepTimes,
    StepWork,
    compute_expected_times,
    compute_step_times,
    name_attention_work,
)
from dit_video.planning.steps import Part, PlannedStep, fill_row, plan_step
from dit_video.training.program_report import ProgramReport, format_traffic

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
    program: ProgramReport | None = None
    """What the program runs; None if it is not known."""

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
        is_compiled = self.program is not None and self.program.moved is not None
        lines = map(format_traffic, () if is_compiled else self.moved)
        for line in itertools.chain(lines, () if self.program is None else self.program.lines()):
            yield f"  {line}"
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


def find_devices(topology: Topology) -> tuple[list[Any], bool]:
    """Return the devices of a topology, and whether a program can be compiled for them.

    TPUs are described by libtpu. GPUs, and CPUs, have to be present: else the host's own devices stand for them, and
    costs are counted instead of compiled.
    """
    chip = topology.chip
    if chip.kind == "tpu":
        return topology.get_devices(), True
    local_devices = jax.devices()
    is_present = local_devices[0].platform == "cpu" if chip.kind == "cpu" else find_chip(local_devices[0]) == chip
    if len(local_devices) >= topology.num_chips and is_present:
        return list(local_devices[: topology.num_chips]), True
    return [], False


def check_memory(memory: int | None, available: int, topology: Topology) -> int:
    """Return the bytes that a device may use: `memory`, or all of its memory by default.

    Raises:
      UserError: If the memory is not within the device's.
    """
    if memory is None:
        return available
    if not 0 < memory <= available:
        rule, fix = f"a device of {topology} has {format_bytes(available)}", f"Use {available // 2**20}MiB or less"
        raise UserError(f"a memory of {format_bytes(memory)} is invalid: {rule}. {fix}")
    return memory


def make_plan_partitioner(experiment: Experiment, topology: Topology, part: Part) -> tuple[MeshPartitioner, bool]:
    """Return what a run's models are made with on a topology, and whether a program can be compiled for it.

    Raises:
      UserError: If the axes do not divide the devices, or rows, heads or tokens are not divisible by these.
    """
    devices, present = find_devices(topology)
    if present:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slices: the plan says it
            partitioner = make_partitioner(experiment.parallel, devices)
    else:
        partitioner = make_abstract_partitioner(experiment.parallel, topology.num_chips)
    if part != "autoencoder":
        check_devices(experiment, partitioner)
    return partitioner, present


def check_devices(experiment: Experiment, partitioner: MeshPartitioner) -> None:
    """Check that a training's rows, heads and tokens are divisible by the devices of a mesh.

    Raises:
      UserError: If one is not; the message says what would be.
    """
    denoiser, model = experiment.denoiser, experiment.get_model()
    rows = denoiser.batch // denoiser.accumulation_steps
    check_denoiser(partitioner, model.backbone, rows=rows, tokens=model.row_shape.tokens)


def plan_experiment(
    experiment: Experiment,
    topology: Topology,
    *,
    part: Part = "denoiser",
    clips: int | None = None,
    steps: int | None = None,
    price: float | None = None,
    measure: bool = False,
    efficiencies: Efficiencies | None = None,
    is_lowered: bool = True,
) -> Plan:
    """Compile a part of an experiment for a topology, and return what it needs.

    Args:
      experiment: The experiment.
      topology: The hardware.
      part: The step to plan.
      clips: Number of equally long clips in each row; by default as many of the largest as fit.
      steps: Number of steps to pay for; the experiment's by default. For a sampler, batches, by default one.
      price: Price of a chip for an hour, instead of the table's.
      measure: True to run a step and measure the devices' peak memory, where the hardware is present.
      efficiencies: Measured shares of the chip's peak rates; the published ones by default.
      is_lowered: False to leave out the program of GPUs that are not present.

    Raises:
      MissingError: If libtpu is needed and not installed.
      UserError: If the axes do not divide the devices, the rows or the heads, or the part cannot be planned.
    """
    chip = topology.chip
    partitioner, present = make_plan_partitioner(experiment, topology, part)
    mesh = partitioner.mesh
    if part == "autoencoder" and not present:
        raise UserError(f"an autoencoder is planned by compiling: run this on {topology}, or plan for a TPU")
    rows_of_clips = fill_row(experiment, clips)
    planned = plan_step(experiment, part, partitioner, clips=rows_of_clips, platform=chip.platform)
    devices, mesh_shape = mesh.size, dict(mesh.shape)
    slices = count_axis_slices(experiment.parallel, devices, topology.slices)
    limit = chip.usable_memory * topology.num_chips // devices  # devices of one chip share its memory
    memory, work, compiled = _count_work(planned, mesh, slices, is_compiled=present)
    over = None if compiled is None else compiled.oom_message
    fits = over is None and memory.peak <= limit
    per_chip = devices // topology.num_chips
    efficiencies = find_efficiencies(chip) if efficiencies is None else efficiencies
    times = compute_step_times(work, topology, mesh_shape, devices_per_chip=per_chip)
    expected = compute_expected_times(work, efficiencies, topology, mesh_shape, devices_per_chip=per_chip)
    has_lower_bounds = work.collectives and present and part == "denoiser"
    lower_bounds = _compute_lower_bounds(experiment, planned, partitioner) if has_lower_bounds else {}
    if steps is None:
        training = experiment.autoencoder if part == "autoencoder" else experiment.denoiser
        steps = 1 if part == "sampler" else int(getattr(training, "steps", 1))
    return Plan(
        experiment=experiment.name,
        part=part,
        topology=topology,
        devices=devices,
        mesh=mesh_shape,
        rows=planned.arguments[1].shape[0] if planned.costs is None else planned.costs.rows,
        clips=tuple(rows_of_clips),
        remat=experiment.get_model().backbone.remat if part == "denoiser" else "none",
        parameter_count=_count_parameters(planned),
        method="compiled" if present else "analytic",
        fits=fits,
        overflow=over,
        memory=memory,
        limit=limit,
        model_flops=planned.model_flops,
        executed_flops=work.flops * devices,
        hbm_bytes=work.bytes,
        moved=work.collectives,
        min_bytes_moved=lower_bounds,
        times=times if over is None else None,
        attention=work.attention,
        efficiencies=efficiencies,
        expected=expected if over is None and part != "autoencoder" else None,
        compile_seconds=0.0 if compiled is None else compiled.compile_seconds,
        unknown_loops=0 if compiled is None or compiled.program is None else compiled.program.unknown_loops,
        device_peak=_measure_peak(planned, mesh, topology, fits) if measure else None,
        steps=steps,
        price=chip.hourly_price if price is None else price,
        warning=describe_slow_axes(slices),
        program=describe_planned_program(experiment, part, topology, mesh_shape, compiled, clips=clips)
        if present or is_lowered
        else None,
    )


def _count_work(
    planned: PlannedStep, mesh: AnyMesh, slices: dict[str, int], *, is_compiled: bool
) -> tuple[MemoryUsage, StepWork, CompiledStep | None]:
    """Return the memory and the work of a step on each device, compiled or counted."""
    if is_compiled and isinstance(mesh, Mesh):
        turns: dict[str, Any] = {"outer_trip_count": planned.sampling_steps, "max_outer_trip_count": planned.max_steps}
        compiled = compile_step(planned.step, planned.arguments, mesh, slices=slices, **turns)
        options: dict[str, Any] = {"model_flops": planned.model_flops, "devices": mesh.size, "turns": planned.turns}
        return compiled.memory, read_step_work(compiled, planned.costs, **options), compiled
    assert planned.costs is not None
    state_bytes = count_argument_bytes(planned.arguments)
    memory, work = estimate_step(planned.costs, state_bytes, planned.layer_bytes, dict(mesh.shape), slices)
    return memory, work.repeat(planned.turns), None


def _measure_peak(planned: PlannedStep, mesh: Any, topology: Topology, fits: bool) -> int | None:
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0] not in jax.devices():
        raise UserError(f"measure is invalid: a measured step is run, and {topology} is not here; leave it out")
    return measure_peak_memory(planned.step, planned.arguments) if fits else None


def _compute_lower_bounds(
    experiment: Experiment, planned: PlannedStep, partitioner: MeshPartitioner
) -> dict[Purpose, float]:
    if isinstance(experiment.denoiser.train, LoraAdapters | Student):
        return {}
    assert planned.costs is not None
    parameters = _count_parameters(planned)
    context_weights = count_context_weights(experiment.get_model().backbone)
    return compute_min_collective_bytes(planned.costs, parameters, partitioner, context_weights=context_weights)


def _count_parameters(planned: PlannedStep) -> int:
    # A training state holds the parameters under `params`; a sampler's first argument is the parameters themselves.
    state = planned.arguments[0]
    leaves = {path: leaf for path, leaf in flatten(state).items() if "params" in path.split("/")[:2]}
    return count(leaves or state)
