"""Trainings of a run, as its config describes them: names, numbers of steps, stages and averages.

The config is read as JSON, because it may hold classes of packages that are not installed here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.sampling.pipeline_config import RUN_CONFIG

_NAME = re.compile(r"[\w.-]{1,80}")
_TITLES = {"autoencoder": "Autoencoder", "denoiser": "Denoiser"}


class PlannedStage(NamedTuple):
    """A stage of a curriculum."""

    name: str
    start: int
    """Number of steps before it."""
    end: int
    """Number of steps at its end."""


@dataclass(frozen=True, kw_only=True)
class PlannedTraining:
    """A training of a run."""

    name: str
    """Name of its folder."""
    steps: int | None = None
    """Number of steps at its end; None if the config does not say."""
    stages: tuple[PlannedStage, ...] = ()
    """Stages of its curriculum; none without one."""
    averages: tuple[str, ...] = ()
    """Averages of the weights that its checkpoints hold, as text."""

    @property
    def title(self) -> str:
        """Return the name for readers."""
        return _TITLES.get(self.name, self.name)

    def find_stage(self, step: int) -> str:
        """Return a description of the stage that the next step belongs to; empty without a curriculum."""
        for number, stage in enumerate(self.stages, start=1):
            if step < stage.end or number == len(self.stages):
                return f"stage {stage.name} ({number} of {len(self.stages)}), steps {stage.start:,} to {stage.end:,}"
        return ""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The trainings of a run, in order."""

    title: str
    """Name of the experiment."""
    command: str = ""
    """Command that started the run."""
    trainings: tuple[PlannedTraining, ...] = ()
    """Planned trainings; none of a run whose config cannot be read."""

    def add_folders(self, run: Path) -> tuple[PlannedTraining, ...]:
        """Return the trainings, with those of further folders of the run that have a log."""
        try:
            folders = sorted(path.parent.name for path in run.glob("*/metrics.jsonl"))
        except OSError:
            folders = []
        names = {each.name for each in self.trainings}
        others = (name for name in folders if name not in names and _NAME.fullmatch(name))
        return (*self.trainings, *(PlannedTraining(name=name) for name in others))


def read_plan(run: Path) -> RunPlan:
    """Return the plan in the config of a run; only the name of its folder if it cannot be read."""
    try:
        document = read_json(run / RUN_CONFIG)
        experiment = document["experiment"]
        trainings = tuple(_list_trainings(experiment))
        return RunPlan(title=str(experiment["name"]), command=str(document.get("command", "")), trainings=trainings)
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return RunPlan(title=run.resolve().name)


def _list_trainings(experiment: Mapping[str, Any]) -> list[PlannedTraining]:
    trainings = []
    if steps := _get_steps(experiment.get("autoencoder")):
        trainings.append(PlannedTraining(name="autoencoder", steps=steps))
    for stage in experiment.get("stages") or ():
        if _NAME.fullmatch(name := str(stage["name"])):
            trainings.append(PlannedTraining(name=name, steps=_get_steps(stage)))
    if last := _get_steps(denoiser := experiment.get("denoiser")):
        named = [(str(each["name"]), _get_steps(each) or 0) for each in experiment.get("curriculum") or ()]
        stages, start = [], 0
        for name, steps in [*named, ("last", last)]:
            stages.append(PlannedStage(name, start, start + steps))
            start += steps
        trainings.append(
            PlannedTraining(
                name="denoiser",
                steps=start,
                stages=tuple(stages) if named else (),
                averages=_list_averages(denoiser or {}),
            )
        )
    return trainings


def _list_averages(denoiser: Mapping[str, Any]) -> tuple[str, ...]:
    averages = denoiser.get("averages") or {}
    decays: Sequence[Any] = averages.get("decays") or ()
    widths: Sequence[Any] = averages.get("sigmas") or ()
    texts = [f"decay {value:g}" for value in (denoiser["ema_decay"], *decays)]
    return (*texts, *(f"relative width {value:g}" for value in widths), "no average")


def _get_steps(config: Any) -> int | None:
    """Return the number of steps of a config of a training; None if it has none."""
    steps = config.get("steps") if isinstance(config, Mapping) else None
    return steps if isinstance(steps, int) and steps > 0 else None
