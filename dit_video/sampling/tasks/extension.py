"""New frames after a clip, before it, between two clips, and between the frames of one."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Condition, Request
from dit_video.sampling.tasks.fields import Doc, Limits
from dit_video.sampling.tasks.task import Prompt, Task, get_prompt, get_size
from dit_video.video import Clip

_MAX_OVERLAP = 9
"""Number of frames of a clip that the sampled part shares with it, at most, unless a task says so."""


_NewFrames = Annotated[int, Doc("Number of new frames.", title="New frames"), Limits(minimum=1)]


@dataclass(frozen=True)
class Extend(Task):
    """A clip with new frames after it, or before it."""

    clip: Annotated[Clip, Doc("Clip that is kept.")]
    prompt: Prompt = None
    _: KW_ONLY
    frames: _NewFrames
    before: Annotated[bool, Doc("Whether the new frames come before the clip.", title="Before the clip")] = False
    overlap: Annotated[
        int | None,
        Doc(
            "Number of the clip's frames that the model continues; by default the most of up to 9 that fit the stride.",
            title="Known frames",
        ),
        Limits(minimum=1),
    ] = None

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return a number of frames that fits the stride."""
        return {"frames": 2 * config.model.autoencoder.stride.t}

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of the known frames and the new ones."""
        stride = config.model.autoencoder.stride.t
        overlap = _choose_overlap(self.frames, len(self.clip.frames), stride, self.overlap)
        known = self.clip.frames[:overlap] if self.before else self.clip.frames[-overlap:]
        condition = Condition(content=Clip(known, self.clip.fps), frame=self.frames if self.before else 0)
        size = get_size(self.clip)._replace(t=overlap + self.frames)
        return Request(get_prompt(self.prompt, self.clip), size, conditions=(condition,))

    def finish(self, sampled: Clip) -> Clip:
        """Return the clip with the new frames."""
        new = sampled.frames[: self.frames] if self.before else sampled.frames[-self.frames :]
        parts = [new, self.clip.frames] if self.before else [self.clip.frames, new]
        return replace(sampled, frames=np.concatenate(parts), fps=self.clip.fps)


@dataclass(frozen=True)
class Blend(Task):
    """Two clips with a transition between them; both are kept."""

    first: Annotated[Clip, Doc("First clip.", title="First clip")]
    second: Annotated[Clip, Doc("Second clip, of the same size and frame rate.", title="Second clip")]
    prompt: Prompt = None
    _: KW_ONLY
    frames: _NewFrames
    overlap: Annotated[
        int | None,
        Doc(
            "Number of frames of each clip that the model gets, the first one's or the second one's perhaps one to "
            "three fewer, so that all fit the stride; by default up to 9.",
            title="Known frames",
        ),
        Limits(minimum=1),
    ] = None

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return a number of frames that fits the stride, with as many known frames of both clips."""
        return {"frames": 2 * config.model.autoencoder.stride.t - 1}

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of the end of the first clip, the transition and the beginning of the second."""
        _check_equal_sizes(self.first, self.second)
        stride = config.model.autoencoder.stride.t
        choose = functools.partial(self._choose_overlaps, is_fitting=lambda length: (length - 1) % stride == 0)
        pair = choose(self.frames)
        if pair is None:
            rule = f"with the known frames of both clips it cannot be 1 + {stride}k"
            near = (self.frames + sign * step for step in range(1, stride) for sign in (-1, 1))
            fitting = sorted([count for count in near if count > 0 and choose(count) is not None][:2])
            raise UserError(f"frames={self.frames} is invalid: {rule}. Use {' or '.join(map(str, fitting))}")
        first, second = pair
        size = get_size(self.first)._replace(t=first + self.frames + second)
        conditions = (
            Condition(content=Clip(self.first.frames[-first:], self.first.fps)),
            Condition(content=Clip(self.second.frames[:second], self.second.fps), frame=first + self.frames),
        )
        return Request(get_prompt(self.prompt, self.first), size, conditions=conditions)

    def finish(self, sampled: Clip) -> Clip:
        """Return both clips with the transition between them."""
        pair = self._choose_overlaps(self.frames, lambda length: length == len(sampled.frames))
        assert pair is not None
        new = sampled.frames[pair[0] : pair[0] + self.frames]
        frames = np.concatenate([self.first.frames, new, self.second.frames])
        return replace(sampled, frames=frames, fps=self.first.fps)

    def _choose_overlaps(self, frames: int, is_fitting: Callable[[int], bool]) -> tuple[int, int] | None:
        """Return the number of known frames of each clip, as equal as a number of all frames that fits allows."""
        limit = _MAX_OVERLAP if self.overlap is None else self.overlap
        counts = [range(1, min(limit, len(clip.frames)) + 1) for clip in (self.first, self.second)]
        pairs = [pair for pair in itertools.product(counts[0], counts[1]) if is_fitting(sum(pair) + frames)]
        return max(pairs, key=lambda pair: (min(pair), -max(pair)), default=None)


@dataclass(frozen=True)
class Interpolate(Task):
    """A clip with new frames between its own.

    Raises:
      UserError: If neither or both of `factor` and `places` are given, or they are invalid.
    """

    clip: Annotated[Clip, Doc("Clip whose frames are kept.")]
    prompt: Prompt = None
    _: KW_ONLY
    factor: Annotated[
        int | None,
        Doc("Number of intervals that every interval of the clip becomes: 2 for one new frame between any two."),
        Limits(minimum=2),
    ] = None
    places: Annotated[
        Sequence[int] | None,
        Doc("Numbers of the result's frames that are the clip's, in any rising pattern that begins at 0."),
    ] = None

    def __post_init__(self):
        super().__post_init__()
        if (self.factor is None) == (self.places is None):
            raise UserError(f"factor={self.factor} and places={self.places} are invalid: use exactly one of them")
        if len(self.clip.frames) < 2:
            raise UserError(
                "a clip of one frame is invalid: there is nothing between. Use Extend, or image= of generate"
            )
        frames = self.known_frames
        is_rising = all(first < second for first, second in itertools.pairwise(frames))
        if len(frames) != len(self.clip.frames) or frames[0] != 0 or not is_rising:
            rule = f"they are rising numbers from 0 on, one for each of the {len(self.clip.frames)} frames"
            raise UserError(f"places={self.places} are invalid: {rule}. Use factor= for equal distances")

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return one new frame between any two."""
        return {"factor": 2}

    @property
    def known_frames(self) -> list[int]:
        """Return the numbers of the result's frames that are the clip's."""
        if self.factor is None:
            return list(self.places or ())
        return [number * self.factor for number in range(len(self.clip.frames))]

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of all frames, and up to the stride further ones, which are cut off."""
        frames = self.known_frames[-1] + 1
        length = frames + -(frames - 1) % config.model.autoencoder.stride.t
        pairs = zip(self.clip.frames, self.known_frames, strict=True)
        conditions = tuple(Condition(content=frame, frame=place) for frame, place in pairs)
        size = get_size(self.clip)._replace(t=length)
        return Request(get_prompt(self.prompt, self.clip), size, conditions=conditions)

    def finish(self, sampled: Clip) -> Clip:
        """Return the frames up to the clip's last, of the clip's duration."""
        last = self.known_frames[-1]
        fps = self.clip.fps * last / (len(self.clip.frames) - 1)
        return replace(sampled, frames=sampled.frames[: last + 1], fps=fps)


def _choose_overlap(frames: int, available: int, stride: int, overlap: int | None) -> int:
    """Return the number of known frames next to `frames` new ones, so that both together fit the temporal stride.

    Args:
      frames: Number of new frames.
      available: Number of frames of the known clip.
      stride: The autoencoder's temporal stride.
      overlap: Number that the user asks for; None for the largest that fits, of up to `_MAX_OVERLAP`.

    Raises:
      UserError: If no number fits, or the user's does not; the message names numbers that fit.
    """
    fitting = [count for count in range(1, available + 1) if (count + frames - 1) % stride == 0]
    if overlap is not None:
        if overlap not in fitting:
            rule = f"overlap + frames must be 1 + {stride}k, with at most {available} frames of the clip"
            nearest = sorted(fitting, key=lambda count: abs(count - overlap))[:2]
            fix = f"Use {' or '.join(map(str, sorted(nearest)))}" if nearest else "Use another number of frames"
            raise UserError(f"overlap={overlap} is invalid for {frames} new frames: {rule}. {fix}")
        return overlap
    if not fitting:
        below = frames - (available + frames - 1) % stride
        fix = " or ".join(str(count) for count in (below, below + stride) if count > 0)
        raise UserError(f"frames={frames} is invalid for a clip of {available} frames: use {fix}")
    return max((count for count in fitting if count <= _MAX_OVERLAP), default=min(fitting))


def _check_equal_sizes(first: Clip, second: Clip) -> None:
    """Check that two clips have one height, width and frame rate.

    Raises:
      UserError: If the clips differ in one of these.
    """
    for name, values in {
        "sizes": tuple((clip.height, clip.width) for clip in (first, second)),
        "frame rates": (first.fps, second.fps),
    }.items():
        if values[0] != values[1]:
            raise UserError(f"clips of different {name}, {values[0]} and {values[1]}, are invalid: use equal ones")
