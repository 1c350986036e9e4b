"""Extension of a clip forwards and backwards, and transitions between two clips."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dit_video.core.errors import UserError
from dit_video.sampling.pictures import Condition
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.clip_task import MAX_OVERLAP, ClipTask, check_equal_sizes, choose_overlap, get_size
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Extend(ClipTask):
    """A clip with new frames after it, or before it."""

    clip: Clip
    frames: int
    """Number of new frames."""
    before: bool = False
    """True for frames before the clip."""
    overlap: int | None = None
    """Number of the clip's frames that the model continues; by default the most of up to 9 that fit the stride."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of the known frames and the new ones."""
        stride = config.autoencoder.stride.t
        overlap = choose_overlap(self.frames, len(self.clip.frames), stride, self.overlap)
        known = self.clip.frames[:overlap] if self.before else self.clip.frames[-overlap:]
        condition = Condition(content=Clip(known, self.clip.fps), frame=self.frames if self.before else 0)
        size = get_size(self.clip)._replace(t=overlap + self.frames)
        return Request(self.get_prompt(self.clip), size, conditions=(condition,))

    def finish(self, sampled: Clip) -> Clip:
        """Return the clip with the new frames."""
        new = sampled.frames[: self.frames] if self.before else sampled.frames[-self.frames :]
        parts = [new, self.clip.frames] if self.before else [self.clip.frames, new]
        return replace(sampled, frames=np.concatenate(parts), fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True)
class Blend(ClipTask):
    """Two clips with a transition between them; both are kept."""

    first: Clip
    second: Clip
    frames: int
    """Number of new frames between the clips."""
    overlap: int | None = None
    """Number of frames of each clip that the model gets, the first one's or the second one's perhaps one to three
    fewer, so that all fit the stride; by default up to 9."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of the end of the first clip, the transition and the beginning of the second."""
        check_equal_sizes(self.first, self.second)
        if self.frames < 1:
            raise UserError(f"frames={self.frames} is invalid: there is at least one new frame. Use a larger number")
        stride = config.autoencoder.stride.t
        pair = self._choose_overlaps(lambda length: (length - 1) % stride == 0)
        if pair is None:
            rule = f"with the known frames of both clips it cannot be 1 + {stride}k"
            raise UserError(f"frames={self.frames} is invalid: {rule}. Use a larger overlap, or another number")
        first, second = pair
        size = get_size(self.first)._replace(t=first + self.frames + second)
        conditions = (
            Condition(content=Clip(self.first.frames[-first:], self.first.fps)),
            Condition(content=Clip(self.second.frames[:second], self.second.fps), frame=first + self.frames),
        )
        return Request(self.get_prompt(self.first), size, conditions=conditions)

    def finish(self, sampled: Clip) -> Clip:
        """Return both clips with the transition between them."""
        pair = self._choose_overlaps(lambda length: length == len(sampled.frames))
        assert pair is not None
        new = sampled.frames[pair[0] : pair[0] + self.frames]
        frames = np.concatenate([self.first.frames, new, self.second.frames])
        return replace(sampled, frames=frames, fps=self.first.fps)

    def _choose_overlaps(self, is_fitting: Callable[[int], bool]) -> tuple[int, int] | None:
        """Return the number of known frames of each clip, as equal as a number of all frames that fits allows."""
        limit = MAX_OVERLAP if self.overlap is None else self.overlap
        counts = [range(1, min(limit, len(clip.frames)) + 1) for clip in (self.first, self.second)]
        pairs = [pair for pair in itertools.product(counts[0], counts[1]) if is_fitting(sum(pair) + self.frames)]
        return max(pairs, key=lambda pair: (min(pair), -max(pair)), default=None)
