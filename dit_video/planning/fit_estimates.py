"""Estimated memory and time of an experiment's step with other settings."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from dit_video.core.errors import UserError
from dit_video.core.memory import format_bytes
from dit_video.distributed import MeshConfig, count_row_shards
from dit_video.distributed.mesh import AnyMesh, count_axis_slices, make_abstract_mesh
from dit_video.experiment import Experiment
from dit_video.planning.compiled_program import count_argument_bytes
from dit_video.planning.efficiencies import Efficiencies
from dit_video.planning.estimate import StepSpec, estimate_step
from dit_video.planning.fit_options import Setting, list_settings
from dit_video.planning.report import check_mesh, plan_experiment
from dit_video.planning.roofline import compute_expected_times, compute_step_times
from dit_video.planning.steps import Part, PlannedStep, fill_row, plan_step, shard_shapes
from dit_video.planning.topology import Topology

Settings = tuple[Setting, ...]


class Combination(NamedTuple):
    """Settings that are tried together, and what they cost."""

    settings: Settings
    """Settings that differ from the experiment's; empty for the experiment as it is."""
    memory: int
    """Bytes of a device at its peak."""
    seconds_per_row: float
    """Seconds of a step for each row: expected ones where the chip's speeds are known, else the limit."""
    method: str = "analytic"
    """Source of the figures: "analytic", or "compiled" for those of the compiled step."""

    def __str__(self) -> str:
        names = " ".join(map(str, self.settings)) or "as configured"
        note = "" if all(setting.keeps_result for setting in self.settings) else "; changes the result"
        return f"{names}: {format_bytes(self.memory)}, {self.seconds_per_row:.3g} s a row ({self.method}){note}"


class FitEstimates:
    """Estimates of combinations of an experiment's settings, each made once."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        devices: int,
        *,
        part: Part,
        clips: int | None,
        efficiencies: Efficiencies,
    ):
        self.experiment, self.topology, self.devices, self.part = experiment, topology, devices, part
        self.clips, self.efficiencies = clips, efficiencies
        self.options = list_settings(experiment, part, devices)
        self.results: dict[Settings, Combination | None] = {}
        self._experiments: dict[Settings, Experiment | None] = {(): experiment}
        self._meshes: dict[tuple[MeshConfig, int, int], tuple[AnyMesh, dict[str, int]] | None] = {}
        self._planned: dict[Settings, PlannedStep] = {}
        self._state_bytes: dict[tuple[Settings, MeshConfig], dict[str, int]] = {}

    def estimate_all(self, options: frozenset[str]) -> Iterator[Combination]:
        """Yield the valid combinations that set these options, and no others."""
        for settings in itertools.product(*(self.options[name] for name in self.options if name in options)):
            if (combination := self.estimate(settings)) is not None:
                yield combination

    def estimate(self, settings: Settings) -> Combination | None:
        """Return the estimate of a combination; None if the settings, or the mesh and the rows, do not go together."""
        if settings not in self.results:
            self.results[settings] = self._estimate(settings)
        return self.results[settings]

    def compile(self, combination: Combination) -> Combination:
        """Return a combination with the memory and the time of its compiled step."""
        experiment = apply_settings(self.experiment, combination.settings)
        options: dict[str, Any] = {"part": self.part, "clips": self.clips, "efficiencies": self.efficiencies}
        plan = plan_experiment(experiment, self.topology, **options)
        times = plan.times if plan.expected is None else plan.expected
        seconds = combination.seconds_per_row if times is None else times.scheduled / experiment.denoiser.batch
        return combination._replace(memory=plan.memory.peak, seconds_per_row=seconds, method=plan.method)

    def _estimate(self, settings: Settings) -> Combination | None:
        experiment = self._apply(settings)
        if experiment is None or (checked := self._check_mesh(experiment)) is None:
            return None
        mesh, slices = checked
        planned = self._plan(tuple(setting for setting in settings if setting.reshapes_step))
        costs, state_bytes = self._resize(experiment, planned), self._count_bytes(settings, experiment, planned, mesh)
        memory, work = estimate_step(costs, state_bytes, planned.layer_bytes, dict(mesh.shape), slices)
        work = work.repeat(planned.turns)
        shape, devices_per_chip = dict(mesh.shape), self.devices // self.topology.num_chips
        times = compute_expected_times(
            work, self.efficiencies, self.topology, shape, devices_per_chip=devices_per_chip
        ) or compute_step_times(work, self.topology, shape, devices_per_chip=devices_per_chip)
        return Combination(settings, memory.peak, times.scheduled / experiment.denoiser.batch)

    def _apply(self, settings: Settings) -> Experiment | None:
        """Return the experiment with these settings; None if they do not go together."""
        if settings not in self._experiments:
            experiment = self._apply(settings[:-1])
            try:
                self._experiments[settings] = None if experiment is None else settings[-1].apply(experiment)
            except UserError:
                self._experiments[settings] = None
        return self._experiments[settings]

    def _check_mesh(self, experiment: Experiment) -> tuple[AnyMesh, dict[str, int]] | None:
        """Return the mesh and the slices along its axes; None if it does not divide devices, rows or heads."""
        key = experiment.mesh, experiment.denoiser.batch, experiment.denoiser.accumulation_steps
        if key not in self._meshes:
            try:
                mesh = make_abstract_mesh(experiment.mesh, self.devices)
                check_mesh(experiment, mesh)
                self._meshes[key] = mesh, count_axis_slices(experiment.mesh, self.devices, self.topology.slices)
            except UserError:
                self._meshes[key] = None
        return self._meshes[key]

    def _plan(self, reshaping: Settings) -> PlannedStep:
        """Return the step on one device with settings that change its state or its costs."""
        if reshaping not in self._planned:
            alone = dataclasses.replace(apply_settings(self.experiment, reshaping), mesh=MeshConfig())
            mesh = make_abstract_mesh(MeshConfig(), 1)
            options: dict[str, Any] = {"clips": fill_row(alone, self.clips), "platform": self.topology.chip.platform}
            self._planned[reshaping] = plan_step(alone, self.part, mesh, **options)
        return self._planned[reshaping]

    def _count_bytes(
        self, settings: Settings, experiment: Experiment, planned: PlannedStep, mesh: AnyMesh
    ) -> dict[str, int]:
        """Return the bytes of the arguments on a device of the mesh by kind."""
        # Of a training the second argument is rows, of a sampler all but the first; the others are sharded as weights.
        rows = planned.arguments[1:] if self.part == "sampler" else planned.arguments[1:2]
        weights = planned.arguments[:1] if self.part == "sampler" else (planned.arguments[0], *planned.arguments[2:])
        reshaping = tuple(setting for setting in settings if setting.reshapes_step)
        if (reshaping, experiment.mesh) not in self._state_bytes:
            shapes = tuple(shard_shapes(each, mesh) for each in weights)
            self._state_bytes[reshaping, experiment.mesh] = count_argument_bytes(shapes)
        counted = self._state_bytes[reshaping, experiment.mesh]
        row_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows))
        shards = self.experiment.denoiser.batch * count_row_shards(mesh)
        return {**counted, "other": counted["other"] + row_bytes * experiment.denoiser.batch // shards}

    def _resize(self, experiment: Experiment, planned: PlannedStep) -> StepSpec:
        """Return the costs of a step with the experiment's rows, remat and accumulation."""
        costs, denoiser = planned.costs, experiment.denoiser
        assert costs is not None
        branches = costs.rows // self.experiment.denoiser.batch
        remat = denoiser.backbone.remat if costs.training else costs.remat
        costs = costs.resize(denoiser.batch * branches, remat)
        return dataclasses.replace(costs, accumulation=denoiser.accumulation_steps if costs.training else 1)


def apply_settings(experiment: Experiment, settings: Sequence[Setting]) -> Experiment:
    """Return the experiment with other settings.

    Raises:
      UserError: settings that do not go together.
    """
    for setting in settings:
        experiment = setting.apply(experiment)
    return experiment
