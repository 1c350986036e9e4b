"""A job as the browser asks for it, checked before it waits in the queue, and the code that makes its clips again."""

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_video.apps.studio.forms import FormError, FormField, MediaSource, Tab, parse_answers
from dit_video.apps.studio.gallery import get_input_file
from dit_video.core.errors import UserError
from dit_video.sampling import Sampling
from dit_video.sampling.adapters import AdapterFile
from dit_video.sampling.pipeline_config import PipelineConfig, to_grid
from dit_video.sampling.preparation import check_requests, check_sampling
from dit_video.sampling.request import Condition
from dit_video.sampling.tasks import Task
from dit_video.sampling.tasks.fields import list_fields
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A task with its sampling."""

    tab: Tab
    task: Task
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
    def options(self) -> dict[str, Any]:
        """Return the arguments of `Pipeline.run` besides the task and the seed."""
        names = (*_SAMPLING, "negative")
        return {name: self.sampling[name] for name in names if self.sampling.get(name) not in (None, "")}

    @property
    def pictures(self) -> dict[str, Any]:
        """Return the pictures that are arguments of `Pipeline.run` besides the task."""
        return {name: value for name, value in self.values.items() if name in self.tab.options}

    def make_sampling(self, config: PipelineConfig) -> Sampling:
        """Return the sampling of a model with the job's values.

        Raises:
          UserError: If a value is invalid.
        """
        changes: dict[str, Any] = {name: value for name, value in self.options.items() if name in _SAMPLING}
        return config.sampling.change(config.model.process, **changes)

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
            for number, each in enumerate(_list_images(value), 1):
                inputs[f"{name}_{number}"] = each.content if isinstance(each, Condition) else each
        return inputs


def parse_submission(
    body: Any,
    config: PipelineConfig,
    tabs: Sequence[Tab],
    sampling_form: Sequence[FormField],
    media: MediaSource,
    *,
    recall: Callable[[str], str] = str,
) -> Submission:
    """Return the job that a browser asks for.

    Args:
      body: `{"tab": NAME, "values": {...}, "sampling": {...}}`.
      config: Config of the model.
      tabs: Tabs of the model.
      sampling_form: Fields that all tabs share.
      media: Uploads and gallery of the user.
      recall: Function that returns a prompt that was expanded with what it was.

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
    if "prompt" in {field.name for field in tab.fields}:
        values["prompt"] = recall(values.get("prompt", _get_caption(values)))
    shared: dict[str, Any] = {"tab": tab, "sampling": sampling, "answers": answers}
    try:
        submission = Submission(task=tab.make_task(values), values=values, **shared)
        _check(submission, config)
    except UserError as error:
        raise FormError(str(error), _guess_field(str(error), tab, sampling_form)) from error
    return submission


def format_python(submission: Submission, model: str, seed: int, adapters: Mapping[str, AdapterFile]) -> str:
    """Return Python that makes the clip of a seed; it reads the inputs from the working folder.

    Args:
      submission: The job.
      model: Folder of the model.
      seed: Seed of the clip.
      adapters: LoRA files of the model, by name.
    """
    kind = type(submission.task)
    values = {name: value for name, value in submission.values.items() if not _is_default(submission, name, value)}
    pictures = {name: text for name, value in values.items() if (text := _format_pictures(submission, name, value))}
    values = {**pictures, **{name: repr(value) for name, value in values.items() if name not in pictures}}
    task = [f"    {name}={text}," for name, text in values.items()]
    options = [f"seed={seed}", *(f"{name}={value!r}" for name, value in submission.options.items())]
    imports = ["import dit_video"]
    if any(isinstance(each, Condition) for value in submission.values.values() for each in _list_images(value)):
        imports.append("from dit_video.sampling.request import Condition")
    if submission.tab.task_name == "generate":
        call = ["result = pipe.generate(", *task, *(f"    {option}," for option in options), ")"]
    else:
        imports.append(f"from {_find_home(kind)} import {kind.__qualname__}")
        call = [f"task = {kind.__qualname__}(", *task, ")", f"result = pipe.run(task, {', '.join(options)})"]
    step = "" if submission.checkpoint is None else f", step={submission.checkpoint}"
    lines = [*imports, "", f"pipe = dit_video.load({model!r}{step})"]
    for adapter in _list_adapters(submission, adapters):
        expert = "" if adapter.expert == "backbone" else f", expert={adapter.expert!r}"
        lines.append(f"pipe = pipe.load_lora({adapter.file.name!r}, {adapter.scale:g}{expert})")
    return "\n".join([*lines, *call, 'result.save("result.apng")', ""])


def format_command(submission: Submission, model: str, seed: int, adapters: Mapping[str, AdapterFile]) -> str | None:
    """Return the command that makes the clip of a seed, which reads the inputs from the working folder.

    It is None for tasks of other packages, which the command knows only if they are installed.

    Args:
      submission: The job.
      model: Folder of the model.
      seed: Seed of the clip.
      adapters: LoRA files of the model, by name.
    """
    name, kind = submission.tab.task_name, type(submission.task)
    if not kind.__module__.startswith("dit_video."):
        return None
    parts = ["python", "experiments/sample.py", model] + ([] if name == "generate" else [name])
    for field in list_fields(kind):
        value = submission.values.get(field.name)
        if value is None or value is False:
            continue
        option = "--" + field.name.replace("_", "-")
        parts += [option] if value is True else [option, *_format_option(field.name, value, submission.inputs)]
    for option, value in submission.pictures.items():
        parts += ["--" + option.replace("_", "-"), *_format_option(option, value, submission.inputs)]
    parts += ["--seed", str(seed)]
    for name, value in submission.options.items():
        parts += [f"--{name}", str(value)]
    if submission.checkpoint is not None:
        parts += ["--step", str(submission.checkpoint)]
    for adapter in _list_adapters(submission, adapters):
        parts += ["--lora", f"{adapter.file.name}@{adapter.scale:g}@{adapter.expert}"]
    return shlex.join([*parts, "--out", "result.mp4"])


_SAMPLING = ("steps", "guidance", "solver", "shift")


def _check(submission: Submission, config: PipelineConfig) -> None:
    """Check that the model can sample the task, as far as that is known before it is sampled."""
    sampling, task = submission.make_sampling(config), submission.task.fit(config)
    given, fitted = ([each for each in vars(own).values() if isinstance(each, Clip)] for own in (submission.task, task))
    if any(len(clip) > len(own) for clip, own in zip(given, fitted, strict=True)):
        warnings.warn("the last frames of a clip are left out: the task has 1 + a multiple of the stride", stacklevel=2)
    if (request := task.make_request(config)) is not None:
        options = {"negative": submission.options.get("negative"), **submission.pictures}
        check_requests(config, [replace(request, **options)], sampling)
    else:
        check_sampling(config, sampling)
        for clip in fitted:
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


def _list_adapters(submission: Submission, adapters: Mapping[str, AdapterFile]) -> list[AdapterFile]:
    """Return the adapters with the scales of a job, without those that are turned off."""
    scaled = [each._replace(scale=submission.scales.get(name, each.scale)) for name, each in adapters.items()]
    return [each for each in scaled if each.scale != 0]


def _find_home(kind: type[Task]) -> str:
    """Return the module that a task is imported from."""
    return "dit_video.sampling.tasks" if kind.__module__.startswith("dit_video.sampling.tasks.") else kind.__module__


def _get_file(name: str, clip: Clip) -> str:
    """Return the name of the file of an input."""
    return f"{name}.{get_input_file(clip.frames.shape)}"


def _list_images(value: Any) -> tuple[Any, ...]:
    """Return the images or conditions of a field of several; nothing for another value."""
    is_list = isinstance(value, tuple) and all(isinstance(each, Clip | Condition) for each in value)
    return value if is_list else ()


def _format_pictures(submission: Submission, name: str, value: Any) -> str:
    """Return the names of the files of pictures, as Python; empty for another value."""
    inputs = submission.inputs
    if name in inputs:
        return repr(_get_file(name, inputs[name]))
    texts = []
    for number, each in enumerate(_list_images(value), 1):
        text = repr(_get_file(f"{name}_{number}", inputs[f"{name}_{number}"]))
        if isinstance(each, Condition):
            strength = "" if each.strength == 1 else f", strength={each.strength}"
            text = f"Condition(content={text}, frame={each.frame}{strength})"
        texts.append(text)
    return f"[{', '.join(texts)}]" if texts else ""


def _format_option(name: str, value: Any, inputs: Mapping[str, Clip]) -> list[str]:
    if name in inputs:
        return [_get_file(name, inputs[name])]
    if images := _list_images(value):
        files = [_get_file(f"{name}_{number}", inputs[f"{name}_{number}"]) for number in range(1, len(images) + 1)]
        return [
            f"{file}@{each.frame}@{each.strength:g}" if isinstance(each, Condition) else file
            for file, each in zip(files, images, strict=True)
        ]
    return ["x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)]


def _is_default(submission: Submission, name: str, value: Any) -> bool:
    """Return whether a value is the default of the task's class, which need not be written."""
    if name == "prompt" or name in submission.inputs:
        return False
    return getattr(type(submission.task), name, None) == value
