"""Generation tasks as methods of a pipeline: extension, interpolation, inpainting, editing and others."""

import abc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import numpy as np
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.diffusion import Euler
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.generation import Denoiser, Sampling
from dit_video.generation.editing import EditPaths
from dit_video.generation.request import Request
from dit_video.generation.stepper import LatentStepper
from dit_video.pipelines.config import PipelineConfig
from dit_video.pipelines.options import GenerateOptions, SamplingOverrides, split_options
from dit_video.pipelines.progress import Callback
from dit_video.pipelines.tasks import Blend, ClipTask, Edit, Extend, Inpaint, Interpolate, Loop, Outpaint, Vary
from dit_video.video import Clip

EditMethod = Literal["flow_edit", "inversion"]


class TaskMethods(abc.ABC):
    """The part of a pipeline with the generation tasks.

    All methods take the options of `generate`: `seed`, `negative`, `method`, `resample`, `steps`, `guidance`, …
    They raise `UserError` for sizes and values that do not fit.
    """

    config: PipelineConfig
    codec: LatentCodec
    _denoiser: Denoiser

    @abc.abstractmethod
    def generate_many(
        self, requests: Sequence[Request], *, callback: Callback | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> list[Clip]:
        """Generate the clips of all requests."""

    @abc.abstractmethod
    def _prepare(self, requests: Sequence[Request], **overrides: Unpack[SamplingOverrides]) -> dict[str, Any]: ...

    def run_tasks(
        self,
        tasks: Sequence[ClipTask],
        *,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Clip]:
        """Run tasks on clips of any sizes, packed and sampled together.

        Args:
          tasks: the tasks, such as `Extend(clip=clip, frames=16)`.
          seeds: seed of each task; by default that of `options` for all.
          callback: called with a `Progress` after every few steps.
          options: options of `generate` for all tasks.
        """
        shared, overrides = split_options("", options)
        names = [name for name in options if name in Request._fields]
        fields = {name: getattr(shared, name) for name in names}
        requests = [task.make_request(self.config)._replace(**fields) for task in tasks]
        if seeds is not None:
            requests = [each._replace(seed=seed) for each, seed in zip(requests, seeds, strict=True)]
        clips = self.generate_many(requests, callback=callback, **overrides)
        return [task.finish(clip) for task, clip in zip(tasks, clips, strict=True)]

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
        self, image: Clip, prompt: str | None = None, *, frames: int, factor: float = 1.1, seed: int = 0, **options: Any
    ) -> Clip:
        """Return a clip that zooms out of an image: every frame is the former one, smaller, with its border filled in.

        Args:
          image: first frame, a clip of one frame.
          prompt: description of the surroundings; None for the image's caption.
          frames: number of new frames.
          factor: factor of the zoom in each of them.
          seed: seed of the first new frame; the others have the next ones.
          options: options of `generate`.
        """
        if len(image.frames) != 1:
            raise UserError(f"a clip of {len(image.frames)} frames is no image; use Clip(clip.frames[:1], clip.fps)")
        height, width = image.height, image.width
        inner = round(height / factor), round(width / factor)
        if frames < 1 or inner[0] >= height or inner[1] >= width or min(inner) < 1:
            raise UserError(f"frames={frames}, factor={factor} is invalid: frames become smaller. Use a factor above 1")
        sampled = [image.frames[0]]
        caption = image.caption if prompt is None else prompt
        for step in range(frames):
            smaller = Clip(resize(sampled[-1][None], *inner), fps=image.fps, caption=caption)
            clip = self.outpaint(smaller, (height, width), seed=seed + step, **options)
            sampled.append(clip.frames[0])
        return Clip(np.stack(sampled), fps=self.config.fps, caption=caption)

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
          options: options of `generate`.
        """
        if source is None:
            return self.run_tasks([Edit(prompt=prompt, clip=clip, strength=strength)], **options)[0]
        request, overrides = split_options(prompt, {"size": clip.frames.shape[:3], **options})
        latents = self.codec.encode(clip)
        paths = self._make_edit_paths(request, source, source_guidance, overrides)
        if edit_method == "flow_edit":
            edited = paths.edit_by_flow(latents, strength=strength, seed=request.seed)
        else:
            edited = paths.edit_by_inversion(latents, strength=strength)
        decoded = self.codec.decode(edited, fps=clip.fps, caption=prompt, seed=request.seed)
        return replace(decoded, fps=clip.fps)

    def _make_edit_paths(
        self, request: Request, source: str, source_guidance: float, overrides: SamplingOverrides
    ) -> EditPaths:
        """Return the paths of a clip's description and of the request."""
        target = self._prepare([request], **overrides)
        overrides["guidance"] = source_guidance
        described = self._prepare([request._replace(prompt=source)], **overrides)
        steppers = []
        for prepared in (described, target):
            sampling: Sampling = replace(prepared["sampling"], solver=Euler())
            (single,) = prepared["requests"]
            steppers.append(LatentStepper(self._denoiser, single, sampling=sampling, shape=prepared["shape"]))
        return EditPaths(*steppers)
