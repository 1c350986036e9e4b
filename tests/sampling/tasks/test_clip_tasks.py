"""Tasks on clips: the lengths of their requests, what of clips is kept, and what does not fit."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.sampling.known_pixels import collect_known_pixels
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
    Vary,
    ZoomOut,
)
from dit_video.sampling.tasks.generation import LoopTurns
from dit_video.sampling.tasks.task import describe_task
from dit_video.video import Clip
from support.tiny_pipeline import make_config

CONFIG = make_config(steps=2)


def make_clip(frames: int, *, seed: int = 0, height: int = 16, width: int = 32, fps: float = 8.0) -> Clip:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Clip(pixels, fps, caption="its caption")


def sample(request) -> Clip:
    """Return a clip of a request's size, whose pixels are numbered by frame."""
    size = request.grid
    frames = np.broadcast_to(np.arange(size.t, dtype=np.uint8)[:, None, None, None], (*size, 3))
    return Clip(np.ascontiguousarray(frames), 8, caption=request.prompt)


@pytest.mark.parametrize(
    ("frames", "new", "overlap"), [(17, 8, 9), (17, 7, 6), (17, 5, 8), (17, 1, 8), (3, 6, 3), (3, 8, 1), (17, 16, 9)]
)
def test_an_extension_has_as_many_new_frames_as_asked(frames, new, overlap):
    clip = make_clip(frames)
    task = Extend(clip=clip, frames=new)
    request = task.make_request(CONFIG)
    assert request.grid == (overlap + new, 16, 32)
    assert request.prompt == "its caption"
    (condition,) = request.conditions
    assert condition.frame == 0
    np.testing.assert_array_equal(condition.content.frames, clip.frames[-overlap:])
    result = task.finish(sample(request))
    np.testing.assert_array_equal(result.frames[:frames], clip.frames)
    np.testing.assert_array_equal(result.frames[frames:, 0, 0, 0], np.arange(overlap, overlap + new))


def test_an_extension_backwards_ends_with_the_clip():
    clip = make_clip(17)
    task = Extend(clip=clip, frames=8, before=True, prompt="another")
    request = task.make_request(CONFIG)
    (condition,) = request.conditions
    assert (condition.frame, len(condition.content.frames), request.prompt) == (8, 9, "another")
    result = task.finish(sample(request))
    np.testing.assert_array_equal(result.frames[8:], clip.frames)
    np.testing.assert_array_equal(result.frames[:8, 0, 0, 0], np.arange(8))


@pytest.mark.parametrize(("frames", "lengths"), [(7, (9, 9)), (8, (9, 8)), (10, (8, 7)), (4, (9, 8))])
def test_a_transition_keeps_both_clips(frames, lengths):
    first, second = make_clip(17), make_clip(12, seed=1)
    task = Blend(first=first, second=second, frames=frames)
    request = task.make_request(CONFIG)
    assert (request.grid.t - 1) % 4 == 0
    start, end = request.conditions
    assert sorted((len(start.content.frames), len(end.content.frames)), reverse=True) == sorted(lengths, reverse=True)
    assert end.frame == len(start.content.frames) + frames
    result = task.finish(sample(request))
    np.testing.assert_array_equal(result.frames[:17], first.frames)
    np.testing.assert_array_equal(result.frames[-12:], second.frames)
    np.testing.assert_array_equal(result.frames[17:-12, 0, 0, 0], len(start.content.frames) + np.arange(frames))


@pytest.mark.parametrize(
    ("options", "places", "length", "fps"),
    [
        ({"factor": 2}, [0, 2, 4, 6, 8], 9, 16.0),
        ({"factor": 4}, [0, 4, 8, 12, 16], 17, 32.0),
        ({"factor": 11}, [0, 11, 22, 33, 44], 45, 88.0),
        ({"places": (0, 1, 5, 6, 10)}, [0, 1, 5, 6, 10], 11, 20.0),
    ],
)
def test_interpolation_places_the_frames_of_the_clip(options, places, length, fps):
    clip = make_clip(5)
    task = Interpolate(clip=clip, **options)
    request = task.make_request(CONFIG)
    assert [condition.frame for condition in request.conditions] == places
    assert length <= request.grid.t < length + 4
    assert (request.grid.t - 1) % 4 == 0
    result = task.finish(sample(request))
    assert (len(result.frames), result.fps) == (length, fps)


@pytest.mark.parametrize("shape", [(16, 32), (5, 16, 32), (5,)])
def test_inpainting_generates_where_the_mask_is_true_and_keeps_the_rest(shape):
    clip, generated = make_clip(5), np.arange(np.prod(shape)).reshape(shape) % 3 == 0
    request = Inpaint(clip, generated).make_request(CONFIG)
    assert request.grid == (5, 16, 32)
    known = collect_known_pixels(request)
    full = generated[:, None, None] if generated.ndim == 1 else generated
    np.testing.assert_array_equal(known.is_known, np.broadcast_to(~full, (5, 16, 32)))
    np.testing.assert_array_equal(known.frames[known.is_known], clip.frames[known.is_known])


def test_the_mask_of_a_generated_video_is_fitted_with_it():
    clip, generated = make_clip(7, height=20), np.indices((20, 32))[0] > 9
    task = Generate("", video=clip, generated=generated).fit(CONFIG)
    assert task.video.frames.shape[:3] == (7, 16, 32)
    np.testing.assert_array_equal(task.generated, np.broadcast_to(generated[2:18], (7, 16, 32)))
    assert Generate("", generated=generated).fit(CONFIG).generated is generated


def test_outpainting_keeps_the_middle():
    clip = make_clip(5)
    request = Outpaint(clip=clip, size=(32, 48)).make_request(CONFIG)
    assert request.grid == (5, 32, 48)
    np.testing.assert_array_equal(request.video.frames[:, 8:24, 8:40], clip.frames)
    assert not request.generated[:, 8:24, 8:40].any()
    assert (~request.generated).sum() == clip.frames[..., 0].size


def test_a_loop_is_sampled_with_the_frame_before_it():
    task = Loop(prompt="waves")
    request = task.make_request(CONFIG)
    assert request.grid == (9, 16, 32)
    result = task.finish(sample(request))
    np.testing.assert_array_equal(result.frames[:, 0, 0, 0], np.arange(1, 9))


@pytest.mark.parametrize("count", [2, 3])
def test_the_second_turn_of_a_loop_is_decoded_and_cut_within_a_latent_frame(count):
    turns = LoopTurns(count=count, shift=2)
    assert turns.list_frames(3) == [0, *[1, 2] * count]
    # The frame before the loop, then frames 1 to 8 of each turn, of four a latent frame.
    decoded = np.array([0, *(10 * turn + frame for turn in range(1, count + 1) for frame in range(1, 9))], np.uint8)
    frames = turns.cut(np.broadcast_to(decoded[:, None, None, None], (1 + 8 * count, 2, 2, 3)))
    assert frames.shape == (9, 2, 2, 3)
    np.testing.assert_array_equal(frames[:, 0, 0, 0], [22, 23, 24, 25, 26, 27, 28, 21, 22])


def test_edits_start_from_the_clip():
    clip = make_clip(5)
    for task, strength in ((Edit(clip=clip, prompt="new"), 0.8), (Vary(clip=clip, strength=0.5), 0.5)):
        request = task.make_request(CONFIG)
        assert (request.video, request.strength, request.generated) == (clip, strength, None)
        assert request.prompt == ("new" if isinstance(task, Edit) and not isinstance(task, Vary) else "its caption")


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("make_task", "message"),
    [
        (lambda: Extend(clip=make_clip(17), frames=0), "frames=0 is invalid: it must be at least 1. Use 1"),
        (lambda: Extend(clip=make_clip(17), frames=2.5), "frames=2.5 is invalid: it must be a whole number"),
        (lambda: Extend(clip=make_clip(17), frames=8, overlap=8), "overlap=8 is invalid .* Use 5 or 9"),
        (lambda: Extend(clip=make_clip(1), frames=6), "frames=6 is invalid for a clip of 1 frames: use 4 or 8"),
        (
            lambda: Blend(first=make_clip(9), second=make_clip(9, width=16), frames=7),
            r"clips of different sizes, \(16, 32\) and \(16, 16\)",
        ),
        (lambda: Blend(first=make_clip(9), second=make_clip(9, fps=4.0), frames=7), "different frame rates"),
        (lambda: Blend(first=make_clip(9), second=make_clip(9), frames=0), "frames=0 is invalid"),
        (lambda: Blend(first=make_clip(1), second=make_clip(1), frames=4), "frames=4 is invalid: with .* Use 3 or 7"),
        (lambda: Blend(make_clip(9), make_clip(9), frames=1, overlap=1), "frames=1 is invalid: with .* Use 3$"),
        (lambda: Interpolate(clip=make_clip(5)), "use exactly one of them"),
        (lambda: Interpolate(clip=make_clip(5), factor=1), "factor=1 is invalid"),
        (lambda: Interpolate(clip=make_clip(1), factor=2), "a clip of one frame is invalid"),
        (lambda: Interpolate(clip=make_clip(3), places=(0, 4, 2)), "they are rising numbers from 0 on"),
        (lambda: Interpolate(clip=make_clip(3), places=(1, 2, 3)), "they are rising numbers from 0 on"),
        (lambda: Inpaint(make_clip(5), np.ones((16, 32), np.uint8)), "generated of uint8 .* must be boolean"),
        (lambda: Inpaint(make_clip(5), np.zeros((16, 32), bool)), "no pixel is generated"),
        (lambda: Outpaint(clip=make_clip(5), size=(16, 32)), "size=16x32 is invalid"),
        (lambda: Outpaint(clip=make_clip(5), size=(32, 16)), "size=32x16 is invalid"),
        (lambda: Loop(prompt="", size=(9, 16, 16)), "a loop has a multiple of 4 frames.* Use 8 or 12"),
        (lambda: Edit(clip=make_clip(5), strength=0.0), "strength=0.0 is invalid: it must be above 0 and at most 1"),
        (lambda: Edit(clip=make_clip(5), strength=1.5), r"strength=1.5 is invalid: .* Use 0\.05"),
        (lambda: Edit(clip=make_clip(5), strength="0.5"), "strength='0.5' is invalid: it must be a number"),
        (lambda: DescribedEdit(make_clip(5), source="", draws=0), "draws=0 is invalid: it must be at least 1"),
        (lambda: DescribedEdit(make_clip(5), source="", edit_method="magic"), "Use flow_edit or inversion"),
        (lambda: ZoomOut(make_clip(9), frames=3), "image is invalid: a clip of 9 frames is no image"),
        (lambda: ZoomOut(make_clip(1), frames=3, factor=1.0), "factor=1.0 is invalid: it must be above 1"),
        (lambda: Extend(clip=[1, 2], frames=4), "clip is invalid: a int is no picture"),
        (lambda: Extend(None, frames=4), "clip is invalid: a NoneType is no picture"),
        (lambda: Extend(make_clip(5), frames=4, before="no"), "before='no' is invalid: .* true or false. Use True"),
        (
            lambda: Edit(make_clip(5), 0.5),
            "prompt=0.5 is invalid: .* Use a text in quotes, and other values by their names",
        ),
        (lambda: Edit(make_clip(5), make_clip(5).frames), r"prompt=array\(.*… is invalid: it must be a text"),
        (lambda: DescribedEdit(make_clip(5), source=None), "source=None is invalid: it must be a text"),
        (lambda: Outpaint(make_clip(5), 48), r"size=48 is invalid: it must be height and width\. Use \(32, 48\)"),
        (lambda: Outpaint(make_clip(5), (5, 48, 48)), r"size=\(5, 48, 48\) is invalid: it must be height and width"),
        (lambda: Loop(size="8x32x32"), r"size='8x32x32' is invalid: .* Use \(9, 32, 48\)"),
        (lambda: Interpolate(make_clip(2), places=[0, 1.5]), r"places=\[0, 1\.5\] is invalid: .* whole numbers"),
        (lambda: Interpolate(make_clip(2), factor=True), "factor=True is invalid: it must be a whole number. Use 2"),
        (lambda: Generate("", conditions=[make_clip(5)]), r"conditions is invalid: .* Use \[Condition\("),
        (lambda: Generate("", conditions=None), r"conditions is invalid: .* Use \[Condition\("),
    ],
)
def test_tasks_that_do_not_fit_are_refused_with_what_does(make_task, message):
    with pytest.raises(UserError, match=message):
        make_task().make_request(CONFIG)


def test_clips_and_masks_of_a_task_may_be_files_and_arrays(tmp_path):
    clip, generated = make_clip(5), np.zeros((16, 32), bool)
    generated[4:8] = True
    clip.save(tmp_path / "clip.apng")
    Clip(np.where(generated, 255, 0).astype(np.uint8)[None, ..., None].repeat(3, -1), 1).save(tmp_path / "mask.png")
    for task in (Inpaint(str(tmp_path / "clip.apng"), tmp_path / "mask.png"), Inpaint(clip.frames, generated)):
        np.testing.assert_array_equal(task.clip.frames, clip.frames)
        np.testing.assert_array_equal(task.generated, generated)


@pytest.mark.wrong_types
def test_values_of_numpy_are_those_of_python():
    task = Interpolate(make_clip(3), places=np.arange(0, 6, 2))
    assert task.places == (0, 2, 4)
    task = Extend(make_clip(5), frames=np.int64(4), before=np.bool_(True))
    assert json.dumps(describe_task(task)) == json.dumps(describe_task(Extend(make_clip(5), frames=4, before=True)))


def test_tasks_with_masks_can_be_compared():
    clip, mask = make_clip(5), np.ones((16, 32), bool)
    task = Inpaint(clip, mask)
    assert task == task
    assert task != Inpaint(clip, mask.copy())
    assert Extend(clip, frames=4) == Extend(clip, frames=4)


def test_a_result_has_the_recipe_of_its_sample():
    clip = make_clip(5)
    sampled = replace(sample(Extend(clip=clip, frames=4).make_request(CONFIG)), recipe={"seed": 3})
    assert Extend(clip=clip, frames=4).finish(sampled).recipe == {"seed": 3}
