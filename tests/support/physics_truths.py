"""Truths of rendered scenes of a law, with their renderings."""

from typing import NamedTuple

from dit_video.scenes import Scene, render
from dit_video.scenes.laws import Law, draw_physics_scene
from dit_video.video import Clip


class PhysicsTruth(NamedTuple):
    """The truth of a sample of a law: the element of `MetricBatch.scenes`."""

    law: Law
    scene: Scene
    reference: Clip
    """Rendering of the scene."""


def make_physics_truths(law, *, count, seed, sizes=None):
    """Return scenes 0 … count-1 of a law, rendered."""
    scenes = [draw_physics_scene(index, seed=seed, law=law, sizes=sizes) for index in range(count)]
    return [PhysicsTruth(law, scene, render(scene).clip) for scene in scenes]
