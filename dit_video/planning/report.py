"""Plans of experiments, from their compiled or counted steps."""

import dataclasses
import warnings
from typing import Any

import jax
from jax.sharding import Mesh

from dit_video.core.errors import UserError
from dit_video.core.memory import format_bytes
from dit_video.core.trees import count_values as count
from dit_video.core.trees import flatten
from dit_video.distributed import MeshConfig, check_denoiser, make_mesh
from dit_video.distributed.mesh import AnyMesh, count_axis_slices, describe_slow_axes, make_abstract_mesh
from dit_video.experiment import Experiment, LoraAdapters, Student
from dit_video.planning.compiled_program import (
    CompiledStep,
    MemoryUsage,
    compile_step,
    count_argument_bytes,
    measure_peak_memory,
)
from dit_video.planning.costs import count_context_weights, read_step_work
from dit_video.planning.efficiencies import Efficiencies, find_efficiencies
from dit_video.planning.estimate import estimate_step
from dit_video.planning.hardware import find_chip
from dit_video.planning.lower_bounds import Purpose, compute_min_collective_bytes
from dit_video.planning.plan import Plan
from dit_video.planning.roofline import StepWork, compute_expected_times, compute_step_times
from dit_video.planning.steps import Part, PlannedStep, fill_row, plan_step
from dit_video.planning.topology import Topology


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
      UserError: a memory that is not within the device's.
    """
    if memory is None:
        return available
    if not 0 < memory <= available:
        rule, fix = f"a device of {topology} has {format_bytes(available)}", f"Use {available // 2**20}MiB or less"
        raise UserError(f"a memory of {format_bytes(memory)} is invalid: {rule}. {fix}")
    return memory


def make_plan_mesh(experiment: Experiment, topology: Topology, config: MeshConfig, part: Part) -> tuple[AnyMesh, bool]:
    """Return the mesh of a run on a topology, and whether a program can be compiled for it.

    Raises:
      UserError: axes that do not divide the devices; rows, heads or tokens that are not divisible by these.
    """
    devices, present = find_devices(topology)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slices: the plan says it
        mesh = make_mesh(config, devices) if present else make_abstract_mesh(config, topology.num_chips)
    if part != "autoencoder":
        check_mesh(dataclasses.replace(experiment, mesh=config), mesh)
    return mesh, present


def check_mesh(experiment: Experiment, mesh: AnyMesh) -> None:
    """Check that an experiment's rows, heads and tokens are divisible by the devices of a mesh.

    Raises:
      UserError: one is not; the message says what would be.
    """
    denoiser = experiment.denoiser
    rows, attention = denoiser.batch // denoiser.accumulation_steps, experiment.mesh.context_attention
    check_denoiser(mesh, denoiser.backbone, rows=rows, tokens=denoiser.row_shape.tokens, context_attention=attention)


def plan_experiment(
    experiment: Experiment,
    topology: Topology,
    *,
    part: Part = "denoiser",
    mesh: MeshConfig | None = None,
    clips: int | None = None,
    steps: int | None = None,
    price: float | None = None,
    measure: bool = False,
    efficiencies: Efficiencies | None = None,
) -> Plan:
    """Compile a part of an experiment for a topology, and return what it needs.

    Args:
      experiment: the experiment.
      topology: the hardware.
      part: the step to plan.
      mesh: mesh instead of the experiment's.
      clips: number of equally long clips in each row; by default as many of the largest as fit.
      steps: number of steps to pay for; the experiment's by default. For a sampler, batches, by default one.
      price: price of a chip for an hour, instead of the table's.
      measure: True to run a step and measure the devices' peak memory, where the hardware is present.
      efficiencies: measured shares of the chip's peak rates; the published ones by default.

    Raises:
      MissingError: libtpu is needed and not installed.
      UserError: a mesh that does not divide the devices, or is not divisible by them; a part that cannot be planned.
    """
    config, chip = experiment.mesh if mesh is None else mesh, topology.chip
    experiment = dataclasses.replace(experiment, mesh=config)
    plan_mesh, present = make_plan_mesh(experiment, topology, config, part)
    if part == "autoencoder" and not present:
        raise UserError(f"an autoencoder is planned by compiling: run this on {topology}, or plan for a TPU")
    rows_of_clips = fill_row(experiment, clips)
    planned = plan_step(experiment, part, plan_mesh, clips=rows_of_clips, platform=chip.platform)
    devices, mesh_shape = plan_mesh.size, dict(plan_mesh.shape)
    slices = count_axis_slices(config, devices, topology.slices)
    limit = chip.usable_memory * topology.num_chips // devices  # devices of one chip share its memory
    memory, work, compiled = _count_work(planned, plan_mesh, slices, is_compiled=present)
    over = None if compiled is None else compiled.oom_message
    fits = over is None and memory.peak <= limit
    per_chip = devices // topology.num_chips
    efficiencies = find_efficiencies(chip) if efficiencies is None else efficiencies
    times = compute_step_times(work, topology, mesh_shape, devices_per_chip=per_chip)
    expected = compute_expected_times(work, efficiencies, topology, mesh_shape, devices_per_chip=per_chip)
    has_lower_bounds = work.collectives and present and part == "denoiser"
    lower_bounds = _compute_lower_bounds(experiment, planned, mesh_shape) if has_lower_bounds else {}
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
        remat=experiment.denoiser.backbone.remat if part == "denoiser" else "none",
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
        device_peak=_measure_peak(planned, plan_mesh, topology, fits) if measure else None,
        steps=steps,
        price=chip.hourly_price if price is None else price,
        warning=describe_slow_axes(slices),
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


def _compute_lower_bounds(experiment: Experiment, planned: PlannedStep, mesh: dict[str, int]) -> dict[Purpose, float]:
    denoiser = experiment.denoiser
    if isinstance(denoiser.train, LoraAdapters | Student):
        return {}
    assert planned.costs is not None
    parameters, attention = _count_parameters(planned), experiment.mesh.context_attention
    context_weights = count_context_weights(denoiser.backbone)
    return compute_min_collective_bytes(planned.costs, parameters, mesh, attention, context_weights=context_weights)


def _count_parameters(planned: PlannedStep) -> int:
    # A training state holds the parameters under `params`; a sampler's first argument is the parameters themselves.
    state = planned.arguments[0]
    leaves = {path: leaf for path, leaf in flatten(state).items() if "params" in path.split("/")[:2]}
    return count(leaves or state)
