"""Generation tasks on rendered scenes, whose truth is known: cases of every task, and their metrics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from dit_video.core.rng import make_generator
from dit_video.evaluation.metrics.metric import Metric
from dit_video.evaluation.metrics.tasks import InterpolationGain, KeptPixels, RegionBorder, TransitionJump, ZoomSteps
from dit_video.models.conditioning import IsKnown
from dit_video.sampling.tasks import (
    Blend,
    Edit,
    Extend,
    Generate,
    Inpaint,
    Interpolate,
    Loop,
    Outpaint,
    Task,
    ZoomOut,
)
from dit_video.scenes import RenderedScene, Scene, draw_scene, render
from dit_video.scenes.draw import SIZES
from dit_video.scenes.position_metrics import ObjectPosition
from dit_video.scenes.prompt_metrics import SceneColours, SceneDirections
from dit_video.scenes.scene import COLOURS
from dit_video.scenes.task_metrics import EditSuccess, LoopSeam
from dit_video.tokens import Grid
from dit_video.video import Clip

Reconstruct = Callable[[Clip], Clip]
FRAMES, KNOWN = 17, 9
"""Number of frames of a scene, and of those that are known in an extension."""
_GAP = 7
"""Number of frames of a transition."""
_KEYFRAMES = (0, 11, 16)
"""Known frames, the first two of which have ten others between them."""
_ZOOM_STEPS, _ZOOM_FACTOR = 24, 1.1


class TaskTruth(NamedTuple):
    """The truth of a sample: the element of `MetricBatch.scenes`."""

    scene: Scene
    """The scene that the result is to show."""
    reference: Clip
    """Its rendering, of the sample's size."""
    reconstruction: Clip
    """The autoencoder's reconstruction of the rendering: the best that a sample can be."""
    is_known: IsKnown | None = None
    """Pixels that the model got; None for none."""
    frame: int = -1
    """Number of the new frame at which positions are compared."""
    source: Scene | None = None
    """The scene that the clip showed before it was changed."""


class TaskCase(NamedTuple):
    """A task on a scene, and what its result is compared with."""

    task: Task
    truth: TaskTruth


@dataclass(frozen=True, kw_only=True)
class TaskMeasure:
    """The measure of a generation task."""

    make_case: Callable[[RenderedScene, Scene, Reconstruct, np.random.Generator], TaskCase | None]
    """Returns the case of a scene; None for a scene that has none."""
    metrics: tuple[Metric, ...]
    sizes: tuple[Grid, ...] = tuple(size for size in SIZES if size.t == FRAMES)
    """Sizes of the scenes."""
    is_completed: bool = True
    """True for a task that a model may be trained for, or that replacement of latents does."""


def make_cases(
    task: TaskMeasure, reconstruct: Reconstruct, *, count: int, seed: int, levels: Sequence[int] = (1, 2)
) -> Iterator[TaskCase]:
    """Yield cases of scenes, of the levels in turn.

    Args:
      task: The task.
      reconstruct: The autoencoder's reconstruction.
      count: Number of cases.
      seed: Seed of the scenes, another one than that of the training.
      levels: Levels of the scenes.
    """
    made = number = 0
    while made < count:
        scene = draw_scene(number, seed=seed, level=levels[made % len(levels)], sizes=task.sizes)
        generator = make_generator(seed, "task case", number)
        case = task.make_case(render(scene), scene, reconstruct, generator)
        number += 1
        if case is not None:
            made += 1
            yield case


def _from_text(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    return TaskCase(Generate(scene.caption, size=scene.size), _make_truth(rendered.clip, scene, reconstruct))


def _from_frames(*frames: int) -> Callable[..., TaskCase]:
    """Return the function that makes cases with the first frame, and perhaps the last one."""

    def make_case(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
        images: dict[str, Any] = dict(
            zip(("image", "last_image"), (rendered.clip.frames[frame] for frame in frames), strict=False)
        )
        task = Generate(scene.caption, size=scene.size, **images)
        return TaskCase(task, _make_truth(rendered.clip, scene, reconstruct, is_known=_know_frames(scene, frames)))

    return make_case


def _extend(*, before: bool) -> Callable[..., TaskCase]:
    def make_case(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
        known = slice(-KNOWN, None) if before else slice(KNOWN)
        task = Extend(_cut(rendered.clip, known), scene.caption, frames=FRAMES - KNOWN, before=before)
        return TaskCase(task, _make_truth(rendered.clip, scene, reconstruct, frame=0 if before else -1))

    return make_case


def _interpolate(frames: Sequence[int], **spacing: Any) -> Callable[..., TaskCase]:
    """Return the function that makes cases in which these frames are known."""

    def make_case(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
        fps = scene.fps * (len(frames) - 1) / frames[-1]
        clip = replace(_cut(rendered.clip, list(frames)), fps=fps)
        task = Interpolate(clip, scene.caption, **spacing)
        return TaskCase(task, _make_truth(rendered.clip, scene, reconstruct, is_known=_know_frames(scene, frames)))

    return make_case


def _inpaint(
    rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, generator: np.random.Generator
) -> TaskCase | None:
    """Return a case in which the box of the last object's way is filled in with one of another colour."""
    is_object = (rendered.instances == len(scene.objects)).any(axis=0)
    rows, columns = (np.flatnonzero(is_object.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    generated = np.zeros(scene.size[1:], bool)
    generated[max(0, rows[0] - 3) : rows[-1] + 4, max(0, columns[0] - 3) : columns[-1] + 4] = True
    others = (rendered.instances > 0) & (rendered.instances < len(scene.objects))
    if generated.mean(axis=(0, 1)) > 0.5 or (others & generated).any(axis=(0, 1, 2)):
        return None
    target = _recolour(scene, generator)
    task = Inpaint(rendered.clip, generated, target.caption)
    is_known = np.broadcast_to(~generated, scene.size)
    return TaskCase(task, _make_truth(render(target).clip, target, reconstruct, is_known=is_known, source=scene))


def _outpaint(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    height, width = scene.size.h, scene.size.w
    inner = slice(8, height - 8), slice(8, width - 8)
    is_known = np.zeros(scene.size, bool)
    is_known[:, inner[0], inner[1]] = True
    clip = replace(rendered.clip, frames=np.ascontiguousarray(rendered.clip.frames[:, inner[0], inner[1]]))
    task = Outpaint(clip, (height, width), scene.caption)
    return TaskCase(task, _make_truth(rendered.clip, scene, reconstruct, is_known=is_known))


def _zoom_out(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    height, width = scene.size.h, scene.size.w
    task = ZoomOut(rendered.clip, scene.caption, frames=_ZOOM_STEPS, factor=_ZOOM_FACTOR)
    inner = task.inner_size
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    is_known = np.zeros((1 + _ZOOM_STEPS, height, width), bool)
    is_known[1:, top : top + inner[0], left : left + inner[1]] = True
    return TaskCase(task, _make_truth(rendered.clip, scene, reconstruct, is_known=is_known))


def _loop(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase | None:
    if not _has_motion(scene):
        return None
    clip = _cut(rendered.clip, slice(FRAMES - 1))
    task = Loop(scene.caption, size=(FRAMES - 1, scene.size.h, scene.size.w))
    return TaskCase(task, TaskTruth(scene, clip, clip))


def _edit(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, generator: np.random.Generator) -> TaskCase:
    target = _recolour(scene, generator)
    task = Edit(rendered.clip, target.caption)
    return TaskCase(task, _make_truth(render(target).clip, target, reconstruct, source=scene))


def _blend(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase | None:
    if not _has_motion(scene):
        return None
    first, second = _cut(rendered.clip, slice(KNOWN)), _cut(rendered.clip, slice(-KNOWN, None))
    task = Blend(first, second, scene.caption, frames=_GAP)
    return TaskCase(task, TaskTruth(scene, rendered.clip, rendered.clip))


def _has_motion(scene: Scene) -> bool:
    return any(each.direction is not None for each in scene.objects)


def _cut(clip: Clip, frames: slice | list[int]) -> Clip:
    return replace(clip, frames=np.ascontiguousarray(clip.frames[frames]))


def _know_frames(scene: Scene, frames: Sequence[int]) -> IsKnown:
    is_known = np.zeros(scene.size, bool)
    is_known[list(frames)] = True
    return is_known


def _recolour(scene: Scene, generator: np.random.Generator) -> Scene:
    """Return a scene whose last object has a colour that the scene lacks."""
    used = {each.colour for each in scene.objects}
    colour = str(generator.choice([name for name in COLOURS if name not in used]))
    *others, last = scene.objects
    return replace(scene, objects=(*others, replace(last, colour=colour)))


def _make_truth(
    clip: Clip,
    scene: Scene,
    reconstruct: Reconstruct,
    *,
    is_known: IsKnown | None = None,
    frame: int = -1,
    source: Scene | None = None,
) -> TaskTruth:
    return TaskTruth(scene, clip, reconstruct(clip), is_known, frame, source)


_KEPT = (KeptPixels(), SceneDirections())
_BETWEEN = (InterpolationGain(), KeptPixels())
TASK_MEASURES: dict[str, TaskMeasure] = {
    "text_to_video": TaskMeasure(
        make_case=_from_text, metrics=(SceneColours(), SceneDirections()), sizes=SIZES, is_completed=False
    ),
    "image_to_video": TaskMeasure(make_case=_from_frames(0), metrics=_KEPT),
    "first_and_last_frame": TaskMeasure(make_case=_from_frames(0, FRAMES - 1), metrics=_KEPT),
    "extension_forwards": TaskMeasure(make_case=_extend(before=False), metrics=(ObjectPosition(),)),
    "extension_backwards": TaskMeasure(make_case=_extend(before=True), metrics=(ObjectPosition(),)),
    "interpolation_2x": TaskMeasure(make_case=_interpolate(range(0, FRAMES, 2), factor=2), metrics=_BETWEEN),
    "interpolation_4x": TaskMeasure(make_case=_interpolate(range(0, FRAMES, 4), factor=4), metrics=_BETWEEN),
    "keyframes": TaskMeasure(make_case=_interpolate(_KEYFRAMES, places=_KEYFRAMES), metrics=_BETWEEN),
    "inpainting": TaskMeasure(make_case=_inpaint, metrics=(KeptPixels(), SceneColours(), RegionBorder())),
    "outpainting": TaskMeasure(make_case=_outpaint, metrics=(KeptPixels(), RegionBorder())),
    "zoom_out": TaskMeasure(
        make_case=_zoom_out,
        metrics=(ZoomSteps(), RegionBorder()),
        sizes=tuple(size for size in SIZES if size.t == 1),
    ),
    "blending": TaskMeasure(
        make_case=_blend,
        metrics=(TransitionJump(),),
        sizes=tuple(size._replace(t=2 * KNOWN + _GAP) for size in SIZES if size.t == FRAMES),
    ),
    "loop": TaskMeasure(make_case=_loop, metrics=(LoopSeam(),), is_completed=False),
    "editing": TaskMeasure(make_case=_edit, metrics=(EditSuccess(),), is_completed=False),
}
"""Measures of the tasks by name."""
