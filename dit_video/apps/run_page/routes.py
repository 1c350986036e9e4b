"""The page of a run: its addresses, and its content in the order in which it is shown."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from dit_video.apps.pages import render_page
from dit_video.apps.reports.elements import format_number
from dit_video.apps.reports.report import Figure
from dit_video.apps.reports.run_times import HOOK_LABELS, TimePart, format_duration, render_run_times
from dit_video.apps.run_page.run_charts import DrawnChart, draw_evaluations, draw_losses, draw_others, draw_throughput
from dit_video.apps.run_page.run_files import KINDS, GridSeries, TimeUse, list_grids
from dit_video.apps.run_page.run_state import RunReader, RunState, TrainingState, make_document, read_plan
from dit_video.core.memory import format_bytes
from dit_video.experiment.checkpoints import SavedCheckpoint


class CheckpointRow(NamedTuple):
    """A checkpoint in the table."""

    step: int
    unix_seconds: float | None
    size: str
    is_loadable: bool
    """Whether it can be sampled from."""


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """A training on the page."""

    name: str
    title: str
    state: TrainingState
    is_current: bool
    summary: str
    """Number of steps and newest loss."""
    stage: str
    figures: tuple[Figure, ...]
    losses: tuple[DrawnChart, ...]
    throughput: tuple[DrawnChart, ...]
    evaluations: tuple[DrawnChart, ...]
    others: tuple[DrawnChart, ...]
    time_parts: tuple[TimePart, ...]
    has_all_times: bool
    checkpoints: tuple[CheckpointRow, ...]
    """Checkpoints, newest first."""

    @property
    def grids(self) -> tuple[GridSeries, ...]:
        """Return the samples and reconstructions."""
        return self.state.grids


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The whole page."""

    title: str
    command: str
    status: str
    status_text: str
    updated: float | None
    """Time of day of the newest file, in seconds."""
    progress: TrainingView | None
    """Training that the header describes; None before the first."""
    time_left: str
    times: Markup | None
    """Where the time of the whole run went; None if nothing is recorded."""
    goodput: str
    """The goodput in words; empty if nothing is recorded."""
    trainings: tuple[TrainingView, ...]
    """Trainings that have begun, newest first."""


_MEDIA_HEADERS = {"Cache-Control": "private, max-age=31536000, immutable"}
"""Headers of a grid, whose address has its version."""


def make_run_routes(folder: Path) -> list[Route]:
    """Return the routes of the page of the run in a folder, which another process may write meanwhile.

    `/run` is the page, `/run/state` its state as JSON, and `/run/media/…` the grids that the page names.
    """
    reader = RunReader(folder)

    def get_page(request: Request) -> Response:
        view = make_view(reader.read())
        return render_page(
            "run.html.jinja", title=view.title, has_run=True, page="run", run=view, format_time=format_time
        )

    def get_state(request: Request) -> Response:
        document = make_document(reader.read())
        # The page is fetched again when this changes.
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        return JSONResponse({"version": digest[:16], **document})

    def get_media(request: Request) -> Response:
        training, kind, name = (request.path_params[part] for part in ("training", "kind", "name"))
        # Compared with what was listed, and never a part of a path.
        if kind in KINDS and training in {each.name for each in read_plan(folder).add_folders(folder)}:
            for grid in list_grids(folder, training):
                for file in grid.files:
                    if grid.kind == kind and file.path.name == name:
                        return FileResponse(file.path, headers=_MEDIA_HEADERS)
        raise HTTPException(404, f"{name[:80]} does not exist")

    return [
        Route("/run", get_page),
        Route("/run/state", get_state),
        Route("/run/media/{training:path}/{kind}/{name}", get_media),
    ]


def make_view(state: RunState) -> RunView:
    """Return the content of the page for a state."""
    current = state.current or next((each for each in state.trainings if each.started is not None), None)
    views = [
        _make_training(each, is_current=each is current, is_sampled=each.plan.name == state.plan.sampled)
        for each in state.trainings
        if _has_begun(each)
    ]
    progress = next((view for view in views if view.is_current), None)
    return RunView(
        title=state.plan.title,
        command=state.plan.command,
        status=state.status,
        status_text=state.status_text,
        updated=None if current is None else current.updated,
        progress=progress,
        time_left=_format_time_left(state, current),
        times=render_run_times(state.times) if state.times.total else None,
        goodput="" if state.times.goodput is None else f"{100 * state.times.goodput:.1f} % goodput",
        trainings=tuple(reversed(views)),
    )


def _has_begun(training: TrainingState) -> bool:
    return bool(training.entries or training.grids or training.checkpoints or training.started)


def _format_time_left(state: RunState, current: TrainingState | None) -> str:
    if current is None or state.status not in ("training", "starting") or current.is_done:
        return ""
    seconds = current.estimate_seconds_left()
    return "" if seconds is None else f"{format_duration(seconds)} left"


def _make_training(training: TrainingState, *, is_current: bool, is_sampled: bool) -> TrainingView:
    step, steps = training.step, training.plan.steps
    count = f"{step:,} of {steps:,} steps" if steps is not None else f"{step:,} steps"
    loss = _get_newest(training, "loss")
    return TrainingView(
        name=training.plan.name,
        title=training.plan.title,
        state=training,
        is_current=is_current,
        summary=count + ("" if loss is None else f", loss {loss:.4g}"),
        stage=training.plan.find_stage(step),
        figures=tuple(_make_figures(training)),
        losses=tuple(draw_losses(training)),
        throughput=tuple(draw_throughput(training)),
        evaluations=tuple(draw_evaluations(training)),
        others=tuple(draw_others(training)),
        time_parts=tuple(_make_time_parts(training.time_use)),
        has_all_times=training.time_use.is_complete,
        checkpoints=tuple(_make_row(each, is_sampled) for each in reversed(training.checkpoints)),
    )


def _make_row(checkpoint: SavedCheckpoint, is_sampled: bool) -> CheckpointRow:
    size = "" if checkpoint.size is None else format_bytes(checkpoint.size)
    return CheckpointRow(checkpoint.step, checkpoint.unix_seconds, size, is_sampled)


def _get_newest(training: TrainingState, name: str) -> float | None:
    """Return the newest finite value of this name; None if there is none."""
    values = (entry[name] for entry in reversed(training.entries) if math.isfinite(entry.get(name, math.nan)))
    return next(values, None)


def _make_figures(training: TrainingState) -> Iterator[Figure]:
    """Yield the headline figures of a training."""
    finite = [entry["loss"] for entry in training.entries if math.isfinite(entry.get("loss", math.nan))]
    if finite:
        invalid = sum(not math.isfinite(entry["loss"]) for entry in training.entries if "loss" in entry)
        note = f"lowest {min(finite):.4g}" + (f", {invalid} not finite" if invalid else "")
        yield Figure(label="loss", value=f"{finite[-1]:.4g}", note=note)
    if (value := _get_newest(training, "validation_loss")) is not None:
        yield Figure(label="validation loss", value=f"{value:.4g}")
    if (value := _get_newest(training, "reconstruction_psnr")) is not None:
        yield Figure(label="PSNR", value=f"{value:.1f} dB", note="of the clips below")
    if (value := _get_newest(training, "tokens_per_second")) is not None:
        yield Figure(label="tokens per second", value=format_number(value))
    if (value := _get_newest(training, "steps_per_second")) is not None:
        is_fast = value >= 1
        label = "steps per second" if is_fast else "seconds per step"
        yield Figure(label=label, value=f"{value if is_fast else 1 / value:.3g}")
    if (value := _get_newest(training, "mfu")) is not None:
        yield Figure(label="MFU", value=f"{100 * value:.1f} %", note="of the devices' peak", share=value)
    use = training.time_use
    if (share := use.lost_share) is not None:
        note = f"of {format_duration(use.total)}"
        yield Figure(label="time lost", value=f"{100 * share:.1f} %", note=note, share=share)
    if skipped := sum(entry.get("skipped", 0.0) for entry in training.entries):
        yield Figure(label="skipped steps", value=f"{skipped:.0f}", note="loss or gradient not finite")


def _make_time_parts(use: TimeUse) -> Iterator[TimePart]:
    """Yield the parts of the time that took any, each hook after the sum of all."""
    parts = [
        ("training steps", "c0", use.steps),
        ("waiting for data", "c1", use.data),
        ("compilation", "c3", use.compilation),
        ("checkpoints", "c2", use.checkpoints),
        ("monitoring", "c4", use.monitoring),
        ("restarts and steps taken again", "c5", use.restarts),
    ]
    start, total = 0.0, use.total
    for label, colour, seconds in parts:
        if total <= 0 or seconds <= 0:
            continue
        yield TimePart(label, colour, format_duration(seconds), seconds / total, start)
        if colour == "c4":
            for name, part in sorted(use.hooks.items(), key=lambda item: -item[1]):
                if part >= 0.001 * total:
                    yield TimePart(HOOK_LABELS.get(name, name), "", format_duration(part), part / total, start)
        start += seconds / total


def format_time(unix_seconds: float) -> str:
    """Return a time of day for machines and, in this server's time zone, for readers without scripts."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(unix_seconds))
