"""Search for the options that make a training, or a sampler, fit into a device's memory."""

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.memory import format_bytes
from dit_video.experiment import Experiment
from dit_video.planning.efficiencies import Efficiencies, find_efficiencies
from dit_video.planning.fit_estimates import Combination, FitEstimates, Settings
from dit_video.planning.report import check_memory, find_devices
from dit_video.planning.steps import Part
from dit_video.planning.topology import Topology

_SLACK = 1.1
"""Largest estimate of memory that is compiled, relative to the memory: estimates are a little too high."""


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
    devices, present = find_devices(topology)
    device_count = len(devices) if present else topology.num_chips
    available = topology.chip.usable_memory * topology.num_chips // device_count
    limit = check_memory(limit, available, topology)
    efficiencies = find_efficiencies(topology.chip) if efficiencies is None else efficiencies
    options: dict[str, Any] = {"part": part, "clips": clips, "efficiencies": efficiencies}
    estimates = FitEstimates(experiment, topology, device_count, **options)
    meshes = [estimates.estimate(()), *estimates.estimate_all(frozenset({"--mesh"}.intersection(estimates.options)))]
    if not any(meshes):
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
