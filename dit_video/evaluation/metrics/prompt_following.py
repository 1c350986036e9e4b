"""Prompt following on rendered shapes, judged from pixels alone.

The judge knows the background and the six colours, and nothing of how a clip was made. It says None where it does not
find one solid shape of a known colour.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from dit_video.core import rng
from dit_video.data.synthetic.shapes import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    FREE_FRAMES,
    HELD_OUT,
    Description,
    centroid_below_centre,
    sample_geometry,
)
from dit_video.tokens import Grid
from dit_video.video import Clip

FAINTEST = 70.0
"""Distance from the background in RGB below which nothing is there; the palette's colours are 190 to 390 away."""
NEAR, ALIKE = 0.96, 0.93
"""Cosines between two colours' directions from the background: of a colour that is the palette's, and of pixels of one
shape. No two of the palette are above 0.89."""
FILLS = {"triangle": (0.40, 0.76), "circle": (0.70, 0.88), "square": (0.88, 1.15)}
"""Area over bounding box: 1/2, pi/4 and 1, and what 4:2:0 chroma, blur and noise make of them."""
LEAN = 0.06
"""How far below its box's middle, as a share of its height, a triangle's centroid lies at least (1/6 without blur)."""
STILL = 1.0
"""Pixels over the whole clip: a centroid that moves less stays where it is."""


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; None where that is not found."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    """None for an image, and when the shape does not move or moves askew."""
    start: tuple[float, float] | None = None
    """The first frame's centroid (row, column), as a fraction of the frame's height and width."""


@dataclass(frozen=True)
class Score:
    """What of a description a verdict has right; `direction` is None where none was asked for."""

    colour: bool
    shape: bool
    direction: bool | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A sample's prompt, what was found in it, and its size in pixels."""

    description: Description
    verdict: Verdict
    size: Grid


def examine(description: Description, clip: Clip) -> Result:
    """Judge a sample of `description`."""
    return Result(description=description, verdict=judge(clip), size=Grid(*clip.frames.shape[:3]))


def score(description: Description, verdict: Verdict) -> Score:
    """Compare what was asked for with what was found."""
    return Score(
        colour=verdict.colour == description.colour,
        shape=verdict.shape == description.shape,
        direction=None if description.direction is None else verdict.direction == description.direction,
    )


def judge(clip: Clip) -> Verdict:
    """Colour, shape and direction of the one shape in a clip.

    Colour: the nearest of the palette to the foreground's brightest part. Shape: by fill, the area over the bounding
    box's, from soft coverage, over all frames; a triangle must be heavier below, the others not. Direction: of the
    centroid's displacement over the first 17 frames, before any bounce, if it is within 30 degrees of an axis.
    """
    light = clip.frames.astype(np.float64) - np.asarray(BACKGROUND, np.float64)
    strength = np.linalg.norm(light, axis=-1)
    tone = _tone(light, strength)
    if tone is None:
        return Verdict()
    colour = _colour(tone, light, strength)
    coverage = np.clip(light @ tone / (tone @ tone), 0.0, 1.0)
    body = _body(coverage)
    bodies = coverage * body
    area = bodies.sum(axis=(1, 2))
    strays = ((strength > np.linalg.norm(tone) / 2) & ~body).sum(axis=(1, 2))
    found = (area >= 4) & (area <= 0.45 * clip.height * clip.width) & (strays <= 0.25 * area)
    if found.mean() < 0.75:  # nothing, more than one thing, or something in some frames alone
        return Verdict(colour=colour)
    centroids = _centroids(bodies)
    start = centroids[0] / (clip.height, clip.width) if found[0] else None
    return Verdict(
        colour=colour,
        shape=_shape(bodies[found]),
        direction=_direction(centroids[:FREE_FRAMES], found[:FREE_FRAMES]),
        start=None if start is None else (float(start[0]), float(start[1])),
    )


def _tone(light: Float[np.ndarray, "T H W 3"], strength: Float[np.ndarray, "T H W"]) -> Float[np.ndarray, "3"] | None:
    """The foreground's colour minus the background's, from its brightest part; None if there is no foreground."""
    bright = strength[strength > FAINTEST]
    if len(bright) < 4 * len(light):
        return None
    core = strength > 0.8 * np.quantile(bright, 0.8)
    return np.median(light[core], axis=0)


def _colour(
    tone: Float[np.ndarray, "3"], light: Float[np.ndarray, "T H W 3"], strength: Float[np.ndarray, "T H W"]
) -> str | None:
    """The palette's nearest, if it is near, about as bright, and most of the foreground has it."""
    palette = np.asarray(list(COLOURS.values()), np.float64) - np.asarray(BACKGROUND, np.float64)
    length, lengths = np.linalg.norm(tone), np.linalg.norm(palette, axis=-1)
    cosines = palette @ tone / (length * lengths)
    best = int(np.argmax(cosines))
    foreground = strength > length / 2
    alike = (light[foreground] @ tone) / (strength[foreground] * length) > ALIKE
    if cosines[best] < NEAR or not 0.55 < length / lengths[best] < 1.3 or alike.mean() < 0.7:
        return None
    return list(COLOURS)[best]


def _grown(mask: Bool[np.ndarray, "T H W"]) -> Bool[np.ndarray, "T H W"]:
    """With every pixel's eight neighbours."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]


def _body(coverage: Float[np.ndarray, "T H W"]) -> Bool[np.ndarray, "T H W"]:
    """In every frame the connected part around the densest place, and two pixels around it for its soft edge."""
    padded = np.pad(coverage, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    density = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    solid = coverage > 0.5
    densest = density.reshape(len(density), -1).argmax(axis=1)
    body = (np.arange(density[0].size) == densest[:, None]).reshape(density.shape) & solid
    while True:
        grown = _grown(body) & solid
        if (grown == body).all():
            return _grown(_grown(body))
        body = grown


def _centroids(bodies: Float[np.ndarray, "T H W"]) -> Float[np.ndarray, "T 2"]:
    """(row, column) from the frame's top left corner; nan in an empty frame."""
    rows, columns = np.arange(bodies.shape[1]) + 0.5, np.arange(bodies.shape[2]) + 0.5
    with np.errstate(invalid="ignore"):
        moments = np.stack([bodies.sum(axis=2) @ rows, bodies.sum(axis=1) @ columns], axis=-1)
        return moments / bodies.sum(axis=(1, 2))[:, None]


def _shape(bodies: Float[np.ndarray, "T H W"]) -> str | None:
    """By fill and lean, their means over frames."""
    fills, leans, aspects = [], [], []
    for body, centroid in zip(bodies, _centroids(bodies), strict=True):
        rows, columns = body.max(axis=1), body.max(axis=0)
        rows, columns = np.where(rows > 0.2, rows, 0.0), np.where(columns > 0.2, columns, 0.0)
        height, width = rows.sum(axis=0), columns.sum(axis=0)
        fills.append(body.sum(axis=(0, 1)) / (height * width))
        middle = rows @ (np.arange(len(rows)) + 0.5) / height
        leans.append((centroid[0] - middle) / height)
        aspects.append(height / width)
    if not 0.7 < np.mean(aspects) < 1.4:
        return None
    fill, heavier_below = np.mean(fills), np.mean(leans) > LEAN
    for name, (low, high) in FILLS.items():
        if low <= fill < high and (name == "triangle") == heavier_below:
            return name
    return None


def _direction(centroids: Float[np.ndarray, "T 2"], found: Bool[np.ndarray, " T"]) -> str | None:
    """Of the displacement that a line through the centroids has over the clip."""
    frames = np.flatnonzero(found)
    if len(frames) < 2:
        return None
    moved = np.polyfit(frames, centroids[frames], 1)[0] * (len(found) - 1)
    axis = int(np.argmax(np.abs(moved)))
    if np.abs(moved[axis]) < STILL or np.abs(moved[1 - axis]) > np.tan(np.pi / 6) * np.abs(moved[axis]):
        return None
    return next(name for name, signs in DIRECTIONS.items() if signs[axis] == np.sign(moved[axis]))


def prompt_following(results: Sequence[Result]) -> dict:
    """Rates of prompts that were followed, and whether the samples start in as many places as the data's.

    `all`, `seen` (videos of combinations that occur in training), `never_seen` and `images` each hold for `colour`,
    `shape` and `direction` the `rate` with its Wilson 95 % interval (`low`, `high`) over `count` prompts; rates are
    None where nothing was asked. `start_spread` is `start_spread(results)`.
    """
    groups: dict[str, Callable[[Result], bool]] = {
        "all": lambda result: True,
        "seen": lambda result: result.description.direction is not None and result.description not in HELD_OUT,
        "never_seen": lambda result: result.description in HELD_OUT,
        "images": lambda result: result.size.t == 1,
    }
    table: dict = {name: _rates([result for result in results if member(result)]) for name, member in groups.items()}
    return {**table, "start_spread": start_spread(results)}


def _rates(results: Sequence[Result]) -> dict:
    scores = [score(result.description, result.verdict) for result in results]
    rates = {}
    for name in ("colour", "shape", "direction"):
        answers = [answer for one in scores if (answer := getattr(one, name)) is not None]
        right = sum(answers)
        low, high = wilson(right, len(answers))
        rate = right / len(answers) if answers else None
        rates[name] = {"rate": rate, "low": low, "high": high, "count": len(answers)}
    return rates


def wilson(right: int, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a rate (1927), 95 % by default; (0, 1) of nothing."""
    if count == 0:
        return 0.0, 1.0
    rate, weight = right / count, z**2 / count
    middle = (rate + weight / 2) / (1 + weight)
    reach = z * np.sqrt(rate * (1 - rate) / count + weight / (4 * count)) / (1 + weight)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def start_spread(results: Sequence[Result], *, draws: int = 100) -> dict:
    """Standard deviations of start positions (fractions of the frame), of samples and of data, for each direction.

    `{direction: {"vertical" | "horizontal": {"samples", "data", "ratio"}, "count"}, "lowest_ratio"}`, images under
    `image`. The data's is that of `draws` renderings for every sample, of its prompt at its size; samples without a
    shape in their first frame are left out of both, and `count` says how many are left. Two samples of a direction are
    the least that have a spread: with fewer the numbers are None.
    """
    spreads: dict[str, dict] = {}
    ratios: list[float] = []
    for name in (*DIRECTIONS, "image"):
        direction = None if name == "image" else name
        group = [one for one in results if one.description.direction == direction and one.verdict.start is not None]
        entry: dict = {"count": len(group)}
        starts = np.asarray([one.verdict.start for one in group]).reshape(-1, 2)
        data = np.concatenate([np.zeros((0, 2)), *(_data_starts(one, index, draws) for index, one in enumerate(group))])
        for axis, label in enumerate(("vertical", "horizontal")):
            if len(group) < 2:
                entry[label] = {"samples": None, "data": None, "ratio": None}
                continue
            samples, expected = (float(values[:, axis].std(ddof=1)) for values in (starts, data))
            ratios.append(samples / expected)
            entry[label] = {"samples": samples, "data": expected, "ratio": ratios[-1]}
        spreads[name] = entry
    return {**spreads, "lowest_ratio": min(ratios, default=None)}


def _data_starts(result: Result, index: int, draws: int) -> Float[np.ndarray, "n 2"]:
    """First centroids, as fractions of the frame, of renderings of a sample's prompt at its size."""
    generator, size, starts = rng.host(0, "start spread", index), result.size, []
    for _ in range(draws):
        geometry = sample_geometry(generator, result.description, height=size.h, width=size.w)
        below = centroid_below_centre(result.description.shape, geometry.radius)
        starts.append(((geometry.row + below) / size.h, geometry.column / size.w))
    return np.asarray(starts)
