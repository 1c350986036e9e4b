"""Sizes that uploaded clips are fitted to, so that a model can sample them."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dit_video.core.resize import compute_fitted_size, resize_and_crop
from dit_video.video import Clip

MAX_IMAGE_SIDE = 1280
"""Maximum pixels of a side of an uploaded image, which every task fits to the size of its clip."""


@dataclass(frozen=True, kw_only=True)
class ClipFit:
    """The rate, length and sizes of uploaded clips that a model can sample."""

    fps: float
    max_frames: int
    """Number of frames that are used of a longer clip."""
    stride: int
    """Temporal stride: clips have `1 + k * stride` frames."""
    multiple: tuple[int, int]
    """Numbers that height and width are multiples of."""
    area: int
    """Number of pixels of a frame, about."""
    planes: tuple[tuple[int, int], ...]
    """Heights and widths that are preferred."""

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "ClipFit":
        """Return the fit of `to_json`."""
        planes = tuple((height, width) for height, width in values["planes"])
        return ClipFit(**(values | {"planes": planes, "multiple": tuple(values["multiple"])}))

    def choose_plane(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width for frames of another size.

        Those of frames that the model can sample as they are stay; other frames get the one of the preferred sizes,
        and of the multiples with about the model's number of pixels, whose aspect ratio is the nearest.
        """
        is_multiple = height % self.multiple[0] == 0 and width % self.multiple[1] == 0
        if is_multiple and height * width <= 1.5 * self.area:
            return height, width
        candidates = [*self.planes, compute_fitted_size(height, width, area=self.area, multiple=self.multiple)]
        return min(candidates, key=lambda plane: abs(math.log(plane[0] * width / (plane[1] * height))))

    def round_length(self, frames: int) -> int:
        """Return the number of frames that are used of a clip."""
        used = min(frames, self.max_frames)
        return 1 + (used - 1) // self.stride * self.stride

    def fit_clip(self, clip: Clip) -> Clip:
        """Return a clip at a size that the model can sample; its frame rate stays."""
        frames = clip.frames[: self.round_length(len(clip.frames))]
        plane = self.choose_plane(clip.height, clip.width)
        return Clip(resize_and_crop(frames, *plane), fps=clip.fps, caption=clip.caption, recipe=clip.recipe)


def limit_side(height: int, width: int) -> tuple[int, int]:
    """Return the height and width of an uploaded image, reduced to at most `MAX_IMAGE_SIDE`."""
    scale = min(1.0, MAX_IMAGE_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
