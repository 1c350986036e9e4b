"""The VAE of images with random parameters: sizes, independent frames, canvases, configs.

Equality with diffusers is tested in tests/families/test_autoencoder_parity.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import count_values, flatten
from dit_video.models.autoencoders import Autoencoder, AutoencoderConfig, ImageLevels, ImageVaeConfig
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.tokens import Grid
from support.random_params import make_random_params

CONFIG = ImageVaeConfig(levels=ImageLevels(widths=(4, 8), blocks=1, groups=2, attention=(0,)))
SIDE = CONFIG.stride.h


@functools.partial(jax.jit, static_argnums=0, static_argnames="config")
def call(method, params, *arrays, config=CONFIG):
    return getattr(nnx.merge(get_graph_def(config.make), params), method)(*arrays)


@pytest.fixture(scope="module")
def params():
    return make_random_params(CONFIG.make)


def clip(frames, height, width, seed=0):
    noise = np.random.default_rng(seed).normal(size=(1, frames, height * SIDE, width * SIDE, 3))
    return np.tanh(noise.cumsum(axis=2)).astype(np.float32)


@pytest.mark.nightly
def test_frames_are_coded_one_by_one(params):
    pixels = clip(3, 3, 2)
    latents = call("encode", params, pixels)
    assert latents.shape == (1, 3, 3, 2, 4)
    assert np.std(latents) > 0.1
    for frame in range(3):
        alone = call("encode", params, pixels[:, frame : frame + 1])
        np.testing.assert_allclose(latents[:, frame : frame + 1], alone, atol=1e-5)
    decoded = call("decode", params, latents)
    assert decoded.shape == pixels.shape
    assert np.std(decoded) > 0.1
    np.testing.assert_allclose(decoded[:, 1:2], call("decode", params, latents[:, 1:2]), atol=1e-5)


@pytest.mark.slow
def test_clips_on_a_canvas_get_the_latents_that_they_get_alone(params):
    clips = [clip(2, 3, 2, seed=0), clip(1, 2, 4, seed=1), clip(2, 1, 1, seed=2)]
    corners = [(0, 0), (0, 3), (4, 5)]
    canvas = np.random.default_rng(3).normal(size=(1, 2, 6 * SIDE, 7 * SIDE, 3)).astype(np.float32)
    inside = np.zeros((1, 6, 7), np.int32)
    for number, (one, (row, column)) in enumerate(zip(clips, corners, strict=True), 1):
        t, h, w = one.shape[1:4]
        canvas[:, :t, row * SIDE : row * SIDE + h, column * SIDE : column * SIDE + w] = one
        inside[:, row : row + h // SIDE, column : column + w // SIDE] = number
    together = np.asarray(call("encode", params, canvas, inside))
    for one, (row, column) in zip(clips, corners, strict=True):
        alone = call("encode", params, one)
        t, h, w = alone.shape[1:4]
        np.testing.assert_allclose(together[:, :t, row : row + h, column : column + w], alone, atol=1e-5)
    # Without their numbers they would be seen as one picture.
    assert np.abs(call("encode", params, canvas) - together).max() > 1e-2


def test_latents_are_normalised(params):
    pixels = clip(1, 2, 2)
    plain = params | {"normalizer": {"mean": np.zeros(4, np.float32), "std": np.ones(4, np.float32)}}
    normalizer = params["normalizer"]
    latents, normal = (np.asarray(call("encode", values, pixels)) for values in (plain, params))
    np.testing.assert_allclose(normal, (latents - normalizer["mean"]) / normalizer["std"], atol=1e-5)
    np.testing.assert_allclose(call("decode", params, normal), call("decode", plain, latents), atol=1e-4)


@pytest.mark.nightly
def test_a_fixed_or_zero_variance_keeps_the_mean(params):
    images = clip(1, 4, 6)
    learned = call("posterior", params, images)
    for std in (0.3, 0.0):
        posterior = call("posterior", params, images, config=dataclasses.replace(CONFIG, std=std))
        np.testing.assert_allclose(posterior.mean, learned.mean, atol=1e-6)
        noise = jnp.ones_like(posterior.mean)
        np.testing.assert_allclose(posterior.sample(noise) - posterior.mean, std, atol=1e-5)
        assert np.isfinite(posterior.kl()).all()
    with pytest.raises(UserError, match=r"std=-1\.0 .* not negative"):
        ImageVaeConfig(std=-1.0)


@pytest.mark.slow
def test_bfloat16_is_close_and_results_are_float32(params):
    pixels = clip(1, 2, 2)
    rounded = ImageVaeConfig(levels=ImageLevels(widths=(4, 8), blocks=1, groups=2, attention=(0,), bfloat16=True))
    latents = call("encode", params, pixels, config=rounded)
    assert latents.dtype == jnp.float32
    assert jax.eval_shape(lambda x: call("decode", params, x, config=rounded), latents).dtype == jnp.float32
    error = np.abs(latents - call("encode", params, pixels))
    assert 0 < error.max() < 0.3


def test_configs_of_open_models_have_their_sizes():
    stable, flux = ImageVaeConfig.stable_diffusion(), ImageVaeConfig.flux()
    assert stable.stride == flux.stride == Grid(1, 8, 8)
    assert count_values(get_param_shapes(stable.make)) == 83_653_863 + 8  # diffusers counts no normalisation
    assert (flux.channels, flux.use_quant_conv, flux.use_post_quant_conv) == (16, False, False)
    assert isinstance(stable, AutoencoderConfig)
    assert isinstance(nnx.eval_shape(lambda: CONFIG.make(nnx.Rngs(0))), Autoencoder)


def test_only_configured_places_have_attention():
    levels = ImageLevels(widths=(4, 8), groups=2, middle_attention=False)
    plain = get_param_shapes(ImageVaeConfig(levels=levels, use_quant_conv=False, use_post_quant_conv=False).make)
    assert set(plain) == {"encoder", "decoder", "normalizer"}
    assert not [path for path in flatten(plain) if "attention" in path]
    some = [path for path in flatten(get_param_shapes(CONFIG.make)) if "attentions/" in path and "query/kernel" in path]
    assert some == [
        "decoder/levels/1/attentions/0/query/kernel",
        "decoder/levels/1/attentions/1/query/kernel",
        "encoder/levels/0/attentions/0/query/kernel",
    ]


def test_a_config_is_the_same_after_json():
    assert config_json.from_json(config_json.to_json(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageLevels(widths=(4, 6), groups=4), "6 channels .*groups=4"),
        (lambda: ImageLevels(widths=()), "one level or more"),
        (lambda: ImageLevels(widths=(4,), groups=2, blocks=0), "at least 1"),
        (lambda: ImageLevels(widths=(4,), groups=2, attention=(1,)), r"attention=\(1,\) .* 0 to 0"),
        (lambda: ImageVaeConfig(channels=0), "channels=0 .*at least 1"),
    ],
)
def test_inconsistent_configs_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_sizes_that_the_stride_does_not_divide_are_refused(params):
    with pytest.raises(UserError, match=r"width 5 is not divisible by the spatial stride 2; use 4 or 6"):
        call("encode", params, np.zeros((1, 1, 4, 5, 3), np.float32))
