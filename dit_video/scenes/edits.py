"""Edited videos whose transitions are known: shots of scenes and of moving textures, with cuts, dissolves and fades.

Shots hold what detectors mistake for transitions: flashes, fast pans and lights that change.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core import rng
from dit_video.core.grid import Grid
from dit_video.core.resize import resize
from dit_video.scenes import draw_scene, render

TransitionKind = Literal["cut", "dissolve", "fade", "wipe"]
KINDS: tuple[TransitionKind, ...] = ("cut", "dissolve", "fade")
"""Default kinds of transitions; fades go through black."""
SHOT_SECONDS = (1.0, 4.0)
GRADUAL_SECONDS = (0.3, 1.5)
"""Minimum and maximum duration of a dissolve, of a wipe, and of each half of a fade."""
MIN_DIFFERENCE = 12.0
"""Minimum mean difference of the pictures on both sides of a transition, in levels of 255."""
_SCENE_SCALE = 3
"""Factor by which scenes are enlarged, as they are slow to render."""


class EditTransition(NamedTuple):
    """A transition between two shots."""

    kind: TransitionKind
    first: int
    """First frame that does not belong to the shot before."""
    stop: int
    """First frame that belongs to the shot after; equal to `first` for a cut."""


class EditedVideo(NamedTuple):
    """Frames of several shots, and the transitions between them."""

    frames: UInt8[np.ndarray, "T H W 3"]
    fps: float
    transitions: tuple[EditTransition, ...]


def render_edited(
    index: int,
    *,
    seed: int,
    shots: int = 5,
    height: int = 144,
    width: int = 256,
    fps: float = 24.0,
    kinds: Sequence[TransitionKind] = KINDS,
) -> EditedVideo:
    """Render edited video `index` of a data set, which is a function of the arguments alone."""
    generator = rng.make_generator(seed, "edited videos", index)
    transitions: list[EditTransition] = []
    frames = _draw_shot(generator, height, width, fps)
    while len(transitions) < shots - 1:
        after = _draw_shot(generator, height, width, fps)
        if np.abs(frames[-1] - after[0]).mean() < MIN_DIFFERENCE:
            continue
        kind = kinds[int(generator.integers(len(kinds)))]
        count = 0 if kind == "cut" else max(2, round(fps * generator.uniform(*GRADUAL_SECONDS)))
        frames, transition = _join(frames, after, kind, count, generator)
        transitions.append(transition)
    return EditedVideo(np.rint(np.clip(frames, 0, 255)).astype(np.uint8), fps, tuple(transitions))


class DetectionScore(NamedTuple):
    """Agreement of detected transitions with the true ones; scores of several videos are added by `combine`."""

    hits: dict[str, int]
    """Number of transitions that were detected, by kind."""
    misses: dict[str, int]
    """Number of transitions that were not detected, by kind."""
    false_alarms: int
    """Number of detections without a transition."""

    @property
    def f1(self) -> float:
        """Return the harmonic mean of precision and recall."""
        hits = sum(self.hits.values())
        return 2 * hits / max(1, 2 * hits + sum(self.misses.values()) + self.false_alarms)

    def combine(self, other: "DetectionScore") -> "DetectionScore":
        """Return the score of the videos of both."""
        hits, misses = Counter(self.hits) + Counter(other.hits), Counter(self.misses) + Counter(other.misses)
        return DetectionScore(dict(hits), dict(misses), self.false_alarms + other.false_alarms)


def score_transitions(
    detected: Sequence[tuple[int, int]], transitions: Sequence[EditTransition], tolerance: int = 2
) -> DetectionScore:
    """Return the agreement of spans of frames with transitions: one span may account for one transition.

    Args:
      detected: First frame and stop of each; equal for a cut.
      transitions: The truth.
      tolerance: Frames by which a span may miss the transition.
    """
    free, hits, misses = list(detected), Counter[str](), Counter[str]()
    for kind, first, stop in transitions:
        near = [span for span in free if span[0] <= stop + tolerance and span[1] >= first - tolerance]
        (hits if near else misses)[kind] += 1
        if near:
            free.remove(near[0])
    return DetectionScore(dict(hits), dict(misses), len(free))


def _join(
    before: np.ndarray, after: np.ndarray, kind: TransitionKind, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, EditTransition]:
    """Return both shots with a transition; those of a dissolve and of a wipe overlap by `count` frames."""
    weights = ((np.arange(count) + 1) / (count + 1)).astype(np.float32)
    if kind == "cut":
        return np.concatenate([before, after]), EditTransition(kind, len(before), len(before))
    if kind == "fade":
        before, after = before.copy(), after.copy()
        before[-count:] *= 1 - weights[:, None, None, None]
        after[:count] *= weights[:, None, None, None]
        black = np.zeros((int(generator.integers(0, 6)), *before.shape[1:]), np.float32)
        transition = EditTransition(kind, len(before) - count, len(before) + len(black) + count)
        return np.concatenate([before, black, after]), transition
    share = weights[:, None, None, None]
    if kind == "wipe":
        share = (np.arange(before.shape[2]) < share * before.shape[2]).astype(np.float32)[..., 0, :, None]
        share = np.broadcast_to(share[:, None], (count, 1, before.shape[2], 1))
    mixed = before[-count:] + share * (after[:count] - before[-count:])
    transition = EditTransition(kind, len(before) - count, len(before))
    return np.concatenate([before[:-count], mixed, after[count:]]), transition


def _draw_shot(generator: np.random.Generator, height: int, width: int, fps: float) -> Float32[np.ndarray, "T H W 3"]:
    """Return the frames of a shot, long enough for a transition at each end."""
    frames = round(fps * (generator.uniform(*SHOT_SECONDS) + 2 * GRADUAL_SECONDS[1]))
    if generator.random() < 0.4:
        size = Grid(frames, height // _SCENE_SCALE, width // _SCENE_SCALE)
        scene = draw_scene(int(generator.integers(1 << 30)), seed=0, level=3, sizes=[size], fps=fps)
        shot = resize(render(scene).clip.frames, height, width).astype(np.float32)
    else:
        shot = _draw_texture(generator, frames, height, width, fps)
    # The middle of the shot: what is next to a transition must be seen as it is.
    begin, end = round(fps * GRADUAL_SECONDS[1]), frames - round(fps * GRADUAL_SECONDS[1])
    times = np.arange(frames)
    distractor = generator.random()
    if distractor < 0.25:
        start, length = int(generator.integers(begin, end)), int(generator.integers(1, 5))
        light = np.where((times >= start) & (times < start + length), generator.uniform(0.5, 1.0), 0.0)
        shot += light.astype(np.float32)[:, None, None, None] * (255 - shot)
    elif distractor < 0.4:
        moment, gain = generator.uniform(begin, end), generator.uniform(0.6, 1.3)
        gains = 1 + (gain - 1) / (1 + np.exp(-(times - moment) / (fps * generator.uniform(0.02, 0.2))))
        shot *= gains.astype(np.float32)[:, None, None, None]
    shot += generator.normal(0, generator.uniform(0, 3), (frames, height, width, 1)).astype(np.float32)
    return np.clip(shot, 0, 255)


def _draw_texture(
    generator: np.random.Generator, frames: int, height: int, width: int, fps: float
) -> Float32[np.ndarray, "T H W 3"]:
    """Return a camera's view of a plane with detail of all sizes: it moves, zooms, shakes, and may pan fast."""
    side = 2 * width
    picture = _draw_plane(generator, side)
    seconds = np.arange(frames) / fps
    speed, angle = width * generator.exponential(0.12), generator.uniform(0, 2 * math.pi)
    distance = speed * seconds
    if generator.random() < 0.35:  # by up to a frame in a third of a second
        moment, length = generator.uniform(0.3, 0.7) * seconds[-1], generator.uniform(0.15, 0.5)
        distance += generator.uniform(0.4, 1.2) * width / (1 + np.exp(-8 * (seconds - moment) / length))
    shake = np.cumsum(generator.normal(0, generator.uniform(0, 0.6), (frames, 2)), axis=0)
    centres = side / 2 + distance[:, None] * np.array([math.sin(angle), math.cos(angle)]) + shake
    scales = (
        np.exp(np.log(generator.uniform(0.7, 1.4)) * seconds / max(seconds[-1], 1e-3))
        if generator.random() < 0.4
        else np.ones(frames)
    )
    rows, columns = np.arange(height) - height / 2, np.arange(width) - width / 2
    shot = np.empty((frames, height, width, 3), np.float32)
    for number, (centre, scale) in enumerate(zip(centres, scales, strict=True)):
        shot[number] = _sample(picture, centre[0] + rows * scale, centre[1] + columns * scale)
    return shot


def _draw_plane(generator: np.random.Generator, side: int) -> Float32[np.ndarray, "S S 3"]:
    """Return a picture that repeats: noise of all sizes with hard edges, in the colours of a palette."""
    levels = np.zeros((side, side), np.float32)
    roughness = generator.uniform(0.4, 0.75)
    for octave in range(2, 7):
        coarse = generator.random((1 << octave, 1 << octave)).astype(np.float32)
        grid = np.linspace(0, 1 << octave, side, endpoint=False)
        levels += roughness ** (octave - 2) * _sample(coarse[..., None], grid, grid)[..., 0]
    levels = (levels - levels.min()) / np.ptp(levels)
    if generator.random() < 0.5:
        levels = np.round(levels * 6) / 6
    palette = generator.uniform(0, 255, (5, 3)) * generator.uniform(0.4, 1.0)
    stops = np.linspace(0, 1, len(palette))
    return np.stack([np.interp(levels, stops, palette[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)


def _sample(picture: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return a picture, which repeats, at rows and columns between its pixels."""
    for axis, places in enumerate((rows, columns)):
        size = picture.shape[axis]
        whole = np.floor(places).astype(int)
        share = (places - whole).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        first, second = (picture.take((whole + step) % size, axis=axis) for step in (0, 1))
        picture = first + share * (second - first)
    return picture
