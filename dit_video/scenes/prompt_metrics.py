"""Metrics of samples of rendered scenes, by what they judge: the prompt, or the laws of motion."""

from dit_video.evaluation.metrics.metric import Metric
from dit_video.scenes.metrics.bounce_law import BounceLaw
from dit_video.scenes.metrics.collision_law import CollisionLaw
from dit_video.scenes.metrics.free_fall import FreeFall
from dit_video.scenes.metrics.object_permanence import ObjectPermanence
from dit_video.scenes.metrics.scene_attributes import SceneColours, SceneDirections
from dit_video.scenes.metrics.scene_counts import SceneCounts
from dit_video.scenes.metrics.scene_relations import SceneRelations
from dit_video.scenes.metrics.scene_shapes import SceneShapes
from dit_video.scenes.metrics.scene_sizes import SceneSizes
from dit_video.scenes.metrics.scene_speeds import SceneSpeeds
from dit_video.scenes.metrics.scene_start_error import SceneStartError
from dit_video.scenes.metrics.scene_start_spread import SceneStartSpread
from dit_video.scenes.metrics.scene_textures import SceneTextures

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
"""Metrics of the laws that scenes of `physics_scenes` show; each counts the samples of its law."""
