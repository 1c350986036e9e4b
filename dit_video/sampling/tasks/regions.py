"""Regions of a clip that are filled in: inside of it, or around it, once or for every frame of a zoom."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.sampling.pictures import Mask
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.progress import Callback
from dit_video.sampling.request import Request
from dit_video.sampling.sampling_config import Sampling
from dit_video.sampling.tasks.fields import Doc, Limits, OneFrame, Plane
from dit_video.sampling.tasks.task import Prompt, Task, TaskPipeline, get_prompt, get_size
from dit_video.video import Clip


@dataclass(frozen=True, eq=False)
class Inpaint(Task):
    """A clip with a region that is filled in."""

    fitted_axes = "thw"
    clip: Annotated[Clip, Doc("Clip that is kept outside of the region.")]
    generated: Annotated[
        Mask,
        Doc(
            "Mask of the clip, white (True) where pixels are generated: the same in all frames, or moving.",
            title="Region to generate",
        ),
    ]
    prompt: Prompt = None

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request that keeps all of the clip but the region."""
        prompt = get_prompt(self.prompt, self.clip)
        return Request(prompt, get_size(self.clip), video=self.clip, generated=self.generated)

    def finish(self, sampled: Clip) -> Clip:
        """Return the sampled clip at the clip's frame rate."""
        return replace(sampled, fps=self.clip.fps)


@dataclass(frozen=True)
class Outpaint(Task):
    """A clip in the middle of a larger one, whose border is filled in."""

    fitted_axes = "t"
    clip: Annotated[Clip, Doc("Clip that is kept.")]
    size: Annotated[Plane, Doc("Height and width of the result.")]
    prompt: Prompt = None

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return a size that is larger by one step on every side."""
        stride, multiple = config.model.autoencoder.stride, config.model.backbone.size_multiple
        return {"size": (config.size.h + 2 * stride.h * multiple.h, config.size.w + 2 * stride.w * multiple.w)}

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of the larger clip, which keeps the middle."""
        size, (height, width) = get_size(self.clip), self.size
        if height < size.h or width < size.w or (height, width) == tuple(size[1:]):
            rule = f"it must be larger than the clip's {size.h}x{size.w}"
            raise UserError(f"size={height}x{width} is invalid: {rule}. Use a larger height or width")
        top, left = (height - size.h) // 2, (width - size.w) // 2
        frames, generated = np.zeros((size.t, height, width, 3), np.uint8), np.ones((size.t, height, width), bool)
        region = slice(None), slice(top, top + size.h), slice(left, left + size.w)
        frames[region], generated[region] = self.clip.frames, False
        video = Clip(frames, self.clip.fps)
        return Request(get_prompt(self.prompt, self.clip), get_size(video), video=video, generated=generated)

    def finish(self, sampled: Clip) -> Clip:
        """Return the sampled clip at the clip's frame rate."""
        return replace(sampled, fps=self.clip.fps)


@dataclass(frozen=True)
class ZoomOut(Task):
    """A clip that zooms out of an image: every frame is the former one, smaller, with its border filled in."""

    image: Annotated[Clip, OneFrame, Doc("First frame.", title="First frame")]
    prompt: Prompt = None
    _: KW_ONLY
    frames: Annotated[int, Doc("Number of new frames.", title="New frames"), Limits(minimum=1)]
    factor: Annotated[float, Doc("Factor of the zoom in each new frame."), Limits(above=1, step=0.05)] = 1.1

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return a number of frames that is quickly sampled."""
        return {"frames": 8}

    @property
    def inner_size(self) -> tuple[int, int]:
        """Return the height and width of a frame in the centre of the next one."""
        return round(self.image.height / self.factor), round(self.image.width / self.factor)

    def run(self, pipeline: TaskPipeline, options: Request, *, sampling: Sampling, callback: Callback | None) -> Clip:
        """Return the clip; the seed is that of the first new frame, and the others have the next ones."""
        image, height, width = self.image, self.image.height, self.image.width
        inner = self.inner_size
        if inner[0] >= height or inner[1] >= width or min(inner) < 1:
            rule = "frames become smaller, by at least a pixel"
            raise UserError(f"factor={self.factor} is invalid: {rule}. Use a larger factor, and smaller than the image")
        caption = get_prompt(self.prompt, image)
        frames, recipe = [image.frames[0]], dict[str, Any]()
        for number in range(self.frames):
            smaller = Clip(resize(frames[-1][None], *inner), fps=image.fps, caption=caption)
            task, seeded = Outpaint(smaller, (height, width)), replace(options, seed=options.seed + number)
            (clip,) = pipeline.run_many([task], [seeded], sampling=sampling, callback=callback)
            frames.append(clip.frames[0])
            recipe = recipe or dict(clip.recipe)
        return Clip(np.stack(frames), fps=pipeline.config.fps, caption=caption, recipe=recipe)
