"""Models made from trained ones: they predict the same until their new parameters are trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path
from dit_video.models.backbones.conversion import add_cond_channels, add_temporal_layers
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.positions import BoundaryEmbedding, SineCosine
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import init_params
from dit_video.nn.attention import TimeOnly
from dit_video.training.optim.optimizer import AdamW
from support.packed_rows import CLASSES, COND_WIDTH, FIRST, TEXT_WIDTH, make_batch, predict, predict_with_gradients
from support.random_params import make_random_params

IMAGE = DiTConfig(channels=2, context_width=TEXT_WIDTH, width=24, layers=2, heads=2, mlp_ratio=2.0)
VIDEO = SpatioTemporalDiTConfig(
    channels=2, context_width=TEXT_WIDTH, width=24, layers=2, heads=2, mlp_ratio=2.0, temporal=TemporalLayers()
)
WAN = WanDitConfig(
    channels=2, context_width=TEXT_WIDTH, text_length=5, width=24, mlp_dim=40, layers=2, heads=2, time_width=32
)
KEY = jax.random.key(0)


def as_images(batch):
    """Return the first clip's two frames as two images, with its text and time."""
    halves = jnp.where(jnp.arange(18) < 4, 1, jnp.where(jnp.arange(18) < 8, 2, 0))[None]
    return batch._replace(
        segments=halves,
        positions=batch.positions * jnp.asarray([0.0, 1.0, 1.0]),
        time=batch.time.at[:, 1].set(batch.time[:, 0]),
        labels=batch.labels.at[:, 1].set(batch.labels[:, 0]),
        context=batch.context.at[:, 3:6].set(batch.context[:, :3]),
        context_segments=jnp.asarray([[1, 1, 1, 2, 2, 2, 0]]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "temporal"),
    [
        (dataclasses.replace(IMAGE, absolute_position=BoundaryEmbedding()), TemporalLayers()),
        (
            # As DiT-XL/2's image models are.
            dataclasses.replace(
                IMAGE,
                absolute_position=SineCosine(),
                rotary="none",
                modulation="own",
                classes=CLASSES,
            ),
            TemporalLayers(spatial_layers=2, layers=3),
        ),
    ],
    ids=["alternating", "in a block"],
)
def test_a_new_video_model_predicts_every_frame_like_the_image_model(config, temporal):
    params, batch = make_random_params(config.make), make_batch((0,))
    video, grown = add_temporal_layers(config, params, temporal, KEY)
    expected = predict(params, as_images(batch), config)[:, FIRST]
    result, gradients, _ = predict_with_gradients(grown, batch, video)
    np.testing.assert_allclose(result[:, FIRST], expected, atol=1e-6)
    assert np.abs(expected).max() > 0.1
    # What is new learns, and once it has learned frames know of each other.
    new = {path for path in flatten(grown) if path not in flatten(params)}
    for path in ("temporal_blocks/out/kernel", "temporal_blocks/down/kernel", "temporal_position/kernel"):
        assert np.abs(flatten(gradients)[path]).max() > 1e-3
    rough = flatten(make_random_params(video.make))
    trained = map_with_path(lambda path, leaf: rough[path] if path in new else leaf, grown)
    before = predict(trained, batch, video)
    after = predict(trained, batch._replace(noisy=batch.noisy.at[:, 0].add(1.0)), video)
    assert np.abs(after - before)[0, 4].max() > 1e-3  # the same place in the second frame


def test_temporal_layers_alone_are_trained_by_their_name():
    video, grown = add_temporal_layers(IMAGE, make_random_params(IMAGE.make), TemporalLayers(), KEY)
    assert video == VIDEO
    trains = AdamW(trainable=("temporal",)).is_trained
    new = {path for path in flatten(grown) if path not in flatten(make_random_params(IMAGE.make))}
    assert new
    assert {path for path in flatten(grown) if trains(path)} == new


@pytest.mark.nightly
def test_a_video_model_from_nothing_trains_its_temporal_layers():
    """Its gates are zero, too; if its last kernels were zero as well, neither would have a gradient."""
    params = jax.jit(init_params, static_argnums=0)(VIDEO.make, KEY)
    params["head"]["kernel"] = params["head"]["kernel"] + 0.1 * make_random_params(VIDEO.make)["head"]["kernel"]
    _, gradients, _ = predict_with_gradients(params, make_batch((0,)), VIDEO)
    assert np.abs(flatten(gradients)["temporal_blocks/out/kernel"]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        IMAGE,
        dataclasses.replace(IMAGE, cond_channels=1),
        WAN,
    ],
    ids=["none", "one", "wan"],
)
def test_a_model_with_more_conditioning_channels_predicts_the_same_at_first(config):
    params, batch = make_random_params(config.make), make_batch((0, 1), ())
    if config.cond_channels:
        old = batch.latents.reshape(*batch.latents.shape[:2], 4, -1)[..., :1]
        expected = predict(params, batch._replace(latents=old.reshape(*old.shape[:2], -1)), config)
    else:
        expected = predict(params, batch, config)
    grown_config, grown = add_cond_channels(config, params, 3)
    assert grown_config == dataclasses.replace(config, cond_channels=3)
    assert grown_config.cond_width == COND_WIDTH
    result, gradients, _ = predict_with_gradients(grown, batch, grown_config)
    np.testing.assert_allclose(result[0, :14], expected[0, :14], atol=1e-6)
    path = "embed/kernel" if isinstance(config, WanDitConfig) else "cond_embed/kernel"
    assert (np.abs(flatten(gradients)[path]).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize(
    ("grow", "message"),
    [
        (
            lambda params: add_temporal_layers(IMAGE, params | {"more": params["head"]}, TemporalLayers(), KEY),
            "more/bias has ",
        ),
        (lambda params: add_cond_channels(IMAGE, {"head": params["head"]}, 3), "has shape None, the config implies"),
        (
            lambda params: add_cond_channels(dataclasses.replace(IMAGE, cond_channels=3), params, 3),
            "channels=3 .* give more",
        ),
        (
            lambda params: add_temporal_layers(
                dataclasses.replace(IMAGE, pattern=TimeOnly()), params, TemporalLayers(), KEY
            ),
            r"pattern=TimeOnly\(\) is invalid: .* Use a model with Full\(\) or SpaceOnly\(\)",
        ),
        (
            lambda params: add_temporal_layers(dataclasses.replace(IMAGE, registers=1), params, TemporalLayers(), KEY),
            "registers=1 is invalid: .* Use a model with 0",
        ),
    ],
)
def test_invalid_conversions_are_refused(grow, message):
    with pytest.raises(UserError, match=message):
        grow(make_random_params(IMAGE.make))
