"""A search for the mesh, the rows and the recomputation with which a step takes the least time for what it does."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

from dit_video.core.errors import UserError
from dit_video.distributed import AXES, MeshConfig, row_shards
from dit_video.distributed.mesh import abstract_mesh
from dit_video.distributed.planner import Topology, estimate, held, step_times
from dit_video.experiment import Experiment
from dit_video.nn import Remat
from dit_video.planning.report import Plan, adapted, check_mesh, devices_of, plan_experiment, with_dit
from dit_video.planning.steps import Part, clips_of, on_mesh, plan_step

_SLACK = 1.1
"""How much more than a device's memory a candidate may be estimated at: where steps were compiled, too, estimates were
at most 5 % too high."""
_ROWS = (1, 2, 4, 8)
_LIKE_OTHERS = ("dots", "dots_no_batch", "offload")
"""Policies that are not tried: one keeps scores of attention too, and the two others keep a little less than
`dots_attention`, one of them in the host, for which all of attention is computed again."""


class Candidate(NamedTuple):
    """What is tried."""

    mesh: MeshConfig
    rows: int
    """of the batch"""
    remat: Remat
    share: float
    """of the chips' peak that the model's operations are, estimated: what candidates are ranked by"""
    peak: int
    """bytes, estimated"""

    def of(self, experiment: Experiment) -> Experiment:
        """The experiment with it."""
        changed = with_dit(experiment, remat=self.remat)
        denoiser = dataclasses.replace(changed.denoiser, batch=self.rows)
        return dataclasses.replace(changed, denoiser=denoiser, mesh=self.mesh)


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
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The best plan that fits: candidates are counted first, then the best few are compiled.

    Args:
      experiment: whose mesh, batch and remat are replaced.
      topology: the hardware.
      part: the denoiser, or its sampler.
      tries: how many candidates are compiled at the most, after which the best that fits is taken; until one fits,
        as many more.
      rows: of the batch, where that is not to be chosen.
      clips: in each row; see `plan_experiment`.
      steps: to be paid for.
      price: of a chip for an hour.
      say: is told of every candidate that is compiled.

    Raises:
      UserError: an autoencoder, whose step is not counted; nothing that fits.
    """
    if part == "autoencoder":
        raise UserError("meshes are searched for the denoiser and its sampler; plan the autoencoder with --mesh")
    experiment = adapted(experiment, topology)
    found = candidates(experiment, topology, part=part, rows=rows, clips=clips)
    if not found:
        raise UserError(
            f"nothing on {topology} divides the denoiser's heads, hidden width and rows, or comes near to fitting"
        )
    best: Plan | None = None
    for number, candidate in enumerate(found):
        if number >= tries * (1 if best else 3):
            break
        given: dict[str, Any] = {"part": part, "mesh": candidate.mesh, "clips": clips, "steps": steps, "price": price}
        plan = plan_experiment(candidate.of(experiment), topology, **given)
        say(_line(candidate, plan))
        if plan.fits and (best is None or _worth(plan) > _worth(best)):
            best = plan
    if best is None:
        raise UserError(
            f"none of the {min(len(found), 3 * tries)} most promising meshes fits {topology}; take more chips, or rows "
            "of fewer tokens"
        )
    return best


def _worth(plan: Plan) -> float:
    assert plan.times is not None
    return plan.mfu(plan.times.apart)


def _line(candidate: Candidate, plan: Plan) -> str:
    mesh = " ".join(f"{name}={getattr(candidate.mesh, name)}" for name in AXES)
    verdict = "does not fit" if not plan.fits or plan.times is None else f"MFU {plan.mfu(plan.times.apart):.1%}"
    peak = f"{plan.memory.peak / 2**30:.1f} GiB (counted {candidate.peak / 2**30:.1f})"
    return f"{mesh}, {candidate.rows} rows, remat {candidate.remat}: {peak}, {verdict}"


def candidates(
    experiment: Experiment,
    topology: Topology,
    *,
    part: Part = "denoiser",
    rows: int | None = None,
    clips: int | None = None,
) -> list[Candidate]:
    """All that divides and may fit, the most promising first; of equal ones that with the fewest rows."""
    found = []
    devices, there = devices_of(topology)
    number = len(devices) if there else topology.chips
    limit = topology.chip.memory * topology.chips // number
    remats = [remat for remat in get_args(Remat) if remat not in _LIKE_OTHERS] if part == "denoiser" else ["none"]
    one = plan_step(experiment, part, abstract_mesh(MeshConfig(), 1), clips=clips_of(experiment, clips))
    assert one.known is not None
    for mesh in meshes(experiment, number):
        abstract = abstract_mesh(mesh, number)
        laid = on_mesh(one.arguments[0], abstract)
        state, parts = held((laid,)), row_shards(abstract)
        batches = [rows] if rows is not None else [parts * each for each in _ROWS]
        for batch, remat in itertools.product(batches, remats):
            try:
                check_mesh(Candidate(mesh, batch, remat, 0.0, 0).of(experiment), abstract)
            except UserError:
                continue
            known = one.known.resized(batch, remat)
            memory, work = estimate(known, state, one.layer_bytes, dict(abstract.shape))
            if memory.peak > _SLACK * limit:
                continue
            times = step_times(work, topology, dict(abstract.shape), devices_per_chip=number // topology.chips)
            flops = known.forward * (3 if known.training else 1)
            share = flops / (times.apart * topology.chips * topology.chip.flops)
            found.append(Candidate(mesh, batch, remat, share, memory.peak))
    return sorted(found, key=lambda one: (-round(one.share, 2), one.rows, -one.mesh.fsdp))


def meshes(experiment: Experiment, devices: int) -> Iterator[MeshConfig]:
    """Every way to lay the devices along the axes; along `tensor` and `context` no more than there are heads."""
    dit = experiment.denoiser.dit
    for tensor in _divisors(devices):
        if dit.heads % tensor or dit.hidden_width % tensor:
            continue
        for context in _divisors(devices // tensor):
            if context > dit.heads // tensor:
                continue
            for fsdp in _divisors(devices // (tensor * context)):
                data = devices // (tensor * context * fsdp)
                way = experiment.mesh.context_attention
                yield MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context, context_attention=way)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
