"""Generators of masks: what of a clip a model is trained to generate, and what it accepts in a request.

A mask is True where pixels are generated; all others are known. Each generator stands for a generation task, and is
named by what is known. Training draws masks from the generators of a config; in sampling the generators tell whether a
model was trained for the pixels that a request gives.
"""

import abc
import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid

ClipMask = Bool[np.ndarray, "T H W"]
"""Mask of a clip: True where pixels are generated."""
IsKnown = Bool[np.ndarray, "T H W"]
"""Complement of a mask: True for known pixels of a clip, which are kept."""


@dataclass(frozen=True, kw_only=True)
class MaskGenerator(abc.ABC):
    """A generator of masks of one kind.

    Raises:
      UserError: If the weight is not positive.
    """

    weight: float = 1.0
    """Relative probability among a training run's generators."""

    def __post_init__(self):
        if not self.weight > 0:
            raise UserError(f"weight={self.weight} is invalid: it must be positive. Leave the mask out instead of 0.")

    @abc.abstractmethod
    def draw(self, generator: np.random.Generator, size: Grid) -> ClipMask | None:
        """Return a random mask; None if clips of this size have none."""

    @abc.abstractmethod
    def accepts(self, generated: ClipMask) -> bool:
        """Return whether a mask, which has pixels that are generated and known ones, is of this kind."""


class FrameMask(MaskGenerator):
    """A generator of masks of whole frames, named by those that are known."""

    @abc.abstractmethod
    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        """Return the numbers of the known frames of a clip with `count` frames, at least two."""

    @abc.abstractmethod
    def accepts_frames(self, frames: list[int], count: int) -> bool:
        """Return whether these known frames of a clip are of this kind."""

    def draw(self, generator: np.random.Generator, size: Grid) -> ClipMask | None:
        """Return a random mask; None for an image."""
        if size.t == 1:
            return None
        generated = np.ones(size, bool)
        generated[self.draw_frames(generator, size.t)] = False
        return generated

    def accepts(self, generated: ClipMask) -> bool:
        """Return whether the clip has several frames, only whole frames are known, and they are of this kind."""
        frames = find_known_frames(~generated)
        return len(generated) > 1 and frames is not None and self.accepts_frames(frames, len(generated))


def find_known_frames(is_known: IsKnown) -> list[int] | None:
    """Return the numbers of the known frames; None if parts of a frame are known."""
    shares = is_known.mean(axis=(1, 2))
    return np.flatnonzero(shares == 1).tolist() if np.isin(shares, (0, 1)).all() else None


@dataclass(frozen=True, kw_only=True)
class FirstFrame(FrameMask):
    """Masks of all but the first frame, for image to video."""

    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        return [0]

    def accepts_frames(self, frames: list[int], count: int) -> bool:
        return frames == [0]


@dataclass(frozen=True, kw_only=True)
class LastFrame(FrameMask):
    """Masks of all but the last frame."""

    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        return [count - 1]

    def accepts_frames(self, frames: list[int], count: int) -> bool:
        return frames == [count - 1]


@dataclass(frozen=True, kw_only=True)
class FirstAndLastFrame(FrameMask):
    """Masks of all but the first and the last frame."""

    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        return [0, count - 1]

    def accepts_frames(self, frames: list[int], count: int) -> bool:
        return frames == [0, count - 1]


@dataclass(frozen=True, kw_only=True)
class Beginning(FrameMask):
    """Masks of all but any number of frames at the beginning, for extension forwards."""

    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        return list(range(generator.integers(1, count)))

    def accepts_frames(self, frames: list[int], count: int) -> bool:
        return frames == list(range(len(frames)))


@dataclass(frozen=True, kw_only=True)
class Ending(FrameMask):
    """Masks of all but any number of frames at the end, for extension backwards."""

    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        return list(range(generator.integers(1, count), count))

    def accepts_frames(self, frames: list[int], count: int) -> bool:
        return frames == list(range(count - len(frames), count))


@dataclass(frozen=True, kw_only=True)
class BothEnds(FrameMask):
    """Masks of all but frames at the beginning and at the end, for blending two clips."""

    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        if count < 3:
            return [0]
        first, last = sorted(generator.choice(np.arange(1, count), size=2, replace=False).tolist())
        return [*range(first), *range(last, count)]

    def accepts_frames(self, frames: list[int], count: int) -> bool:
        gap_count = sum(second - first > 1 for first, second in itertools.pairwise(frames))
        return frames[:1] == [0] and frames[-1:] == [count - 1] and gap_count == 1


@dataclass(frozen=True, kw_only=True)
class Keyframes(FrameMask):
    """Masks of all but single frames, at equal or random distances, for interpolation and keyframes.

    Raises:
      UserError: If the largest distance is below 2.
    """

    max_distance: int = 8
    """Largest distance between two known frames when distances are equal."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_distance < 2:
            raise UserError(f"max_distance={self.max_distance} is invalid: it must be at least 2. Use 8.")

    def draw_frames(self, generator: np.random.Generator, count: int) -> list[int]:
        if generator.random() < 0.5:
            return list(range(0, count, int(generator.integers(2, self.max_distance + 1))))
        number = int(generator.integers(1, max(2, count // 2)))
        return sorted(generator.choice(count, size=number, replace=False).tolist())

    def accepts_frames(self, frames: list[int], count: int) -> bool:
        return len(frames) > 0


@dataclass(frozen=True, kw_only=True)
class OutsideOfBox(MaskGenerator):
    """Masks of a box, which moves at a constant speed, for inpainting: what is outside of it is known.

    Raises:
      UserError: If a share is outside (0, 1), or the shares are in the wrong order.
    """

    min_share: float = 0.3
    """Smallest height and width of the box, relative to the frame's."""
    max_share: float = 0.8
    """Largest height and width of the box."""

    def __post_init__(self):
        super().__post_init__()
        _check_shares(self.min_share, self.max_share)

    def draw(self, generator: np.random.Generator, size: Grid) -> ClipMask:
        generated = np.zeros(size, bool)
        sides, path = [], []
        for length in (size.h, size.w):
            side = max(1, round(length * generator.uniform(self.min_share, self.max_share)))
            first, last = generator.uniform(0, length - side, size=2)
            sides.append(side)
            path.append(np.rint(np.linspace(first, last, size.t)).astype(int))
        for frame, (top, left) in enumerate(zip(*path, strict=True)):
            generated[frame, top : top + sides[0], left : left + sides[1]] = True
        return generated

    def accepts(self, generated: ClipMask) -> bool:
        """Return whether parts of frames are known, but not just a box inside them."""
        return find_known_frames(~generated) is None and not _is_inner_box(~generated)


@dataclass(frozen=True, kw_only=True)
class InsideOfBox(MaskGenerator):
    """Masks of all but a box, for outpainting: what is inside of it is known.

    Raises:
      UserError: If a share is outside (0, 1).
    """

    min_share: float = 0.4
    """Smallest height and width of the box, relative to the frame's."""
    max_share: float = 0.95
    """Largest height and width of the box."""

    def __post_init__(self):
        super().__post_init__()
        _check_shares(self.min_share, self.max_share)

    def draw(self, generator: np.random.Generator, size: Grid) -> ClipMask:
        generated, box = np.ones(size, bool), []
        for length in (size.h, size.w):
            side = max(1, min(length - 1, round(length * generator.uniform(self.min_share, self.max_share))))
            start = int(generator.integers(length - side + 1))
            box.append(slice(start, start + side))
        generated[:, box[0], box[1]] = False
        return generated

    def accepts(self, generated: ClipMask) -> bool:
        return find_known_frames(~generated) is None and _is_inner_box(~generated)


def _check_shares(min_share: float, max_share: float) -> None:
    if not 0 < min_share <= max_share < 1:
        shares = f"min_share={min_share}, max_share={max_share}"
        raise UserError(f"{shares} is invalid: they must lie in (0, 1), the smaller first. Use 0.4 and 0.8.")


def _is_inner_box(is_known: IsKnown) -> bool:
    """Return whether the known pixels form one box, the same in all frames."""
    rows, columns = is_known[0].any(axis=1), is_known[0].any(axis=0)
    box = rows[:, None] & columns[None]
    is_contiguous = all(np.ptp(np.flatnonzero(axis)) + 1 == axis.sum() for axis in (rows, columns) if axis.any())
    return is_contiguous and bool((is_known == box).all(axis=(0, 1, 2)))
