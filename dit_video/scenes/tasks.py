"""Protocols of generation tasks on rendered scenes, whose truth is known.

Whoever imports this module can name them: `task_inpainting`, `task_inpainting_training_free` and so on, and for models
with further conditioning `scenes_super_resolution`, `scenes_depth` and `scenes_actions`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.resize import resize
from dit_video.core.rng import make_generator
from dit_video.evaluation.clip_set import NO_CLIPS
from dit_video.evaluation.metrics.metric import Metric
from dit_video.evaluation.metrics.tasks import (
    EnlargementGain,
    InterpolationGain,
    KeptPixels,
    RegionBorder,
    TransitionJump,
    ZoomSteps,
)
from dit_video.evaluation.protocol import EvaluationData, EvaluationItem, EvaluationProtocol
from dit_video.evaluation.protocols import register_protocol
from dit_video.models.conditioning import IsKnown
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Method, Request
from dit_video.sampling.tasks import (
    Blend,
    DescribedEdit,
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
from dit_video.sampling.tasks.task_file import TaskEntry
from dit_video.scenes import RenderedScene, Scene, render
from dit_video.scenes.draw import SIZES, SceneKind, draw_kind
from dit_video.scenes.folder import get_actions
from dit_video.scenes.position_metrics import ObjectPosition
from dit_video.scenes.prompt_metrics import SceneColours, SceneDirections
from dit_video.scenes.shapes import ShapeScene, draw_shape_scene
from dit_video.scenes.task_metrics import ConnectedTransition, DepthAgreement, EditSuccess, LoopSeam
from dit_video.tokens import Grid
from dit_video.video import Clip

Reconstruct = Callable[[Clip], Clip]
EditMethod = Literal["flow_edit", "inversion"]
FRAMES, KNOWN = 17, 9
"""Number of frames of a scene, and of those that are known in an extension."""
ENLARGEMENT = 4
"""Factor between the sides of a scene and those of its clip of low resolution."""
_GAP = 7
"""Number of frames of a transition."""
_LONG_FRAMES = 33
_KEYFRAMES = (0, 11, 22, 32)
"""Known frames of a long clip with ten others between them."""
_ZOOM_STEPS, _ZOOM_FACTOR = 24, 1.1
_FLOW_EDIT_DRAWS = 4
"""Number of noises in every step of FlowEdit."""


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
    second_clip: Clip | None = None
    """The clip of low resolution, or the control, that the model got."""


class TaskCase(NamedTuple):
    """A task on a scene, and what its result is compared with."""

    task: Task
    truth: TaskTruth
    options: Mapping[str, Any] = {}
    """Further fields of the request."""


MakeCase = Callable[[RenderedScene, Scene, Reconstruct, np.random.Generator], TaskCase | None]
"""A function that makes the case of a scene; None for a scene that has none."""


def _from_text(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    return TaskCase(Generate(scene.caption, size=scene.size), _make_truth(rendered.clip, scene, reconstruct))


def _from_frames(*frames: int) -> MakeCase:
    """Return the function that makes cases with the first frame, and perhaps the last one."""

    def make_case(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
        images: dict[str, Any] = dict(
            zip(("image", "last_image"), (rendered.clip.frames[frame] for frame in frames), strict=False)
        )
        task = Generate(scene.caption, size=scene.size, **images)
        return TaskCase(task, _make_truth(rendered.clip, scene, reconstruct, is_known=_know_frames(scene, frames)))

    return make_case


def _extend(*, before: bool) -> MakeCase:
    def make_case(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
        known = slice(-KNOWN, None) if before else slice(KNOWN)
        task = Extend(_cut(rendered.clip, known), scene.caption, frames=FRAMES - KNOWN, before=before)
        return TaskCase(task, _make_truth(rendered.clip, scene, reconstruct, frame=0 if before else -1))

    return make_case


def _interpolate(frames: Sequence[int], **spacing: Any) -> MakeCase:
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
    return TaskCase(task, _make_truth(_render(target).clip, target, reconstruct, is_known=is_known, source=scene))


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


def _loop(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    clip = _cut(rendered.clip, slice(FRAMES - 1))
    task = Loop(scene.caption, size=(FRAMES - 1, scene.size.h, scene.size.w))
    return TaskCase(task, TaskTruth(scene, clip, clip))


def _edit(method: EditMethod | None) -> MakeCase:
    """Return the function that makes cases in which an object gets another colour; None stands for SDEdit."""

    def make_case(
        rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, generator: np.random.Generator
    ) -> TaskCase:
        target = _recolour(scene, generator)
        task: Task = Edit(rendered.clip, target.caption)
        if method is not None:
            draws = _FLOW_EDIT_DRAWS if method == "flow_edit" else 1
            options: dict[str, Any] = {"source": rendered.clip.caption, "edit_method": method, "draws": draws}
            task = DescribedEdit(rendered.clip, target.caption, **options)
        truth = _make_truth(_render(target).clip, target, reconstruct, source=scene)
        return TaskCase(task, truth)

    return make_case


def _blend(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase | None:
    if not _has_motion(scene):
        return None
    first, second = _cut(rendered.clip, slice(KNOWN)), _cut(rendered.clip, slice(-KNOWN, None))
    task = Blend(first, second, scene.caption, frames=_GAP)
    return TaskCase(task, TaskTruth(scene, rendered.clip, rendered.clip))


def _enlarge(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    height, width = scene.size.h // ENLARGEMENT, scene.size.w // ENLARGEMENT
    low = replace(rendered.clip, frames=resize(rendered.clip.frames, height, width))
    truth = _make_truth(rendered.clip, scene, reconstruct)._replace(second_clip=low)
    options = {"conditioning": {"low_resolution": low}}
    return TaskCase(Generate(scene.caption, size=scene.size), truth, options)


def _follow_depth(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    control = rendered.depth_clip
    truth = _make_truth(rendered.clip, scene, reconstruct)._replace(second_clip=control)
    return TaskCase(Generate(scene.caption, size=scene.size), truth, {"control": control})


def _steer(rendered: RenderedScene, scene: Scene, reconstruct: Reconstruct, _: np.random.Generator) -> TaskCase:
    """Return a case of a steered object, from its first frame on."""
    clip = rendered.clip
    task = Generate(scene.caption, size=scene.size, image=Clip(clip.frames[:1], clip.fps))
    return TaskCase(task, _make_truth(clip, scene, reconstruct), {"conditioning": {"actions": get_actions(scene)}})


def _render(scene: Scene) -> RenderedScene:
    rendered = render(scene)
    return rendered._replace(clip=scene.render_clip()) if isinstance(scene, ShapeScene) else rendered


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
    colour = str(generator.choice([name for name in scene.colours if name not in used]))
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


_IMAGES, _VIDEOS = (tuple(size for size in SIZES if size.t == frames) for frames in (1, FRAMES))
_TWO_CLIPS = tuple(size._replace(t=2 * KNOWN + _GAP) for size in _VIDEOS)
_LONG_VIDEOS = tuple(size._replace(t=_LONG_FRAMES) for size in _VIDEOS)
_KEPT = (KeptPixels(), SceneDirections())


class _TaskKind(NamedTuple):
    make_case: MakeCase
    metrics: tuple[Metric, ...]
    sizes: tuple[Grid, ...] = _VIDEOS
    scenes: SceneKind = "levels"
    is_completion: bool = True
    """Whether a model may be trained for it, so that it is measured with training-free replacement, too."""


def _between(frames: Sequence[int], **spacing: Any) -> _TaskKind:
    """Return the task of frames between known ones, in clips of a pixel or more a frame.

    Of slower objects, blended frames are as good.
    """
    metrics = (InterpolationGain(), KeptPixels())
    return _TaskKind(_interpolate(frames, **spacing), metrics, _LONG_VIDEOS, scenes="loops")


_KINDS = {
    "text_to_video": _TaskKind(_from_text, (SceneColours(), SceneDirections()), SIZES, is_completion=False),
    "image_to_video": _TaskKind(_from_frames(0), _KEPT),
    "first_and_last_frame": _TaskKind(_from_frames(0, FRAMES - 1), _KEPT),
    "extension_forwards": _TaskKind(_extend(before=False), (ObjectPosition(),)),
    "extension_backwards": _TaskKind(_extend(before=True), (ObjectPosition(),)),
    "interpolation_2x": _between(range(0, _LONG_FRAMES, 2), factor=2),
    "interpolation_4x": _between(range(0, _LONG_FRAMES, 4), factor=4),
    "keyframes": _between(_KEYFRAMES, places=_KEYFRAMES),
    "inpainting": _TaskKind(_inpaint, (KeptPixels(), SceneColours(), RegionBorder())),
    "outpainting": _TaskKind(_outpaint, (KeptPixels(), RegionBorder())),
    "zoom_out": _TaskKind(_zoom_out, (ZoomSteps(), RegionBorder()), _IMAGES),
    "blending": _TaskKind(_blend, (TransitionJump(), ConnectedTransition()), _TWO_CLIPS),
    "loop": _TaskKind(_loop, (LoopSeam(),), scenes="loops", is_completion=False),
    "editing_sdedit": _TaskKind(_edit(None), (EditSuccess(),), is_completion=False),
    "editing_flow_edit": _TaskKind(_edit("flow_edit"), (EditSuccess(),), is_completion=False),
    "editing_inversion": _TaskKind(_edit("inversion"), (EditSuccess(),), is_completion=False),
}
"""Tasks on scenes, by name."""
_CONDITIONED_KINDS = {
    "super_resolution": _TaskKind(_enlarge, (EnlargementGain(), SceneColours()), is_completion=False),
    "actions": _TaskKind(_steer, (ObjectPosition(), SceneColours()), scenes="steered", is_completion=False),
    "depth": _TaskKind(_follow_depth, (DepthAgreement(), SceneColours(), ObjectPosition()), is_completion=False),
}
"""Tasks of models with conditioning of their own; their protocols begin with `scenes_`, and not with `task_`."""


@dataclass(frozen=True, kw_only=True)
class SceneTaskProtocol(EvaluationProtocol):
    """A generation task on new scenes, measured from lossless files.

    Raises:
      UserError: If the task is unknown, or blocks of steps are taken less than once.
    """

    task: str
    """Name of the task."""
    count: int = 60
    codec: Literal["mp4", "webm", "apng"] = "apng"
    seed: int = 1000
    """Seed of scenes and samples, another one than that of the training."""
    levels: tuple[int, ...] = (1, 2)
    """Levels of the scenes, in turn."""
    sizes: tuple[Grid, ...] = _VIDEOS
    """Sizes of the scenes."""
    data: Literal["scenes", "shapes"] = "scenes"
    """Scenes of the task's kind, or clips of the quickstart's data, which the shipped model knows."""
    method: Method = "auto"
    """Way in which known pixels are kept; see `Request`."""
    resample: int = 1
    """Number of times that every block of steps is taken by the method `training_free`."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, resample=self.resample)
        if self.task not in _KINDS | _CONDITIONED_KINDS:
            raise UserError(f"task={self.task!r} is unknown; use {', '.join(_KINDS | _CONDITIONED_KINDS)}")

    def make_data(self, data: EvaluationData | None) -> EvaluationData:
        """Return no clips: each task has the truth of its own scene."""
        return EvaluationData(NO_CLIPS)

    def make_items(self, pipeline: Pipeline, data: EvaluationData) -> list[EvaluationItem]:
        """Return the tasks of scenes, of the levels in turn; scenes that do not have the task are left out."""
        kind = (_KINDS | _CONDITIONED_KINDS)[self.task]
        items, number = list[EvaluationItem](), 0
        while len(items) < self.count:
            level = self.levels[len(items) % len(self.levels)]
            scene: Scene
            if self.data == "shapes":
                scene = draw_shape_scene(number, seed=self.seed, sizes=self.sizes)
            else:
                scene = draw_kind(kind.scenes, number, seed=self.seed, level=level, sizes=self.sizes)
            generator = make_generator(self.seed, "task case", number)
            number += 1
            if (case := kind.make_case(_render(scene), scene, pipeline.reconstruct, generator)) is not None:
                resample = self.resample if self.method == "training_free" else 1
                seed = self.seed + len(items)
                options = Request("", seed=seed, method=self.method, resample=resample, **case.options)
                items.append(EvaluationItem(TaskEntry(case.task, options), truth=case.truth))
        return items


for _task, _kind in (_KINDS | _CONDITIONED_KINDS).items():
    _prefix = "task" if _task in _KINDS else "scenes"
    _protocol = SceneTaskProtocol(name=f"{_prefix}_{_task}", task=_task, metrics=_kind.metrics, sizes=_kind.sizes)
    register_protocol(_protocol)
    if _kind.is_completion:
        register_protocol(replace(_protocol, name=f"{_protocol.name}_training_free", method="training_free"))
