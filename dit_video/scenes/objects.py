"""Objects of a rendered scene, read from pixels alone.

The judge knows the palettes of objects and backgrounds (`scene`), and nothing about how a clip was generated. A pixel
belongs to the colour whose shades it is nearest to, of the objects' colours, which textures darken, and of the
background's, which varies slowly. For its shape, size and texture an object is compared with renderings of all of
them, first at its centroid, then the nearest of them at positions around it. Pixels near objects of other colours do
not count: these may hide it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int
from scipy.ndimage import binary_dilation, binary_opening, label

from dit_video.scenes.draw import FREE_FRAMES
from dit_video.scenes.outlines import compute_distance, compute_ground, compute_shade
from dit_video.scenes.render import POST_COLOUR
from dit_video.scenes.scene import BACKGROUNDS, COLOURS, DIRECTIONS, RADII, SHAPES, SPEEDS, TEXTURES
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
MIN_COUNTED_AREA = 0.018
"""Smallest area of an object relative to the square of the frame's shorter side. The smallest object of the data, a
triangle, has 0.045."""
_CORE = np.ones((2, 2), bool)
"""Parts that hold no such block are edges that blend two other colours."""
MAX_SPEED_FACTOR = 1.2
"""Factor by which a speed may lie outside the range of all speeds."""
_MIN_SPEED_FRAMES = 3
"""Number of frames that a speed is read from, at least."""
MAX_ERROR = 45.0
"""Largest root mean square difference in RGB of an object from its nearest rendering."""
_MAX_FRAMES = 3
_RADII_PER_SIZE = 3
_NUM_REFINED = 6
"""Number of renderings that are compared at several positions."""
_STEPS = ((0.0, 0.0), (-0.4, 0.0), (0.4, 0.0), (0.0, -0.4), (0.0, 0.4))
"""Rows and columns from the centroid, in pixels, at which these are compared."""
_CAP = 90.0
"""Largest difference of a pixel that counts, so that few wrong pixels do not decide."""


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
      clip: The clip.
      background: Name of its background.
      min_share: Smallest share of the frames that show an object, which is lower for one that may be hidden.
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
      clip: The clip.
      background: Name of its background.
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


def count_objects(clip: Clip, background: str) -> Int[np.ndarray, " T"]:
    """Return the number of objects in every frame.

    Args:
      clip: The clip.
      background: Name of its background.
    """
    colours = classify_colours(clip, background)
    smallest = MIN_COUNTED_AREA * min(clip.height, clip.width) ** 2
    masks = [[frame == number for number in range(len(COLOURS))] for frame in colours]
    return np.array([sum(_count_parts(mask, smallest) for mask in frame) for frame in masks])


def select_whole_frames(track: ObjectTrack, *, min_area: float = MIN_WHOLE_AREA) -> Int[np.ndarray, " n"]:
    """Return the numbers of the frames in which nothing hides an object, as its area shows.

    Args:
      track: The object.
      min_area: Smallest area that counts as whole, relative to the area that a tenth of the frames exceed.
    """
    area = track.area[track.is_visible]
    if not len(area):
        return np.zeros(0, np.int64)
    return np.flatnonzero(track.is_visible & (track.area >= min_area * np.quantile(area, 0.9, axis=0)))


def classify_speed(track: ObjectTrack, *, fps: float, side: int) -> str | None:
    """Return the name of an object's speed; None for one that is slower or faster than all of the data.

    Args:
      track: The object.
      fps: Frames per second of its clip.
      side: Shorter side of the frame, in pixels.
    """
    frames = select_whole_frames(track)
    frames = frames[frames < FREE_FRAMES]
    if len(frames) < _MIN_SPEED_FRAMES:
        return None
    velocity = np.polyfit(frames / fps, track.centre[frames], 1)[0]
    speed = float(np.hypot(*velocity)) / side
    (low, slow), (quick, high) = SPEEDS["slowly"], SPEEDS["quickly"]
    if not low / MAX_SPEED_FACTOR <= speed <= high * MAX_SPEED_FACTOR:
        return None
    return "slowly" if speed < np.sqrt(slow * quick) else "quickly"


class Appearance(NamedTuple):
    """Attributes of an object that do not change over a clip."""

    shape: str
    size: str
    texture: str


def judge_appearance(clip: Clip, background: str, track: ObjectTrack) -> Appearance | None:
    """Return shape, size and texture of an object; None if it is no object of the data.

    The object must be upright, and the camera at rest.

    Args:
      clip: The clip.
      background: Name of its background.
      track: The object, as `find_objects` returns it.
    """
    side = min(clip.height, clip.width)
    crops = _cut_crops(clip, background, track)
    if not crops:
        return None
    candidates = [
        _Candidate(Appearance(shape, size, texture), side * radius)
        for (size, limits), shape, texture in itertools.product(RADII.items(), SHAPES, TEXTURES)
        for radius in np.linspace(*limits, _RADII_PER_SIZE)
    ]
    colour = np.asarray(COLOURS[track.colour], np.float32)
    nearest = np.mean([_compare(candidates, crop, colour) for crop in crops], axis=0).argsort()[:_NUM_REFINED]
    chosen = [candidates[index] for index in nearest]
    refined = np.mean(
        [np.min([_compare(chosen, crop, colour, step) for step in _STEPS], axis=0) for crop in crops], axis=0
    )
    best = int(np.argmin(refined))
    return chosen[best].appearance if refined[best] <= MAX_ERROR**2 else None


def classify_colours(clip: Clip, background: str) -> np.ndarray:
    """Return the number of every pixel's colour of the objects, in the order of `COLOURS`; -1 for others `[T H W]`."""
    planes = _split_channels(clip)
    distances = np.stack([_measure_distance(planes, colour, OBJECT_SHADES) for colour in COLOURS.values()])
    behind = _measure_distance(planes, BACKGROUNDS[background], BACKGROUND_SHADES)
    nearest = distances.argmin(axis=0)
    is_object = (distances.min(axis=0) < behind) & (distances.min(axis=0) < MAX_DISTANCE)
    return np.where(is_object, nearest, -1)


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


def _count_parts(mask: Bool[np.ndarray, "H W"], smallest: float) -> int:
    """Return the number of objects of one colour in a frame; parts near a larger one belong to it."""
    if mask.sum(axis=(0, 1)) < smallest:
        return 0  # as after the opening, which is slow and takes pixels away
    mask, count = binary_opening(mask, structure=_CORE), 0
    while mask.sum(axis=(0, 1)) >= smallest:
        parts, _ = label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        rows, columns = np.nonzero(parts == sizes.argmax(axis=0) + 1)
        # Textures and objects in front may divide an object.
        reach = 1.2 * np.sqrt(sizes.max(axis=0)) + 2
        distances = np.hypot(*(np.indices(mask.shape) - np.array([rows.mean(), columns.mean()])[:, None, None]))
        is_near = mask & (distances < reach)
        count += int(is_near.sum(axis=(0, 1)) >= smallest)
        mask = mask & ~is_near
    return count


class _Candidate(NamedTuple):
    appearance: Appearance
    radius: float


class _Crop(NamedTuple):
    """Pixels around an object in one frame."""

    pixels: np.ndarray
    """Their colours, `[n 3]`."""
    ground: np.ndarray
    """Colours of the background there, `[n 3]`."""
    points: np.ndarray
    """Rows and columns relative to the object's centroid, `[n 2]`."""


def _cut_crops(clip: Clip, background: str, track: ObjectTrack) -> list[_Crop]:
    """Return the pixels around an object in some frames in which most of it is visible."""
    whole = select_whole_frames(track)
    if not len(whole):
        return []
    frames = whole[np.unique(np.linspace(0, len(whole) - 1, _MAX_FRAMES).round().astype(int))]
    side = min(clip.height, clip.width)
    reach = max(high for _, high in RADII.values()) * side + 3
    grid = np.stack(np.meshgrid(np.arange(clip.height) + 0.5, np.arange(clip.width) + 0.5, indexing="ij"), axis=-1)
    ground = compute_ground(grid, side)[..., None] * np.asarray(BACKGROUNDS[background], np.float32)
    colours = classify_colours(Clip(clip.frames[frames], clip.fps), background)
    crops = []
    for frame, numbers in zip(frames, colours, strict=True):
        is_other = (numbers >= 0) & (numbers != list(COLOURS).index(track.colour))
        # Parts of one pixel's width are edges that blend two other colours.
        is_other = binary_dilation(binary_opening(is_other, structure=np.ones((2, 2))))
        points = grid - track.centre[frame]
        is_near = (np.abs(points) < reach).all(axis=-1) & ~is_other
        if is_near.any(axis=(0, 1)):
            crops.append(_Crop(clip.frames[frame][is_near].astype(np.float32), ground[is_near], points[is_near]))
    return crops


def _compare(
    candidates: Sequence[_Candidate], crop: _Crop, colour: np.ndarray, step: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """Return the mean square difference of renderings from the pixels around an object `[candidates]`."""

    # Renderings share outlines and textures.
    @cache
    def cover(shape: str, radius: float) -> np.ndarray:
        points = crop.points + np.array([_get_offset(shape, radius) - step[0], -step[1]])
        return np.clip(0.5 - compute_distance(shape, points, radius), 0.0, 1.0)[:, None]

    @cache
    def light(texture: str, radius: float, offset: float) -> np.ndarray:
        points = crop.points + np.array([offset - step[0], -step[1]])
        return compute_shade(texture, points, radius)[:, None] * colour - crop.ground

    rest = crop.ground - crop.pixels
    differences = np.stack(
        [
            rest + cover(shape, radius) * light(texture, radius, _get_offset(shape, radius))
            for (shape, _, texture), radius in candidates
        ]
    )
    squares = np.einsum("nph,nph->np", differences, differences) / 3
    return np.minimum(squares, _CAP**2).mean(axis=1)


def _get_offset(shape: str, radius: float) -> float:
    """Return how far the centroid of a shape lies below the middle of its box: a sixth of a triangle's height."""
    return radius / 3 if shape == "triangle" else 0.0


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
