"""Rendered scenes as clips of the data, with their truths: prompts of an evaluation that needs no downloads."""

from collections.abc import Sequence
from typing import NamedTuple

from dit_video.data.synthetic.scenes import Scene, draw_scene, render
from dit_video.evaluation.clip_set import ClipSet
from dit_video.tokens import Grid
from dit_video.video import Clip


class SceneTruth(NamedTuple):
    """The truth of a sample of a scene's caption: the element of `MetricBatch.scenes`."""

    scene: Scene


def make_scene_set(
    count: int, *, seed: int, levels: Sequence[int], sizes: Sequence[Grid]
) -> tuple[ClipSet, tuple[SceneTruth, ...]]:
    """Return scenes, of the levels in turn, as clips that are rendered when they are read, and their truths."""
    scenes = [draw_scene(number, seed=seed, level=levels[number % len(levels)], sizes=sizes) for number in range(count)]

    def read(index: int, fps: float | None) -> Clip:
        return render(scenes[index]).clip

    names = tuple(f"scene {number:06d}" for number in range(count))
    clips = ClipSet("rendered scenes", names, tuple(scene.caption for scene in scenes), read)
    return clips, tuple(SceneTruth(scene) for scene in scenes)
