"""Metrics of samples of rendered shapes, judged from pixels alone: prompt following, and variety of starts.

The judge knows the background and the six colours, and nothing about how a clip was generated. It returns None for
attributes that it cannot determine because it finds no single solid shape of a known colour.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import binary_dilation, binary_propagation

from dit_video.core import rng
from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    estimate_share,
)
from dit_video.scenes.shapes import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    FREE_FRAMES,
    HELD_OUT,
    Description,
    get_centroid_offset,
    parse_caption,
    sample_geometry,
)
from dit_video.tokens import Grid
from dit_video.video import Clip

ATTRIBUTES = ("colour", "direction", "shape")
"""Attributes of a prompt that are judged."""
MIN_STRENGTH = 70.0
"""Minimum distance of a foreground pixel from the background in RGB; the palette's colours have distances of 190
to 390."""
MIN_PALETTE_COSINE, MIN_FOREGROUND_COSINE = 0.96, 0.93
"""Minimum cosine between a colour's direction from the background and that of the nearest colour of the palette, and
between pixels of one shape. No two colours of the palette have more than 0.89."""
FILL_RANGES = {"triangle": (0.40, 0.76), "circle": (0.70, 0.88), "square": (0.88, 1.15)}
"""Ranges of area over bounding box: 1/2, pi/4 and 1, and the effects of 4:2:0 chroma, blur and noise on them."""
MIN_LEAN = 0.06
"""Minimum distance of a triangle's centroid below the middle of its box, as a share of its height (1/6 without
blur)."""
MIN_MOTION = 1.0
"""Minimum motion of a centroid over the whole clip, in pixels; a shape that moves less has no direction."""


@dataclass(frozen=True)
class Judgement:
    """Attributes of the shape that a clip shows; None if an attribute cannot be determined."""

    colour: str | None = None
    """Name of the shape's colour."""
    shape: str | None = None
    """Name of the shape."""
    direction: str | None = None
    """Direction of motion; None for an image, and if the shape does not move or moves diagonally."""
    start: tuple[float, float] | None = None
    """Centroid in the first frame (row, column), as a fraction of the frame's height and width."""


@dataclass(frozen=True, kw_only=True)
class JudgedSample:
    """A sample's prompt, the judgement of the sample, and its size in pixels."""

    description: Description
    judgement: Judgement
    size: Grid


def judge_sample(description: Description, clip: Clip) -> JudgedSample:
    """Judge a sample of `description`."""
    return JudgedSample(description=description, judgement=judge(clip), size=Grid(*clip.frames.shape[:3]))


def score(description: Description, judgement: Judgement) -> dict[str, bool]:
    """Return for each attribute of the description whether the judgement has it."""
    attributes = {name: value for name, value in asdict(description).items() if value is not None}
    return {name: getattr(judgement, name) == value for name, value in attributes.items()}


def judge(clip: Clip) -> Judgement:
    """Return colour, shape and direction of the single shape in a clip.

    Colour: the colour of the palette nearest to the foreground's brightest part. Shape: by fill, the soft area over
    that of the bounding box, over all frames; a triangle must be heavier below, the others not. Direction: that of the
    centroid's displacement over the first 17 frames, before any bounce, if it is within 30 degrees of an axis.
    """
    light = clip.frames.astype(np.float64) - np.asarray(BACKGROUND, np.float64)
    strength = np.linalg.norm(light, axis=-1)
    tone = _estimate_tone(light, strength)
    if tone is None:
        return Judgement()
    colour = _classify_colour(tone, light, strength)
    coverage = np.clip(light @ tone / (tone @ tone), 0.0, 1.0)
    body = _find_body(coverage)
    bodies = coverage * body
    area = bodies.sum(axis=(1, 2))
    stray_area = ((strength > np.linalg.norm(tone) / 2) & ~body).sum(axis=(1, 2))
    is_valid = (area >= 4) & (area <= 0.45 * clip.height * clip.width) & (stray_area <= 0.25 * area)
    if is_valid.mean() < 0.75:  # no shape, several shapes, or a shape in some frames only
        return Judgement(colour=colour)
    centroids = _compute_centroids(bodies)
    start = centroids[0] / (clip.height, clip.width) if is_valid[0] else None
    return Judgement(
        colour=colour,
        shape=_classify_shape(bodies[is_valid]),
        direction=_classify_direction(centroids[:FREE_FRAMES], is_valid[:FREE_FRAMES]),
        start=None if start is None else (float(start[0]), float(start[1])),
    )


def _estimate_tone(
    light: Float[np.ndarray, "T H W 3"], strength: Float[np.ndarray, "T H W"]
) -> Float[np.ndarray, "3"] | None:
    """Return the foreground's colour minus the background's, from its brightest part; None without a foreground."""
    bright = strength[strength > MIN_STRENGTH]
    if len(bright) < 4 * len(light):
        return None
    core = strength > 0.8 * np.quantile(bright, 0.8)
    return np.median(light[core], axis=0)


def _classify_colour(
    tone: Float[np.ndarray, "3"], light: Float[np.ndarray, "T H W 3"], strength: Float[np.ndarray, "T H W"]
) -> str | None:
    """Return the palette's nearest colour, if direction and brightness match and most of the foreground has it."""
    palette = np.asarray(list(COLOURS.values()), np.float64) - np.asarray(BACKGROUND, np.float64)
    length, lengths = np.linalg.norm(tone), np.linalg.norm(palette, axis=-1)
    cosines = palette @ tone / (length * lengths)
    best = int(np.argmax(cosines))
    foreground = strength > length / 2
    is_similar = (light[foreground] @ tone) / (strength[foreground] * length) > MIN_FOREGROUND_COSINE
    if cosines[best] < MIN_PALETTE_COSINE or not 0.55 < length / lengths[best] < 1.3 or is_similar.mean() < 0.7:
        return None
    return list(COLOURS)[best]


def _find_body(coverage: Float[np.ndarray, "T H W"]) -> Bool[np.ndarray, "T H W"]:
    """Return in every frame the connected part around the densest pixel, and two pixels around it for its soft edge."""
    padded = np.pad(coverage, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    density = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    solid = coverage > 0.5
    densest = density.reshape(len(density), -1).argmax(axis=1)
    seed = (np.arange(density[0].size) == densest[:, None]).reshape(density.shape) & solid
    neighbours = np.ones((1, 3, 3), bool)
    body = binary_propagation(seed, neighbours, mask=solid)
    return binary_dilation(body, neighbours, iterations=2)


def _compute_centroids(bodies: Float[np.ndarray, "T H W"]) -> Float[np.ndarray, "T 2"]:
    """Return (row, column) from the frame's top left corner; nan in an empty frame."""
    rows, columns = np.arange(bodies.shape[1]) + 0.5, np.arange(bodies.shape[2]) + 0.5
    with np.errstate(invalid="ignore"):
        moments = np.stack([bodies.sum(axis=2) @ rows, bodies.sum(axis=1) @ columns], axis=-1)
        return moments / bodies.sum(axis=(1, 2))[:, None]


def _classify_shape(bodies: Float[np.ndarray, "T H W"]) -> str | None:
    """Return the shape by the means of fill and lean over frames; None if no shape matches."""
    fills, leans, aspects = [], [], []
    for body, centroid in zip(bodies, _compute_centroids(bodies), strict=True):
        rows, columns = body.max(axis=1), body.max(axis=0)
        rows, columns = np.where(rows > 0.2, rows, 0.0), np.where(columns > 0.2, columns, 0.0)
        height, width = rows.sum(axis=0), columns.sum(axis=0)
        fills.append(body.sum(axis=(0, 1)) / (height * width))
        middle = rows @ (np.arange(len(rows)) + 0.5) / height
        leans.append((centroid[0] - middle) / height)
        aspects.append(height / width)
    if not 0.7 < np.mean(aspects) < 1.4:
        return None
    fill, heavier_below = np.mean(fills), np.mean(leans) > MIN_LEAN
    for name, (low, high) in FILL_RANGES.items():
        if low <= fill < high and (name == "triangle") == heavier_below:
            return name
    return None


def _classify_direction(centroids: Float[np.ndarray, "T 2"], is_valid: Bool[np.ndarray, " T"]) -> str | None:
    """Return the direction of the displacement of a line through the centroids; None if it is small or diagonal."""
    frames = np.flatnonzero(is_valid)
    if len(frames) < 2:
        return None
    displacement = np.polyfit(frames, centroids[frames], 1)[0] * (len(is_valid) - 1)
    axis = int(np.argmax(np.abs(displacement)))
    along, across = np.abs(displacement[[axis, 1 - axis]])
    if along < MIN_MOTION or across > np.tan(np.pi / 6) * along:
        return None
    return next(name for name, signs in DIRECTIONS.items() if signs[axis] == np.sign(displacement[axis]))


class JudgedMetric(ExampleMetric[JudgedSample]):
    """A metric of judgements of samples of rendered shapes."""

    needs = ("samples", "prompts")

    def measure(self, batch: MetricBatch) -> Sequence[JudgedSample]:
        """Return the judgement of every sample.

        Raises:
          UserError: If a prompt describes no shape.
        """
        pairs = zip(batch.prompts, batch.samples, strict=True)
        return [judge_sample(parse_caption(prompt), clip) for prompt, clip in pairs]


@dataclass(frozen=True, kw_only=True)
class PromptFollowing(JudgedMetric):
    """Shares of samples that have the colour, shape and direction of their prompt.

    Each value is also given for `seen` (videos of combinations that occur in training), `never_seen` and `images`, and
    is None if no prompt has the attribute.
    """

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of the attributes' shares, each of all samples and of every group."""
        share = MetricDescription(label="", unit="%", decimals=1, is_higher_better=True, explanation=_MEANING)
        return {
            name + suffix: replace(share, label=f"{name} as prompted{of}", is_headline=suffix in _HEADLINES)
            for suffix, (of, _) in _GROUPS.items()
            for name in ATTRIBUTES
        }

    def compute(self, state: tuple[JudgedSample, ...]) -> Mapping[str, MetricValue]:
        """Return the shares with Wilson's intervals."""
        estimates = {}
        for suffix, (_, is_member) in _GROUPS.items():
            scores = [score(result.description, result.judgement) for result in filter(is_member, state)]
            for name in ATTRIBUTES:
                estimates[name + suffix] = estimate_share([entry[name] for entry in scores if name in entry])
        return estimates

    def list_examples(self, state: tuple[JudgedSample, ...]) -> Sequence[Mapping[str, float | bool]]:
        """Return for each attribute of a prompt whether the sample has it."""
        return [score(result.description, result.judgement) for result in state]


_HEADLINES = ("", "_never_seen")
_MEANING = "judged from pixels; Wilson's interval"
_GROUPS: dict[str, tuple[str, Callable[[JudgedSample], bool]]] = {
    "": ("", lambda result: True),
    "_seen": (
        ", videos of combinations in training",
        lambda result: result.description.direction is not None and result.description not in HELD_OUT,
    ),
    "_never_seen": (", combinations not in training", lambda result: result.description in HELD_OUT),
    "_images": (", images", lambda result: result.size.t == 1),
}
"""Suffix of the names, end of the labels and members of each group of samples."""


NAME = "start_spread"
_KEYS = tuple(f"{direction}_{axis}" for direction in (*DIRECTIONS, "image") for axis in ("vertical", "horizontal"))


@dataclass(frozen=True, kw_only=True)
class StartSpread(JudgedMetric):
    """Standard deviations of start positions relative to the data's, for each direction and axis, and the lowest.

    Images have the direction `image`. The data's is that of renderings of each sample's prompt at its size. Samples
    without a shape in their first frame are excluded from both; with fewer than two the value is None.
    """

    draws: int = 100
    """Number of renderings per sample."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of the lowest ratio and of all ratios."""
        lowest = MetricDescription(
            label="variety",
            unit="%",
            decimals=0,
            is_higher_better=True,
            explanation="spread of start positions relative to the data's: lowest of all directions and axes",
        )
        ratio = replace(lowest, explanation="spread of starts over the data's; bootstrap interval", is_headline=False)
        labels = {key: f"variety, {key.replace('_', ', ')}" for key in _KEYS}
        return {NAME: lowest} | {f"{NAME}_{key}": replace(ratio, label=label) for key, label in labels.items()}

    def compute(self, state: tuple[JudgedSample, ...]) -> Mapping[str, MetricValue]:
        """Return the ratios, each with the two deviations in fractions of the frame, and the lowest."""
        estimates: list[MetricValue] = []
        detected = [result for result in state if result.judgement.start is not None]
        for direction in (*DIRECTIONS, "image"):
            group = [result for result in detected if (result.description.direction or "image") == direction]
            starts = np.asarray([result.judgement.start for result in group]).reshape(-1, 2)
            drawn = [_draw_data_starts(result, index, self.draws) for index, result in enumerate(group)]
            estimates += map(_compare_deviations, starts.T, np.concatenate([np.zeros((0, 2)), *drawn]).T)
        lowest = min((each.value for each in estimates if each.value is not None), default=None)
        ratios = {f"{NAME}_{key}": estimate for key, estimate in zip(_KEYS, estimates, strict=True)}
        return {NAME: MetricValue(value=lowest, count=len(detected)), **ratios}


def _compare_deviations(starts: Float[np.ndarray, " n"], data: Float[np.ndarray, " m"]) -> MetricValue:
    """Return the ratio of standard deviations of samples and data."""
    if len(starts) < 2:
        return MetricValue(value=None, count=len(starts))
    deviation, expected = (float(values.std(ddof=1)) for values in (starts, data))
    indices = rng.make_generator(0, "bootstrap").integers(len(starts), size=(2000, len(starts)))  # Efron 1979
    low, high = np.quantile(starts[indices].std(axis=1, ddof=1) / expected, (0.025, 0.975), axis=0).tolist()
    note = f"samples {deviation:.3f}, data {expected:.3f} of the frame"
    return MetricValue(value=deviation / expected, interval=(low, high), count=len(starts), note=note)


def _draw_data_starts(result: JudgedSample, index: int, draws: int) -> Float[np.ndarray, "n 2"]:
    """Return first centroids, as fractions of the frame, of renderings of a sample's prompt at its size."""
    generator, size, starts = rng.make_generator(0, "start spread", index), result.size, []
    for _ in range(draws):
        geometry = sample_geometry(generator, result.description, height=size.h, width=size.w)
        below = get_centroid_offset(result.description.shape, geometry.radius)
        starts.append(((geometry.row + below) / size.h, geometry.column / size.w))
    return np.asarray(starts)
