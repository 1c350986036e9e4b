"""Experiments of tests of extensions."""

import dataclasses

import dit_video
from dit_video.experiment.run import Run
from dit_video.training.optim.schedules import Constant


def train(experiment, tiny_run, folder, clips=None):
    """Train two steps of the denoiser on the tiny run's clips and autoencoder, and return the loaded pipeline."""
    experiment = shorten(experiment, tiny_run)
    Run.create(folder, experiment).train((tiny_run / "data").resolve() if clips is None else clips)
    return dit_video.load(folder)


def shorten(experiment, tiny_run):
    """Return the experiment with two steps of the denoiser alone, on the latents of the tiny run's autoencoder."""
    pretrained = experiment.autoencoder_from if experiment.autoencoder is None else str(tiny_run / "pipeline")
    optimizer = dataclasses.replace(experiment.denoiser.optimizer, schedule=Constant(warmup=0))
    denoiser = dataclasses.replace(experiment.denoiser, steps=2, optimizer=optimizer)
    return dataclasses.replace(experiment, autoencoder_from=pretrained, stages=(denoiser,))


def replace_backbone(experiment, kind=None, **fields):
    """Return the experiment with other fields of its backbone's config, perhaps of another class."""
    model = experiment.get_model()
    own = {field.name: getattr(model.backbone, field.name) for field in dataclasses.fields(model.backbone)}
    backbone = (kind or type(model.backbone))(**own | fields)
    return experiment.replace_model(backbone=backbone)
