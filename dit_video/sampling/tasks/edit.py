"""Changes of a whole clip: SDEdit (arXiv 2108.01073) with its prompt or another, FlowEdit, and inversion to noise."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

from dit_video.core.errors import UserError
from dit_video.sampling.clip_recipe import describe_sampling, hash_pixels
from dit_video.sampling.edit_paths import EditPaths
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.progress import Callback, make_report
from dit_video.sampling.request import Request, split_options
from dit_video.sampling.tasks.clip_task import ClipTask, CompositeTask, TaskPipeline, get_size
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Edit(ClipTask):
    """A clip that is changed to fit a prompt: noise is added to it, and taken away with the prompt."""

    clip: Clip
    strength: float = 0.8
    """Diffusion time, in (0, 1], that the clip is noised to; more changes it more."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request that starts from the noisy clip."""
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength} is invalid: it must be above 0 and at most 1. Use 0.8")
        return Request(self.get_prompt(self.clip), get_size(self.clip), video=self.clip, strength=self.strength)

    def finish(self, sampled: Clip) -> Clip:
        """Return the sampled clip at the clip's frame rate."""
        return replace(sampled, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True)
class Vary(Edit):
    """A variation of a clip, for its own caption; every seed gives another."""

    strength: float = 0.7
    """Diffusion time, in (0, 1], that the clip is noised to; more changes it more."""


EditMethod = Literal["flow_edit", "inversion"]


@dataclass(frozen=True, kw_only=True)
class DescribedEdit(CompositeTask):
    """A clip that changes by the difference of two descriptions: see `EditPaths`."""

    clip: Clip
    source: str
    """Description of the clip."""
    strength: float = 0.8
    """Diffusion time, in (0, 1], at which the change begins; more changes it more."""
    edit_method: EditMethod = "flow_edit"
    """FlowEdit, or inversion of the clip to noise."""
    source_guidance: float = 1.0
    """Guidance scale of the clip's description."""
    draws: int = 1
    """Number of noises in every step of FlowEdit, whose changes are averaged: more keep more of the clip, and cost as
    many times more."""

    def run(self, pipeline: TaskPipeline, *, callback: Callback | None = None, **options: Any) -> Clip:
        """Return the edited clip."""
        if self.edit_method not in ("flow_edit", "inversion"):
            raise UserError(f"edit_method={self.edit_method!r} is invalid. Use flow_edit or inversion")
        prompt = self.clip.caption if self.prompt is None else self.prompt
        request, overrides = split_options(prompt, {**options, "size": get_size(self.clip)})
        if overrides.get("sampler") is not None or request.resample > 1 or request.method == "trained":
            rule = "its steps are Euler's, and it has no known pixels"
            raise UserError(f"sampler=, resample= or method= is invalid with source=: {rule}. Leave it out")
        target = pipeline.make_stepper(request, **overrides)
        described = request._replace(prompt=self.source)
        source = pipeline.make_stepper(described, **{**overrides, "guidance": self.source_guidance})
        paths, latents = EditPaths(source, target), pipeline.codec.encode(self.clip)
        decode = functools.partial(pipeline.codec.decode, fps=self.clip.fps, caption=prompt, seed=request.seed)
        monitor = make_report(callback, decode, preview_decoder=pipeline.preview_decoder, fps=self.clip.fps)
        if self.edit_method == "flow_edit":
            options = {"strength": self.strength, "seed": request.seed, "draws": self.draws}
            edited = paths.edit_by_flow(latents, **options, monitor=monitor)
        else:
            edited = paths.edit_by_inversion(latents, strength=self.strength, monitor=monitor)
        decoded = decode(edited)
        recipe = {
            "prompt": prompt,
            "size": list(request.grid),
            "seed": request.seed,
            "pictures": {"clip": hash_pixels(self.clip.frames)},
            "sampling": describe_sampling(target.sampling),
            "model": pipeline.config.provenance,
        }
        if request.negative is not None:
            recipe["negative"] = request.negative
        return replace(decoded, recipe=recipe)
