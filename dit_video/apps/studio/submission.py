"""A job as the browser asks for it, checked before it waits in the queue, and the code that makes its clips again."""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_video.apps.studio.forms import FormError, FormField, MediaSource, Tab, parse_answers
from dit_video.apps.studio.gallery import get_input_file
from dit_video.core.errors import UserError
from dit_video.sampling.adapters import AdapterFile
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig, to_grid
from dit_video.sampling.preparation import check_requests, resolve_sampling
from dit_video.sampling.tasks import AnyTask, ClipTask
from dit_video.video import Clip


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
      config: Config of the model.
      tabs: Tabs of the model.
      sampling_form: Fields that all tabs share.
      media: Uploads and gallery of the user.

    Raises:
      FormError: If an answer is invalid, or the values do not fit the model or each other.
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
            fitted = _fit_lengths(values, config.model.autoencoder.stride.t)
            if fitted == values:
                raise
        submission = _make_submission(fitted, config, **shared)
    except UserError as error:
        raise FormError(str(error), _guess_field(str(error), tab, sampling_form)) from error
    warnings.warn("the last frames of a clip are left out: this task needs 1 + a multiple of the stride", stacklevel=2)
    return submission


def format_python(submission: Submission, model: str, seed: int, adapters: Mapping[str, AdapterFile]) -> str:
    """Return Python that makes the clip of a seed; it reads the inputs from the working folder.

    Args:
      submission: The job.
      model: Folder of the model.
      seed: Seed of the clip.
      adapters: LoRA files of the model, by name.
    """
    values = {name: value for name, value in submission.values.items() if name not in submission.inputs}
    inputs = {name: _format_decode(name, clip) for name, clip in submission.inputs.items()}
    if submission.tab.task_name not in ("generate", "loop"):
        values = {name: value for name, value in values.items() if not _is_default(submission, name, value)}
    task = [f"{name}={name}" for name in inputs] + [f"{name}={value!r}" for name, value in values.items()]
    overrides = [f"{name}={value!r}" for name, value in submission.overrides.items()]
    imports = ["import dit_video"] + (["from dit_video.video import decode"] if inputs else [])
    if (method := _find_method(submission)) is not None:
        call = [f"result = pipe.{method}(", *(f"    {each}," for each in (*task, f"seed={seed}", *overrides)), ")"]
    else:
        kind = type(submission.task)
        imports.append(f"from {kind.__module__} import {kind.__qualname__}")
        arguments = [f"[{kind.__qualname__}({', '.join(task)})]", f"seeds=[{seed}]", *overrides]
        call = ["(result,) = pipe.run_tasks(", *(f"    {each}," for each in arguments), ")"]
    step = "" if submission.checkpoint is None else f", step={submission.checkpoint}"
    lines = [*imports, "", f"pipe = dit_video.load({model!r}{step})"]
    for adapter in _list_adapters(submission, adapters):
        expert = "" if adapter.expert == "backbone" else f", expert={adapter.expert!r}"
        lines.append(f"pipe = pipe.load_lora({adapter.file.name!r}, {adapter.scale:g}{expert})")
    lines += [f"{name} = {text}" for name, text in inputs.items()]
    return "\n".join([*lines, *call, 'result.save("result.apng")', ""])


def format_command(submission: Submission, model: str, seed: int, adapters: Mapping[str, AdapterFile]) -> str | None:
    """Return the command that makes the clip of a seed, which reads the inputs from the working folder.

    It is None for tasks of other packages, and for values that `sample.py` has no option for.

    Args:
      submission: The job.
      model: Folder of the model.
      seed: Seed of the clip.
      adapters: LoRA files of the model, by name.
    """
    task, values = submission.tab.task_name, dict(submission.values)
    if _find_method(submission) is None:
        return None
    if any(name in values and not _is_default(submission, name, values[name]) for name in _NO_OPTION):
        return None
    parts = ["python", "experiments/sample.py", model]
    if task != "generate":
        parts += ["--task", task]
    for name, value in values.items():
        if name in _NO_OPTION or value is False:
            continue
        option = "--" + _OPTION_NAMES.get(name, name).replace("_", "-")
        parts += [option, _format_option(name, value, submission.inputs)]
    parts += ["--seed", str(seed)]
    for name, value in submission.overrides.items():
        parts += [f"--{name}", str(value)]
    if submission.checkpoint is not None:
        parts += ["--step", str(submission.checkpoint)]
    for adapter in _list_adapters(submission, adapters):
        parts += ["--lora", f"{adapter.file.name}@{adapter.scale:g}@{adapter.expert}"]
    return shlex.join([*parts, "--out", "result.mp4" if task == "generate" else "result"])


_OVERRIDES = ("steps", "guidance", "sampler", "shift")


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
            config.model.latent_grid(to_grid(clip.frames.shape[:3]))


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


_OPTION_NAMES = {"frames": "new-frames"}
"""Options that have another name than the value."""
_METHOD_NAMES = {"described_edit": "edit"}
"""Methods of a pipeline that have another name than the task."""
_NO_OPTION = ("source_guidance", "draws")
"""Values of tasks that the command has no option for."""


def _list_adapters(submission: Submission, adapters: Mapping[str, AdapterFile]) -> list[AdapterFile]:
    """Return the adapters with the scales of a job, without those that are turned off."""
    scaled = [each._replace(scale=submission.scales.get(name, each.scale)) for name, each in adapters.items()]
    return [each for each in scaled if each.scale != 0]


def _find_method(submission: Submission) -> str | None:
    """Return the name of the pipeline's method for a task; None for a task of another package."""
    name = submission.tab.task_name
    method = _METHOD_NAMES.get(name, name)
    return method if hasattr(Pipeline, method) else None


def _format_decode(name: str, clip: Clip) -> str:
    suffix = get_input_file(clip.frames.shape)
    if name == "mask":
        return f'decode("mask.{suffix}").frames[0, ..., 0] > 127'
    return f'decode("{name}.{suffix}")'


def _format_option(name: str, value: Any, inputs: Mapping[str, Clip]) -> str:
    if name in inputs:
        return f"{name}.{get_input_file(inputs[name].frames.shape)}"
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _is_default(submission: Submission, name: str, value: Any) -> bool:
    """Return whether a value is the default of the task's class, which need not be written."""
    return name != "prompt" and getattr(type(submission.task), name, None) == value
