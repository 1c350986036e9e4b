"""Experiments of tests of extensions."""

import dataclasses

import dit_video
from dit_video.experiment import PretrainedAutoencoder
from dit_video.experiment.run import Run


def train(experiment, tiny_run, folder, clips=None):
    """Train two steps of the denoiser on the tiny run's clips and autoencoder, and return the loaded pipeline."""
    pretrained = experiment.autoencoder
    if not isinstance(pretrained, PretrainedAutoencoder):
        pretrained = PretrainedAutoencoder(model=pretrained.model, folder=str(tiny_run / "pipeline"))
    optimizer = dataclasses.replace(experiment.denoiser.optimizer, warmup=0)
    denoiser = dataclasses.replace(experiment.denoiser, steps=2, optimizer=optimizer)
    experiment = dataclasses.replace(experiment, autoencoder=pretrained, denoiser=denoiser)
    Run.create(folder, experiment).train((tiny_run / "data").resolve() if clips is None else clips)
    return dit_video.load(folder)


def replace_backbone(experiment, kind=None, *, training=None, **fields):
    """Return the experiment with other fields of its backbone's config, perhaps of another class."""
    denoiser = experiment.denoiser
    own = {field.name: getattr(denoiser.backbone, field.name) for field in dataclasses.fields(denoiser.backbone)}
    backbone = (kind or type(denoiser.backbone))(**own | fields)
    return dataclasses.replace(
        experiment, denoiser=dataclasses.replace(denoiser, backbone=backbone, **(training or {}))
    )
