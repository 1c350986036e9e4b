"""Objects of a rendered scene, read from pixels alone.

The judge knows the palettes of objects and backgrounds (`data.synthetic.scenes`), and nothing about how a clip was
generated. A pixel belongs to the colour whose shades it is nearest to, of the objects' colours, which textures darken,
and of the background's, which varies slowly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int
from scipy.ndimage import label

from dit_video.scenes.description import BACKGROUNDS, COLOURS, DIRECTIONS
from dit_video.scenes.render import POST_COLOUR
from dit_video.video import Clip

OBJECT_SHADES, BACKGROUND_SHADES = (0.5, 1.05), (0.65, 1.35)
"""Darkest and lightest shades of a colour."""
MAX_DISTANCE = 60.0
"""Largest distance in RGB of an object's pixel from the shades of its colour."""
MIN_AREA = 8.0
"""Smallest area of an object in a frame, in pixels."""
MIN_SHARE = 0.6
"""Smallest share of the frames in which an object is found."""
MIN_WHOLE_AREA = 0.9
"""Smallest area of an object that nothing hides, relative to its largest."""
MIN_POST_SHARE = 0.75
"""Smallest share of a column's pixels, in all frames, that have a post's colour where it stands."""
MIN_MOTION = 1.5
"""Smallest displacement of an object over a clip, in pixels; one that moves less stands still."""


@dataclass(frozen=True, eq=False)
class ObjectTrack:
    """An object that a clip shows."""

    colour: str
    area: Float32[np.ndarray, " T"]
    """Number of its pixels in each frame."""
    centre: Float32[np.ndarray, "T 2"]
    """Row and column of its centroid in each frame; nan in a frame without it."""

    @property
    def is_visible(self) -> Bool[np.ndarray, " T"]:
        """Return True for the frames that show the object."""
        return self.area >= MIN_AREA

    def compute_displacement(self) -> Float32[np.ndarray, "2"]:
        """Return rows and columns of the displacement over the clip, of a line through the centroids."""
        frames = np.flatnonzero(self.is_visible)
        if len(frames) < 2:
            return np.zeros(2, np.float32)
        slope = np.polyfit(frames, self.centre[frames], 1)[0]
        return (slope * (len(self.area) - 1)).astype(np.float32)

    def classify_direction(self) -> str | None:
        """Return the direction of motion; None for an object that stands still or moves diagonally."""
        displacement = self.compute_displacement()
        axis = int(np.argmax(np.abs(displacement), axis=0))
        along, across = np.abs(displacement[[axis, 1 - axis]])
        if along < MIN_MOTION or across > np.tan(np.pi / 6) * along:
            return None
        return next(name for name, signs in DIRECTIONS.items() if signs[axis] == np.sign(displacement[axis]))


def find_objects(clip: Clip, background: str, *, min_share: float = MIN_SHARE) -> dict[str, ObjectTrack]:
    """Return the objects of a clip by their colours, each the largest connected part of its colour in every frame.

    Args:
      clip: the clip.
      background: name of its background.
      min_share: smallest share of the frames that show an object, which is lower for one that may be hidden.
    """
    colours = classify_colours(clip, background)
    tracks = {}
    for number, name in enumerate(COLOURS):
        is_colour = colours == number
        if (is_colour.sum(axis=(1, 2)) >= MIN_AREA).mean(axis=0) < min_share:
            continue
        track = _track(name, is_colour)
        if track.is_visible.mean(axis=0) >= min_share:
            tracks[name] = track
    return tracks


class Post(NamedTuple):
    """A post that a clip shows in front of its objects, from the top to the bottom."""

    column: float
    """Column of its centre, in pixels."""
    half_width: float


def find_post(clip: Clip, background: str) -> Post | None:
    """Return the widest post of a clip that stands in all of its frames; None if there is none.

    Args:
      clip: the clip.
      background: name of its background.
    """
    planes = _split_channels(clip)
    distance = _measure_distance(planes, POST_COLOUR, (0.95, 1.05))
    behind = _measure_distance(planes, BACKGROUNDS[background], BACKGROUND_SHADES)
    is_post = (distance < behind) & (distance < MAX_DISTANCE)
    parts, count = label(is_post.mean(axis=(0, 1)) >= MIN_POST_SHARE)
    if not count:
        return None
    widest = int(np.bincount(parts)[1:].argmax(axis=0)) + 1
    columns = np.flatnonzero(parts == widest)
    return Post(float(columns.mean(axis=0)) + 0.5, len(columns) / 2)


def select_whole_frames(track: ObjectTrack, *, min_area: float = MIN_WHOLE_AREA) -> Int[np.ndarray, " n"]:
    """Return the numbers of the frames in which nothing hides an object, as its area shows.

    Args:
      track: the object.
      min_area: smallest area that counts as whole, relative to the area that a tenth of the frames exceed.
    """
    area = track.area[track.is_visible]
    if not len(area):
        return np.zeros(0, np.int64)
    return np.flatnonzero(track.is_visible & (track.area >= min_area * np.quantile(area, 0.9, axis=0)))


def classify_colours(clip: Clip, background: str) -> np.ndarray:
    """Return the number of every pixel's colour of the objects, in the order of `COLOURS`; -1 for others `[T H W]`."""
    planes = _split_channels(clip)
    distances = np.stack([_measure_distance(planes, colour, OBJECT_SHADES) for colour in COLOURS.values()])
    behind = _measure_distance(planes, BACKGROUNDS[background], BACKGROUND_SHADES)
    nearest = distances.argmin(axis=0)
    is_object = (distances.min(axis=0) < behind) & (distances.min(axis=0) < MAX_DISTANCE)
    return np.where(is_object, nearest, -1)


def _split_channels(clip: Clip) -> list[np.ndarray]:
    """Return red, green and blue of all pixels: arrays of one channel are several times as fast as pixels of three."""
    return [np.ascontiguousarray(clip.frames[..., channel]).astype(np.float32) for channel in range(3)]


def _measure_distance(
    planes: Sequence[np.ndarray], colour: tuple[int, int, int], shades: tuple[float, float]
) -> np.ndarray:
    """Return the distance of pixels from the shades of a colour; red, green and blue are arrays of their own."""
    tone = np.asarray(colour, np.float32)
    light = sum(plane * value for plane, value in zip(planes, tone, strict=True))
    shade = np.clip(light / (tone @ tone), *shades)
    return np.sqrt(sum(np.square(plane - shade * value) for plane, value in zip(planes, tone, strict=True)))


def _track(colour: str, is_colour: Bool[np.ndarray, "T H W"]) -> ObjectTrack:
    frames = len(is_colour)
    area, centre = np.zeros(frames, np.float32), np.full((frames, 2), np.nan, np.float32)
    for frame, mask in enumerate(is_colour):
        parts, count = label(mask, structure=np.ones((3, 3)))
        if not count:
            continue
        sizes = np.bincount(parts.ravel())[1:]
        largest = int(sizes.argmax(axis=0)) + 1
        # Textures may divide an object: parts near the largest one belong to it.
        rows, columns = np.nonzero(parts == largest)
        middle = np.array([rows.mean(axis=0), columns.mean(axis=0)])
        reach = 1.2 * np.sqrt(sizes[largest - 1]) + 2
        rows, columns = np.nonzero(mask)
        is_near = np.hypot(rows - middle[0], columns - middle[1]) < reach
        area[frame] = is_near.sum(axis=0)
        if area[frame] >= MIN_AREA:
            centre[frame] = rows[is_near].mean(axis=0) + 0.5, columns[is_near].mean(axis=0) + 0.5
    return ObjectTrack(colour, area, centre)
