"""Training runs of other autoencoders and losses than those of the tiny run."""

import contextlib
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.registry import register
from dit_video.data.windows import FittedWindows, WindowConfig
from dit_video.experiment.run import Run
from dit_video.experiment.stages.autoencoder import WINDOWS
from dit_video.models.autoencoders import (
    AdversarialConfig,
    AutoencoderConfig,
    AutoencoderObjective,
    CausalVaeConfig,
    DecodedClips,
    LatentLoss,
    from_patches,
    to_patches,
)
from dit_video.nn import Linear
from dit_video.tokens import Grid
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks import logging
from dit_video.video import Clip


@pytest.fixture(scope="module")
def convolutional(tiny):
    """Return an experiment whose convolutional autoencoder meets a discriminator, on images and videos in turn."""
    loss = AutoencoderObjective(adversarial=AdversarialConfig(width=4, layers=1))
    model = CausalVaeConfig(channels=4, width=4, multipliers=(1, 2), factors=(Grid(2, 2, 2),), blocks=1)
    autoencoder = replace(
        tiny.EXPERIMENT.autoencoder,
        windows=(WindowConfig(size=Grid(3, 8, 12), batch=2), WindowConfig(size=Grid(1, 8, 8), batch=3)),
        steps=3,
        loss=loss,
    )
    model = replace(tiny.EXPERIMENT.model, autoencoder=model, layout=replace(tiny.EXPERIMENT.model.layout, tokens=160))
    stages = (autoencoder, tiny.EXPERIMENT.denoiser)
    return replace(tiny.EXPERIMENT, model=model, stages=stages, log_every=1)


@pytest.mark.slow
def test_any_autoencoder_is_trained_against_a_discriminator(convolutional, tiny_clips, tmp_path):
    run = Run.create(tmp_path / "run", convolutional)
    run.take(tiny_clips)
    run.run_stages("autoencoder")
    params = run.codec().params
    assert params["normalizer"]["std"].shape == (4,)
    assert (params["normalizer"]["std"] != 1).all()
    entries = logging.read_metrics(tmp_path / "run" / "autoencoder" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert np.isfinite(list(entry.values())).all()
        assert entry["adversarial_weight"] > 0
        assert (entry["temporal"] > 0) == (entry["step"] % 2 == 1)  # the other batches are images
    # The weights are those of the autoencoder; the discriminator is in the checkpoint.
    assert params.keys() == {"encoder", "decoder", "moments", "latents", "normalizer"}
    assert Checkpoints(tmp_path / "run" / "autoencoder" / "checkpoints").latest() == 3
    assert Run.open(tmp_path / "run").experiment == convolutional


def test_an_autoencoder_is_that_of_another_run_as_soon_as_it_is_trained(tiny, tiny_clips, tmp_path):
    run = Run.create(tmp_path / "run", tiny.EXPERIMENT.replace_stage("autoencoder", steps=3))
    experiment = replace(tiny.EXPERIMENT, autoencoder_from=str(run.folder), stages=(tiny.EXPERIMENT.denoiser,))
    with pytest.raises(MissingError, match="has no trained autoencoder yet"):
        Run.create(tmp_path / "too_early", experiment).read_autoencoder()
    run.take(tiny_clips)
    run.run_stages("autoencoder")
    params = Run.create(tmp_path / "denoiser", experiment).read_autoencoder()
    jax.tree.map(np.testing.assert_array_equal, params, run.read_autoencoder())
    wider = experiment.replace_model(autoencoder=replace(tiny.EXPERIMENT.model.autoencoder, width=12))
    with pytest.raises(UserError, match="holds another autoencoder than the config's: width"):
        Run.create(tmp_path / "wider", wider).read_autoencoder()


def test_a_folder_of_small_squares_and_pictures_is_trained_on(tiny, tmp_path, capsys):
    """All of them: the windows follow from the clips, and only then can be too small for the loss."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(4):
        frames = np.random.default_rng(number).integers(0, 256, (9 if number % 2 else 1, 24, 24, 3)).astype(np.uint8)
        Clip(frames, fps=8).save(clips / f"{number}.{'mp4' if number % 2 else 'png'}")
    experiment = replace(tiny.EXPERIMENT, data=replace(tiny.EXPERIMENT.data, held_out=()))
    experiment = experiment.replace_stage("autoencoder", windows=FittedWindows(batch=2), steps=4)
    run = Run.create(tmp_path / "run", experiment)
    run.take(clips)
    stage = experiment.get_stage("autoencoder")
    windows = stage.choose_windows(stage.open_crops(run))
    assert {tuple(window.size): window.batch for window in windows} == {(9, 16, 16): 8, (1, 16, 16): 8}
    run.run_stages("autoencoder")
    assert not list(stage.open_batches(run, stage.open_crops(run), 0).excluded_clips)
    told = "1x16x16 of 4 clips (8 a step), 9x16x16 of 2 clips (8 a step)"
    assert capsys.readouterr().err.partition("windows of ")[2].partition("\n")[0] == told
    loss = AutoencoderObjective(adversarial=AdversarialConfig(width=4, layers=5))
    other = Run.create(tmp_path / "other", experiment.replace_stage("autoencoder", loss=loss))
    other.take(clips)
    with pytest.raises(UserError, match="needs windows of 32 pixels or more, but one has 16"):
        other.check()
    assert not (tmp_path / "other" / "autoencoder").exists()


def test_windows_stay_those_that_were_chosen_first(tiny, tiny_clips, tmp_path):
    """A later version may choose others, and a training is continued exactly."""
    experiment = tiny.EXPERIMENT.replace_stage("autoencoder", windows=FittedWindows(batch=2), steps=4)
    run = Run.create(tmp_path / "run", experiment)
    run.take(tiny_clips)
    run.run_stages("autoencoder")
    record = tmp_path / "run" / "autoencoder" / WINDOWS
    (first, *_) = read_json(record)
    window = WindowConfig(size=Grid(5, 16, 24), batch=3)
    assert config_json.from_json(first["window"]) != window
    write_json(record, [first | {"window": config_json.to_json(window)}])
    training = experiment.get_stage("autoencoder").open_training(run, is_new=False)
    with contextlib.closing(training.open_batches(4)) as batches:
        assert next(batches).shape == (3, 5, 16, 24, 3)


def test_weights_of_lpips_that_are_not_there_end_a_run_before_it_trains(tiny, tiny_clips, tmp_path):
    loss = AutoencoderObjective(lpips=0.5, lpips_weights=str(tmp_path / "lpips.safetensors"))
    run = Run.create(tmp_path / "run", tiny.EXPERIMENT.replace_stage("autoencoder", loss=loss))
    run.take(tiny_clips)
    with pytest.raises(MissingError, match=r"no such file of LPIPS weights: .*lpips\.safetensors"):
        run.run_stages("autoencoder")
    assert not (tmp_path / "run" / "autoencoder").exists()


@register
@dataclass(frozen=True, kw_only=True)
class PatchMapConfig(AutoencoderConfig):
    stride: Grid = Grid(4, 8, 8)
    channels: int = 4

    def make(self, rngs):
        return PatchMap(self, rngs)

    def make_loss(self, objective, is_trained=lambda path: True):
        return SquareLoss()


class PatchMap(nnx.Module):
    """An autoencoder that is no `Vae`: it has neither a posterior nor a normalizer."""

    def __init__(self, config, rngs):
        self.stride = config.stride
        self.encoder = Linear(3 * config.stride.volume, config.channels, rngs=rngs)
        self.decoder = Linear(config.channels, 3 * config.stride.volume, rngs=rngs)

    def encode(self, pixels, segment_ids=None, cache=None):
        return jnp.tanh(self.encoder(to_patches(pixels, self.stride)))

    def decode(self, latents, cache=None):
        return from_patches(self.decoder(latents), self.stride)


@dataclass(frozen=True, kw_only=True)
class SquareLoss(LatentLoss):
    def decode(self, model, pixels, random_key):
        latents = model.encode(pixels)
        return DecodedClips(model.decode(latents), jnp.square(latents).mean(axis=(1, 2, 3, 4)), {})


def test_an_autoencoder_without_a_normalizer_is_trained_to_its_end(tiny, tiny_clips, tmp_path):
    experiment = tiny.EXPERIMENT.replace_stage("autoencoder", steps=3)
    model = replace(experiment.model, autoencoder=PatchMapConfig())
    run = Run.create(tmp_path / "run", replace(experiment, model=model))
    run.take(tiny_clips)
    run.run_stages("autoencoder")
    assert run.codec().params.keys() == {"encoder", "decoder"}
