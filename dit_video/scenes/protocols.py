"""Protocols on rendered scenes, which need no downloads: scenes of captions, and scenes of the laws of motion.

Whoever imports this module can name them: `scenes`, `physics` and `physics_extension`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.metrics.distributions import FrechetMetric, PrecisionRecall
from dit_video.evaluation.metrics.metric import Metric
from dit_video.evaluation.protocol import EvaluationData, EvaluationItem, EvaluationProtocol
from dit_video.evaluation.protocols import FRAME_METRICS, register_protocol
from dit_video.models.encoders import FrozenTextConfig
from dit_video.models.encoders.tokenizer import CutTextWarning
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Condition, Request
from dit_video.scenes import Scene, draw_scene, render
from dit_video.scenes.draw import FREE_FRAMES, SIZES
from dit_video.scenes.features import SceneFeatures
from dit_video.scenes.law_metrics import BounceLaw, CollisionLaw, ContinuationError, FreeFall, ObjectPermanence
from dit_video.scenes.laws import LAWS, MIN_FRAMES, Law, draw_physics_scene
from dit_video.scenes.position_metrics import SceneStartError, SceneStartSpread
from dit_video.scenes.prompt_metrics import (
    SceneColours,
    SceneCounts,
    SceneDirections,
    SceneRelations,
    SceneShapes,
    SceneSizes,
    SceneSpeeds,
    SceneTextures,
)
from dit_video.tokens import Grid
from dit_video.video import Clip


class SceneTruth(NamedTuple):
    """The truth of a sample of a scene's caption: the element of `MetricBatch.scenes`."""

    scene: Scene
    law: Law | None = None
    """Law of motion that the scene shows, if it is drawn for one."""
    known: int = 0
    """Number of first frames of the scene that the sample continues."""


@dataclass(frozen=True, kw_only=True)
class SceneProtocol(EvaluationProtocol):
    """A protocol on scenes whose caption says all that is judged."""

    levels: tuple[int, ...] = (1, 2)
    """Levels of the scenes."""
    sizes: tuple[Grid, ...] = tuple(size for size in SIZES if size.t == FREE_FRAMES)
    """Sizes of the scenes."""

    def make_items(self, pipeline: Pipeline, data: EvaluationData) -> list[EvaluationItem]:
        """Return the scenes' captions.

        Raises:
          UserError: If the model would be given other prompts, as it does not read texts of this length.
        """
        _check_captions(pipeline, data)
        return super().make_items(pipeline, data)

    def make_data(self, data: EvaluationData | None) -> EvaluationData:
        """Return scenes of the levels in turn, drawn from the seed."""
        truths = [
            SceneTruth(
                draw_scene(number, seed=self.seed, level=self.levels[number % len(self.levels)], sizes=self.sizes)
            )
            for number in range(self.real_count or self.count or 1)
        ]
        return _make_scenes(truths)


@dataclass(frozen=True, kw_only=True)
class PhysicsProtocol(EvaluationProtocol):
    """A protocol on scenes that each show one law of motion, as many of each law.

    Raises:
      UserError: If there are more known frames than before every contact, or less than none.
    """

    laws: tuple[Law, ...] = LAWS
    """Laws that the scenes show, in turn."""
    sizes: tuple[Grid, ...] | None = None
    """Sizes of the scenes; None for those of each law."""
    known: int = 0
    """Number of first frames of its scene that a sample continues; 0 for samples of the caption alone."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.known <= MIN_FRAMES:
            rule = f"a contact may follow after {MIN_FRAMES} frames, and the law is to be judged by the others"
            raise UserError(f"known={self.known} is invalid: {rule}. Use 0 to {MIN_FRAMES}.")

    def make_data(self, data: EvaluationData | None) -> EvaluationData:
        """Return scenes of the laws in turn, drawn from the seed.

        Raises:
          UserError: If the law is unknown, or cannot be seen in a size.
        """
        truths = []
        for number in range(self.real_count or self.count or 1):
            index, law = number // len(self.laws), self.laws[number % len(self.laws)]
            scene = draw_physics_scene(index, seed=self.seed, law=law, sizes=self.sizes)
            truths.append(SceneTruth(scene, law, self.known))
        return _make_scenes(truths)

    def make_items(self, pipeline: Pipeline, data: EvaluationData) -> list[EvaluationItem]:
        """Return the scenes' captions, with the first frames of their renderings as conditions.

        Raises:
          UserError: If the samples have another rate, at which the scenes would move at another speed, or the model
            does not read captions of this length.
        """
        _check_captions(pipeline, data)
        items = super().make_items(pipeline, data)
        if not self.known:
            return items
        completed, fps = [], pipeline.config.fps
        for item in items:
            assert isinstance(item.entry, Request)
            assert item.read_reference is not None
            clip = item.read_reference()
            if clip.fps != fps:
                rule = f"scenes, whose first frames the samples continue, have {clip.fps:g} frames per second"
                raise UserError(f"fps={fps:g} is invalid: {rule}. Use a model of this rate, or the protocol physics.")
            condition = Condition(content=clip[: self.known])
            completed.append(item._replace(entry=replace(item.entry, conditions=(condition,))))
        return completed


def _check_captions(pipeline: Pipeline, data: EvaluationData) -> None:
    """Raise if a trained text encoder would read the beginning of some captions alone, which are judged as a whole.

    Published encoders, whose limits are above the captions of any scene, are not checked.
    """
    encoder = pipeline.config.model.text_encoder
    if isinstance(encoder, FrozenTextConfig):
        return
    captions, tokenizer = [caption for caption in data.clips.captions if caption], encoder.make_tokenizer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CutTextWarning)
        for caption in captions:
            tokenizer(caption)
    if count := sum(issubclass(each.category, CutTextWarning) for each in caught):
        rule = f"{count} of {len(captions)} captions of the scenes are longer than the model reads"
        raise UserError(f"max_tokens={encoder.max_tokens} is invalid: {rule}. Use a model that is trained with more")


def _make_scenes(truths: Sequence[SceneTruth]) -> EvaluationData:
    """Return scenes that are rendered when they are read."""

    def read(index: int, fps: float | None) -> Clip:
        return render(truths[index].scene).clip

    names = tuple(f"scene {number:06d}" for number in range(len(truths)))
    captions = tuple(truth.scene.caption for truth in truths)
    clips = ClipSet("rendered scenes", names, captions, read, get_size=lambda index: truths[index].scene.size)
    return EvaluationData(clips._replace(truths=tuple(truths)))


SCENE_PROMPT_METRICS: tuple[Metric, ...] = (
    SceneColours(),
    SceneShapes(),
    SceneSizes(),
    SceneTextures(),
    SceneCounts(),
    SceneRelations(),
    SceneDirections(),
    SceneSpeeds(),
    SceneStartError(),
    SceneStartSpread(),
)
"""Metrics of what a caption says of a scene of level 1 or 2, and of where its objects start."""
PHYSICS_METRICS: tuple[Metric, ...] = (FreeFall(), BounceLaw(), CollisionLaw(), ObjectPermanence())
"""Metrics of the laws of motion; each counts the samples of its law."""

register_protocol(
    SceneProtocol(
        name="scenes",
        count=1024,
        metrics=(
            *SCENE_PROMPT_METRICS,
            FrechetMetric(features=SceneFeatures(), name="scene_distance", label="Fréchet distance of scene features"),
            PrecisionRecall(features=SceneFeatures()),
            *FRAME_METRICS,
        ),
        seed=10**6,
    )
)
register_protocol(PhysicsProtocol(name="physics", count=256, metrics=PHYSICS_METRICS, seed=10**6))
# A sample starts as its scene, so that the law says how it goes on.
register_protocol(
    PhysicsProtocol(
        name="physics_extension",
        count=256,
        metrics=(*PHYSICS_METRICS, ContinuationError()),
        seed=10**6,
        known=MIN_FRAMES,
    )
)
