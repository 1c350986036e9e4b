"""Generation tasks as methods of a pipeline: extension, interpolation, inpainting, editing and others."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Unpack

import numpy as np
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.diffusion import Euler
from dit_video.sampling import Denoiser, Sampling
from dit_video.sampling.options import GenerateOptions, SamplingOverrides, split_options
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preview import PreviewDecoder
from dit_video.sampling.progress import Callback
from dit_video.sampling.request import Request
from dit_video.sampling.stepper import LatentStepper
from dit_video.sampling.tasks import (
    AnyTask,
    Blend,
    ClipTask,
    DescribedEdit,
    Edit,
    EditMethod,
    Extend,
    Inpaint,
    Interpolate,
    Loop,
    Outpaint,
    Vary,
    ZoomOut,
)
from dit_video.video import Clip


class TaskMethods(abc.ABC):
    """The part of a pipeline with the generation tasks.

    All methods take the options of `generate`: `seed`, `negative`, `method`, `resample`, `steps`, `guidance`, …
    They raise `UserError` for sizes and values that do not fit.
    """

    config: PipelineConfig
    codec: LatentCodec
    preview_decoder: PreviewDecoder | None
    _denoiser: Denoiser

    @abc.abstractmethod
    def generate_many(
        self, requests: Sequence[Request], *, callback: Callback | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> list[Clip]:
        """Generate the clips of all requests."""

    @abc.abstractmethod
    def resolve_sampling(self, **overrides: Unpack[SamplingOverrides]) -> Sampling:
        """Return the pipeline's own sampling with the given values replaced."""

    @abc.abstractmethod
    def _prepare(self, requests: Sequence[Request], **overrides: Unpack[SamplingOverrides]) -> dict[str, Any]: ...

    def make_stepper(self, request: Request, **overrides: Unpack[SamplingOverrides]) -> LatentStepper:
        """Return the denoiser and Euler's solver for the latents of a request, at any times of its steps.

        `overrides` and errors are as for `generate`.
        """
        prepared = self._prepare([request], **overrides)
        sampling = replace(prepared["sampling"], solver=Euler())
        (single,) = prepared["requests"]
        return LatentStepper(self._denoiser, single, sampling=sampling, shape=prepared["shape"])

    def run_tasks(
        self,
        tasks: Sequence[AnyTask],
        *,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Clip]:
        """Run tasks on clips of any sizes, packed and sampled together; composite tasks one after the other.

        Args:
          tasks: the tasks, such as `Extend(clip=clip, frames=16)`.
          seeds: seed of each task; by default that of `options` for all.
          callback: called with a `PipelineProgress` after every few steps.
          options: options of `generate` for all tasks.
        """
        shared, overrides = split_options("", options)
        values = {name: getattr(shared, name) for name in options if name in Request._fields}
        seeds = [shared.seed] * len(tasks) if seeds is None else seeds
        requests = {
            number: _add_options(task.make_request(self.config), {**values, "seed": seed})
            for number, (task, seed) in enumerate(zip(tasks, seeds, strict=True))
            if isinstance(task, ClipTask)
        }
        clips = self.generate_many(list(requests.values()), callback=callback, **overrides) if requests else []
        sampled = dict(zip(requests, clips, strict=True))
        results = []
        for number, (task, seed) in enumerate(zip(tasks, seeds, strict=True)):
            if isinstance(task, ClipTask):
                clip = task.finish(sampled[number])
            else:
                clip = task.run(self, **{**options, "seed": seed, "callback": callback})
            results.append(_add_task(clip, task))
        return results

    def extend(
        self,
        clip: Clip,
        prompt: str | None = None,
        *,
        frames: int,
        before: bool = False,
        overlap: int | None = None,
        **options: Any,
    ) -> Clip:
        """Return a clip with new frames after it.

        Args:
          clip: the clip, which is kept.
          prompt: description of the result; None for the clip's caption.
          frames: number of new pixel frames.
          before: true for new frames before the clip.
          overlap: number of the clip's frames that the model continues; by default the most of up to 9 that fit.
          options: options of `generate`.
        """
        task = Extend(prompt=prompt, clip=clip, frames=frames, before=before, overlap=overlap)
        return self.run_tasks([task], **options)[0]

    def blend(
        self,
        first: Clip,
        second: Clip,
        prompt: str | None = None,
        *,
        frames: int,
        overlap: int | None = None,
        **options: Any,
    ) -> Clip:
        """Return two clips with a transition of new frames between them; both are kept.

        Args:
          first: the first clip.
          second: the second clip, of the same size and frame rate.
          prompt: description of the transition; None for the first clip's caption.
          frames: number of new frames.
          overlap: number of frames of each clip that the model gets, at most.
          options: options of `generate`.
        """
        task = Blend(prompt=prompt, first=first, second=second, frames=frames, overlap=overlap)
        return self.run_tasks([task], **options)[0]

    def interpolate(
        self,
        clip: Clip,
        prompt: str | None = None,
        *,
        factor: int | None = None,
        times: Sequence[int] | None = None,
        **options: Any,
    ) -> Clip:
        """Return a clip with new frames between its own, of the same duration.

        Args:
          clip: the clip, whose frames are kept.
          prompt: description of the result; None for the clip's caption.
          factor: number of intervals that every interval becomes: 2 for one new frame between any two.
          times: instead, the numbers of the result's frames that are the clip's, in any rising pattern from 0 on.
          options: options of `generate`.
        """
        return self.run_tasks([Interpolate(prompt=prompt, clip=clip, factor=factor, times=times)], **options)[0]

    def loop(self, prompt: str, *, size: tuple[int, int, int] | None = None, **options: Any) -> Clip:
        """Return a clip whose first frame follows its last.

        Args:
          prompt: description of the clip.
          size: frames, a multiple of the temporal stride, height and width.
          options: options of `generate`.
        """
        return self.run_tasks([Loop(prompt=prompt, size=size)], **options)[0]

    def inpaint(
        self,
        clip: Clip,
        mask: Bool[np.ndarray, "T H W"] | Bool[np.ndarray, "H W"],
        prompt: str | None = None,
        **options: Any,
    ) -> Clip:
        """Return a clip with a region filled in.

        Args:
          clip: the clip, which is kept outside of the region.
          mask: the region (True = fill in, as in diffusers), the same in all frames or moving.
          prompt: description of the result; None for the clip's caption.
          options: options of `generate`.
        """
        return self.run_tasks([Inpaint(prompt=prompt, clip=clip, mask=mask)], **options)[0]

    def outpaint(self, clip: Clip, size: tuple[int, int], prompt: str | None = None, **options: Any) -> Clip:
        """Return a clip in the middle of a larger one, whose border is filled in.

        Args:
          clip: the clip, which is kept.
          size: height and width of the result.
          prompt: description of the result; None for the clip's caption.
          options: options of `generate`.
        """
        return self.run_tasks([Outpaint(prompt=prompt, clip=clip, size=size)], **options)[0]

    def zoom_out(
        self, image: Clip, prompt: str | None = None, *, frames: int, factor: float = 1.1, **options: Any
    ) -> Clip:
        """Return a clip that zooms out of an image: every frame is the former one, smaller, with its border filled in.

        Args:
          image: first frame, a clip of one frame.
          prompt: description of the surroundings; None for the image's caption.
          frames: number of new frames.
          factor: factor of the zoom in each of them.
          options: options of `generate`.
        """
        task = ZoomOut(prompt=prompt, image=image, frames=frames, factor=factor)
        return self.run_tasks([task], **options)[0]

    def vary(self, clip: Clip, prompt: str | None = None, *, strength: float = 0.7, **options: Any) -> Clip:
        """Return a variation of a clip; every `seed` gives another.

        Args:
          clip: the clip.
          prompt: its description; None for its caption.
          strength: diffusion time, in (0, 1], that it is noised to; more changes it more.
          options: options of `generate`.
        """
        return self.run_tasks([Vary(prompt=prompt, clip=clip, strength=strength)], **options)[0]

    def edit(
        self,
        clip: Clip,
        prompt: str,
        *,
        source: str | None = None,
        strength: float = 0.8,
        edit_method: EditMethod = "flow_edit",
        source_guidance: float = 1.0,
        draws: int = 1,
        **options: Any,
    ) -> Clip:
        """Return a clip that is changed to fit a prompt.

        Without `source` noise is added to the clip and taken away with the prompt (SDEdit). With it, the difference of
        both descriptions changes the clip: see `EditPaths`.

        Args:
          clip: the clip.
          prompt: description of the result.
          source: description of the clip.
          strength: diffusion time, in (0, 1], at which the change begins; more changes it more.
          edit_method: with `source`, FlowEdit, or inversion of the clip to noise.
          source_guidance: with `source`, guidance scale of the clip's description.
          draws: with FlowEdit, number of noises in every step, whose changes are averaged.
          options: options of `generate`.
        """
        if source is None:
            return self.run_tasks([Edit(prompt=prompt, clip=clip, strength=strength)], **options)[0]
        task = DescribedEdit(
            prompt=prompt,
            clip=clip,
            source=source,
            strength=strength,
            edit_method=edit_method,
            source_guidance=source_guidance,
            draws=draws,
        )
        return self.run_tasks([task], **options)[0]


def _add_options(request: Request, options: Mapping[str, Any]) -> Request:
    """Return the request of a task with options; conditions are added to its own.

    Raises:
      UserError: an option of which the task has its own value.
    """
    defaults = Request("")
    own = {name for name in request._fields if getattr(request, name) is not getattr(defaults, name)}
    if overridden := sorted(own & options.keys() - {"conditions"}):
        raise UserError(f"{overridden[0]}= is invalid: the task has its own. Leave it out, or use generate")
    conditions = (*request.conditions, *options.get("conditions", ()))
    return request._replace(**{**options, "conditions": conditions})


def _add_task(clip: Clip, task: AnyTask) -> Clip:
    """Return the result of a task, whose recipe has the task's name and its values, without its clips."""
    values = {each.name: getattr(task, each.name) for each in fields(task)}
    described: dict[str, Any] = {"name": type(task).__name__}
    for name, value in values.items():
        if name != "prompt" and isinstance(value, int | float | bool | str):
            described[name] = value
        elif name in ("size", "times") and value is not None:
            described[name] = list(value)
    return replace(clip, recipe={**clip.recipe, "clip_task": described})
