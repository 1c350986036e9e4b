"""A job as the browser asks for it, checked before it waits in the queue."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_video.apps.studio.fields import FormError, FormField, MediaSource
from dit_video.apps.studio.forms import Tab, parse_answers
from dit_video.core.errors import UserError
from dit_video.sampling.pipeline_config import PipelineConfig, to_grid
from dit_video.sampling.preparation import check_requests, resolve_sampling
from dit_video.sampling.tasks import AnyTask, ClipTask
from dit_video.video import Clip

_OVERRIDES = ("steps", "guidance", "sampler", "shift")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A task with its sampling."""

    tab: Tab
    task: AnyTask
    values: Mapping[str, Any]
    """Values of the task, with clips and masks as arrays."""
    sampling: Mapping[str, Any]
    """Values that all tabs share."""
    answers: Mapping[str, Any]
    """The answers of both forms, as the browser sent them."""

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of the clips."""
        first = self.sampling.get("seed", 0)
        return list(range(first, first + self.sampling.get("count", 1)))

    @property
    def overrides(self) -> dict[str, Any]:
        """Return the arguments of a pipeline's methods besides the task and the seed."""
        names = (*_OVERRIDES, "negative")
        return {name: self.sampling[name] for name in names if self.sampling.get(name) not in (None, "")}

    @property
    def scales(self) -> dict[str, float]:
        """Return the scales of adapters (LoRA), by name."""
        parts = ((name.partition(":"), value) for name, value in self.sampling.items())
        return {name: value for (kind, _, name), value in parts if kind == "lora" and name}

    @property
    def checkpoint(self) -> int | None:
        """Return the step of the run's checkpoint; None for the newest."""
        chosen = self.sampling.get("checkpoint")
        return int(chosen) if chosen else None

    @property
    def title(self) -> str:
        """Return the prompt, or the title of the tab."""
        return self.values.get("prompt") or self.tab.title

    @property
    def inputs(self) -> dict[str, Clip]:
        """Return the clips, images and masks that the task gets, by the names of their fields."""
        inputs: dict[str, Clip] = {}
        for name, value in self.values.items():
            if isinstance(value, Clip):
                inputs[name] = value
            elif isinstance(value, np.ndarray):
                picture = np.where(value, np.uint8(255), np.uint8(0))
                inputs[name] = Clip(np.repeat(picture[None, ..., None], 3, axis=-1), fps=1)
        return inputs


def parse_submission(
    body: Any, config: PipelineConfig, tabs: Sequence[Tab], sampling_form: Sequence[FormField], media: MediaSource
) -> Submission:
    """Return the job that a browser asks for.

    Args:
      body: `{"tab": NAME, "values": {...}, "sampling": {...}}`.
      config: config of the model.
      tabs: tabs of the model.
      sampling_form: fields that all tabs share.
      media: uploads and gallery of the user.

    Raises:
      FormError: an answer that is invalid, or values that do not fit the model or each other.
    """
    if not isinstance(body, Mapping):
        raise FormError("the request must be an object")
    tab = next((tab for tab in tabs if tab.name == body.get("tab")), None)
    if tab is None:
        raise FormError(f"tab={str(body.get('tab'))[:40]!r} does not exist. Reload the page.")
    answers = {"values": body.get("values") or {}, "sampling": body.get("sampling") or {}}
    values = tab.parse(answers["values"], media)
    sampling = parse_answers(sampling_form, answers["sampling"], media)
    values.setdefault("prompt", _get_caption(values))
    shared: dict[str, Any] = {"tab": tab, "sampling": sampling, "answers": answers}
    try:
        try:
            return _make_submission(values, config, **shared)
        except UserError:
            fitted = _fit_lengths(values, config.autoencoder.stride.t)
            if fitted == values:
                raise
        submission = _make_submission(fitted, config, **shared)
    except UserError as error:
        raise FormError(str(error), _guess_field(str(error), tab, sampling_form)) from error
    warnings.warn("the last frames of a clip are left out: this task needs 1 + a multiple of the stride", stacklevel=2)
    return submission


def _make_submission(values: Mapping[str, Any], config: PipelineConfig, *, tab: Tab, **shared: Any) -> Submission:
    """Return the job of a task's values, after it was checked."""
    submission = Submission(tab=tab, task=tab.make_task(values), values=values, **shared)
    _check(submission, config)
    return submission


def _fit_lengths(values: Mapping[str, Any], stride: int) -> dict[str, Any]:
    """Return the values with clips of `1 + k * stride` frames, which tasks need that change all of a clip."""
    fitted = dict(values)
    for name, value in values.items():
        if isinstance(value, Clip) and (rest := (len(value.frames) - 1) % stride):
            fitted[name] = replace(value, frames=value.frames[:-rest])
    return fitted


def _check(submission: Submission, config: PipelineConfig) -> None:
    """Check that the model can sample the task, as far as that is known before it is sampled."""
    overrides: dict[str, Any] = {name: value for name, value in submission.overrides.items() if name in _OVERRIDES}
    if isinstance(submission.task, ClipTask):
        request = submission.task.make_request(config)._replace(negative=submission.overrides.get("negative"))
        check_requests(config, [request], **overrides)
    else:
        resolve_sampling(config, **overrides)
        for clip in submission.inputs.values():
            config.latent_grid(to_grid(clip.frames.shape[:3]))


def _get_caption(values: Mapping[str, Any]) -> str:
    """Return the caption of the first clip that has one, which describes a clip of the gallery."""
    captions = (value.caption for value in values.values() if isinstance(value, Clip))
    return next(filter(None, captions), "")


def _guess_field(message: str, tab: Tab, sampling_form: Sequence[FormField]) -> str | None:
    """Return the field whose name the message of an error begins with, if any."""
    word = message.replace("=", " ").partition(" ")[0]
    names = [field.name for field in (*tab.fields, *sampling_form)]
    if word in ("T", "height", "width", "frames") and word not in names and "size" in names:
        return "size"
    return word if word in names else None
