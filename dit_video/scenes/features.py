"""Features of a small classifier of rendered scenes, whose weights are part of the package."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.evaluation.feature_functions import (
    FeatureFunction,
    NetworkInput,
    OpenFeatures,
    make_extractor,
    make_identity,
)
from dit_video.scenes import Scene
from dit_video.scenes.classifier import SIDE, SceneClassifier
from dit_video.scenes.description import (
    BACKGROUNDS,
    CAMERA_MOTIONS,
    COLOURS,
    DIRECTIONS,
    FIGURE_ACTIONS,
    RADII,
    SHAPES,
    SPEEDS,
    TEXTURES,
)
from dit_video.scenes.physics import simulate
from dit_video.video import Clip
from dit_video.weights import load

SCENE_WEIGHTS = Path(__file__).with_name("features.safetensors")
"""Weights that `tools/train_scene_classifier.py` makes."""
_MOVES = (*DIRECTIONS, "still")
LABELS: tuple[str, ...] = (
    *(f"background:{name}" for name in BACKGROUNDS),
    *(f"colour:{name}" for name in COLOURS),
    *(f"shape:{name}" for name in SHAPES),
    *(f"texture:{name}" for name in TEXTURES),
    *(f"size:{name}" for name in RADII),
    *(f"direction:{colour} {move}" for colour in COLOURS for move in _MOVES),
    *(f"speed:{name}" for name in SPEEDS),
    *(f"number:{count}" for count in (1, 2, 3)),
    *(f"contact:{kind}" for kind in ("bounce", "collision")),
    *(f"figure:{action}" for action in FIGURE_ACTIONS),
    *(f"camera:{motion}" for motion in CAMERA_MOTIONS),
    "gravity:fall",
    "occluder:post",
)
"""Labels that the classifier recognises, as `kind:value`; several of a kind may be true."""


@dataclass(frozen=True, kw_only=True)
class SceneFeatures(FeatureFunction):
    """The 96 features of the classifier of rendered scenes; they know colours, shapes and motion of these scenes only.

    Clips of any number of frames are resized to 48×48 pixels.
    """

    weights: str = ""
    """File of the classifier's weights; those of the package if empty."""

    def load(self) -> OpenFeatures:
        """Read the weights.

        Raises:
          MissingError: the file does not exist.
        """
        path = self.weights or SCENE_WEIGHTS
        params = load(path)
        extract = make_extractor(
            lambda rngs: SceneClassifier(len(LABELS), rngs=rngs), params, NetworkInput(side=SIDE), batch=16
        )
        return OpenFeatures(extract, make_identity("scene classifier", path))


def list_labels(scene: Scene) -> Float32[np.ndarray, " L"]:
    """Return 1 for the labels that are true of a scene, and 0 for the others."""
    labels = {f"background:{scene.background}", f"number:{len(scene.objects)}"}
    for each in scene.objects:
        labels |= {
            f"colour:{each.colour}",
            f"shape:{each.shape}",
            f"texture:{each.texture}",
            f"size:{each.size}",
            f"speed:{each.speed}",
        }
        if each.direction is not None or not any(each.velocity):
            labels.add(f"direction:{each.colour} {each.direction or 'still'}")
    labels |= {f"contact:{event.kind}" for event in simulate(scene).events}
    if scene.figure is not None:
        labels.add(f"figure:{scene.figure.action}")
    if scene.camera.caption is not None:
        labels.add(f"camera:{scene.camera.caption}")
    if scene.gravity:
        labels.add("gravity:fall")
    if scene.occluder is not None:
        labels.add("occluder:post")
    return np.array([label in labels for label in LABELS], np.float32)


def make_scene_pixels(clip: Clip) -> UInt8[np.ndarray, "T h w 3"]:
    """Return the frames of a clip at the classifier's size."""
    return NetworkInput(side=SIDE).resize(clip.frames)
