"""Models that read a second clip: clips made larger by a second model, and clips that follow a control."""

import dataclasses

import numpy as np
import pytest

import dit_video
from dit_video.apps.studio.forms import make_tabs
from dit_video.core.errors import MissingError, UserError
from dit_video.experiment import AllWeights, Run
from dit_video.models.backbones.controlled_dit import ControlledDiTConfig
from dit_video.models.conditioning import ControlClip, LowResolutionClip
from dit_video.sampling.pipeline_config import Downscale, PreviousStep
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip, decode
from support.extending import replace_backbone, shorten, train
from support.latents import generate_latents


@pytest.mark.slow
@pytest.mark.parametrize("latent_channels", [0, 4])
def test_a_low_resolution_clip_with_noise_augmentation(latent_channels, tiny, tiny_run, tiny_pipeline, tmp_path):
    """Clips are made larger by a second model; the noise that is added to them has a level at call time."""
    experiment = replace_backbone(
        tiny.EXPERIMENT, conditioning=(LowResolutionClip(pixels=Grid(4, 4, 4), latent_channels=latent_channels),)
    )
    large = train(experiment, tiny_run, tmp_path / "run")
    both = large.add_previous_step(PreviousStep(name="low_resolution", size=Downscale(h=2, w=2)), tiny_pipeline)
    small = tiny_pipeline.generate("a red circle", size=(9, 16, 32), seed=4)
    arguments = {"size": (9, 32, 64), "steps": 2}

    def sample_latents(pipeline, seed=4, strength=1.0, **options):
        strengths = {"low_resolution": strength}
        return generate_latents(pipeline, "a red circle", seed=seed, strengths=strengths, **arguments, **options)

    expected = sample_latents(large, conditioning={"low_resolution": small})
    np.testing.assert_array_equal(sample_latents(both), expected)
    noisy = [sample_latents(both, strength=strength) for strength in (0.7, 0.7, 0.2)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - expected).max() > 0 < np.abs(noisy[2] - noisy[0]).max()
    strengths = [{"low_resolution": strength} for strength in (1.0, 0.2)]
    requests = [Request("a red circle", (9, 32, 64), seed=4, strengths=each) for each in strengths]
    for result, alone in zip(
        both.generate_latents(requests, sampling=both.make_sampling(steps=2)), (expected, noisy[2]), strict=True
    ):
        np.testing.assert_allclose(result, alone, atol=1e-5)
    both.save(tmp_path / "both")
    np.testing.assert_array_equal(sample_latents(dit_video.load(tmp_path / "both")), expected)
    with pytest.raises(UserError, match="conditioning size is unknown to this model; use low_resolution"):
        sample_latents(large, conditioning={"size": 0.5})


@pytest.fixture(scope="module")
def controls(tiny_clips, tmp_path_factory):
    """Return a folder with the negative of each of the tiny clips, under its name."""
    folder = tmp_path_factory.mktemp("controls")
    for path in sorted(path for path in (tiny_clips / "clips").iterdir() if path.suffix in (".mp4", ".png")):
        clip, target = decode(path), folder / path.relative_to(tiny_clips)
        target.parent.mkdir(exist_ok=True)
        dataclasses.replace(clip, frames=255 - clip.frames).save(target)
    return folder


@pytest.fixture(scope="module")
def controlled(tiny, tiny_run, controls, tmp_path_factory):
    """Return the folder of a run that grew a control stack around the tiny run's model."""
    folder = tmp_path_factory.mktemp("controlled") / "run"
    fields = {"control_layers": 1, "conditioning": (ControlClip(folder=str(controls), pixels=Grid(1, 4, 4)),)}
    experiment = shorten(replace_backbone(tiny.EXPERIMENT, ControlledDiTConfig, **fields), tiny_run)
    experiment = dataclasses.replace(experiment, autoencoder_from=str(tiny_run))
    optimizer = dataclasses.replace(experiment.denoiser.optimizer, trainable=("control",))
    experiment = experiment.replace_stage(
        "denoiser", train=AllWeights(init_from=str(tiny_run)), optimizer=optimizer, steps=3
    )
    Run.create(folder, experiment).train((tiny_run / "data").resolve())
    return folder


def test_a_control_stack_is_trained_alone_and_follows_its_clip(controlled, tiny_run):
    """At strength 0 the pipeline is bit for bit the one that it grew from."""
    pipeline, base = dit_video.load(controlled), dit_video.load(tiny_run)
    clip = Clip(np.random.default_rng(0).integers(0, 256, (9, 16, 32, 3), np.uint8), fps=8.0)
    options = {"size": (9, 16, 32), "steps": 2, "seed": 3, "guidance": 2.0}
    expected = generate_latents(base, "a red circle", **options)

    def sample(strength, control=clip):
        return generate_latents(pipeline, "a red circle", control=control, strengths={"control": strength}, **options)

    np.testing.assert_array_equal(sample(0), expected)
    assert np.abs(sample(1) - expected).max() > np.abs(sample(0.5) - expected).max() > 0
    assert np.abs(sample(1, Clip(255 - clip.frames, fps=8.0)) - sample(1)).max() > 0
    by_name = generate_latents(pipeline, "a red circle", conditioning={"control": clip}, **options)
    np.testing.assert_array_equal(by_name, sample(1))
    large = Clip(np.repeat(np.repeat(clip.frames, 2, axis=1), 2, axis=2), fps=8.0)  # is scaled to the size
    assert np.isfinite(sample(1, large)).all()
    guided = generate_latents(
        pipeline, "a red circle", control=clip, **options | {"guidance": {"text": 2, "control": 3}}
    )
    assert np.abs(guided - by_name).max() > 0
    with pytest.raises(UserError, match="control of 5 frames is invalid: it must have the sampled clip's 9 frames"):
        sample(1, Clip(clip.frames[:5], fps=8.0))
    with pytest.raises(UserError, match=r"control of a request is invalid: this model was not trained with it"):
        generate_latents(base, "a red circle", control=clip, **options)


def test_a_controlled_model_completes_clips_and_has_a_tab(controlled, tiny_run, script, tmp_path):
    pipeline = dit_video.load(controlled)
    clip = pipeline.generate("a blue square", size=(9, 16, 32), steps=2)
    kept = pipeline.generate("a red circle", size=(9, 16, 32), steps=2, control=clip, image=clip.frames[0])
    assert kept.frames.shape == (9, 16, 32, 3)
    tabs = {tab.name: [field.name for field in tab.fields] for tab in make_tabs(pipeline.config)}
    assert set(tabs["control"]) == {"prompt", "control", "size"}
    assert "control" not in {tab.name for tab in make_tabs(dit_video.load(tiny_run).config)}
    clip.save(tmp_path / "control.apng")
    options = ("--control", tmp_path / "control.apng", "--size", "9x16x32", "--steps", 2, "--seed", 5)
    done = script(
        "experiments/sample.py", controlled, "--prompt", "a red circle", *options, "--out", tmp_path / "a.apng"
    )
    assert done.code == 0, done.err
    expected = pipeline.generate("a red circle", size=(9, 16, 32), steps=2, seed=5, control=clip)
    np.testing.assert_array_equal(decode(tmp_path / "a.apng").frames, expected.frames)


def test_clips_without_control_end_the_training_with_their_name(tiny, tiny_run, tmp_path):
    fields = {"control_layers": 1, "conditioning": (ControlClip(folder=str(tmp_path / "none")),)}
    experiment = replace_backbone(tiny.EXPERIMENT, ControlledDiTConfig, **fields)
    with pytest.raises(MissingError, match=r"none/clips/\d+\.(mp4|png) does not exist. Name the folder of the control"):
        train(experiment, tiny_run, tmp_path / "run")
