"""Search for the mesh, the rows and the rematerialisation with the highest utilisation."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

from dit_video.core.errors import UserError
from dit_video.distributed import AXES, Parallelism, count_row_shards, make_abstract_partitioner
from dit_video.distributed.mesh import count_axis_slices
from dit_video.experiment import Experiment
from dit_video.nn import Remat
from dit_video.planning.compiled_program import count_argument_bytes
from dit_video.planning.costs import estimate_step
from dit_video.planning.hardware import Topology
from dit_video.planning.plan import Plan, check_devices, find_devices, plan_experiment
from dit_video.planning.roofline import Efficiencies, compute_step_times
from dit_video.planning.steps import Part, fill_row, plan_step, shard_shapes

_SLACK = 1.1
"""Largest estimate of a candidate's memory relative to a device's; for compiled steps, estimates were at most 5 % too
high."""
_ROWS_PER_SHARD = (1, 2, 4, 8)
SKIPPED_REMATS = ("dots", "dots_no_batch", "offload")
"""Policies that are not tried: `dots` also keeps attention scores; the two others keep a little less than
`dots_attention`, one of them on the host, and recompute all of attention for it."""


class Candidate(NamedTuple):
    """A candidate of the search."""

    parallel: Parallelism
    rows: int
    """Number of rows of the batch."""
    remat: Remat
    mfu: float
    """Estimated share of the chips' peak that the model's operations use, by which candidates are ranked."""
    peak_bytes: int
    """Estimated peak memory in bytes."""

    def apply_to(self, experiment: Experiment) -> Experiment:
        """Return the experiment with this candidate's settings."""
        changed = experiment.replace_backbone(remat=self.remat)
        changed = changed.replace_stage(changed.denoiser.name, batch=self.rows)
        return dataclasses.replace(changed, parallel=self.parallel)


def suggest(
    experiment: Experiment,
    topology: Topology,
    *,
    part: Part = "denoiser",
    tries: int = 4,
    rows: int | None = None,
    clips: int | None = None,
    steps: int | None = None,
    price: float | None = None,
    efficiencies: Efficiencies | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Search for the best plan that fits: estimate all candidates, then compile the best few.

    Args:
      experiment: The experiment, whose parallelism, batch and remat are replaced.
      topology: The hardware.
      part: The denoiser, or its sampler.
      tries: Number of candidates to compile; until one fits, up to three times as many.
      rows: Number of rows of the batch, if fixed.
      clips: Number of clips in each row; see `plan_experiment`.
      steps: Number of steps to pay for.
      price: Price of a chip for an hour.
      efficiencies: Measured shares of the chip's peak rates; the published ones by default.
      report: Called with a line about every candidate that is compiled.

    Raises:
      UserError: If the part is an autoencoder, whose step cannot be estimated, or nothing fits.
    """
    if part == "autoencoder":
        raise UserError("part=autoencoder is invalid: only denoiser and sampler are searched; set --parallel for it")
    ranked = list_candidates(experiment, topology, part=part, rows=rows, clips=clips)
    if not ranked:
        raise UserError(f"nothing on {topology} divides the denoiser's heads, hidden width and rows, or nearly fits")
    best: Plan | None = None
    options: dict[str, Any] = {"part": part, "clips": clips, "steps": steps, "price": price}
    options |= {"efficiencies": efficiencies}
    for number, candidate in enumerate(ranked):
        # Estimates may all be a little too low, so keep trying for longer until one candidate fits.
        if number >= tries * (1 if best else 3):
            break
        suggested = candidate.apply_to(experiment)
        plan = plan_experiment(suggested, topology, is_lowered=False, **options)
        report(_format_line(candidate, plan))
        if plan.fits and (best is None or _score(plan) > _score(best)):
            best, chosen = plan, suggested
    if best is None:
        fix = "use more chips, or rows of fewer tokens"
        raise UserError(f"none of the {min(len(ranked), 3 * tries)} most promising meshes fits {topology}; {fix}")
    return best if best.method == "compiled" else plan_experiment(chosen, topology, **options)


def _score(plan: Plan) -> float:
    assert plan.times is not None
    return plan.mfu(plan.times.apart if plan.expected is None else plan.expected.scheduled)


def _format_line(candidate: Candidate, plan: Plan) -> str:
    mesh = " ".join(f"{name}={getattr(candidate.parallel, name)}" for name in AXES)
    verdict = "does not fit"
    if plan.fits and plan.times is not None:
        kind = "at most" if plan.expected is None else "expected"
        verdict = f"MFU {kind} {_score(plan):.1%}"
    peak = f"{plan.memory.peak / 2**30:.1f} GiB (counted {candidate.peak_bytes / 2**30:.1f})"
    return f"{mesh}, {candidate.rows} rows, remat {candidate.remat}: {peak}, {verdict}"


def list_candidates(
    experiment: Experiment,
    topology: Topology,
    *,
    part: Part = "denoiser",
    rows: int | None = None,
    clips: int | None = None,
) -> list[Candidate]:
    """Return all candidates that divide the experiment and may fit, best first, and of equals the fewest rows first."""
    results = []
    devices, present = find_devices(topology)
    device_count = len(devices) if present else topology.num_chips
    limit = topology.chip.usable_memory * topology.num_chips // device_count
    devices_per_chip = device_count // topology.num_chips
    remats = [remat for remat in get_args(Remat) if remat not in SKIPPED_REMATS] if part == "denoiser" else ["none"]
    one_device, platform = make_abstract_partitioner(Parallelism(), 1), topology.chip.platform
    unsharded = plan_step(experiment, part, one_device, clips=fill_row(experiment, clips), platform=platform)
    assert unsharded.costs is not None
    for parallel in list_parallelisms(experiment, device_count):
        partitioner = make_abstract_partitioner(parallel, device_count)
        mesh = partitioner.mesh
        state_shapes = shard_shapes(unsharded.arguments[0], mesh)
        state, parts = count_argument_bytes((state_shapes,)), count_row_shards(mesh)
        batches = [rows] if rows is not None else [parts * rows_per_shard for rows_per_shard in _ROWS_PER_SHARD]
        for batch, remat in itertools.product(batches, remats):
            try:
                check_devices(Candidate(parallel, batch, remat, 0.0, 0).apply_to(experiment), partitioner)
                slices = count_axis_slices(parallel, device_count, topology.slices)
            except UserError:
                continue
            costs = unsharded.costs.resize(batch, remat)
            memory, work = estimate_step(costs, state, unsharded.layer_bytes, dict(mesh.shape), slices)
            if memory.peak > _SLACK * limit:
                continue
            times = compute_step_times(work, topology, dict(mesh.shape), devices_per_chip=devices_per_chip)
            flops = costs.forward_flops * (3 if costs.training else 1)
            share = flops / (times.apart * topology.num_chips * topology.chip.flops)
            results.append(Candidate(parallel, batch, remat, share, memory.peak))
    # Estimates do not tell shares within one percent apart: there, prefer fewer rows, then more `fsdp`.
    return sorted(results, key=lambda unsharded: (-round(unsharded.mfu, 2), unsharded.rows, -unsharded.parallel.fsdp))


def list_parallelisms(experiment: Experiment, devices: int) -> Iterator[Parallelism]:
    """Yield every parallelism of the devices, with at most as many along `tensor` and `context` as there are heads."""
    backbone = experiment.get_model().backbone
    for tensor in _list_divisors(devices):
        if backbone.heads % tensor or backbone.mlp_dim % tensor:
            continue
        for context in _list_divisors(devices // tensor):
            if context > backbone.heads // tensor:
                continue
            for fsdp in _list_divisors(devices // (tensor * context)):
                data, attention = devices // (tensor * context * fsdp), experiment.parallel.context_attention
                yield Parallelism(data=data, fsdp=fsdp, tensor=tensor, context=context, context_attention=attention)


def _list_divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
