"""Protocols: everything besides the model that a figure depends on, kept with every result."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from dit_video.core import config_json
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.rng import make_generator
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.metrics.metric import Metric
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip

Filter = Literal["bilinear", "bicubic", "lanczos", "box"]


@dataclass(frozen=True, kw_only=True)
class ClipSampling:
    """Frames of clips that are measured.

    Raises:
      UserError: If a size is empty.
    """

    frames: int | None = None
    """Number of frames; None for all frames of each clip."""
    fps: float | None = None
    """Frame rate that clips are sampled at; None for their own."""
    start: Literal["first", "middle", "random"] = "first"
    """Position of the frames in a longer clip."""
    size: tuple[int, int] | None = None
    """Height and width: the largest centred part with this aspect ratio is resized to them; None for each clip's
    own."""
    filter: Filter = "bicubic"
    """Pillow's resampling filter, which is wider when pictures become smaller (against aliasing)."""
    multiple: tuple[int, int, int] = (1, 1, 1)
    """Step of sizes: frames are 1 + k times the first number, heights and widths are multiples of the others, as an
    autoencoder needs. The excess is cut off; in height and width, on both sides."""

    def __post_init__(self):
        sides = self.size or (1, 1)
        check_at_least(1, frames=self.frames or 1, size=min(sides), multiple=min(self.multiple))

    def sample(self, clip: Clip, *, seed: int, number: int) -> Clip:
        """Return the frames of a clip that are measured.

        Args:
          clip: The clip, already at the sampled rate.
          seed: Seed of random positions.
          number: Number of the clip in its set; the random position is a function of it.

        Raises:
          UserError: If the clip has too few frames.
        """
        total, count = len(clip.frames), self.frames or len(clip.frames)
        if total < count:
            raise UserError(f"it has {total} frames, {count} are measured")
        start = {"first": 0, "middle": (total - count) // 2}.get(self.start)
        if start is None:
            start = int(make_generator(seed, "start of a measured clip", number).integers(total - count + 1))
        frames = clip.frames[start : start + count]
        if self.size not in (None, frames.shape[1:3]):
            frames = np.stack([self._resize(frame) for frame in frames])
        return replace(clip, frames=np.ascontiguousarray(self._cut(frames)))

    def _cut(self, frames: np.ndarray) -> np.ndarray:
        """Return the frames, cut to a multiple of the size step.

        Raises:
          UserError: If the frames are smaller than one step.
        """
        t, *steps = self.multiple
        if min(frames.shape[1] // steps[0], frames.shape[2] // steps[1]) < 1:
            raise UserError(f"its {frames.shape[1]}x{frames.shape[2]} pixels are less than {steps[0]}x{steps[1]}")
        slices = [slice(1 + (len(frames) - 1) // t * t)]
        for length, step in zip(frames.shape[1:3], steps, strict=True):
            margin = length % step
            slices.append(slice(margin // 2, length - (margin - margin // 2)))
        return frames[tuple(slices)]

    def _resize(self, frame: np.ndarray) -> np.ndarray:
        assert self.size is not None
        (height, width), (rows, columns) = self.size, frame.shape[:2]
        scale = min(rows / height, columns / width)
        half_height, half_width = scale * height / 2, scale * width / 2
        box = (columns / 2 - half_width, rows / 2 - half_height, columns / 2 + half_width, rows / 2 + half_height)
        method = Image.Resampling[self.filter.upper()]
        return np.asarray(Image.fromarray(frame).resize((width, height), method, box=box))


class Scenes(NamedTuple):
    """Rendered data clips, whose content is fully known."""

    clips: ClipSet
    """Renderings, with captions."""
    truths: tuple[Any, ...]
    """True content of each clip, which only metrics that need `scenes` read."""
    sizes: tuple[Grid, ...]
    """Size of the sample of each clip's caption."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that a figure depends on besides the model.

    A subclass may render its own data clips (`make_scenes`) and give a part of them to the model (`add_known_frames`).

    Raises:
      UserError: If a number of clips is below 1, or `max_unreadable` is outside [0, 1].
    """

    name: str
    """Name in reports."""
    metrics: tuple[Metric, ...]
    """Metrics to compute."""
    clips: ClipSampling = ClipSampling()
    """Frames that are measured, in samples and in data clips."""
    count: int | None = None
    """Number of samples; None for one per data clip."""
    real_count: int | None = None
    """Number of data clips; None for all."""
    split: str = ""
    """Split of the data; all of its clips if empty."""
    codec: Literal["mp4", "webm"] = "mp4"
    """Container of the sample files, which measurements read."""
    crf: int | None = 10
    """Quality of the sample files, 0 (best) to 51; None for the default quality of written clips."""
    seed: int = 0
    """Seed of samples, positions in longer clips, and the choice of clips."""
    max_unreadable: float = 0.01
    """Largest share of clips that may be unreadable or too short; these are named in the result."""

    def __post_init__(self):
        check_at_least(1, count=self.count or 1, real_count=self.real_count or 1)
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"max_unreadable={self.max_unreadable} is invalid: it is a share. Use 0 to 1")

    def make_scenes(self) -> Scenes | None:
        """Return the scenes that serve as data clips; None (the default) if the data clips are the user's."""
        return None

    def add_known_frames(
        self, requests: Sequence[Request], clips: Sequence[Callable[[], Clip]], *, fps: float | int
    ) -> list[Request]:
        """Return the requests with the parts of data clips that the model gets; by default it gets none.

        Args:
          requests: Requests of the clips' captions.
          clips: Functions that read the clip of each request.
          fps: Frames per second of the samples.
        """
        return list(requests)

    def choose(self, total: int, count: int | None, *, purpose: str) -> list[int]:
        """Return the numbers of the clips to use, in order: all, or `count` different ones at random."""
        if count is None or count >= total:
            return list(range(total))
        return sorted(make_generator(self.seed, purpose).choice(total, count, replace=False).tolist())

    def repeat_captions(self, captions: int) -> list[int]:
        """Return the caption number of each sample: every caption as often as another, give or take one."""
        count = captions if self.count is None else self.count
        rounds = math.ceil(count / max(1, captions))
        return [number for _ in range(rounds) for number in range(captions)][:count]


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any], *, names: tuple[str, str]) -> None:
    """Check that two recorded protocols are equal, so that their figures may be compared.

    Args:
      first: `protocol` of one result's `metrics.json`.
      second: `protocol` of the other's.
      names: Names of the results in the message.

    Raises:
      UserError: If the protocols differ; the message names the fields.
    """
    old, new = (config_json.rewrite(dict(each)) for each in (first, second))
    if difference := config_json.describe_difference(old, new, "protocol"):
        raise UserError(
            f"{names[0]} and {names[1]} are not comparable: {difference} (there: {names[0]}). "
            "Evaluate both with one protocol"
        )
