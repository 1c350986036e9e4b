"""Changes of a whole clip: SDEdit (arXiv 2108.01073) with its prompt or another, FlowEdit, and inversion to noise."""

import functools
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any, Literal

from dit_video.core.errors import UserError
from dit_video.diffusion import Euler
from dit_video.sampling.clip_recipe import hash_pixels, make_recipe
from dit_video.sampling.edit_paths import EditPaths
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.progress import Callback, make_report
from dit_video.sampling.request import Request
from dit_video.sampling.sampling_config import Sampling, make_guidance
from dit_video.sampling.tasks.fields import Doc, Limits
from dit_video.sampling.tasks.task import Prompt, Task, TaskPipeline, add_options, get_prompt, get_size
from dit_video.video import Clip

_SHARE = Limits(above=0, maximum=1, step=0.05)


@dataclass(frozen=True)
class Edit(Task):
    """A clip that is changed to fit a prompt: noise is added to it, and taken away with the prompt."""

    is_completion = False
    fitted_axes = "thw"
    clip: Annotated[Clip, Doc("Clip that is changed.")]
    prompt: Prompt = None
    _: KW_ONLY
    strength: Annotated[float, Doc("Diffusion time that the clip is noised to; more changes it more."), _SHARE] = 0.8

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request that starts from the noisy clip."""
        prompt = get_prompt(self.prompt, self.clip)
        return Request(prompt, get_size(self.clip), video=self.clip, strength=self.strength)

    def finish(self, sampled: Clip) -> Clip:
        """Return the sampled clip at the clip's frame rate."""
        return replace(sampled, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True)
class Vary(Edit):
    """A variation of a clip, for its own caption; every seed gives another."""

    strength: Annotated[float, Doc("Diffusion time that the clip is noised to; more changes it more."), _SHARE] = 0.7


@dataclass(frozen=True)
class DescribedEdit(Task):
    """A clip that changes by the difference of two descriptions: see `EditPaths`."""

    is_completion = False
    fitted_axes = "thw"
    clip: Annotated[Clip, Doc("Clip that is changed.")]
    prompt: Prompt = None
    _: KW_ONLY
    source: Annotated[str, Doc("Description of the clip.", title="Description of the clip")]
    strength: Annotated[float, Doc("Diffusion time at which the change begins; more changes it more."), _SHARE] = 0.8
    edit_method: Annotated[
        Literal["flow_edit", "inversion"], Doc("FlowEdit, or inversion of the clip to noise.", title="Method")
    ] = "flow_edit"
    source_guidance: Annotated[
        float,
        Doc("Guidance scale of the clip's description.", title="Guidance of the source"),
        Limits(minimum=0, step=0.1),
    ] = 1.0
    draws: Annotated[
        int,
        Doc(
            "Number of noises in every step of FlowEdit, whose changes are averaged: more keep more of the clip, and "
            "cost as many times more."
        ),
        Limits(minimum=1),
    ] = 1

    def run(self, pipeline: TaskPipeline, options: Request, *, sampling: Sampling, callback: Callback | None) -> Clip:
        """Return the edited clip."""
        own, prompt = pipeline.config.sampling, get_prompt(self.prompt, self.clip)
        refused = {
            "solver": sampling.solver not in (own.solver, Euler()),
            "method": options.method != "auto",
            "resample": options.resample > 1,
        }
        if given := [f"{name}=" for name, is_given in refused.items() if is_given]:
            rule = "its steps are Euler's, and replace no known pixels"
            raise UserError(f"{', '.join(given)} is invalid with source=: {rule}. Leave it out")
        request = add_options(Request(prompt, get_size(self.clip)), options)
        source_sampling = replace(sampling, guidance=make_guidance(self.source_guidance, base=own.guidance))
        target = pipeline.make_stepper(request, sampling=sampling)
        if "training_free" in target.plan.method:
            rule = "its steps replace no known pixels, and this model was not trained for these alone"
            raise UserError(f"conditions= is invalid with source=: {rule}. Leave it out")
        source = pipeline.make_stepper(replace(request, prompt=self.source), sampling=source_sampling)
        paths, latents = EditPaths(source, target), pipeline.codec.encode(self.clip)
        decode = functools.partial(pipeline.codec.decode, fps=self.clip.fps, caption=prompt, seed=request.seed)
        monitor = make_report(callback, decode, preview_decoder=pipeline.preview_decoder, fps=self.clip.fps)
        if self.edit_method == "flow_edit":
            values: dict[str, Any] = {"strength": self.strength, "seed": request.seed, "draws": self.draws}
            edited = paths.edit_by_flow(latents, **values, monitor=monitor)
        else:
            edited = paths.edit_by_inversion(latents, strength=self.strength, monitor=monitor)
        recipe = make_recipe(pipeline.config, request, target.plan, target.sampling)
        pictures = {**recipe.get("pictures", {}), "clip": hash_pixels(self.clip.frames)}
        return replace(decode(edited), recipe=recipe | {"pictures": pictures})
