"""A task as a file of another package: an image that comes alive, for as long as its user likes."""

from dataclasses import dataclass, replace
from typing import Annotated

from dit_video.sampling.request import Condition, Request
from dit_video.sampling.tasks import TASKS, Doc, Limits, OneFrame, Prompt, Task
from dit_video.video import Clip


@dataclass(frozen=True)
class Shimmer(Task):
    """An image that comes alive: it is the middle of the clip."""

    image: Annotated[Clip, OneFrame, Doc("Image in the middle.")]
    prompt: Prompt = None
    seconds: Annotated[float, Doc("Duration."), Limits(above=0, maximum=10, step=0.5)] = 1.0
    is_reversed: Annotated[bool, Doc("Whether the clip is played backwards.")] = False

    def make_request(self, config):
        stride = config.model.autoencoder.stride.t
        frames = 1 + round(self.seconds * config.fps / stride) * stride
        size = (frames, self.image.height, self.image.width)
        middle = Condition(content=self.image, frame=frames // 2)
        return Request(self.prompt or self.image.caption, size, conditions=(middle,))

    def finish(self, sampled):
        return replace(sampled, frames=sampled.frames[::-1].copy()) if self.is_reversed else sampled


TASKS["shimmer"] = Shimmer
