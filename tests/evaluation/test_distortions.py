"""Distortions of clips, and the distances of sets of scenes that grow with them."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.evaluation.distortions import SEVERITIES, distort
from dit_video.evaluation.metrics.distributions import FrechetMetric
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.scenes import draw_scene, render
from dit_video.scenes.features import SceneFeatures
from dit_video.tokens import Grid


def render_clips(count, seed):
    return [render(draw_scene(number, seed=seed, level=1, sizes=(Grid(17, 48, 48),))).clip for number in range(count)]


@pytest.mark.parametrize("distortion", ["noise", "blur"])
def test_nothing_changes_without_severity_and_more_with_more(distortion):
    (clip,) = render_clips(1, 3)
    differences = []
    for severity in (0, *SEVERITIES[distortion]):
        other = distort(clip, distortion, severity, np.random.default_rng(0))
        assert other.frames.shape == clip.frames.shape
        differences.append(np.abs(other.frames.astype(int) - clip.frames).mean(axis=(0, 1, 2, 3)))
    assert differences[0] == 0
    assert np.all(np.diff(differences) > 0)


@pytest.mark.parametrize("distortion", ["swap", "shuffle"])
def test_exchanged_frames_are_as_many_as_the_severity_says(distortion):
    (clip,) = render_clips(1, 3)
    numbered = np.broadcast_to(np.arange(17, dtype=np.uint8)[:, None, None, None], clip.frames.shape)
    clip = type(clip)(np.ascontiguousarray(numbered), fps=8)
    for severity in (1, 3, 8):
        order = distort(clip, distortion, severity, np.random.default_rng(1)).frames[:, 0, 0, 0].astype(int)
        assert sorted(order) == list(range(17))
        moved = np.flatnonzero(order != np.arange(17))
        assert len(moved) == 2 * severity
        if distortion == "swap":
            assert np.all(np.abs(order - np.arange(17))[moved] == 1)


@pytest.mark.slow
def test_a_distance_of_scenes_from_themselves_grows_with_distortions():
    metric = FrechetMetric(features=SceneFeatures(), name="distance", label="distance")
    clips = render_clips(64, 1)
    real = metric.update(metric.init(), MetricBatch(real_clips=clips))

    def measure(samples):
        state = metric.update(metric.init(), MetricBatch(samples=samples))
        return metric.compute(metric.merge(state, real))["distance"].value

    assert measure(clips) == pytest.approx(0, abs=1e-3)
    for distortion, severities in {"noise": (20, 40), "blur": (1, 4), "swap": (2, 8), "shuffle": (2, 8)}.items():
        values = [
            measure([distort(clip, distortion, severity, np.random.default_rng(0)) for clip in clips])
            for severity in severities
        ]
        assert 0.1 < values[0] < values[1], distortion


def test_mistakes_are_named():
    (clip,) = render_clips(1, 3)
    with pytest.raises(UserError, match="noise, blur, swap, shuffle"):
        distort(clip, "wobble", 1, np.random.default_rng(0))
    with pytest.raises(UserError, match="at least 0"):
        distort(clip, "noise", -1, np.random.default_rng(0))
