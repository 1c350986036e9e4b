"""Open weights of images that are fine-tuned: they get temporal layers, and clips are conditioned on classes."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import Uniform
from dit_video.distributed import make_mesh
from dit_video.experiment import TemporalWeights
from dit_video.experiment.denoiser import open_trainable_denoiser
from dit_video.experiment.recipes.distill import make_distillation_experiment
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.experiment.run import Run
from dit_video.families import load_denoiser
from dit_video.models.backbones.conversion import add_temporal_layers
from dit_video.nn.attention import SpaceOnly
from support.latents import generate_latents
from support.tiny_class_dit import DIT, SIDE, SIT, write_class_dit

OPTIONS = FineTuningOptions(
    train="temporal", max_frames=5, dtype="float32", steps=4, warmup=1, learning_rate=1e-2, sampling_steps=2, samples=1
)
FIXED = {"_class_name": "DDPMScheduler", "clip_sample": False, "num_train_timesteps": 100}
"""A scheduler that drops the learned variance, and scales the model's time otherwise than its `config.json`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of DiT in diffusers' layout, to be read only."""
    return write_class_dit(tmp_path_factory.mktemp("dit") / "images", scheduler=FIXED)


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """Return the folder of SiT in its authors' layout, to be read only."""
    return write_class_dit(tmp_path_factory.mktemp("sit") / "images", SIT, scheduler=None)


def make_experiment(folder, **options):
    return make_finetuning_experiment(folder, dataclasses.replace(OPTIONS, **options))


def load_initial(experiment, folder):
    """Return the initial parameters of an experiment's training."""
    mesh = make_mesh(experiment.parallel)
    trained = open_trainable_denoiser(experiment.denoiser, experiment.model, folder, mesh, is_resuming=False)
    return trained.load_initial(jax.random.key(0))


def test_the_experiment_of_image_weights_follows_from_the_folder(folder, tmp_path):
    experiment, images = make_experiment(folder), dit_video.load(folder, dtype="float32").config.model
    model = experiment.model
    assert model.backbone == add_temporal_layers(images.backbone).replace(remat="full")
    same = ("autoencoder", "text_encoder", "process", "prediction")
    assert all(getattr(model, field) == getattr(images, field) for field in same)
    assert model.fps is None
    assert experiment.denoiser.train == TemporalWeights(init_from=str(folder))
    assert experiment.denoiser.times == Uniform()
    assert config_json.from_json(config_json.to_json(experiment)) == experiment
    start, before = load_initial(experiment, tmp_path)["backbone"], load_denoiser(folder / "transformer")[1]
    assert all(np.array_equal(flatten(start)[path], leaf) for path, leaf in flatten(before).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "authors"])
def test_image_weights_with_temporal_layers_sample_every_frame_as_before(request, name, tmp_path):
    folder = request.getfixturevalue(name)
    experiment, images = make_experiment(folder), dit_video.load(folder, dtype="float32")

    def sample_latents(backbone, params):
        pipeline = images.replace(config=images.config.replace_model(backbone=backbone, fps=8.0), denoiser=params)
        return generate_latents(pipeline, 2, size=(3, SIDE, SIDE), steps=3, guidance=2.0)

    # The image model on the same noise: its tokens see their frame, and no position tells the time.
    expected = sample_latents(images.config.model.backbone.replace(pattern=SpaceOnly()), images.denoiser_params)
    latents = sample_latents(experiment.model.backbone, load_initial(experiment, tmp_path))
    np.testing.assert_allclose(latents, expected, atol=1e-6 * np.abs(expected).max())
    assert np.abs(expected[1] - expected[0]).max() > 0.1


@pytest.mark.slow
def test_temporal_layers_of_image_weights_are_trained_on_clips_of_classes(tiny_run, tiny_clips, tmp_path):
    with (tiny_clips / "metadata.csv").open(newline="") as file:
        names = sorted({row["text"] for row in csv.DictReader(file)})
    numbered = {str(number): name for number, name in enumerate(names)}
    folder = write_class_dit(tmp_path / "dit", DIT.replace(classes=len(names)), names=numbered)
    experiment = make_experiment(folder)
    run = Run.create(tmp_path / "run", experiment)
    run.train((tiny_run / "data").resolve())
    before, pipeline = flatten(load_initial(experiment, tmp_path)), dit_video.load(run.folder)
    for path, leaf in flatten(pipeline.denoiser_params).items():
        assert (np.abs(leaf - before[path]).max() > 0) == ("temporal" in path), path
    clips = [pipeline.generate(name, size=(5, SIDE, SIDE), steps=2, guidance=1.0) for name in names[:2]]
    assert clips[0].frames.shape == (5, SIDE, SIDE, 3)
    assert np.abs(clips[0].frames.astype(int) - clips[1].frames).max() > 1
    other = make_experiment(write_class_dit(tmp_path / "other", names={}))
    refused = Run.create(tmp_path / "refused", other)
    with pytest.raises(UserError, match=r"the caption '.*' is no class: use a number from 0 to 4"):
        refused.train((tiny_run / "data").resolve())
    assert not (tmp_path / "refused" / "latents").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_frames": None}, r"max_frames=1 is invalid with train=temporal: .*Use max_frames=17, or more"),
        ({"train": "lora"}, r"max_frames=5 is invalid with train=lora: .* order of frames\. Use train=temporal"),
        ({"spatial_layers": 3}, "2 layers need a divisor as spatial_layers"),
    ],
)
def test_options_that_do_not_fit_images_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        make_experiment(folder, **options)


def test_image_weights_are_not_distilled(folder):
    with pytest.raises(UserError, match=r"open weights of images, .*; distil a text-to-video model"):
        make_distillation_experiment(folder)
