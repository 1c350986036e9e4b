"""Measures of generation tasks: the truth passes, and wrong answers fail."""

from dataclasses import replace
from itertools import compress
from unittest.mock import Mock

import numpy as np
import pytest

from dit_video.core.resize import resize
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.metrics.tasks import blend_linearly
from dit_video.evaluation.protocols import PROTOCOLS
from dit_video.models.features.clip import resize_bicubic
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.tasks import Blend
from dit_video.scenes.objects import find_objects
from dit_video.scenes.tasks import SceneTaskProtocol  # registers its protocols
from dit_video.video import Clip

COUNT = 8


def blur(clip: Clip) -> Clip:
    """Return a clip as an autoencoder might reconstruct it: with a little noise."""
    noise = np.random.default_rng(clip.frames.size).normal(0, 5, clip.frames.shape)
    return replace(clip, frames=np.clip(clip.frames + noise, 0, 255).astype(np.uint8))


def get_cases(name, count=COUNT, levels=(1, 2), data="scenes"):
    protocol = PROTOCOLS[f"task_{name}"]
    assert isinstance(protocol, SceneTaskProtocol)
    drawn = replace(protocol, count=count, seed=7, levels=levels, data=data)
    return drawn.make_items(Mock(Pipeline, reconstruct=blur), drawn.make_data(None))


def measure(name, clips, cases):
    """Return the values of a task's metrics by name."""
    values = {}
    for metric in PROTOCOLS[f"task_{name}"].metrics:
        batch = MetricBatch(samples=clips, scenes=[case.truth for case in cases])
        values |= metric.compute(metric.update(metric.init(), batch.select(metric.needs)))
    return {key: value.value for key, value in values.items()}


def freeze(clip: Clip) -> Clip:
    return replace(clip, frames=np.repeat(clip.frames[:1], len(clip.frames), axis=0))


def shuffle(clip: Clip) -> Clip:
    order = np.random.default_rng(0).permutation(len(clip.frames))
    return replace(clip, frames=clip.frames[order])


def swap(clips):
    """Return the clips of other cases, cut or repeated to each one's size."""
    others = clips[1:] + clips[:1]
    return [
        replace(clip, frames=np.resize(other.frames, clip.frames.shape))
        for clip, other in zip(clips, others, strict=True)
    ]


def truths(cases):
    return [blur(case.truth.reference) for case in cases]


def test_text_to_video_is_judged_by_colours_and_directions():
    cases = get_cases("text_to_video", 18)
    clips = truths(cases)
    assert measure("text_to_video", clips, cases) == {"scene_colours": 1.0, "scene_directions": 1.0}
    reversed_clips = [replace(clip, frames=clip.frames[::-1]) for clip in clips]
    moving = [
        each.direction is not None for case in cases if case.truth.scene.size.t > 1 for each in case.truth.scene.objects
    ]
    still = 1 - np.mean(moving)
    assert measure("text_to_video", reversed_clips, cases)["scene_directions"] == pytest.approx(still)
    assert measure("text_to_video", list(map(freeze, clips)), cases)["scene_directions"] == pytest.approx(still)
    assert measure("text_to_video", swap(clips), cases)["scene_colours"] < 0.3


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("text_to_video", {"scene_colours": 1.0, "scene_directions": 1.0}),
        ("extension_forwards", {"position_error": pytest.approx(0, abs=0.5)}),
        ("blending", {"transition_connected": 1.0}),
        ("editing_sdedit", {"edited_colour": 1.0, "edited_distance": pytest.approx(0, abs=0.5)}),
    ],
)
def test_clips_of_the_quickstart_are_judged_as_scenes(name, right):
    cases = get_cases(name, data="shapes")
    assert {len(each.split()) for each in (case.truth.scene.caption for case in cases)} <= {3, 5}  # a red circle …
    assert measure(name, truths(cases), cases).items() >= right.items()
    wrong = measure(name, swap(truths(cases)), cases)
    assert all(wrong[key] != value for key, value in right.items())


def test_directions_are_those_that_captions_name():
    cases = get_cases("image_to_video", 4, levels=(3,))
    assert measure("image_to_video", truths(cases), cases)["scene_directions"] is None


@pytest.mark.parametrize("name", ["image_to_video", "first_and_last_frame"])
def test_kept_frames_and_directions_of_other_clips_fail(name):
    cases = get_cases(name)
    clips = truths(cases)
    right = measure(name, clips, cases)
    assert abs(right["kept_psnr_loss"]) < 0.2
    assert right["scene_directions"] == 1
    assert measure(name, list(map(freeze, clips)), cases)["scene_directions"] < 0.5
    assert measure(name, swap(clips), cases)["kept_psnr_loss"] > 5
    assert measure(name, list(map(shuffle, clips)), cases)["kept_psnr_loss"] > 2


@pytest.mark.parametrize("name", ["extension_forwards", "extension_backwards"])
def test_extensions_that_stop_or_show_something_else_fail(name):
    cases = get_cases(name)
    clips = truths(cases)
    assert measure(name, clips, cases)["position_error"] < 0.5
    known = [clip.frames[:9] if name == "extension_forwards" else clip.frames[-9:] for clip in clips]
    stopped = [
        replace(clip, frames=np.concatenate([part, np.repeat(part[-1:], 8, axis=0)]))
        if name == "extension_forwards"
        else replace(clip, frames=np.concatenate([np.repeat(part[:1], 8, axis=0), part]))
        for clip, part in zip(clips, known, strict=True)
    ]
    assert measure(name, stopped, cases)["position_error"] > 2
    assert measure(name, swap(clips), cases)["position_error"] > 5


def test_linear_blending_gains_nothing_and_other_clips_lose():
    for name, frames in (
        ("interpolation_2x", range(0, 33, 2)),
        ("interpolation_4x", range(0, 33, 4)),
        ("keyframes", (0, 11, 22, 32)),
    ):
        cases = get_cases(name)
        is_known = np.isin(np.arange(33), frames)
        blended = [
            replace(case.truth.reference, frames=blend_linearly(case.truth.reconstruction.frames, is_known))
            for case in cases
        ]
        assert measure(name, blended, cases)["interpolation_gain"] == pytest.approx(0)
        assert measure(name, [case.truth.reference for case in cases], cases)["interpolation_gain"] > 3
        assert measure(name, swap(truths(cases)), cases)["interpolation_gain"] < -3


def test_inpainting_needs_the_new_colour_inside_and_the_old_pixels_outside():
    cases = get_cases("inpainting")
    clips = truths(cases)
    right = measure("inpainting", clips, cases)
    assert right["scene_colours"] == 1
    assert abs(right["kept_psnr_loss"]) < 0.2
    unchanged = [blur(case.entry.task.clip) for case in cases]
    assert measure("inpainting", unchanged, cases)["scene_colours"] == 0
    assert measure("inpainting", swap(clips), cases)["kept_psnr_loss"] > 5


def test_a_visible_border_has_a_gradient():
    cases = get_cases("outpainting")
    clips = truths(cases)
    assert measure("outpainting", clips, cases)["border_gradient"] < 1.1
    darker = [
        replace(clip, frames=np.where(case.truth.is_known[..., None], clip.frames, clip.frames // 2))
        for clip, case in zip(clips, cases, strict=True)
    ]
    assert measure("outpainting", darker, cases)["border_gradient"] > 1.5


def zoom_out(case, border):
    """Return a zoom out whose surroundings are of one colour: `border`, or the edge's."""
    frames = [case.truth.reference.frames[0]]
    for is_known in case.truth.is_known[1:]:
        spans = [np.flatnonzero(is_known.any(axis=axis)) for axis in (1, 0)]
        smaller = resize(frames[-1][None], *map(len, spans))[0]
        margins = [(each[0], length - 1 - each[-1]) for each, length in zip(spans, is_known.shape, strict=True)]
        options = {"mode": "edge"} if border is None else {"constant_values": border}
        frames.append(np.pad(smaller, (*margins, (0, 0)), **options))
    return blur(Clip(np.stack(frames), 8))


def test_a_zoom_out_keeps_its_centre_and_has_no_border():
    cases = get_cases("zoom_out", 4)
    clips = [zoom_out(case, None) for case in cases]
    right = measure("zoom_out", clips, cases)
    assert abs(right["zoom_centre_loss"]) < 2  # both frames of a step have noise
    assert right["border_gradient"] < 1.1
    assert measure("zoom_out", [zoom_out(case, 255) for case in cases], cases)["border_gradient"] > 1.3
    assert measure("zoom_out", list(map(freeze, clips)), cases)["zoom_centre_loss"] > 5


def test_a_loop_needs_motion_in_the_prompted_direction_and_no_seam():
    cases = get_cases("loop")
    clips = truths(cases)
    right = measure("loop", clips, cases)
    assert right["loop_seam"] == pytest.approx(1, abs=0.05)
    assert right["loop_motion"] == pytest.approx(1, abs=0.1)
    assert right["loop_direction"] == 1
    cut = measure("loop", [replace(clip, frames=clip.frames[:10]) for clip in clips], cases)
    assert cut["loop_seam"] > 1.3  # objects jump back
    backwards = measure("loop", [replace(clip, frames=clip.frames[::-1]) for clip in clips], cases)
    assert (backwards["loop_direction"], backwards["loop_motion"]) == (0, pytest.approx(1, abs=0.1))
    still = measure("loop", list(map(freeze, clips)), cases)
    assert (still["loop_motion"], still["loop_direction"]) == (pytest.approx(0, abs=0.05), 0)
    there_and_back = [replace(clip, frames=np.concatenate([clip.frames[::2], clip.frames[-1::-2]])) for clip in clips]
    assert measure("loop", there_and_back, cases)["loop_direction"] < 0.6


def test_edits_must_change_the_colour_and_nothing_else():
    cases = get_cases("editing_sdedit")
    right = measure("editing_sdedit", truths(cases), cases)
    assert right["edited_colour"] == 1
    assert right["edited_distance"] < 0.5
    assert measure("editing_sdedit", [blur(case.entry.task.clip) for case in cases], cases)["edited_colour"] == 0
    moved = [replace(clip, frames=np.roll(clip.frames, 8, axis=2)) for clip in truths(cases)]
    assert measure("editing_sdedit", moved, cases)["edited_distance"] > 4


def test_a_cut_between_clips_is_a_jump():
    cases = get_cases("blending")
    assert measure("blending", truths(cases), cases)["transition_jump"] < 2
    cuts = []
    for case in cases:
        assert isinstance(case.entry.task, Blend)
        first, second = case.entry.task.first.frames, case.entry.task.second.frames
        cuts.append(Clip(np.concatenate([first, np.repeat(first[-1:], 7, axis=0), second]), 8))
    assert measure("blending", cuts, cases)["transition_jump"] > 3


def fill_gap(case, fill):
    """Return a transition whose new frames a function makes of the last frame before and the first one after them."""
    first, second = case.entry.task.first.frames, case.entry.task.second.frames
    return blur(Clip(np.concatenate([first, fill(first[-1:], second[:1]), second]), 8))


def test_a_transition_that_stands_still_jumps_or_fades_does_not_connect_two_clips():
    cases = get_cases("blending", 12)
    assert measure("blending", truths(cases), cases)["transition_connected"] > 0.9
    shares = []
    weights = np.linspace(0, 1, 9)[1:-1, None, None, None]
    for fill in (
        lambda before, after: np.repeat(before, 7, axis=0),
        lambda before, after: np.repeat(after, 7, axis=0),
        lambda before, after: np.concatenate([np.repeat(before, 4, axis=0), np.repeat(after, 3, axis=0)]),
        lambda before, after: ((1 - weights) * before + weights * after).astype(np.uint8),
        lambda before, after: np.full((7, *before.shape[1:]), 30, np.uint8),
    ):
        clips = [fill_gap(case, fill) for case in cases]
        shares.append(measure("blending", clips, cases)["transition_connected"])
    assert max(shares) < 0.3, shares
    # Another clip may have an object of the same colour.
    colours = [{each.colour for each in case.truth.scene.objects} for case in cases]
    lacks_one = [not own <= other for own, other in zip(colours, colours[1:] + colours[:1], strict=True)]
    swapped, others = (list(compress(each, lacks_one)) for each in (swap(truths(cases)), cases))
    assert len(others) >= 10
    assert measure("blending", swapped, others)["transition_connected"] == 0


def get_conditioned_cases(name, count=COUNT):
    protocol = replace(PROTOCOLS[f"scenes_{name}"], count=count, seed=7)
    return protocol, protocol.make_items(Mock(Pipeline, reconstruct=blur), protocol.make_data(None))


def test_enlarged_clips_are_compared_with_bicubic_ones():
    protocol, cases = get_conditioned_cases("super_resolution")
    low = [case.entry.options.conditioning["low_resolution"] for case in cases]
    assert {clip.frames.shape[1:3] for clip in low} <= {(8, 8), (8, 12), (12, 8)}
    bicubic = [replace(clip, frames=resize_bicubic(clip.frames, 4 * clip.height, 4 * clip.width)) for clip in low]
    metric = protocol.metrics[0]
    for clips, check in (
        (bicubic, lambda gain: gain == 0),
        (truths(cases), lambda gain: gain > 4),
        (swap(truths(cases)), lambda gain: gain < -3),
    ):
        batch = MetricBatch(samples=clips, scenes=[case.truth for case in cases])
        assert all(map(check, metric.measure(batch)))


def test_a_steered_object_that_does_not_follow_its_actions_is_far_from_its_place():
    protocol, cases = get_conditioned_cases("actions")
    values = {}
    for name, clips in (
        ("right", truths(cases)),
        ("still", list(map(freeze, truths(cases)))),
        ("reversed", [replace(clip, frames=clip.frames[::-1]) for clip in truths(cases)]),
    ):
        batch = MetricBatch(samples=clips, scenes=[case.truth for case in cases])
        metric = protocol.metrics[0]
        values[name] = metric.compute(metric.update(metric.init(), batch.select(metric.needs)))["position_error"].value
    assert values["right"] < 0.5
    assert min(values["still"], values["reversed"]) > 4
    for case in cases:
        actions = case.entry.options.conditioning["actions"]
        assert actions.shape == (17, 2)
        np.testing.assert_array_equal(case.entry.task.image.frames, case.truth.reference.frames[:1])


def test_depth_is_read_back_from_the_places_of_colours():
    protocol, cases = get_conditioned_cases("depth")
    metric = protocol.metrics[0]

    def get_agreement(clips):
        return np.mean(metric.measure(MetricBatch(samples=clips, scenes=[case.truth for case in cases])))

    assert all(case.entry.options.control == case.truth.second_clip for case in cases)
    assert get_agreement(truths(cases)) > 0.85  # pixels at edges blend both
    moved = [replace(clip, frames=np.roll(clip.frames, 8, axis=2)) for clip in truths(cases)]
    assert get_agreement(moved) < 0.5
    assert get_agreement(list(map(freeze, truths(cases)))) < 0.7
    exchanged = []
    for case in cases:
        first, second = [*case.truth.scene.objects, None][:2]
        if second is not None:  # both objects change their places in depth
            objects = replace(first, depth=second.depth), replace(second, depth=first.depth)
            exchanged.append(case._replace(truth=case.truth._replace(scene=replace(case.truth.scene, objects=objects))))
    shares = metric.measure(
        MetricBatch(samples=[each.truth.reference for each in exchanged], scenes=[each.truth for each in exchanged])
    )
    assert np.mean(shares) > 0.85


def test_objects_are_found_where_they_are():
    for case in get_cases("image_to_video"):
        tracks = find_objects(case.truth.reference, case.truth.scene.background)
        for each in case.truth.scene.objects:
            assert tracks[each.colour].classify_direction() == each.direction
