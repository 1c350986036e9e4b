"""Frames between those of a clip."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dit_video.core.errors import UserError
from dit_video.sampling.pictures import Condition
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.clip_task import ClipTask, get_size, round_up_length
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Interpolate(ClipTask):
    """A clip with new frames between its own.

    Raises:
      UserError: neither or both of `factor` and `times`, or invalid ones.
    """

    clip: Clip
    factor: int | None = None
    """Number of intervals that every interval of the clip becomes: 2 for one new frame between any two."""
    times: Sequence[int] | None = None
    """Numbers of the result's frames that are the clip's, in any rising pattern that begins at 0."""

    def __post_init__(self):
        if (self.factor is None) == (self.times is None):
            raise UserError(f"factor={self.factor} and times={self.times} are invalid: use exactly one of them")
        if self.factor is not None and self.factor < 2:
            raise UserError(f"factor={self.factor} is invalid: there are no new frames. Use 2 or more")
        if len(self.clip.frames) < 2:
            raise UserError("a clip of one frame is invalid: there is nothing between. Use image=, or extend")
        places = self.places
        is_rising = all(first < second for first, second in itertools.pairwise(places))
        if len(places) != len(self.clip.frames) or places[0] != 0 or not is_rising:
            rule = f"they are rising numbers from 0 on, one for each of the {len(self.clip.frames)} frames"
            raise UserError(f"times={self.times} are invalid: {rule}. Use factor= for equal distances")

    @property
    def places(self) -> list[int]:
        """Return the numbers of the result's frames that are the clip's."""
        if self.factor is None:
            return list(self.times or ())
        return [number * self.factor for number in range(len(self.clip.frames))]

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of all frames, and up to the stride further ones, which are cut off."""
        length = round_up_length(self.places[-1] + 1, config.autoencoder.stride.t)
        pairs = zip(self.clip.frames, self.places, strict=True)
        conditions = tuple(Condition(content=frame, frame=place) for frame, place in pairs)
        size = get_size(self.clip)._replace(t=length)
        return Request(self.get_prompt(self.clip), size, conditions=conditions)

    def finish(self, sampled: Clip) -> Clip:
        """Return the frames up to the clip's last, of the clip's duration."""
        last = self.places[-1]
        fps = self.clip.fps * last / (len(self.clip.frames) - 1)
        return replace(sampled, frames=sampled.frames[: last + 1], fps=fps)
