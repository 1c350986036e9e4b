"""Tasks of a pipeline with random weights: what their results must be whatever the model does."""

from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.sampling.request import Condition
from dit_video.sampling.tasks import Extend, Interpolate, ZoomOut
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
    together = pipeline.run_tasks(tasks, seeds=[3, 4, 5, 6], steps=2)
    for task, seed, result in zip(tasks, (3, 4, 5, 6), together, strict=True):
        (alone,) = pipeline.run_tasks([task], seed=seed, steps=2)
        assert np.abs(alone.frames.astype(int) - result.frames).max() <= 1
        assert (alone.recipe, alone.fps) == (result.recipe, result.fps)


@pytest.mark.nightly
def test_zooming_out_makes_every_frame_the_middle_of_the_next(pipeline, clip):
    image = Clip(clip.frames[:1], 8, caption="a box")
    result = pipeline.zoom_out(image, frames=3, factor=2.0, steps=2)
    assert result.frames.shape == (4, 16, 32, 3)
    np.testing.assert_array_equal(result.frames[0], clip.frames[0])
    with pytest.raises(UserError, match=r"factor=1\.0 is invalid"):
        pipeline.zoom_out(image, frames=3, factor=1.0)
    with pytest.raises(UserError, match="a clip of 9 frames is no image"):
        pipeline.zoom_out(clip, frames=3)


def test_a_clip_knows_its_recipe_and_so_does_its_file(pipeline, clip, tmp_path):
    result = pipeline.extend(clip, frames=4, seed=7, steps=2, negative="blue")
    recipe = result.recipe
    assert (recipe["prompt"], recipe["negative"], recipe["seed"]) == ("a clip", "blue", 7)
    assert (recipe["method"], recipe["sampling"]["steps"]) == ("training_free", 2)
    assert recipe["clip_task"] == {"name": "Extend", "frames": 4, "before": False}
    assert recipe["model"] == {"command": "a test"}
    result.save(tmp_path / "a.mp4")
    assert read_recipe(tmp_path / "a.mp4") == recipe
    again = pipeline.extend(clip, frames=4, seed=7, steps=2, negative="blue")
    assert again.recipe == recipe
    other = pipeline.extend(replace(clip, frames=255 - clip.frames), frames=4, seed=7, steps=2, negative="blue")
    assert other.recipe["pictures"] != recipe["pictures"]


def test_options_do_not_replace_values_of_a_task(pipeline, clip):
    with pytest.raises(UserError, match="size= is invalid: the task has its own"):
        pipeline.extend(clip, frames=4, size=(5, 16, 16))
    with pytest.raises(UserError, match="video= is invalid: the task has its own"):
        pipeline.vary(clip, video=clip)
    condition = Condition(content=clip.frames[0], frame=12)
    with_condition = pipeline.extend(clip, frames=4, steps=2, conditions=[condition])
    assert len(with_condition.recipe["pictures"]["conditions"]) == 2
    with pytest.raises(UserError, match="invalid with source="):
        pipeline.edit(clip, "blue", source="red", sampler="unipc")
    for options in ({"edit_method": "inversion"}, {"source_guidance": 2.0}, {"draws": 4}):
        (name,) = options
        with pytest.raises(
            UserError, match=rf"^{name}=.* is invalid: it needs source, .*\. Give one, or leave it out\.$"
        ):
            pipeline.edit(clip, "blue", **options)


def test_options_that_do_not_exist_are_refused(pipeline):
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        pipeline.generate("red", step=3)
