"""Tasks of a pipeline with random weights: what their results must be whatever the model does."""

import json
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.resize import resize_and_crop
from dit_video.sampling.clip_recipe import hash_pixels
from dit_video.sampling.request import Condition, Request
from dit_video.sampling.tasks import (
    Blend,
    DescribedEdit,
    Doc,
    Edit,
    Extend,
    Inpaint,
    Interpolate,
    Limits,
    Outpaint,
    Task,
    ZoomOut,
)
from dit_video.video import Clip, read_recipe
from support.tiny_pipeline import SIZE, make_config, make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:this model was not trained")


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline(make_config(steps=4, provenance={"command": "a test"}))


@pytest.fixture(scope="module")
def clip(pipeline):
    frames = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return replace(pipeline.reconstruct(Clip(frames, 8)), caption="a clip")


@pytest.mark.slow
def test_tasks_of_several_clips_are_those_of_each_alone(pipeline, clip):
    tasks = [
        Extend(clip=clip, frames=4),
        Interpolate(clip=Clip(clip.frames[:3], 4), factor=2, prompt="b"),
        Extend(clip=clip, frames=8, before=True),
        ZoomOut(image=Clip(clip.frames[:1], 8), frames=2, factor=1.5),
    ]
    together = pipeline.run(tasks, seed=[3, 4, 5, 6], steps=2)
    for task, seed, result in zip(tasks, (3, 4, 5, 6), together, strict=True):
        alone = pipeline.run(task, seed=seed, steps=2)
        assert np.abs(alone.frames.astype(int) - result.frames).max() <= 1
        assert (alone.recipe, alone.fps) == (result.recipe, result.fps)


@pytest.mark.nightly
def test_zooming_out_makes_every_frame_the_middle_of_the_next(pipeline, clip):
    image = Clip(clip.frames[:1], 8, caption="a box")
    result = pipeline.run(ZoomOut(image, frames=3, factor=2.0), steps=2)
    assert result.frames.shape == (4, 16, 32, 3)
    np.testing.assert_array_equal(result.frames[0], clip.frames[0])
    with pytest.raises(UserError, match=r"factor=1\.01 is invalid: .* by at least a pixel"):
        pipeline.run(ZoomOut(image, frames=3, factor=1.01))


def test_a_clip_knows_its_recipe_and_so_does_its_file(pipeline, clip, tmp_path):
    task, options = Extend(clip, frames=4), {"seed": 7, "steps": 2, "negative": "blue"}
    result = pipeline.run(task, **options)
    recipe = result.recipe
    assert (recipe["prompt"], recipe["negative"], recipe["seed"]) == ("a clip", "blue", 7)
    assert (recipe["method"], recipe["sampling"]["steps"]) == ("training_free", 2)
    assert recipe["task"] == {"name": "extend", "clip": hash_pixels(clip.frames), "frames": 4, "before": False}
    assert recipe["model"] == {"command": "a test"}
    result.save(tmp_path / "a.mp4")
    assert read_recipe(tmp_path / "a.mp4") == recipe
    assert Extend(tmp_path / "a.mp4", frames=4).make_request(pipeline.config).prompt == "a clip"
    assert pipeline.run(task, **options).recipe == recipe
    other = pipeline.run(Extend(replace(clip, frames=255 - clip.frames), frames=4), **options)
    assert other.recipe["pictures"] != recipe["pictures"]
    edit = DescribedEdit(clip, "blue", source="red", strength=1.0)
    edited, varied = pipeline.run(edit, **options).recipe, pipeline.run(Edit(clip, "blue"), **options).recipe
    assert edited["pictures"] == {"clip": hash_pixels(clip.frames)}
    described = {"name": "described_edit", "clip": hash_pixels(clip.frames), "source": "red", "strength": 1.0}
    assert edited["task"].items() >= described.items()
    rest = varied.keys() - {"pictures", "task", "strength"}
    assert {name: edited[name] for name in edited.keys() - {"pictures", "task"}} == {
        name: varied[name] for name in rest
    }


@pytest.mark.parametrize(
    ("make_task", "size"),
    [
        (lambda clip: Edit(clip, "b", strength=np.float32(0.5)), (5, 16, 32)),
        (lambda clip: DescribedEdit(clip, "b", source="a"), (5, 16, 32)),
        (lambda clip: Inpaint(clip, np.arange(clip.width) > 20 + np.zeros(clip.frames.shape[:3])), (5, 16, 32)),
        (lambda clip: Outpaint(clip, (32, 48)), (5, 32, 48)),
        (lambda clip: ZoomOut(clip[:1], frames=1, factor=2.0), (2, 16, 32)),
        (lambda clip: Extend(clip, frames=np.int64(4)), (11, 16, 32)),
        (lambda clip: Interpolate(clip, factor=2), (13, 16, 32)),
        (lambda clip: Blend(clip, clip, frames=4), (18, 16, 32)),
    ],
)
def test_a_clip_of_a_camera_is_fitted(pipeline, make_task, size):
    """Its frames are not 1 + 4k, and its sides no multiples of 16; what is kept is scaled and cropped."""
    frames = np.random.default_rng(1).integers(0, 256, (7, 19, 35, 3), dtype=np.uint8)
    task = make_task(Clip(frames, 8))
    result = pipeline.run(task, steps=3)
    assert result.frames.shape == (*size, 3)
    assert json.loads(json.dumps(result.recipe)) == result.recipe
    if not isinstance(task, Edit | DescribedEdit | Outpaint | ZoomOut):
        kept = 14 if isinstance(task, Inpaint) else 32
        fitted = resize_and_crop(frames, *size[1:])
        np.testing.assert_array_equal(result.frames[0, :, :kept], fitted[0, :, :kept])


def test_options_join_a_task_that_lacks_them(pipeline, clip):
    condition = Condition(content=clip.frames[0], frame=12)
    with_condition = pipeline.run(Extend(clip, frames=4), steps=2, conditions=[condition])
    assert len(with_condition.recipe["pictures"]["conditions"]) == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        pipeline.run(Extend(clip, frames=4), size=(5, 16, 16))
    refused = {"solver": "unipc", "conditions": [Condition(content=clip.frames[0])], "method": "trained", "resample": 2}
    for name, value in refused.items():
        with pytest.raises(UserError, match=rf"{name}= is invalid with source=: .* Leave it out"):
            pipeline.run(DescribedEdit(clip, "blue", source="red"), **{name: value})
    with pytest.raises(UserError, match=r"seed of 2 values is invalid: the list that it is for has 1"):
        pipeline.run([Extend(clip, frames=4)], seed=[1, 2])


def test_a_task_of_one_s_own_needs_one_class(pipeline, clip):
    @dataclass(frozen=True)
    class Reverse(Task):
        """A clip that is played backwards, and changed a little."""

        clip: Annotated[Clip, Doc("Clip.")]
        strength: Annotated[float, Doc("Diffusion time."), Limits(above=0, maximum=1)] = 0.5

        def make_request(self, config):
            frames = self.clip.frames[::-1].copy()
            return Request("back", SIZE, video=Clip(frames, self.clip.fps), strength=self.strength)

    result = pipeline.run(Reverse(clip), steps=4)
    expected = pipeline.generate("back", size=SIZE, video=clip.frames[::-1].copy(), strength=0.5, steps=4)
    np.testing.assert_array_equal(result.frames, expected.frames)
    assert result.recipe["task"]["name"] == "Reverse"
    with pytest.raises(UserError, match=r"strength=2 is invalid: it must be above 0 and at most 1. Use 1"):
        Reverse(clip, strength=2)
