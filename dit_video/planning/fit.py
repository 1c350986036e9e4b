"""Search for the options that make a training, or a sampler, fit into a device's memory."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import jax

from dit_video.core.errors import UserError
from dit_video.core.memory import format_bytes
from dit_video.distributed import Parallelism, count_row_shards, make_abstract_partitioner
from dit_video.distributed.mesh import AnyMesh, count_axis_slices, format_parallelism, make_abstract_mesh
from dit_video.experiment import AllWeights, Experiment, LoraAdapters
from dit_video.nn import Remat
from dit_video.planning.compiled_program import count_argument_bytes
from dit_video.planning.costs import StepSpec, estimate_step
from dit_video.planning.efficiencies import find_efficiencies
from dit_video.planning.hardware import Topology
from dit_video.planning.plan import check_devices, check_memory, find_devices, plan_experiment
from dit_video.planning.roofline import Efficiencies, compute_expected_times, compute_step_times
from dit_video.planning.steps import Part, PlannedStep, fill_row, plan_step, shard_shapes
from dit_video.planning.suggest import SKIPPED_REMATS, list_parallelisms
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.optim.optimizer import Adafactor, OptimizerConfig


@dataclass(frozen=True)
class Setting:
    """A value of an option, other than the experiment's."""

    option: str
    """Path of the field in the config, or name of an option of `tools/plan.py` such as `--parallel`."""
    value: str
    apply: Callable[[Experiment], Experiment] = field(compare=False)
    """Function that returns the experiment with this value."""
    keeps_result: bool = field(default=True, compare=False)
    """The training, or the sample, is the same up to rounding."""
    reshapes_step: bool = field(default=False, compare=False)
    """The state, or the counted costs, have to be computed again."""

    def __str__(self) -> str:
        return f"{self.option} {self.value}" if self.option.startswith("--") else f"--set {self.option}={self.value}"


Settings = tuple[Setting, ...]
_SLACK = 1.1
"""Largest estimate of memory that is compiled, relative to the memory: estimates are a little too high."""


class Combination(NamedTuple):
    """Settings that are tried together, and what they cost."""

    settings: Settings
    """Settings that differ from the experiment's; empty for the experiment as it is."""
    memory: int
    """Bytes of a device at its peak."""
    seconds_per_row: float
    """Seconds of a step for each row: expected ones where the chip's speeds are known, else the limit."""
    method: str = "analytic"
    """Source of the figures: "analytic", or "compiled" from the compiled step."""

    def __str__(self) -> str:
        names = " ".join(map(str, self.settings)) or "as configured"
        note = "" if all(setting.keeps_result for setting in self.settings) else "; changes the result"
        return f"{names}: {format_bytes(self.memory)}, {self.seconds_per_row:.3g} s a row ({self.method}){note}"


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
        yield f"{self.experiment}: {self.part} on {self.topology} in {format_bytes(self.limit)} of each device"
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
    its parts fits. Where several values of the same options fit, the fastest are kept. The fastest combinations are
    compiled, where that is possible.

    Args:
      experiment: The experiment.
      topology: The hardware.
      limit: Bytes that a device may use; all of its memory by default.
      part: The denoiser, or its sampler.
      tries: Number of combinations to compile; more if some of them turn out not to fit.
      clips: Number of clips in each row; see `plan_experiment`.
      efficiencies: Measured shares of the chip's peak rates; the published ones by default.
      report: Called with a line about every combination that is compiled.

    Raises:
      UserError: If the part is an autoencoder, whose step cannot be estimated, or the limit exceeds the memory.
    """
    if part == "autoencoder":
        raise UserError("part=autoencoder is invalid: only denoiser and sampler are searched; use --set for it")
    devices, present = find_devices(topology)
    device_count = len(devices) if present else topology.num_chips
    available = topology.chip.usable_memory * topology.num_chips // device_count
    limit = check_memory(limit, available, topology)
    efficiencies = find_efficiencies(topology.chip) if efficiencies is None else efficiencies
    options: dict[str, Any] = {"part": part, "clips": clips, "efficiencies": efficiencies}
    estimates = FitEstimates(experiment, topology, device_count, **options)
    searched = frozenset({"--parallel"}.intersection(estimates.options))
    if not any([estimates.estimate(()), *estimates.estimate_all(searched)]):
        rule = "no mesh of its devices divides the denoiser's heads, hidden width and rows"
        raise UserError(f"{topology} is invalid: {rule}. Use fewer chips, or another number of rows")
    confirmed: dict[Settings, Combination] = {}
    overflowing: dict[Settings, Combination] = {}
    while True:
        fitting = _list_minimal(estimates, int(limit * _SLACK) if present else limit, exclude=overflowing)
        untried = [each for each in fitting if each.settings not in confirmed]
        if not present or not untried or len(confirmed) >= tries or len(overflowing) >= 3 * tries:
            break
        compiled = estimates.compile(untried[0])
        report(str(compiled))
        (confirmed if compiled.memory <= limit else overflowing)[compiled.settings] = compiled
    listed = [confirmed.get(each.settings, each) for each in fitting]
    listed = sorted((each for each in listed if each.memory <= limit), key=lambda each: each.seconds_per_row)
    tried = [each for each in estimates.results.values() if each is not None]
    return FitResult(
        experiment=experiment.name,
        part=part,
        topology=topology,
        limit=limit,
        configured=overflowing.get((), estimates.estimate(())),
        fitting=tuple(listed),
        insufficient=tuple(_list_insufficient(estimates, listed)),
        overflowing=tuple(each for settings, each in overflowing.items() if settings),
        smallest=min(tried, key=lambda each: each.memory),
        count=len(tried),
    )


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
        self._meshes: dict[tuple[Parallelism, int, int], tuple[AnyMesh, dict[str, int]] | None] = {}
        self._planned: dict[Settings, PlannedStep] = {}
        self._state_bytes: dict[tuple[Settings, Parallelism], dict[str, int]] = {}

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
        key = experiment.parallel, experiment.denoiser.batch, experiment.denoiser.accumulation_steps
        if key not in self._meshes:
            try:
                partitioner = make_abstract_partitioner(experiment.parallel, self.devices)
                check_devices(experiment, partitioner)
                slices = count_axis_slices(experiment.parallel, self.devices, self.topology.slices)
                self._meshes[key] = partitioner.mesh, slices
            except UserError:
                self._meshes[key] = None
        return self._meshes[key]

    def _plan(self, reshaping: Settings) -> PlannedStep:
        """Return the step on one device with settings that change its state or its costs."""
        if reshaping not in self._planned:
            alone = dataclasses.replace(apply_settings(self.experiment, reshaping), parallel=Parallelism())
            partitioner = make_abstract_partitioner(alone.parallel, 1)
            options: dict[str, Any] = {"clips": fill_row(alone, self.clips), "platform": self.topology.chip.platform}
            self._planned[reshaping] = plan_step(alone, self.part, partitioner, **options)
        return self._planned[reshaping]

    def _count_bytes(
        self, settings: Settings, experiment: Experiment, planned: PlannedStep, mesh: AnyMesh
    ) -> dict[str, int]:
        """Return the bytes of the arguments on a device of the mesh by kind."""
        # Rows are the second argument of a training, and all but the first of a sampler; others are sharded as weights.
        rows = planned.arguments[1:] if self.part == "sampler" else planned.arguments[1:2]
        weights = planned.arguments[:1] if self.part == "sampler" else (planned.arguments[0], *planned.arguments[2:])
        reshaping = tuple(setting for setting in settings if setting.reshapes_step)
        if (reshaping, experiment.parallel) not in self._state_bytes:
            shapes = tuple(shard_shapes(each, mesh) for each in weights)
            self._state_bytes[reshaping, experiment.parallel] = count_argument_bytes(shapes)
        counted = self._state_bytes[reshaping, experiment.parallel]
        row_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows))
        shards = self.experiment.denoiser.batch * count_row_shards(mesh)
        return {**counted, "other": counted["other"] + row_bytes * experiment.denoiser.batch // shards}

    def _resize(self, experiment: Experiment, planned: PlannedStep) -> StepSpec:
        """Return the costs of a step with the experiment's rows, remat and accumulation."""
        costs, denoiser = planned.costs, experiment.denoiser
        assert costs is not None
        branches = costs.rows // self.experiment.denoiser.batch
        remat = experiment.get_model().backbone.remat if costs.training else costs.remat
        costs = costs.resize(denoiser.batch * branches, remat)
        return dataclasses.replace(costs, accumulation=denoiser.accumulation_steps if costs.training else 1)


def _list_minimal(estimates: FitEstimates, limit: int, *, exclude: Container[Settings]) -> list[Combination]:
    """Return the fastest combination of each set of options that fits, if no part of the set does."""
    fitting: dict[frozenset[str], Combination] = {}
    for size in range(len(estimates.options) + 1):
        for options in map(frozenset, itertools.combinations(estimates.options, size)):
            if any(subset <= options for subset in fitting):
                continue
            room = [each for each in estimates.estimate_all(options) if each.memory <= limit]
            if room := [each for each in room if each.settings not in exclude]:
                fitting[options] = min(room, key=lambda each: (each.seconds_per_row, each.memory))
    return sorted(fitting.values(), key=lambda each: each.seconds_per_row)


def _list_insufficient(estimates: FitEstimates, fitting: Sequence[Combination]) -> Iterator[Combination]:
    """Yield, of each option that does not fit alone, the value with the least memory."""
    enough = {each.settings[0].option for each in fitting if len(each.settings) == 1}
    for option in estimates.options:
        values = list(estimates.estimate_all(frozenset([option])))
        if values and option not in enough:
            yield min(values, key=lambda each: each.memory)


def apply_settings(experiment: Experiment, settings: Sequence[Setting]) -> Experiment:
    """Return the experiment with other settings.

    Raises:
      UserError: If the settings do not go together.
    """
    for setting in settings:
        experiment = setting.apply(experiment)
    return experiment


def list_settings(experiment: Experiment, part: Part, devices: int) -> dict[str, list[Setting]]:
    """Return the settings of every option that the experiment has, by option; options without any are left out.

    Args:
      experiment: The experiment.
      part: The denoiser, or its sampler.
      devices: Number of devices of the mesh.
    """
    settings = [*_list_parallelisms(experiment, devices), *_list_rows(experiment), *_list_dtypes(experiment)]
    settings += _list_sampling(experiment) if part == "sampler" else _list_training(experiment)
    return {option: [each for each in settings if each.option == option] for option in {s.option: 0 for s in settings}}


def _list_parallelisms(experiment: Experiment, devices: int) -> Iterator[Setting]:
    own = None
    with contextlib.suppress(UserError):  # a mesh of other devices
        own = make_abstract_mesh(experiment.parallel, devices)
    for parallel in list_parallelisms(experiment, devices):
        if make_abstract_mesh(parallel, devices) != own:
            value = format_parallelism(parallel)
            yield Setting("--parallel", value, functools.partial(dataclasses.replace, parallel=parallel))


def _list_rows(experiment: Experiment) -> Iterator[Setting]:
    rows = experiment.denoiser.batch
    while (rows := rows // 2) >= 1:
        yield Setting("--rows", str(rows), _replace_denoiser(batch=rows), keeps_result=False)


def _list_dtypes(experiment: Experiment) -> Iterator[Setting]:
    if experiment.get_model().backbone.dtype == "float32":
        yield Setting(
            "model.backbone.dtype",
            "bfloat16",
            functools.partial(Experiment.replace_backbone, dtype="bfloat16"),
            keeps_result=False,
            reshapes_step=True,
        )


def _list_sampling(experiment: Experiment) -> Iterator[Setting]:
    if experiment.sampling.guidance.branch_count > 1 and experiment.sampling.branch_evaluation == "together":

        def apart(old: Experiment) -> Experiment:
            return dataclasses.replace(old, sampling=dataclasses.replace(old.sampling, branch_evaluation="apart"))

        yield Setting("sampling.branch_evaluation", "apart", apart, reshapes_step=True)


def _list_training(experiment: Experiment) -> Iterator[Setting]:
    denoiser, own_remat = experiment.denoiser, experiment.get_model().backbone.remat
    for remat in get_args(Remat):
        if remat != own_remat and remat not in SKIPPED_REMATS:
            yield Setting("model.backbone.remat", remat, functools.partial(Experiment.replace_backbone, remat=remat))
    count = denoiser.accumulation_steps
    while (count := count * 2) <= denoiser.batch:
        if denoiser.batch % count == 0:
            yield Setting("denoiser.accumulation_steps", str(count), _replace_denoiser(accumulation_steps=count))
    changes: dict[str, Any] = {"keeps_result": False, "reshapes_step": True}
    if not isinstance(denoiser.optimizer, Adafactor):
        common = {each.name: getattr(denoiser.optimizer, each.name) for each in dataclasses.fields(OptimizerConfig)}
        adafactor = _replace_denoiser(optimizer=Adafactor(**common))
        yield Setting("denoiser.optimizer", "Adafactor(...)", adafactor, **changes)
    if denoiser.averages.decays or denoiser.averages.sigmas:
        yield Setting("denoiser.averages", "EmaConfig()", _replace_denoiser(averages=EmaConfig()), **changes)
    if isinstance(denoiser.train, AllWeights) and denoiser.train.init_from is not None:
        adapters = LoraAdapters(init_from=denoiser.train.init_from, expert=denoiser.train.expert)
        yield Setting("denoiser.train", "LoraAdapters(...)", _replace_denoiser(train=adapters), **changes)


def _replace_denoiser(**changes: Any) -> Callable[[Experiment], Experiment]:
    """Return a function that replaces fields of the denoiser's training."""

    def apply(experiment: Experiment) -> Experiment:
        return experiment.replace_stage(experiment.denoiser.name, **changes)

    return apply
