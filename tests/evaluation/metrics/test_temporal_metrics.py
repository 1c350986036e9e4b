"""Metrics over time: flicker, smoothness, dynamic degree and consistency."""

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_functions import FeatureFunction, OpenFeatures
from dit_video.evaluation.metrics.frames import (
    DynamicDegree,
    MotionSmoothness,
    SubjectConsistency,
    TemporalFlickering,
    compute_consistency,
    compute_motion_smoothness,
    compute_temporal_flickering,
    compute_top_flow,
    is_dynamic,
    select_frames,
)
from dit_video.evaluation.metrics.metric import ClipReconstruction, MetricBatch
from dit_video.evaluation.metrics.reconstruction import ReconstructionFlicker, compute_added_flicker
from dit_video.evaluation.optical_flow import interpolate_middle
from dit_video.scenes import draw_scene, render
from dit_video.tokens import Grid
from dit_video.video import Clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanColour(FeatureFunction):
    """Mean colour of a clip."""

    def load(self):
        """Return the function."""

        def extract(clips):
            assert {len(clip.frames) for clip in clips} == {1}
            return np.array([clip.frames.mean(axis=(0, 1, 2)) for clip in clips], np.float32)

        return OpenFeatures(extract, "mean colour")


def make_texture(height=64, width=64, seed=0, border=16):
    noise = np.random.default_rng(seed).normal(size=(height + 2 * border, width + 2 * border, 3))
    smooth = gaussian_filter(noise, (2, 2, 0))
    return np.clip(127 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def pan(step, frames=5, side=64, border=16):
    """Return a clip whose content moves to the right by whole pixels."""
    picture = make_texture(side, side)
    starts = [border - step * index for index in range(frames)]
    return np.stack([picture[border : border + side, start : start + side] for start in starts])


def add_noise(frames, strength, seed=9):
    noise = np.random.default_rng(seed).normal(size=frames.shape)
    return np.clip(frames + strength * noise, 0, 255).astype(np.uint8)


def shuffle(frames, seed=3):
    return np.random.default_rng(seed).permutation(frames)


RESTING, SLOW, FAST = pan(0), pan(1), pan(4)
RENDERED = render(draw_scene(4, seed=1, level=1, sizes=(Grid(17, 48, 48),)))


# Flicker of reconstructions


def test_equal_clips_and_errors_at_rest_add_no_flicker():
    assert compute_added_flicker(FAST, FAST) == 0
    dark = FAST // 2
    assert compute_added_flicker(dark, dark + 100) == 0
    assert compute_added_flicker(dark, dark + make_texture(32, 32)[None] // 2) == 0


def test_added_flicker_equals_its_formula():
    decoded = add_noise(FAST, 20.0)
    x, y = FAST.astype(float), decoded.astype(float)
    assert compute_added_flicker(FAST, decoded) == pytest.approx(np.abs(np.diff(y, axis=0) - np.diff(x, axis=0)).mean())
    # Every second frame brighter by 7 levels: each change is off by 7.
    assert (
        compute_added_flicker(RESTING // 2, RESTING // 2 + np.array([0, 7, 0, 7, 0], np.uint8)[:, None, None, None])
        == 7
    )


def test_added_flicker_rises_with_noise_and_shuffled_frames():
    values = [compute_added_flicker(FAST, add_noise(FAST, strength)) for strength in (2.0, 8.0, 32.0)]
    assert 0 < values[0] < values[1] < values[2]
    assert compute_added_flicker(FAST, FAST[[1, 0, 3, 2, 4]]) > 10
    assert compute_added_flicker(FAST, RESTING) == pytest.approx(
        255 * (1 - compute_temporal_flickering(FAST))
    )  # all of the original's change is missing
    with pytest.raises(UserError, match="resize or cut one of them"):
        compute_added_flicker(FAST, FAST[:, :8])


# Temporal flickering


def test_a_clip_at_rest_does_not_flicker():
    assert compute_temporal_flickering(RESTING) == 1
    black_and_white = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    assert compute_temporal_flickering(black_and_white) == 0
    assert compute_temporal_flickering(black_and_white[::-1]) == 0  # unsigned differences do not wrap around


def test_temporal_flickering_equals_vbench_s_formula():
    cv2 = pytest.importorskip("cv2")
    frames = add_noise(SLOW, 10.0).astype(np.float32)
    errors = [np.mean(cv2.absdiff(frames[index], frames[index + 1])) for index in range(len(frames) - 1)]
    assert compute_temporal_flickering(add_noise(SLOW, 10.0)) == pytest.approx((255 - np.mean(errors)) / 255, rel=1e-6)


def test_noise_motion_and_shuffled_frames_lower_temporal_flickering():
    values = [compute_temporal_flickering(add_noise(RESTING, strength)) for strength in (2.0, 8.0, 32.0)]
    assert 1 > values[0] > values[1] > values[2]
    assert compute_temporal_flickering(SLOW) > compute_temporal_flickering(FAST)
    long = pan(1, frames=12)
    assert compute_temporal_flickering(shuffle(long)) < compute_temporal_flickering(long)


# Motion smoothness


def test_a_clip_at_rest_is_smooth():
    assert compute_motion_smoothness(RESTING) == 1


def test_interpolated_frames_are_closer_than_the_mean_of_their_neighbours():
    for frames in (FAST, RENDERED.clip.frames[:9]):
        blends = np.rint((frames[:-2].astype(float) + frames[2:]) / 2)
        blended = np.abs(blends - frames[1:-1])[::2].mean()
        error = 255 * (1 - compute_motion_smoothness(frames))
        assert error < 0.6 * blended


def test_motion_smoothness_is_the_error_of_every_second_frame():
    frames = add_noise(pan(2, frames=6), 5.0)
    errors = [np.abs(interpolate_middle(frames[k - 1], frames[k + 1]).astype(float) - frames[k]).mean() for k in (1, 3)]
    assert compute_motion_smoothness(frames) == pytest.approx((255 - np.mean(errors)) / 255)


def test_noise_judder_and_shuffled_frames_lower_motion_smoothness():
    steady = pan(1, frames=11)
    value = compute_motion_smoothness(steady)
    assert value > 0.985
    noisy = [compute_motion_smoothness(add_noise(steady, strength)) for strength in (4.0, 16.0, 32.0)]
    assert value > noisy[0] > noisy[1] > noisy[2]
    assert compute_motion_smoothness(shuffle(steady)) < value - 0.01
    judder = steady[[0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10]]  # every second frame repeats the last
    assert compute_motion_smoothness(judder) < value - 0.01


# Dynamic degree


def test_top_flow_is_the_mean_of_the_largest_twentieth():
    flow = np.zeros((10, 20, 2), np.float32)
    flow[0, :20] = (3, 4)  # 20 of 200 pixels; the ten largest count
    assert compute_top_flow(flow) == 5
    flow[0, 0] = (0, 15)
    assert compute_top_flow(flow) == pytest.approx((15 + 9 * 5) / 10)
    assert compute_top_flow(np.ones((2, 2, 2), np.float32)) == pytest.approx(2**0.5)


def test_the_threshold_scales_with_the_frame():
    # 6/256 of 64 pixels are 1.5.
    assert not is_dynamic(RESTING)
    assert not is_dynamic(SLOW)
    assert is_dynamic(pan(2))
    assert is_dynamic(FAST)


def test_a_quarter_of_the_frames_must_move():
    picture, moved = FAST[0], FAST[1]
    assert is_dynamic(np.stack([picture, moved, *[moved] * 2]))  # one of four frames
    assert not is_dynamic(np.stack([picture, moved, *[moved] * 6]))  # one of eight, of which two must
    assert is_dynamic(np.stack([picture, moved, picture, *[picture] * 5]))
    assert not is_dynamic(np.stack([picture, picture]))
    alternating = [picture, moved] * 2  # three of sixteen frames, and one more
    assert not is_dynamic(np.stack([*alternating, *[moved] * 12]))
    assert is_dynamic(np.stack([*alternating, *[picture] * 12]))


def test_frames_are_compared_at_eight_per_second():
    frames = pan(1, frames=9)
    assert len(select_frames(Clip(frames=frames, fps=24))) == 3
    assert len(select_frames(Clip(frames=frames, fps=2))) == 9
    metric = DynamicDegree()
    answers = metric.measure(MetricBatch(samples=[Clip(frames=frames, fps=fps) for fps in (8, 24)]))
    assert answers == [False, True]  # 1 pixel, or 3, from frame to frame


def test_dynamic_degree_agrees_with_the_true_flow_of_scenes():
    answers = []
    for index in range(6):
        for fps in (4.0, 20.0):  # the speed in pixels per frame
            scene = render(draw_scene(index, seed=2, level=1, sizes=(Grid(9, 48, 48),), fps=fps))
            is_moving = [compute_top_flow(flow) > 6 / 256 * 48 for flow in scene.flow]
            answers.append(sum(is_moving) >= 2)
            assert is_dynamic(scene.clip.frames) == answers[-1]
    assert {*answers} == {True, False}


def test_dynamic_degree_is_a_share():
    metric = DynamicDegree()
    clips = [Clip(frames=each, fps=8) for each in (FAST, RESTING, FAST[:1])]
    state = metric.update(metric.init(), MetricBatch(samples=clips))
    value = metric.compute(state)["dynamic_degree"]
    assert (value.value, value.count, value.note) == (0.5, 2, "without 1 clips that are too short")
    assert value.interval is not None
    assert 0 < value.interval[0] < 0.5 < value.interval[1] < 1
    assert metric.list_examples(state) == [{"dynamic_degree": True}, {"dynamic_degree": False}, {}]
    assert metric.compute(metric.init())["dynamic_degree"].interval == (0.0, 1.0)


# Subject consistency


def test_equal_features_are_consistent_whatever_their_length():
    features = np.random.default_rng(0).normal(size=16)
    assert compute_consistency(np.stack([features, 3 * features, 0.5 * features])) == pytest.approx(1)
    assert compute_consistency(np.eye(4)) == 0
    assert compute_consistency(np.stack([features, -features])) == 0  # a negative similarity counts as none
    assert compute_consistency(np.zeros((3, 4))) == 0


def test_consistency_equals_vbench_s_formula():
    features = np.random.default_rng(1).normal(size=(6, 8)) + 0.5

    def cosine(a, b):
        return max(0.0, float(a @ b) / float(np.sqrt((a @ a) * (b @ b))))

    total = sum((cosine(features[k - 1], features[k]) + cosine(features[0], features[k])) / 2 for k in range(1, 6))
    assert compute_consistency(features) == pytest.approx(total / 5)


def test_an_exchanged_subject_lowers_consistency():
    red, blue = (np.broadcast_to(np.uint8(colour), (1, 16, 16, 3)) for colour in ((200, 20, 20), (20, 20, 200)))
    metric = SubjectConsistency(features=MeanColour())
    steady, cut, alternating = np.repeat(red, 6, axis=0), [red] * 3 + [blue] * 3, [red, blue] * 3
    clips = [Clip(frames=each, fps=8) for each in (steady, np.concatenate(cut), np.concatenate(alternating), red)]
    values = metric.measure(MetricBatch(samples=clips))
    assert values[3] is None
    assert values[0] == pytest.approx(1)
    assert values[0] > values[1] + 0.2 > values[2] + 0.4
    note = metric.compute(tuple(values))["subject_consistency"].note
    assert note == "without 1 clips that are too short; mean colour"


# All of them

SAMPLE_METRICS = [TemporalFlickering(), MotionSmoothness(), DynamicDegree(), SubjectConsistency(features=MeanColour())]


@pytest.mark.parametrize("metric", SAMPLE_METRICS, ids=lambda metric: metric.name)
def test_images_do_not_count(metric):
    image, clip = Clip(frames=FAST[:1], fps=1), Clip(frames=FAST, fps=8)
    state = metric.update(metric.init(), MetricBatch(samples=[image, clip, image]))
    value, alone = (metric.compute(each)[metric.name] for each in (state, state[1:2]))
    assert (value.value, value.count) == (alone.value, 1)
    assert value.note.startswith("without 2 clips that are too short")
    assert [*map(len, metric.list_examples(state))] == [0, 1, 0]
    only_images = metric.compute(metric.update(metric.init(), MetricBatch(samples=[image])))[metric.name]
    assert (only_images.value, only_images.count) == (None, 0)
    assert metric.compute(metric.merge(state[:1], state[1:]))[metric.name] == value


def test_two_frames_have_no_smoothness():
    assert MotionSmoothness().measure(MetricBatch(samples=[Clip(frames=FAST[:2], fps=8)])) == [None]


def test_reconstructed_images_have_no_flicker():
    metric, clip = ReconstructionFlicker(), Clip(frames=FAST, fps=8)
    image = dataclasses.replace(clip, frames=FAST[:1])
    pairs = [ClipReconstruction("image", image, image), ClipReconstruction("clip", clip, clip)]
    state = metric.update(metric.init(), MetricBatch(pairs=pairs))
    assert state == (None, 0.0)
    assert metric.compute(state)["reconstruction_flicker"].count == 1
