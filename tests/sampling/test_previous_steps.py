"""Previous steps of a pipeline: what they are given of a request, and how they are sampled."""

from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.models.conditioning import LowResolutionClip
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import Downscale, PreviousStep
from support import tiny_pipeline
from support.latents import generate_latents

STEP = PreviousStep(name="low_resolution", size=Downscale(h=2, w=2))


@pytest.fixture
def models(add_package):
    """Return a model that knows a camera, and one that knows a clip of low resolution and a colour."""
    camera = add_package("their_poses", "camera_poses").CameraPoses()
    color = add_package("their_prior", "color_prior").ColorEmbedding()

    def make(*conditioning):
        config = tiny_pipeline.make_config(steps=2)
        model = config.model.replace_backbone(conditioning=conditioning)
        return tiny_pipeline.make_pipeline(replace(config, model=model))

    return make(camera), make(LowResolutionClip(), color)


def sample(pipeline, **options):
    return generate_latents(pipeline, "a red circle", seed=4, **options)


def test_a_step_has_the_conditioning_and_strengths_that_it_knows(models):
    small, large = models
    both = large.add_previous_step(STEP, small)
    own = {"conditioning": {"camera": 2}, "strengths": {"camera": 0.5}}
    low_resolution = small.generate("a red circle", size=(5, 16, 16), seed=4, **own)
    values = {"low_resolution": low_resolution, "color": (1, 0, 0)}
    expected = sample(large, size=(5, 32, 32), conditioning=values, strengths={"low_resolution": 0.7})

    def sample_both(speed):
        given = {
            "conditioning": {"camera": speed, "color": (1, 0, 0)},
            "strengths": {"camera": 0.5, "low_resolution": 0.7},
        }
        return sample(both, size=(5, 32, 32), **given)

    np.testing.assert_array_equal(sample_both(2), expected)
    assert np.abs(sample_both(-2) - expected).max() > 0


def test_a_step_has_steps_and_guidance_of_its_own(models, tmp_path):
    small, large = models
    options = {"steps": 3, "guidance": 3.0}
    low_resolution = small.generate("a red circle", size=(5, 16, 16), seed=4, **options)
    expected = sample(large, size=(5, 32, 32), conditioning={"low_resolution": low_resolution}, steps=2)
    both = large.add_previous_step(STEP, small)
    previous = {"low_resolution": options}
    np.testing.assert_array_equal(sample(both, size=(5, 32, 32), steps=2, previous=previous), expected)
    assert np.abs(sample(both, size=(5, 32, 32), steps=2) - expected).max() > 0
    own = large.add_previous_step(replace(STEP, sampling=small.make_sampling(**options)), small)
    own.save(tmp_path / "both")
    np.testing.assert_array_equal(sample(dit_video.load(tmp_path / "both"), size=(5, 32, 32), steps=2), expected)
    changed = own.make_sampling(previous={"low_resolution": {"steps": 5}}).previous["low_resolution"]
    assert changed.guidance.scales == {"text": 3.0}
    recipe = both.generate("a red circle", size=(5, 32, 32), previous=previous).recipe
    assert recipe["sampling"]["previous"]["low_resolution"]["steps"] == 3


def test_a_step_before_a_step_is_reached_by_both_names(models):
    small, large = models
    two = large.add_previous_step(STEP, small)
    three = large.add_previous_step(STEP, two)
    previous = {"low_resolution": {"steps": 1, "previous": {"low_resolution": {"steps": 3}}}}
    options = {"size": (5, 64, 64), "conditioning": {"camera": 2}}
    middle = two.generate(
        "a red circle",
        seed=4,
        size=(5, 32, 32),
        steps=1,
        previous={"low_resolution": {"steps": 3}},
        conditioning={"camera": 2},
    )
    expected = sample(large, size=(5, 64, 64), conditioning={"low_resolution": middle})
    np.testing.assert_array_equal(sample(three, **options, previous=previous), expected)


def test_what_no_step_uses_is_refused(models):
    small, large = models
    both = large.add_previous_step(STEP, small)
    size = {"size": (5, 32, 32)}
    clip = small.generate("a red circle", size=(5, 16, 16), steps=1)
    for options, match in (
        ({"conditioning": {"sound": 1}}, "conditioning sound is unknown to this model; use low_resolution, color"),
        ({"strengths": {"sound": 1}}, "conditioning sound is unknown to this model"),
        ({"conditioning": {"camera": 2, "low_resolution": clip}}, "conditioning camera is unknown to this model"),
        ({"conditioning": {"camera": (1, 2)}}, r"previous step low_resolution: camera=\(1, 2\) is invalid"),
        ({"size": (5, 16, 16)}, "previous step low_resolution: height 8 is not divisible by 16"),
        ({"previous": {"prior": {"steps": 1}}}, r"previous='prior' is invalid: .* Use low_resolution\."),
        ({"previous": {"low_resolution": {"steps": 0}}}, "steps=0 is invalid"),
        ({"sampling": Sampling(previous={"prior": Sampling()})}, "previous='prior' is invalid"),
    ):
        with pytest.raises(UserError, match=match):
            both.generate("a red circle", **size | options)
    with pytest.raises(UserError, match=r"previous='prior' is invalid: .* Leave it out"):
        small.generate("a red circle", previous={"prior": {"steps": 1}})
