"""Regions of a clip that are filled in: inside of it, or around it, once or for every frame of a zoom."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.clip_task import ClipTask, CompositeTask, TaskPipeline, get_size
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Inpaint(ClipTask):
    """A clip with a region that is filled in."""

    clip: Clip
    mask: Bool[np.ndarray, "T H W"] | Bool[np.ndarray, "H W"]
    """Pixels that are filled in (True), as in diffusers; the same in all frames, or moving."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request that keeps all of the clip but the mask."""
        size, mask = get_size(self.clip), np.asarray(self.mask)
        if mask.dtype != np.bool_ or mask.shape not in (tuple(size), tuple(size[1:])):
            rule = f"it must be a boolean [{size.t} {size.h} {size.w}] or [{size.h} {size.w}]"
            raise UserError(f"mask of {mask.dtype} {list(mask.shape)} is invalid: {rule}. Use True to fill in")
        if not mask.any():
            raise UserError("mask is invalid: no pixel is filled in. Use True where to fill in")
        is_kept = ~np.broadcast_to(mask, size)
        return Request(self.get_prompt(self.clip), size, video=self.clip, mask=is_kept)

    def finish(self, sampled: Clip) -> Clip:
        """Return the sampled clip at the clip's frame rate."""
        return replace(sampled, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True)
class Outpaint(ClipTask):
    """A clip in the middle of a larger one, whose border is filled in."""

    clip: Clip
    size: tuple[int, int]
    """Height and width of the result."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of the larger clip, which keeps the middle."""
        size, (height, width) = get_size(self.clip), self.size
        if height < size.h or width < size.w or (height, width) == tuple(size[1:]):
            rule = f"it must be larger than the clip's {size.h}x{size.w}"
            raise UserError(f"size={height}x{width} is invalid: {rule}. Use a larger height or width")
        top, left = (height - size.h) // 2, (width - size.w) // 2
        frames, is_kept = np.zeros((size.t, height, width, 3), np.uint8), np.zeros((size.t, height, width), bool)
        region = slice(None), slice(top, top + size.h), slice(left, left + size.w)
        frames[region], is_kept[region] = self.clip.frames, True
        video = Clip(frames, self.clip.fps)
        return Request(self.get_prompt(self.clip), get_size(video), video=video, mask=is_kept)

    def finish(self, sampled: Clip) -> Clip:
        """Return the sampled clip at the clip's frame rate."""
        return replace(sampled, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True)
class ZoomOut(CompositeTask):
    """A clip that zooms out of an image: every frame is the former one, smaller, with its border filled in."""

    image: Clip
    """First frame, a clip of one frame."""
    frames: int
    """Number of new frames."""
    factor: float = 1.1
    """Factor of the zoom in each of them."""

    @property
    def inner_size(self) -> tuple[int, int]:
        """Return the height and width of a frame in the centre of the next one."""
        return round(self.image.height / self.factor), round(self.image.width / self.factor)

    def run(self, pipeline: TaskPipeline, *, seed: int = 0, **options: Any) -> Clip:
        """Return the clip; the seed is that of the first new frame, and the others have the next ones."""
        image, height, width = self.image, self.image.height, self.image.width
        if len(image.frames) != 1:
            raise UserError(f"a clip of {len(image.frames)} frames is no image; use Clip(clip.frames[:1], clip.fps)")
        inner = self.inner_size
        if self.frames < 1 or inner[0] >= height or inner[1] >= width or min(inner) < 1:
            rule = "frames become smaller, by at least a pixel"
            raise UserError(f"frames={self.frames}, factor={self.factor} is invalid: {rule}. Use a larger factor")
        caption = image.caption if self.prompt is None else self.prompt
        frames, recipe = [image.frames[0]], dict[str, Any]()
        for number in range(self.frames):
            smaller = Clip(resize(frames[-1][None], *inner), fps=image.fps, caption=caption)
            (clip,) = pipeline.run_tasks([Outpaint(clip=smaller, size=(height, width))], seed=seed + number, **options)
            frames.append(clip.frames[0])
            recipe = recipe or dict(clip.recipe)
        return Clip(np.stack(frames), fps=pipeline.config.fps, caption=caption, recipe=recipe)
