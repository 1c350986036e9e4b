"""The interface of tasks: what is generated from what."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.clip_recipe import hash_pixels
from dit_video.sampling.edit_paths import LatentStepper
from dit_video.sampling.known_pixels import fit_mask
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preview import PreviewDecoder
from dit_video.sampling.progress import Callback
from dit_video.sampling.request import Request, fit_frames
from dit_video.sampling.sampling_config import Sampling
from dit_video.sampling.tasks.fields import Doc, list_fields
from dit_video.tokens import Grid
from dit_video.video import Clip

Prompt = Annotated[str | None, Doc("Description of the result; the caption of the clip by default.")]


@runtime_checkable
class TaskPipeline(Protocol):
    """The part of a `Pipeline` that tasks of several passes use."""

    config: PipelineConfig
    codec: LatentCodec
    preview_decoder: PreviewDecoder | None

    def run_many(
        self,
        tasks: Sequence["Task"],
        options: Sequence[Request],
        *,
        sampling: Sampling | None = None,
        callback: Callback | None = None,
    ) -> list[Clip]:
        """Run tasks, each with its options."""

    def make_stepper(self, request: Request, *, sampling: Sampling | None = None) -> LatentStepper:
        """Return the denoiser and Euler's solver for the latents of a request."""


@dataclass(frozen=True, eq=False)
class Task:
    """Base class of generation tasks, such as extension and inpainting: frozen dataclasses.

    `sample.py`, the forms of the studio, task files and recipes are made of its fields alone (see `fields`). Clips,
    images and masks may be given in any form of `dit_video.sampling.pictures`. Most tasks are a request for one clip:
    they have `make_request`, and perhaps `finish`. One of several passes has `run` instead.

    Raises:
      UserError: If a value is of another kind than its field, or a number is outside of its limits.
    """

    is_completion: ClassVar[bool] = True
    """Whether the result keeps pixels of the task's clips and images."""
    fitted_axes: ClassVar[str] = "hw"
    """Axes along which clips and images get a length that the model samples: `t` frames, `h` height, `w` width."""

    def __post_init__(self):
        for field in list_fields(type(self)):
            object.__setattr__(self, field.name, field.convert(getattr(self, field.name)))

    def fit(self, config: PipelineConfig) -> "Task":
        """Return the task with clips, images and masks of a size that the model samples.

        Last frames are left out, and pictures scaled and cropped, as those of a `Request` are.
        """
        multiple, changes = config.model.size_multiple, dict[str, Any]()
        for field in list_fields(type(self)):
            value = getattr(self, field.name)
            if field.kind not in ("clip", "image", "mask") or value is None:
                continue
            clip: Clip | None = value
            if field.kind == "mask":  # of the clip, or of the video of `Generate`, whose request is refused without one
                clip = getattr(self, "clip", None) or getattr(self, "video", None)
            if clip is None:
                continue
            old = get_size(clip)
            steps = Grid(*(max(1, length // step) * step for length, step in zip(old, multiple, strict=True)))
            lengths = steps._replace(t=1 + (old.t - 1) // multiple.t * multiple.t)._asdict()
            size = old._replace(**{axis: lengths[axis] for axis in self.fitted_axes})
            if field.kind == "mask":
                changes[field.name] = fit_mask(value, clip, size)
            else:
                changes[field.name] = replace(value, frames=fit_frames(value.frames[: size.t], size))
        return replace(self, **changes)

    def make_request(self, config: PipelineConfig) -> Request | None:
        """Return the request of the clip, of a task that fits; None for a task of several passes.

        Raises:
          UserError: If sizes, lengths or values do not fit the model or each other.
        """
        return None

    def finish(self, sampled: Clip) -> Clip:
        """Return the result, of the clip that was sampled for the request."""
        return sampled

    def run(self, pipeline: TaskPipeline, options: Request, *, sampling: Sampling, callback: Callback | None) -> Clip:
        """Return the result of a task of several passes.

        Args:
          pipeline: The pipeline.
          options: Seed, negative prompt and other options of `Pipeline.run`; see `add_options`.
          sampling: Steps, solver and guidance.
          callback: Called with a `PipelineProgress` after every few steps.

        Raises:
          UserError: If values do not fit the model or each other.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither make_request nor run")

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return values that a form begins with for a model, of fields whose defaults do not depend on it."""
        return {}


def list_tasks(tasks: Any) -> list[Task]:
    """Return a task, or several, as a list.

    Raises:
      UserError: If one of them is no task, such as the class of one.
    """
    listed: list[Any] = list(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else [tasks]
    for each in listed:
        if not isinstance(each, Task):
            shown, rule = textwrap.shorten(repr(each), 60, placeholder="…"), "it must be a task, or a list of tasks"
            raise UserError(f"task={shown} is invalid: {rule}. Use Extend(clip, frames=8)")
    return listed


def add_options(request: Request, options: Request) -> Request:
    """Return the request of a task with the options of `Pipeline.run`; conditions are added to its own.

    Raises:
      UserError: If the task has its own value of an option.
    """
    defaults = Request("")
    names = ("negative", "control", "reference_images", "method", "resample", "conditioning", "strengths")
    given = {name for name in names if getattr(options, name) != getattr(defaults, name)}
    if own := sorted(name for name in given if getattr(request, name) != getattr(defaults, name)):
        raise UserError(f"{own[0]}= is invalid: the task has its own. Leave it out, or use generate")
    changes: dict[str, Any] = {name: getattr(options, name) for name in given}
    conditions = (*request.conditions, *options.conditions)
    return replace(request, seed=options.seed, conditions=conditions, **changes)


def describe_task(task: Task) -> dict[str, Any]:
    """Return the fields of a task but its prompt as JSON values, with hashes of pixels in the place of files."""
    described: dict[str, Any] = {}
    for field in list_fields(type(task)):
        value = getattr(task, field.name)
        if value is None or (field.kind == "conditions" and not value) or field.name == "prompt":
            continue
        if field.kind in ("clip", "image"):
            described[field.name] = hash_pixels(value.frames)
        elif field.kind == "mask":
            described[field.name] = hash_pixels(value)
        elif field.kind == "conditions":
            described[field.name] = [{"file": hash_pixels(each.content.frames), "frame": each.frame} for each in value]
        else:
            described[field.name] = list(value) if field.kind in ("size", "plane", "numbers") else value
    return described


def get_prompt(prompt: str | None, clip: Clip) -> str:
    """Return a task's prompt, or the caption of its clip."""
    return clip.caption if prompt is None else prompt


def get_size(clip: Clip) -> Grid:
    """Return the number of frames, height and width of a clip."""
    return Grid(*clip.frames.shape[:3])
