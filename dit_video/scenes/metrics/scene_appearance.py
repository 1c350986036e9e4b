"""Shape, size and texture of objects of rendered scenes, read from pixels by comparison with all of them.

An object of a known colour is compared with renderings of every shape, radius and texture, first at its centroid, then
the nearest of them at positions around it. Pixels near objects of other colours do not count: these may hide it.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
from scipy.ndimage import binary_dilation, binary_opening

from dit_video.evaluation.metrics.metric import ExampleMetric, MetricBatch, ShareMetric
from dit_video.scenes import Scene
from dit_video.scenes.description import BACKGROUNDS, COLOURS, RADII, SHAPES, TEXTURES
from dit_video.scenes.metrics.scene_objects import ObjectTrack, classify_colours, find_objects, select_whole_frames
from dit_video.scenes.outlines import compute_distance, compute_ground, compute_shade
from dit_video.video import Clip

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


class Appearance(NamedTuple):
    """Attributes of an object that do not change over a clip."""

    shape: str
    size: str
    texture: str


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


def judge_appearance(clip: Clip, background: str, track: ObjectTrack) -> Appearance | None:
    """Return shape, size and texture of an object; None if it is no object of the data.

    The object must be upright, and the camera at rest.

    Args:
      clip: the clip.
      background: name of its background.
      track: the object, as `find_objects` returns it.
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


class AppearanceMetric(ShareMetric):
    """Base of the metrics of one attribute of all objects of samples; a missing object has no attribute.

    Objects that spin, and those of scenes whose camera moves, do not count.
    """

    needs = ("samples", "scenes")
    attribute: ClassVar[str]
    """Field of `Appearance` and of `SceneObject`."""

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return for every object of every sample whether it has the scene's attribute."""
        answers = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if has_moving_view(truth.scene):
                continue
            tracks = batch.derive(find_objects, clip, truth.scene.background)
            for each in truth.scene.objects:
                track = tracks.get(each.colour)
                judged = None if track is None else batch.derive(judge_appearance, clip, truth.scene.background, track)
                answers.append(judged is not None and getattr(judged, self.attribute) == getattr(each, self.attribute))
        return answers

    list_examples = ExampleMetric.list_examples  # answers are of objects, of which an example may have several


def has_moving_view(scene: Scene) -> bool:
    """Return True if objects turn in the picture, or are scaled."""
    return scene.camera.caption is not None or any(each.spin for each in scene.objects)
