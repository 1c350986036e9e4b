"""Initial weights of a training, from the same autoencoder or from an image one that is inflated."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten, unflatten
from dit_video.data.windows import WindowConfig
from dit_video.experiment import TrainAutoencoder
from dit_video.experiment.autoencoder import load_initial_params, make_autoencoder_step, make_init
from dit_video.experiment.run import Run
from dit_video.families import save_autoencoder
from dit_video.models.autoencoders import (
    AdversarialConfig,
    AutoencoderConfig,
    AutoencoderObjective,
    CausalVaeConfig,
    CodebookConfig,
    ImageLevels,
    ImageVaeConfig,
    InflatedConfig,
    PatchVaeConfig,
    VqConfig,
)
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from support.random_params import make_random_params

IMAGE = ImageVaeConfig(channels=4, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2))


def training(start=None):
    return TrainAutoencoder(
        windows=(WindowConfig(size=Grid(5, 16, 16), batch=2),),
        optimizer=AdamW(learning_rate=1e-2, schedule=Constant(warmup=1), weight_decay=0.1, trainable=("/temporal/",)),
        steps=4,
        init_from=None if start is None else str(start),
    )


def make_model(tiny, autoencoder):
    """Return the tiny model with another autoencoder, whose latents are twice as high and wide."""
    layout = PackedShape(tokens=512, text=96, segments=3)
    return dataclasses.replace(tiny.EXPERIMENT.model, autoencoder=autoencoder, layout=layout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("image")
    save_autoencoder(place, IMAGE, make_random_params(IMAGE.make))
    return place


def test_training_without_a_start_folder_has_no_initial_params():
    assert load_initial_params(training(), IMAGE, jax.random.key(0)) is None


def test_training_starts_from_the_weights_of_the_same_autoencoder(folder):
    faster = dataclasses.replace(IMAGE, levels=dataclasses.replace(IMAGE.levels, bfloat16=True))
    for model in (IMAGE, faster):
        loaded = load_initial_params(training(folder), model, jax.random.key(0))
        np.testing.assert_array_equal(loaded["moments"]["bias"], make_random_params(IMAGE.make)["moments"]["bias"])


def test_an_inflated_autoencoder_starts_from_the_image_weights(folder):
    loaded = flatten(
        load_initial_params(training(folder), InflatedConfig(image=IMAGE, kernel_size=2), jax.random.key(0))
    )
    image = flatten(make_random_params(IMAGE.make))
    for path in image:
        np.testing.assert_array_equal(loaded[path], image[path])
    assert loaded["decoder/levels/0/temporal/0/conv_in/kernel"].shape == (2, 1, 1, 8, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dataclasses.replace(IMAGE, channels=8), "channels is 4 there and 8 here"),
        (
            InflatedConfig(image=dataclasses.replace(IMAGE, levels=ImageLevels(widths=(4, 8), groups=2))),
            "levels.blocks is 1 there and 2 here",
        ),
        (PatchVaeConfig(), "type is 'dit_video.models.autoencoders:ImageVaeConfig' there"),
        (CausalVaeConfig(), "type is 'dit_video.models.autoencoders:ImageVaeConfig' there"),
    ],
)
def test_a_start_folder_with_another_autoencoder_is_refused(folder, model, message):
    with pytest.raises(UserError, match=message) as error:
        load_initial_params(training(folder), model, jax.random.key(0))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_start_folder_is_refused(tmp_path):
    with pytest.raises(MissingError):
        load_initial_params(training(tmp_path / "none"), IMAGE, jax.random.key(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted(PatchVaeConfig):
    """An autoencoder with initial parameters that follow from the clips."""

    path: str
    size: int

    def init_from_clips(self, clips):
        return unflatten({self.path: np.full(self.size, len(list(clips.read_windows())), np.float32)})


class ThreeWindows:
    """Clips with three batches of windows."""

    def read_windows(self):
        return iter([np.zeros((1, 1, 8, 8, 3), np.float32)] * 3)

    def fit_linear(self, *, stride, channels):
        raise AssertionError("nothing is fitted")


def test_what_follows_from_the_clips_takes_the_place_of_random_parameters():
    model = Fitted(width=8, blocks=1, path="decoder_in/bias", size=8)
    random, fitted = (flatten(make_init(model, clips)(jax.random.key(0))) for clips in (None, ThreeWindows()))
    for path, value in random.items():
        np.testing.assert_array_equal(fitted[path], np.full(8, 3.0) if path == model.path else value)


@pytest.mark.parametrize(("path", "size"), [("decoder_in/bais", 8), ("decoder_in/bias", 9)])
def test_parameters_that_the_model_lacks_cannot_follow_from_the_clips(path, size):
    with pytest.raises(UserError, match=rf"Fitted.init_from_clips is invalid: {path} has shape \({size},\)"):
        make_init(Fitted(width=8, blocks=1, path=path, size=size), ThreeWindows())


def test_a_model_without_a_last_layer_is_not_trained_against_a_discriminator():
    class Nameless(PatchVaeConfig):
        last_layer = AutoencoderConfig.last_layer

    loss = AutoencoderObjective(adversarial=AdversarialConfig())
    with pytest.raises(UserError, match=r"adversarial is invalid: Nameless .*Give it a property last_layer"):
        make_autoencoder_step(dataclasses.replace(training(), loss=loss), Nameless(), 0)


@pytest.mark.slow
def test_a_run_inflates_and_trains_the_temporal_layers_alone(folder, tiny, tiny_clips, tmp_path):
    experiment = dataclasses.replace(
        tiny.EXPERIMENT,
        model=make_model(tiny, InflatedConfig(image=IMAGE)),
        stages=(training(folder), tiny.EXPERIMENT.denoiser),
    )
    run = Run.create(tmp_path / "run", experiment)
    run.take(tiny_clips)
    run.run_stages("autoencoder")
    trained, image = flatten(run.codec().params), flatten(make_random_params(IMAGE.make))
    assert len(trained) > len(image)
    for path, value in trained.items():
        if path in image:  # the latents' mean and deviation too
            assert value.tobytes() == np.asarray(image[path]).tobytes(), path
    moved = {path: np.abs(value).max() for path, value in trained.items() if path.endswith("conv_out/kernel")}
    assert all(most > 0 for path, most in moved.items() if "/temporal/" in path)
    # A continued run neither needs the folder nor starts again.
    (run.folder / "autoencoder" / "weights.safetensors").unlink()
    again = Run.open(run.folder)
    elsewhere = experiment.replace_stage("autoencoder", init_from=str(tmp_path / "gone"))
    again = dataclasses.replace(again, experiment=elsewhere)
    again.run_stages("autoencoder")
    for path, value in flatten(again.codec().params).items():
        np.testing.assert_array_equal(value, trained[path])


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True], ids=["fresh", "given"])
def test_a_codebook_starts_at_latents_unless_its_weights_are_loaded(given, tiny, tiny_clips, tmp_path):
    model = VqConfig(network=IMAGE, codebook=CodebookConfig(codes=64, width=4))
    parameters = make_random_params(model.make)
    if given:
        save_autoencoder(tmp_path / "given", model, parameters)
    autoencoder = dataclasses.replace(
        training(tmp_path / "given" if given else None),
        windows=(WindowConfig(size=Grid(1, 16, 16), batch=4),),
        optimizer=AdamW(learning_rate=1e-3, schedule=Constant(warmup=1)),
    )
    experiment = dataclasses.replace(
        tiny.EXPERIMENT,
        model=make_model(tiny, model),
        stages=(autoencoder, tiny.EXPERIMENT.denoiser),
        log_every=1,
    )
    run = Run.create(tmp_path / "run", experiment)
    run.take(tiny_clips)
    run.run_stages("autoencoder")
    trained = run.codec().params
    log = [json.loads(line) for line in (run.folder / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 4
    assert all(0 < entry["usage"] <= 1 and entry["perplexity"] >= 1 for entry in log)
    assert (log[0]["restarts"] == 0) == given
    unmoved = np.isclose(trained["codebook"]["codes"], parameters["codebook"]["codes"], rtol=1e-3).all(axis=-1)
    assert (unmoved.mean() > 0.3) == given  # most codes are not used by so few images
