"""Experiments of tests of extensions."""

import dataclasses

import dit_video
from dit_video.core import config_json
from dit_video.experiment.run import Run
from dit_video.training.optim.schedules import Constant
from support.interruptions import interrupt, wait_for_save


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


def train_by_script(experiment, clips, folder, *, interrupted, monkeypatch, script):
    """Train in a folder with train.py, which is killed in the second step of a training and started again."""
    config = folder.with_name("config.py")
    document = config_json.to_json(experiment)
    config.write_text(f"from dit_video.core import config_json\nEXPERIMENT = config_json.from_json({document})")
    command = ("experiments/train.py", config, "--data", clips, "--workdir", folder, "--no-cache")
    with monkeypatch.context() as patch:
        interrupt(patch, call=2, how="killed")
        assert script(*command).code != 0
    wait_for_save(folder / interrupted, 1)
    ended = script(*command)
    assert ended.code == 0, ended.err


def replace_backbone(experiment, kind=None, **fields):
    """Return the experiment with other fields of its backbone's config, perhaps of another class."""
    model = experiment.get_model()
    own = {field.name: getattr(model.backbone, field.name) for field in dataclasses.fields(model.backbone)}
    backbone = (kind or type(model.backbone))(**own | fields)
    return experiment.replace_model(backbone=backbone)
