"""Prompt following on rendered scenes: true renderings pass, and wrong clips fail."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.scenes import draw_scene, render
from dit_video.scenes.draw import SIZES
from dit_video.scenes.position_metrics import SceneStartError, SceneStartSpread, draw_starts
from dit_video.scenes.prompt_metrics import (
    SceneCounts,
    SceneRelations,
    SceneShapes,
    SceneSizes,
    SceneSpeeds,
    SceneTextures,
)
from dit_video.scenes.protocols import SCENE_PROMPT_METRICS
from dit_video.scenes.scene import SHAPES, TEXTURES
from dit_video.scenes.tasks import TaskTruth
from dit_video.tokens import Grid

APPEARANCES = (SceneShapes(), SceneSizes(), SceneTextures())
SHARES = (*APPEARANCES, SceneSpeeds(), SceneRelations(), SceneCounts())
LARGER = Grid(17, 48, 48)


@cache
def make_truths(count=24, level=None):
    """Return scenes of levels 1 and 2 in turn, of the data's sizes and of 48 pixels, with their renderings."""
    scenes = [
        draw_scene(index, seed=3, level=level or 1 + index % 2, sizes=(*SIZES, LARGER, LARGER))
        for index in range(count)
    ]
    return tuple(TaskTruth(scene, clip, clip) for scene in scenes for clip in [render(scene).clip])


def get_clips(truths):
    return [truth.reference for truth in truths]


def add_noise(clip, deviation=5.0):
    """Return a clip as an autoencoder might reconstruct it."""
    noise = np.random.default_rng(clip.frames.size).normal(0, deviation, clip.frames.shape)
    return replace(clip, frames=np.clip(clip.frames + noise, 0, 255).astype(np.uint8))


def measure(metric, clips, truths):
    """Return the only value of a metric."""
    batch = MetricBatch(samples=clips, scenes=truths).select(metric.needs)
    (value,) = metric.compute(metric.update(metric.init(), batch)).values()
    return value


def rerender(truths, change):
    """Return clips of scenes whose objects are changed."""
    scenes = [replace(truth.scene, objects=tuple(change(each) for each in truth.scene.objects)) for truth in truths]
    return [render(scene).clip for scene in scenes]


@pytest.mark.nightly
@pytest.mark.parametrize("metric", SHARES, ids=lambda metric: metric.name)
def test_renderings_follow_their_prompt(metric):
    truths = make_truths()[: 12 if metric in APPEARANCES else None]
    value = measure(metric, list(map(add_noise, get_clips(truths))), truths)
    assert value.count >= 12
    assert value.value >= 0.97
    assert value.interval[0] < value.value <= value.interval[1]


@pytest.mark.slow
@pytest.mark.parametrize("metric", SHARES, ids=lambda metric: metric.name)
def test_many_renderings_follow_their_prompt(metric):
    truths = make_truths(160)
    assert measure(metric, get_clips(truths), truths).value >= 0.99


@pytest.mark.nightly
@pytest.mark.parametrize("metric", SHARES, ids=lambda metric: metric.name)
def test_clips_of_other_scenes_fail(metric):
    truths = make_truths()
    clips = get_clips(truths)
    # Scenes of both levels in turn: the number of objects is always another one.
    assert measure(metric, clips[1:] + clips[:1], truths).value < 0.2


def choose_other(values, value):
    return values[(values.index(value) + 1) % len(values)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("metric", "change"),
    [
        (SceneShapes(), lambda each: replace(each, shape=choose_other(SHAPES, each.shape))),
        (SceneTextures(), lambda each: replace(each, texture=choose_other(TEXTURES, each.texture))),
        (SceneSizes(), lambda each: replace(each, radius=each.radius * (0.72 if each.size == "large" else 1.38))),
    ],
    ids=["shape", "texture", "size"],
)
def test_objects_with_another_attribute_fail(metric, change):
    truths = make_truths(24, level=1)[:8]
    assert measure(metric, rerender(truths, change), truths).value < 0.2


def test_spinning_objects_have_no_judged_appearance():
    scene = draw_scene(0, seed=3, level=3)
    clip = render(scene).clip
    assert measure(SceneShapes(), [clip], [TaskTruth(scene, clip, clip)]).count == 0


def test_slowed_and_accelerated_clips_have_other_speeds():
    truths = make_truths()
    slowed = [replace(clip, frames=np.repeat(clip.frames, 2, axis=0)[: len(clip.frames)]) for clip in get_clips(truths)]
    assert measure(SceneSpeeds(), slowed, truths).value == 0
    accelerated = [replace(clip, fps=1.5 * clip.fps) for clip in get_clips(truths)]
    assert measure(SceneSpeeds(), accelerated, truths).value < 0.05
    still = [replace(clip, frames=np.repeat(clip.frames[:1], len(clip.frames), axis=0)) for clip in get_clips(truths)]
    assert measure(SceneSpeeds(), still, truths).value == 0


def test_mirrored_clips_have_the_opposite_relation():
    truths = make_truths(24, level=2)
    mirrored = [replace(clip, frames=clip.frames[:, ::-1, ::-1]) for clip in get_clips(truths)]
    assert measure(SceneRelations(), mirrored, truths).value == 0
    assert measure(SceneRelations(), get_clips(make_truths(24, level=1)), make_truths(24, level=1)).count == 0


def test_missing_and_doubled_objects_are_counted():
    truths = make_truths(24, level=1)
    empty = [render(replace(truth.scene, objects=())).clip for truth in truths]
    assert measure(SceneCounts(), empty, truths).value == 0
    doubled = []
    for truth in truths:
        (each,) = truth.scene.objects
        frames = truth.reference.frames
        column = int(each.start[1])
        ground = render(replace(truth.scene, objects=())).clip.frames
        shift = truth.scene.size.w // 2 * (1 if column < truth.scene.size.w / 2 else -1)
        copy, is_object = np.roll(frames, shift, axis=2), np.roll((frames != ground).any(axis=-1), shift, axis=2)
        doubled.append(replace(truth.reference, frames=np.where(is_object[..., None], copy, frames)))
    # Large objects overlap their copies.
    small = [index for index, truth in enumerate(truths) if truth.scene.objects[0].size == "small"]
    value = measure(SceneCounts(), [doubled[index] for index in small], [truths[index] for index in small])
    assert value.count >= 6
    assert value.value < 0.2


def test_start_errors_are_of_known_first_frames():
    truths = make_truths()[:12]
    known = [truth._replace(is_known=np.ones(truth.scene.size, bool)) for truth in truths]
    clips = get_clips(truths)
    assert measure(SceneStartError(), list(map(add_noise, clips)), known).value < 0.3
    moved = [replace(clip, frames=np.roll(clip.frames, 8, axis=2)) for clip in clips]
    assert measure(SceneStartError(), moved, known).value > 6
    later = [truth._replace(is_known=np.arange(truth.scene.size.t)[:, None, None] > 0) for truth in truths]
    for others in (truths, later):
        assert measure(SceneStartError(), clips, others).value is None


def test_starts_vary_as_the_data_or_not_at_all():
    varied, collapsed, repeated = [], [], []
    for truth in make_truths()[:8]:
        for start in draw_starts(truth.scene, 5, seed=9):
            objects = [
                replace(each, start=(float(row), float(column)))
                for each, (row, column) in zip(truth.scene.objects, start, strict=True)
            ]
            varied.append(render(replace(truth.scene, objects=tuple(objects))).clip)
            collapsed.append(truth.reference)
            repeated.append(truth)
    metric = SceneStartSpread()
    value = measure(metric, varied, repeated)
    assert value.count == len(varied)
    assert value.value == pytest.approx(1, abs=0.15)
    assert value.interval[0] < 1 < value.interval[1]
    assert measure(metric, collapsed, repeated).value < 0.01
    assert measure(metric, get_clips(make_truths()), make_truths()).value is None  # one sample of each prompt


def test_drawn_starts_have_the_relation_and_room():
    for truth in make_truths(24, level=2)[:12]:
        scene = truth.scene
        starts = draw_starts(scene, 50)
        for first, second in starts:
            objects = tuple(
                replace(each, start=tuple(start.tolist()))
                for each, start in zip(scene.objects, (first, second), strict=True)
            )
            for each in objects:
                end = np.add(each.start, np.multiply(each.velocity, 16 / scene.fps))
                for place in (each.start, end):
                    assert (np.asarray(place) >= each.radius - 1e-6).all()
                    assert (np.asarray(place) <= np.array(scene.size[1:]) - each.radius + 1e-6).all()


def test_names_of_values_are_unique():
    names = [name for metric in SCENE_PROMPT_METRICS for name in metric.describe()]
    assert len(names) == len({*names}) == 10
