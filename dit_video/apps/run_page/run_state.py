"""Plan of a run, and the state of its folder while another process trains in it."""

import contextlib
import itertools
import math
import re
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_video.apps.reports.run_times import format_duration
from dit_video.apps.run_page.run_files import (
    Entry,
    EvaluationCurves,
    GridSeries,
    MetricsReader,
    TimesReader,
    TimeUse,
    TimeUseCounter,
    list_grids,
    read_evaluations,
)
from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.experiment.autoencoder import WEIGHTS_FILE
from dit_video.experiment.checkpoints import SavedCheckpoint, find_sampled_model, list_checkpoints
from dit_video.sampling.pipeline_config import RUN_CONFIG
from dit_video.training.folder_lock import LOCK_FILE
from dit_video.training.goodput import RunTimes
from dit_video.training.program_report import ProgramReport

RunStatus = Literal["new", "starting", "training", "silent", "between", "finished"]


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
    """Path of its folder in the run's: `denoiser`, or `MODEL/denoiser` of a nested run."""
    steps: int | None = None
    """Number of steps at its end; None if the config does not say."""
    stages: tuple[PlannedStage, ...] = ()
    """Stages of its curriculum; none without one."""
    averages: tuple[str, ...] = ()
    """Averages of the weights that its checkpoints hold, as text."""

    @property
    def title(self) -> str:
        """Return the name for readers."""
        model, _, name = self.name.rpartition("/")
        return _TITLES.get(name, name) + (f" of {model}" if model else "")

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
    sampled: str = "denoiser"
    """Name of the training whose checkpoints are sampled."""

    @property
    def nested(self) -> tuple[str, ...]:
        """Return the paths of the nested runs of several models."""
        return tuple(dict.fromkeys(path for each in self.trainings if (path := each.name.rpartition("/")[0])))

    def add_folders(self, run: Path) -> tuple[PlannedTraining, ...]:
        """Return the trainings, and further folders of the run, and of nested ones, that have a log."""
        names = {each.name: each for each in self.trainings}
        for nested in ("", *self.nested):
            with contextlib.suppress(OSError):
                for folder in sorted(path.parent for path in (run / nested).glob("*/metrics.jsonl")):
                    name = folder.relative_to(run).as_posix()
                    if name not in names and _TRAINING_NAME.fullmatch(folder.name):
                        names[name] = PlannedTraining(name=name)
        return tuple(names.values())


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The contents of a training's folder so far."""

    plan: PlannedTraining
    entries: tuple[Entry, ...]
    """Entries of the log."""
    updated: float | None
    """Time of day of the newest file, in seconds; None before the first."""
    started: float | None
    """Time of day at which the newest process took the folder, in seconds; None before the first."""
    time_use: TimeUse
    grids: tuple[GridSeries, ...]
    checkpoints: tuple[SavedCheckpoint, ...]
    evaluations: EvaluationCurves
    program: ProgramReport | None
    """What it runs; None before its first step, and of older versions."""

    @property
    def step(self) -> int:
        """Return the number of steps done, as far as it is known."""
        steps = [int(self.entries[-1]["step"])] if self.entries else []
        return max([*steps, *(each.step for each in self.checkpoints)], default=0)

    @property
    def is_done(self) -> bool:
        """Return whether all planned steps are done."""
        return self.plan.steps is not None and self.step >= self.plan.steps

    def compute_pace(self) -> float | None:
        """Return the wall time of a step, with all that happens besides, in seconds; None before it is known."""
        newest = self.entries[-_PACE_ENTRIES:]
        starts = [index for index, entry in enumerate(newest) if "first_step_seconds" in entry]
        newest = newest[starts[-1] if starts else 0 :]
        if len(newest) > 1:
            first, last = newest[0], newest[-1]
            seconds, steps = (last.get(name, math.nan) - first.get(name, math.nan) for name in ("unix_seconds", "step"))
            if seconds > 0 and steps > 0:
                return seconds / steps
        seconds = newest[-1].get("step_seconds", math.nan) if newest else math.nan
        return seconds if math.isfinite(seconds) and seconds > 0 else None

    def estimate_seconds_left(self) -> float | None:
        """Return the time up to the last planned step at the current pace; None if it is not known."""
        pace = self.compute_pace()
        return None if pace is None or self.plan.steps is None else pace * max(0, self.plan.steps - self.step)

    def compute_patience(self) -> float:
        """Return the seconds without news from which the training counts as silent."""
        times = [entry.get("unix_seconds", math.nan) for entry in self.entries[-_PACE_ENTRIES:]]
        gaps = [second - first for first, second in itertools.pairwise(times) if second > first]
        return max(_MIN_SILENCE, _SILENT_INTERVALS * statistics.median(gaps)) if gaps else _MAX_START


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The contents of a run's folder so far."""

    plan: RunPlan
    trainings: tuple[TrainingState, ...]
    """Trainings, in the order of the plan."""
    status: RunStatus
    status_text: str
    """The status in words."""
    times: RunTimes
    """Where the time of all attempts went; without attempts for a run of an older version."""

    @property
    def current(self) -> TrainingState | None:
        """Return the training that has the newest files; None before the first step of any."""
        begun = [each for each in self.trainings if each.updated is not None]
        return max(begun, key=lambda each: each.updated or 0.0, default=None)


class RunReader:
    """Reader of a run's folder, which keeps what it has read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._readers: dict[str, MetricsReader] = {}
        self._counters: dict[str, TimeUseCounter] = {}
        self._times = TimesReader(folder)
        self._checkpoints: dict[str, tuple[float, tuple[SavedCheckpoint, ...]]] = {}
        self._lock = threading.Lock()

    def read(self) -> RunState:
        """Return the state; parts that do not exist, or that cannot be read now, are empty."""
        with self._lock:
            plan = read_plan(self.folder)
            trainings = tuple(map(self._read_training, plan.add_folders(self.folder)))
        status, text = _judge(self.folder, trainings)
        return RunState(plan=plan, trainings=trainings, status=status, status_text=text, times=self._times.read())

    def _read_training(self, plan: PlannedTraining) -> TrainingState:
        folder = self.folder / plan.name
        reader = self._readers.setdefault(plan.name, MetricsReader(folder / "metrics.jsonl"))
        entries, grids, checkpoints = (
            reader.read(),
            list_grids(self.folder, plan.name),
            self._list_checkpoints(plan.name),
        )
        times = [each.unix_seconds for each in checkpoints] + [
            file.version / 1e9 for one in grids for file in one.files
        ]
        # The log is put in place again when a training resumes, so that its time alone would not tell.
        times.append(_find_newest_time(entries) or _get_time(reader.path) if entries else None)
        return TrainingState(
            plan=plan,
            entries=tuple(entries),
            updated=max((each for each in times if each is not None), default=None),
            started=_get_time(folder / LOCK_FILE),
            time_use=self._counters.setdefault(plan.name, TimeUseCounter()).update(entries),
            grids=grids,
            checkpoints=checkpoints,
            evaluations=read_evaluations(folder / "evaluations"),
            program=ProgramReport.read(folder),
        )

    def _list_checkpoints(self, name: str) -> tuple[SavedCheckpoint, ...]:
        listed, known = self._checkpoints.get(name, (-math.inf, ()))
        is_remote = any(each.unix_seconds is None for each in known)
        if is_remote and time.monotonic() - listed < _REMOTE_SECONDS:
            return known
        with contextlib.suppress(UserError, OSError):  # an address that cannot be reached now
            known = list_checkpoints(self.folder, name)
        self._checkpoints[name] = time.monotonic(), known
        return known


def read_plan(run: Path) -> RunPlan:
    """Return the plan in the config of a run; only the name of its folder if it cannot be read."""
    try:
        document = read_json(run / RUN_CONFIG)
        experiment = document["experiment"]
        return RunPlan(
            title=str(experiment["name"]),
            command=str(document.get("command", "")),
            trainings=tuple(_list_trainings(experiment)),
            sampled=find_sampled_model(run),
        )
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return RunPlan(title=run.resolve().name)


def make_document(state: RunState) -> dict[str, Any]:
    """Return a state as JSON values, in which NaN is null."""
    return {
        "title": state.plan.title,
        "status": state.status,
        "status_text": state.status_text,
        "goodput": state.times.goodput,
        "attempts": len(state.times.attempts),
        "lost_steps": state.times.lost_steps,
        "seconds": {name: value / 1e6 for name, value in state.times.microseconds.items()},
        "trainings": [_describe_training(each) for each in state.trainings],
    }


_TRAINING_NAME = re.compile(r"(?!\.+$)[\w.-]{1,80}")
_TITLES = {"autoencoder": "Autoencoder", "denoiser": "Denoiser"}


def _list_trainings(experiment: Mapping[str, Any]) -> list[PlannedTraining]:
    trainings, stages, last = [], list[PlannedStage](), None
    for stage in experiment.get("stages") or ():
        name, steps = str(stage["name"]), _get_steps(stage)
        if "experiment" in stage:  # a model of its own, as TrainModel
            nested = _list_trainings(stage["experiment"]) if _TRAINING_NAME.fullmatch(name) else []
            trainings += [replace(each, name=f"{name}/{each.name}") for each in nested]
        elif "continues" in stage:  # a stage of the denoiser, as DenoiserTraining
            start, last = stages[-1].end if stages else 0, stage
            stages.append(PlannedStage(name, start, start + (steps or 0)))
        elif "previous" not in stage and _TRAINING_NAME.fullmatch(name):  # which JoinPipelines has
            trainings.append(PlannedTraining(name=name, steps=steps))
    if last is not None:
        named = tuple(stages) if len(stages) > 1 else ()
        averages = _list_averages(last)
        trainings.append(PlannedTraining(name="denoiser", steps=stages[-1].end, stages=named, averages=averages))
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


_MIN_SILENCE = 120.0
"""Seconds without news after which a run that logs often counts as silent."""
_SILENT_INTERVALS = 5
"""Number of intervals between entries after which a run without news counts as silent."""
_MAX_START = 1800.0
"""Seconds that a process may take from its start to the first entry: it loads, compiles and makes latents."""
_PACE_ENTRIES = 20
"""Number of entries over which the pace is averaged."""
_REMOTE_SECONDS = 60.0
"""Seconds for which a list of checkpoints at an address is used again."""


def _find_newest_time(entries: Sequence[Entry]) -> float | None:
    """Return the time of the newest entry that has one; None without any, as in logs of older versions."""
    times = (entry.get("unix_seconds", math.nan) for entry in reversed(entries))
    return next(filter(math.isfinite, times), None)


def _get_time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _judge(folder: Path, trainings: Sequence[TrainingState]) -> tuple[RunStatus, str]:
    """Return the status of a run, and its description."""
    now = time.time()
    if (folder / "pipeline").is_dir() or (trainings and all(each.is_done for each in trainings)):
        return "finished", "finished"
    active = max(trainings, key=lambda each: max(each.updated or 0.0, each.started or 0.0), default=None)
    if active is None or (active.updated is None and active.started is None):
        return "new", "not begun: nothing is logged yet"
    title, updated, started = _lower(active), active.updated or 0.0, active.started or 0.0
    if started > updated and now - started < _MAX_START:
        return "starting", f"training of the {title} starts: loading and compiling"
    silence = now - max(updated, started)
    if active.is_done:
        following = [_lower(each) for each in trainings[trainings.index(active) + 1 :]]
        own = folder / active.plan.name.rpartition("/")[0]
        latents = _get_time(own / "latents") or 0.0
        if following and max(silence, 0.0) < _MAX_START and (own / WEIGHTS_FILE).exists() and latents > updated:
            return "between", f"the {title} is trained; latents are encoded for the {following[0]}"
        return "between", f"the {title} is trained" + (f"; the {following[0]} has not begun" if following else "")
    if silence > active.compute_patience():
        return "silent", f"no news of the {title} for {format_duration(silence)}"
    return "training", f"training the {title}"


def _lower(training: TrainingState) -> str:
    """Return the title of a training inside of a sentence."""
    title = training.plan.title
    return title[:1].lower() + title[1:]


def _describe_training(training: TrainingState) -> dict[str, Any]:
    use, newest = training.time_use, training.entries[-1] if training.entries else {}
    return {
        "name": training.plan.name,
        "step": training.step,
        "steps": training.plan.steps,
        "entries": len(training.entries),
        "updated": training.updated,
        "seconds_left": training.estimate_seconds_left(),
        "values": {name: value if math.isfinite(value) else None for name, value in newest.items()},
        "seconds": {
            "steps": use.steps,
            "data": use.data,
            "compilation": use.compilation,
            "checkpoints": use.checkpoints,
            "restarts": use.restarts,
            "hooks": use.hooks,
        },
        "grids": {
            grid.kind: [{"step": file.step, "url": grid.get_url(file)} for file in grid.files]
            for grid in training.grids
        },
        "evaluations": training.evaluations,
        "warnings": [] if training.program is None else list(training.program.warnings),
        "checkpoints": [each._asdict() for each in training.checkpoints],
    }
