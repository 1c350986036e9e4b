"""An inflated image autoencoder: at first equal to the image autoencoder, causal, with only temporal layers trained."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.pixels import to_float
from dit_video.core.trees import flatten
from dit_video.models.autoencoders import (
    Autoencoder,
    AutoencoderConfig,
    CausalVaeConfig,
    ImageLevels,
    ImageVaeConfig,
    InflatedConfig,
    PatchVaeConfig,
    decode_stream,
    encode_stream,
    inflate,
)
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.tokens import Grid
from support.random_params import make_random_params

IMAGE = ImageVaeConfig(channels=3, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2))
LATENTS = np.random.default_rng(0).normal(size=(1, 5, 3, 4, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def image():
    return make_random_params(IMAGE.make)


@pytest.fixture(scope="module")
def inflated(image):
    return inflate(IMAGE, image, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(config, method, params, *arrays):
    return getattr(nnx.merge(get_graph_def(config.make), params), method)(*arrays)


@pytest.mark.nightly
def test_it_starts_as_the_image_autoencoder_frame_by_frame(image, inflated):
    config, params = inflated
    decoded = call(config, "decode", params, LATENTS)
    assert np.std(decoded) > 0.1
    for frame in range(5):
        alone = call(IMAGE, "decode", image, LATENTS[:, frame : frame + 1])
        np.testing.assert_allclose(decoded[:, frame : frame + 1], alone, atol=1e-6)
    pixels = np.asarray(decoded)
    np.testing.assert_array_equal(call(config, "encode", params, pixels), call(IMAGE, "encode", image, pixels))


def test_the_image_parameters_are_shared_and_only_temporal_ones_are_new(image, inflated):
    _, params = inflated
    before, after = flatten(image), flatten(params)
    assert all(after[path] is before[path] for path in before)
    new = sorted(after.keys() - before.keys())
    # Two levels of two blocks, each of two norms and two convolutions.
    assert len(new) == 2 * 2 * 8
    assert all("/temporal/" in path for path in new)
    assert after["decoder/levels/0/temporal/1/conv_in/kernel"].shape == (3, 1, 1, 8, 8)


@pytest.fixture(scope="module")
def rough(inflated):
    """Return an inflated autoencoder whose temporal layers have an effect."""
    config, params = inflated
    return config, make_random_params(config.make) | {"normalizer": params["normalizer"]}


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 2])
def test_streamed_chunks_equal_the_whole_clip(rough, chunk):
    config, params = rough
    whole = np.asarray(call(config, "decode", params, LATENTS))
    frames = np.concatenate(list(decode_stream(config, params, [LATENTS], chunk=chunk)), axis=1)
    assert np.abs(frames / 127.5 - 1 - np.clip(whole, -1, 1)).max() < 1.01 / 127.5
    latents = np.concatenate(list(encode_stream(config, params, [frames], chunk=chunk)), axis=1)
    np.testing.assert_allclose(latents, call(config, "encode", params, to_float(frames)), atol=1e-5)
    # Else it would be no test of the layers in time.
    alone = np.concatenate([call(config, "decode", params, LATENTS[:, t : t + 1]) for t in range(5)], axis=1)
    assert np.abs(alone[:, 1:] - whole[:, 1:]).max() > 0.1


def test_no_frame_depends_on_later_ones(rough):
    config, params = rough
    changed = LATENTS.copy()
    changed[:, 3:] *= -1
    left, right = (np.asarray(call(config, "decode", params, latents)) for latents in (LATENTS, changed))
    np.testing.assert_allclose(left[:, :3], right[:, :3], atol=1e-6)
    assert (np.abs(left[:, 3:] - right[:, 3:]).max(axis=(0, 2, 3, 4)) > 1e-3).all()


@pytest.mark.slow
def test_each_temporal_layer_learns_from_the_start(inflated):
    config, params = inflated
    gradients = flatten(jax.grad(lambda params: call(config, "decode", params, LATENTS).std())(params))
    last = [path for path in gradients if "/temporal/" in path and path.endswith("conv_out/kernel")]
    assert config.last_layer in last
    assert all(np.abs(gradients[path]).max() > 1e-6 for path in last)


def test_an_inflated_autoencoder_has_the_interface_of_autoencoders(inflated):
    config, params = inflated
    assert (config.stride, config.channels) == (Grid(1, 2, 2), 3)
    assert config.last_layer == "decoder/levels/1/temporal/1/conv_out/kernel"
    assert config.last_layer in flatten(params)
    assert isinstance(config, AutoencoderConfig)
    assert isinstance(nnx.merge(get_graph_def(config.make), params), Autoencoder)
    assert config_json.from_json(config_json.to_json(config)) == config
    assert jax.tree.structure(params) == jax.tree.structure(get_param_shapes(config.make))
    wide = flatten(get_param_shapes(InflatedConfig(image=IMAGE, kernel_size=5).make))
    assert wide[config.last_layer].shape == (5, 1, 1, 4, 4)


def test_parameters_of_another_model_are_refused(image):
    other = ImageVaeConfig(channels=3, levels=ImageLevels(widths=(4, 4), blocks=1, groups=2))
    with pytest.raises(UserError, match=r"decoder/conv_in/bias has shape \(8,\), the config implies \(4,\)"):
        inflate(other, image, jax.random.key(0))
    with pytest.raises(UserError, match=r"moments/bias has shape None, the config implies"):
        inflate(IMAGE, {name: part for name, part in image.items() if name != "moments"}, jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InflatedConfig(image=CausalVaeConfig()), "CausalVaeConfig has a temporal stride of 4"),
        (lambda: InflatedConfig(image=IMAGE, kernel_size=1), "kernel_size=1 .*at least 2"),
        (
            lambda: get_graph_def(InflatedConfig(image=PatchVaeConfig(stride=Grid(1, 4, 4), channels=3, width=4)).make),
            "PatchVaeConfig .*no decoder of images.*ImageVaeConfig",
        ),
    ],
)
def test_configs_that_cannot_be_inflated_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
