"""Clips that zoom out of an image."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.sampling.tasks.composite_task import CompositeTask, TaskPipeline
from dit_video.sampling.tasks.regions import Outpaint
from dit_video.video import Clip


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
