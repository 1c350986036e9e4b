"""The interface of tasks on clips."""

import abc
from dataclasses import dataclass

from dit_video.core.errors import UserError
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip

MAX_OVERLAP = 9
"""Number of frames of a clip that the sampled part shares with it, at most, unless a task says so."""


@dataclass(frozen=True, kw_only=True)
class ClipTask(abc.ABC):
    """A task: a request of a clip, and what becomes of the sampled clip. A subclass is a frozen dataclass."""

    prompt: str | None = None
    """Description of the result; None for the caption of the clip that it is made of."""

    @abc.abstractmethod
    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request.

        Raises:
          UserError: sizes, lengths or values that do not fit the model or each other.
        """

    def get_prompt(self, clip: Clip) -> str:
        """Return the prompt, or the caption of a clip."""
        return clip.caption if self.prompt is None else self.prompt

    def finish(self, sampled: Clip) -> Clip:
        """Return the result, of the clip that was sampled for the request."""
        return sampled


def round_up_length(frames: int, stride: int) -> int:
    """Return the smallest number of frames, `1 + k * stride`, that is not smaller."""
    return frames + -(frames - 1) % stride


def choose_overlap(frames: int, available: int, stride: int, overlap: int | None) -> int:
    """Return the number of known frames next to `frames` new ones, so that both together fit the temporal stride.

    Args:
      frames: number of new frames.
      available: number of frames of the known clip.
      stride: the autoencoder's temporal stride.
      overlap: number that the user asks for; None for the largest that fits, of up to `MAX_OVERLAP`.

    Raises:
      UserError: no such number, or one that does not fit; the message names those that do.
    """
    if frames < 1:
        raise UserError(f"frames={frames} is invalid: there is at least one new frame. Use a larger number")
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
    return max((count for count in fitting if count <= MAX_OVERLAP), default=min(fitting))


def check_equal_sizes(first: Clip, second: Clip) -> None:
    """Check that two clips have one height, width and frame rate.

    Raises:
      UserError: they do not.
    """
    for name, values in {
        "sizes": tuple((clip.height, clip.width) for clip in (first, second)),
        "frame rates": (first.fps, second.fps),
    }.items():
        if values[0] != values[1]:
            raise UserError(f"clips of different {name}, {values[0]} and {values[1]}, are invalid: use equal ones")


def get_size(clip: Clip) -> Grid:
    """Return the number of frames, height and width of a clip."""
    return Grid(*clip.frames.shape[:3])
