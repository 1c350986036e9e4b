"""Search for the options that make a training, or a sampler, fit into a device's memory."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.distributed import MeshConfig
from dit_video.distributed.mesh import count_axis_slices, make_abstract_mesh
from dit_video.distributed.planner import (
    Efficiencies,
    StepSpec,
    Topology,
    compute_expected_times,
    compute_step_times,
    count_argument_bytes,
    estimate_step,
    find_efficiencies,
)
from dit_video.experiment import Experiment
from dit_video.planning.fit_options import Setting, list_settings
from dit_video.planning.plan import format_size
from dit_video.planning.report import check_mesh, find_devices, plan_experiment, resolve_attention
from dit_video.planning.steps import Part, PlannedStep, fill_row, plan_step, shard_shapes

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SLACK = 1.1
"""Largest estimate of memory that is compiled, relative to the memory: estimates are a little too high."""


def parse_memory(text: str) -> int:
    """Parse a size of memory such as `24GiB`, and return its bytes.

    Raises:
      UserError: it is not a positive number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    unit = None if match is None else next((unit for unit in _UNITS if unit.lower() == match[2].lower()), None)
    if match is None or unit is None or not float(match[1]):
        rule = f"it must be a positive number with one of the units {', '.join(_UNITS)}"
        raise UserError(f"memory size {text!r} is invalid: {rule}. Use a size such as 24GiB")
    return int(float(match[1]) * _UNITS[unit])


class Combination(NamedTuple):
    """Settings that are tried together, and what they cost."""

    settings: tuple[Setting, ...]
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
        return f"{names}: {format_size(self.memory)}, {self.seconds_per_row:.3g} s a row ({self.method}){note}"


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Combinations of options that fit, and those that do not."""

    experiment: str
    part: Part
    topology: Topology
    limit: int
    """Bytes that a device may use."""
    configured: Combination | None
    """The experiment as it is; None if its mesh does not divide the devices, its rows or its heads."""
    fitting: tuple[Combination, ...]
    """Combinations that fit and need all of their settings for it, the fastest first."""
    insufficient: tuple[Combination, ...]
    """Settings that do not fit alone, with the value of each option that needs the least memory."""
    overflowing: tuple[Combination, ...]
    """Combinations whose estimate fits, but whose compiled step does not."""
    smallest: Combination
    """Combination that needs the least memory of all that were tried."""
    count: int
    """Number of combinations that were estimated."""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.experiment}: {self.part} on {self.topology} in {format_size(self.limit)} of each device"
        if self.fitting and not self.fitting[0].settings:
            yield f"  fits {self.fitting[0]}"
            return
        yield f"  does not fit {self.configured or 'as configured: the mesh is for other devices'}"
        if self.fitting:
            yield f"  {len(self.fitting)} of {self.count:,} combinations fit and need all of it, the fastest first"
        yield from (f"    {combination}" for combination in self.fitting)
        if self.overflowing:
            yield "  estimated to fit, but too large when compiled"
        yield from (f"    {combination}" for combination in self.overflowing)
        if self.insufficient:
            yield "  not enough alone"
        yield from (f"    {combination}" for combination in self.insufficient)
        if not self.fitting:
            yield f"  nothing fits: the least of {self.count:,} combinations is {self.smallest}"

    def to_json(self) -> dict[str, Any]:
        """Return the result, in bytes and seconds."""

        def describe(combination: Combination) -> dict[str, Any]:
            settings = {setting.option: setting.value for setting in combination.settings}
            return {**combination._asdict(), "settings": settings}

        lists = {name: [describe(each) for each in getattr(self, name)] for name in _LISTS}
        configured = None if self.configured is None else describe(self.configured)
        single = {"configured": configured, "smallest": describe(self.smallest)}
        names = {"experiment": self.experiment, "part": self.part, "topology": str(self.topology)}
        return {**names, "limit": self.limit, "count": self.count, **single, **lists}


_LISTS = ("fitting", "insufficient", "overflowing")


def fit(
    experiment: Experiment,
    topology: Topology,
    limit: int | None = None,
    *,
    part: Part = "denoiser",
    tries: int = 4,
    clips: int | None = None,
    efficiencies: Efficiencies | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Search for the options that make a part of an experiment fit into a device's memory.

    All settings of one option, then of two, and so on, are estimated together; a combination is tried only if none of
    its parts fits. Of the values with which the same options fit, the fastest are kept. The fastest combinations are
    compiled, where that is possible.

    Args:
      experiment: the experiment.
      topology: the hardware.
      limit: bytes that a device may use; all of its memory by default.
      part: the denoiser, or its sampler.
      tries: number of combinations to compile; more if some of them turn out not to fit.
      clips: number of clips in each row; see `plan_experiment`.
      efficiencies: measured shares of the chip's peak rates; the published ones by default.
      report: called with a line about every combination that is compiled.

    Raises:
      UserError: an autoencoder, whose step cannot be estimated; a limit that is not within the device's memory.
    """
    if part == "autoencoder":
        raise UserError("part=autoencoder is invalid: only denoiser and sampler are searched; use --set for it")
    experiment = resolve_attention(experiment, topology)
    devices, present = find_devices(topology)
    search = _Search(experiment, topology, len(devices) if present else topology.num_chips, part, clips, efficiencies)
    available = topology.chip.memory * topology.num_chips // search.devices
    limit = available if limit is None else limit
    if not 0 < limit <= available:
        rule, fix = f"a device of {topology} has {format_size(available)}", f"Use {available // 2**20}MiB or less"
        raise UserError(f"a memory of {format_size(limit)} is invalid: {rule}. {fix}")
    confirmed: dict[tuple[Setting, ...], Combination] = {}
    overflowing: dict[tuple[Setting, ...], Combination] = {}
    while True:
        fitting = search.list_minimal(int(limit * _SLACK) if present else limit, exclude=overflowing)
        untried = [each for each in fitting if each.settings not in confirmed]
        if not present or not untried or len(confirmed) >= tries or len(overflowing) >= 3 * tries:
            break
        compiled = search.compile(untried[0])
        report(str(compiled))
        (confirmed if compiled.memory <= limit else overflowing)[compiled.settings] = compiled
    known = [confirmed.get(each.settings, each) for each in fitting]
    known = sorted((each for each in known if each.memory <= limit), key=lambda each: each.seconds_per_row)
    return FitResult(
        experiment=experiment.name,
        part=part,
        topology=topology,
        limit=limit,
        configured=overflowing.get((), search.estimate(())),
        fitting=tuple(known),
        insufficient=tuple(search.list_insufficient(known)),
        overflowing=tuple(each for settings, each in overflowing.items() if settings),
        smallest=min(search.estimates.values(), key=lambda each: each.memory),
        count=len(search.estimates),
    )


class _Search:
    """Estimates of combinations of settings, each made once."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        devices: int,
        part: Part,
        clips: int | None,
        efficiencies: Efficiencies | None,
    ):
        self.experiment, self.topology, self.devices, self.part, self.clips = experiment, topology, devices, part, clips
        self.efficiencies = find_efficiencies(topology.chip) if efficiencies is None else efficiencies
        self.options = list_settings(experiment, part, devices)
        self.estimates: dict[tuple[Setting, ...], Combination] = {}
        self._planned: dict[tuple[Setting, ...], PlannedStep] = {}
        self._state_bytes: dict[tuple[tuple[Setting, ...], MeshConfig], dict[str, int]] = {}
        # Those of the experiment as it is, and of its meshes, which are some in any case.
        self.estimate(())
        for mesh in self.options.get("--mesh", ()):
            self.estimate((mesh,))
        if not self.estimates:
            rule = "no mesh of its devices divides the denoiser's heads, hidden width and rows"
            raise UserError(f"{topology} is invalid: {rule}. Use fewer chips, or another number of rows")

    def list_minimal(self, limit: int, *, exclude: Any) -> list[Combination]:
        """Return the fastest combination of each set of options that fits, if no part of the set does."""
        fitting: dict[frozenset[str], Combination] = {}
        for size in range(len(self.options) + 1):
            for options in map(frozenset, itertools.combinations(self.options, size)):
                if any(subset <= options for subset in fitting):
                    continue
                estimates = (each for each in self._estimate_all(options) if each.settings not in exclude)
                room = [each for each in estimates if each.memory <= limit]
                if room:
                    fitting[options] = min(room, key=lambda each: (each.seconds_per_row, each.memory))
        return sorted(fitting.values(), key=lambda each: each.seconds_per_row)

    def list_insufficient(self, fitting: Sequence[Combination]) -> Iterator[Combination]:
        """Yield, of each option that does not fit alone, the value with the least memory."""
        enough = {each.settings[0].option for each in fitting if len(each.settings) == 1}
        for option in self.options:
            estimates = list(self._estimate_all(frozenset([option])))
            if estimates and option not in enough:
                yield min(estimates, key=lambda each: each.memory)

    def _estimate_all(self, options: frozenset[str]) -> Iterator[Combination]:
        for settings in itertools.product(*(self.options[name] for name in self.options if name in options)):
            if (combination := self.estimate(settings)) is not None:
                yield combination

    def estimate(self, settings: tuple[Setting, ...]) -> Combination | None:
        """Return the estimate of a combination; None if the mesh does not divide it."""
        if settings in self.estimates:
            return self.estimates[settings]
        try:
            experiment = apply_settings(self.experiment, settings)
            mesh = make_abstract_mesh(experiment.mesh, self.devices)
            check_mesh(experiment, mesh)
            slices = count_axis_slices(experiment.mesh, self.devices, self.topology.slices)
        except UserError:
            return None
        planned, state_bytes = self._plan(settings)
        costs, rows = self._resize(experiment, planned), experiment.denoiser.batch
        memory, work = estimate_step(costs, state_bytes, planned.layer_bytes, dict(mesh.shape), slices)
        work = work.repeat(planned.turns)
        sizes = {"mesh": dict(mesh.shape), "devices_per_chip": self.devices // self.topology.num_chips}
        expected = compute_expected_times(work, self.efficiencies, self.topology, **sizes)
        limits = compute_step_times(work, self.topology, **sizes)
        seconds = limits.scheduled if expected is None else expected.scheduled
        self.estimates[settings] = Combination(settings, memory.peak, seconds / rows)
        return self.estimates[settings]

    def _plan(self, settings: tuple[Setting, ...]) -> tuple[PlannedStep, dict[str, int]]:
        """Return the step on one device, and the bytes of its state on a device of the mesh."""
        reshaping = tuple(setting for setting in settings if setting.reshapes_step)
        if reshaping not in self._planned:
            experiment = apply_settings(self.experiment, reshaping)
            alone = dataclasses.replace(experiment, mesh=MeshConfig())
            clips = fill_row(alone, self.clips)
            self._planned[reshaping] = plan_step(alone, self.part, make_abstract_mesh(MeshConfig(), 1), clips=clips)
        planned, mesh = self._planned[reshaping], apply_settings(self.experiment, settings).mesh
        if (reshaping, mesh) not in self._state_bytes:
            shapes = shard_shapes(planned.arguments[0], make_abstract_mesh(mesh, self.devices))
            self._state_bytes[reshaping, mesh] = count_argument_bytes((shapes,))
        return planned, self._state_bytes[reshaping, mesh]

    def _resize(self, experiment: Experiment, planned: PlannedStep) -> StepSpec:
        """Return the costs of a step with the experiment's rows, remat and accumulation."""
        costs, denoiser = planned.costs, experiment.denoiser
        assert costs is not None
        branches = costs.rows // self.experiment.denoiser.batch
        remat = denoiser.backbone.remat if costs.training else costs.remat
        costs = costs.resize(denoiser.batch * branches, remat)
        return dataclasses.replace(costs, accumulation=denoiser.accumulation_steps if costs.training else 1)

    def compile(self, combination: Combination) -> Combination:
        """Return a combination with the memory and the time of its compiled step."""
        experiment = apply_settings(self.experiment, combination.settings)
        options: dict[str, Any] = {"part": self.part, "clips": self.clips, "efficiencies": self.efficiencies}
        plan = plan_experiment(experiment, self.topology, **options)
        times = plan.times if plan.expected is None else plan.expected
        seconds = combination.seconds_per_row if times is None else times.scheduled / experiment.denoiser.batch
        return combination._replace(memory=plan.memory.peak, seconds_per_row=seconds, method=plan.method)


def apply_settings(experiment: Experiment, settings: Sequence[Setting]) -> Experiment:
    """Return the experiment with other settings."""
    for setting in settings:
        experiment = setting.apply(experiment)
    return experiment
