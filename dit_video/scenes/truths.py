"""Rendered scenes as clips of the data, with their truth: prompts of an evaluation that needs no downloads."""

from collections.abc import Sequence
from typing import NamedTuple

from dit_video.evaluation.clip_set import ClipSet
from dit_video.scenes import Scene, draw_scene, render
from dit_video.scenes.laws import Law, draw_physics_scene
from dit_video.tokens import Grid
from dit_video.video import Clip


class SceneTruth(NamedTuple):
    """The truth of a sample of a scene's caption: the element of `MetricBatch.scenes`."""

    scene: Scene
    law: Law | None = None
    """Law of motion that the scene shows, if it is drawn for one."""


def make_scene_set(
    count: int, *, seed: int, levels: Sequence[int], sizes: Sequence[Grid]
) -> tuple[ClipSet, tuple[SceneTruth, ...]]:
    """Return scenes, of the levels in turn, as clips that are rendered when they are read, and their truths."""
    scenes = [draw_scene(number, seed=seed, level=levels[number % len(levels)], sizes=sizes) for number in range(count)]
    return _make_set([SceneTruth(scene) for scene in scenes])


def make_physics_set(
    count: int, *, seed: int, laws: Sequence[Law], sizes: Sequence[Grid] | None = None
) -> tuple[ClipSet, tuple[SceneTruth, ...]]:
    """Return scenes, of the laws in turn, as clips that are rendered when they are read, and their truths.

    Args:
      count: number of the scenes of all laws.
      seed: seed of the scenes.
      laws: laws that they show.
      sizes: sizes that they may have; by default those of each law.

    Raises:
      UserError: an unknown law, or a size in which it cannot be seen.
    """
    chosen = [laws[number % len(laws)] for number in range(count)]
    return _make_set(
        [
            SceneTruth(draw_physics_scene(number // len(laws), seed=seed, law=law, sizes=sizes), law)
            for number, law in enumerate(chosen)
        ]
    )


def _make_set(truths: Sequence[SceneTruth]) -> tuple[ClipSet, tuple[SceneTruth, ...]]:
    def read(index: int, fps: float | None) -> Clip:
        return render(truths[index].scene).clip

    names = tuple(f"scene {number:06d}" for number in range(len(truths)))
    clips = ClipSet("rendered scenes", names, tuple(truth.scene.caption for truth in truths), read)
    return clips, tuple(truths)
