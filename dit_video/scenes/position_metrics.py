"""Metrics of positions of objects of rendered scenes: in a new frame, and where they start."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float

from dit_video.core import rng
from dit_video.evaluation.metrics.metric import ExampleMetric, MeanMetric, MetricBatch, MetricDescription, MetricValue
from dit_video.scenes import Scene
from dit_video.scenes.draw import FREE_FRAMES
from dit_video.scenes.objects import find_objects
from dit_video.scenes.scene import RELATIONS
from dit_video.video import Clip

_GAP = 2.0
"""Pixels between two objects with a relation, at least."""
_MAX_TRIES = 100


@dataclass(frozen=True, kw_only=True)
class ObjectPosition(MeanMetric):
    """Mean distance of objects from their true positions in a new frame.

    An object that is lost counts as half the frame's diagonal.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "position_error"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="position error", unit="pixels", decimals=2, is_higher_better=False, explanation="of objects' centroids"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the mean error of every sample's objects; None without any."""
        pairs = zip(batch.samples, batch.scenes, strict=True)
        return [measure_position_error(batch, clip, truth, frame=truth.frame) for clip, truth in pairs]


@dataclass(frozen=True, kw_only=True)
class SceneStartError(MeanMetric):
    """Mean distance of objects in the first frame from the truth's, of samples whose first frame was known.

    A caption does not say where an object starts: without a known first frame, `SceneStartSpread` says whether starts
    vary as those of the data. An object that is missing counts as half the frame's diagonal.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "scene_start_error"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="start position error",
        unit="pixels",
        decimals=2,
        is_higher_better=False,
        explanation="of objects' centroids in a first frame that the model got",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the mean distance of every sample whose first frame was known, and None for the others."""
        return [
            measure_position_error(batch, clip, truth, frame=0) if is_first_frame_known(truth) else None
            for clip, truth in zip(batch.samples, batch.scenes, strict=True)
        ]


class StartSample(NamedTuple):
    """The start of a sample's objects."""

    prompt: str
    """Caption and size of the sample."""
    start: tuple[float, ...]
    """Rows and columns of all objects in the first frame, relative to the frame's shorter side."""
    variance: float
    """Sum of the variances that these have in the data, for this prompt."""


@dataclass(frozen=True, kw_only=True)
class SceneStartSpread(ExampleMetric[StartSample]):
    """Standard deviation of the start positions of samples of one prompt, relative to the data's.

    Variances are those about the mean of each prompt (caption and size), added up over all prompts, objects and axes.
    Prompts with one sample do not count, nor do samples without all objects in their first frame, those whose first
    frame was known (`SceneStartError`), and scenes of level 3. The interval is that of a bootstrap of the prompts.
    """

    needs = ("samples", "scenes")
    draws: int = 400
    """Number of start positions that are drawn for the data's variance."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the ratio."""
        explanation = "spread of start positions over samples of a prompt, relative to the data's"
        return {
            "scene_start_spread": MetricDescription(
                label="variety of starts", unit="%", decimals=0, is_higher_better=True, explanation=explanation
            )
        }

    def measure(self, batch: MetricBatch) -> Sequence[StartSample]:
        """Return the starts of all samples that count."""
        samples = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            scene = truth.scene
            if is_first_frame_known(truth) or scene.level == 3:
                continue
            tracks = batch.derive(find_objects, clip, scene.background)
            if not all(each.colour in tracks and tracks[each.colour].is_visible[0] for each in scene.objects):
                continue
            side = min(clip.height, clip.width)
            start = np.concatenate([tracks[each.colour].centre[0] for each in scene.objects]) / side
            drawn = draw_starts(scene, self.draws) / min(scene.size.h, scene.size.w)
            if len(drawn) < 2:
                continue
            variance = float(drawn.var(axis=0, ddof=1).sum(axis=(0, 1)))
            samples.append(StartSample(f"{scene.caption}, {scene.size}", tuple(start.tolist()), variance))
        return samples

    def compute(self, state: tuple[StartSample, ...]) -> Mapping[str, MetricValue]:
        """Return the ratio."""
        groups = defaultdict(list)
        for sample in state:
            groups[sample.prompt].append(sample)
        parts = np.array([_compare_variances(group) for group in groups.values() if len(group) > 1]).reshape(-1, 2)
        count = sum(len(group) for group in groups.values() if len(group) > 1)
        if not len(parts):
            return {"scene_start_spread": MetricValue(value=None, count=0)}
        own, data = parts.sum(axis=0)
        indices = rng.make_generator(0, "bootstrap").integers(len(parts), size=(2000, len(parts)))  # Efron 1979
        sums = parts[indices].sum(axis=1)
        low, high = np.quantile(np.sqrt(sums[:, 0] / sums[:, 1]), (0.025, 0.975), axis=0).tolist()
        interval = (low, high) if len(parts) > 1 else None
        value = MetricValue(value=float(np.sqrt(own / data)), interval=interval, count=count)
        return {"scene_start_spread": value}


def draw_starts(scene: Scene, draws: int, *, seed: int = 0) -> Float[np.ndarray, "draws objects 2"]:
    """Draw start positions of a scene's objects as `draw_scene` does, for their sizes, motions and relation.

    There are fewer than `draws` if hardly any positions have the relation.

    Args:
      scene: A scene of level 1 or 2.
      draws: Number of draws.
      seed: Seed of the draws.
    """
    generator = rng.make_generator(seed, f"start positions of {scene.caption}")
    radius = np.array([each.radius for each in scene.objects])[:, None]
    travel = np.array([each.velocity for each in scene.objects]) * (FREE_FRAMES - 1) / scene.fps
    low = radius - np.minimum(travel, 0.0)
    high = np.array([scene.size.h, scene.size.w]) - radius - np.maximum(travel, 0.0)
    starts = np.zeros((0, len(scene.objects), 2))
    for _ in range(_MAX_TRIES):
        drawn = generator.uniform(low, high, size=(4 * draws, *low.shape))
        if scene.relation is not None:
            axis, sign = RELATIONS[scene.relation]
            offset = drawn[:, 1] - drawn[:, 0]
            room = radius.sum(axis=(0, 1)) + _GAP
            is_far = sign * offset[:, axis] >= room
            drawn = drawn[is_far & (np.abs(offset[:, 1 - axis]) <= np.abs(offset[:, axis]))]
        starts = np.concatenate([starts, drawn])
        if len(starts) >= draws:
            break
    return starts[:draws]


def measure_position_error(batch: MetricBatch, clip: Clip, truth: Any, *, frame: int) -> float | None:
    """Return the mean distance in pixels of a sample's objects from their places in the rendering, in one frame.

    An object that is lost, or farther away, counts as half the frame's diagonal.

    Args:
      batch: Batch of the sample, which keeps the objects of its clips.
      clip: The sample.
      truth: Truth of the sample, with a scene and its rendering.
      frame: Number of the frame.
    """
    own, true = (batch.derive(find_objects, each, truth.scene.background) for each in (clip, truth.reference))
    lost = float(np.hypot(clip.height, clip.width)) / 2
    distances = []
    for name in (each.colour for each in truth.scene.objects if each.colour in true):
        distance = float(np.hypot(*(own[name].centre[frame] - true[name].centre[frame]))) if name in own else np.nan
        distances.append(lost if np.isnan(distance) else min(distance, lost))
    return float(np.mean(distances)) if distances else None


def is_first_frame_known(truth: Any) -> bool:
    """Return True if the model got the whole first frame of a sample.

    Args:
      truth: Truth of the sample; `is_known`, if it has one, are the pixels that the model got.
    """
    is_known = getattr(truth, "is_known", None)
    return is_known is not None and bool(is_known[0].all(axis=(0, 1)))


def _compare_variances(group: Sequence[StartSample]) -> tuple[float, float]:
    """Return the sum of squares about the mean of samples of one prompt, and its expectation in the data."""
    starts = np.array([sample.start for sample in group])
    squares = float(np.square(starts - starts.mean(axis=0)).sum(axis=(0, 1)))
    return squares, (len(group) - 1) * float(np.mean([sample.variance for sample in group]))
