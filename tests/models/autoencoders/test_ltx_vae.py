"""LTX-Video's autoencoder with random parameters: chunks, canvases, noise, time, configs."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.pixels import to_float
from dit_video.models.autoencoders import LtxVaeConfig, Tiles, decode_stream, encode_stream
from dit_video.nn import get_graph_def
from support.random_params import make_random_params
from support.tiny_ltx import RESIDUAL_VAE, VAE

CONFIGS = {"0.9.1": VAE, "0.9.5": RESIDUAL_VAE}
FRAMES = np.random.default_rng(0).integers(0, 256, (1, 17, 32, 96, 3), np.uint8)


@functools.cache
def make_params(config):
    params = make_random_params(config.make)
    if config.has_time:
        params["decoder"]["time_scale"] = np.float32(1000)
    return params


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, pixels, segment_ids=None):
    return nnx.merge(get_graph_def(config.make), params).encode(pixels, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def decode(config, params, latents, time, keys):
    return nnx.merge(get_graph_def(config.make), params).decode(latents, time=time, keys=keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_encoded_chunks_equal_the_whole_clip(name):
    config, params = CONFIGS[name], make_params(CONFIGS[name])
    whole = np.asarray(encode(config, params, to_float(FRAMES)))
    assert whole.shape == (1, 3, 1, 3, 4)
    assert whole.std() > 0.1
    chunks = list(encode_stream(config, params, [FRAMES], chunk=1))
    assert len(chunks) == 3
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_clips_on_a_canvas_have_the_latents_that_they_have_alone(name):
    config, params = CONFIGS[name], make_params(CONFIGS[name])
    canvas = np.asarray(encode(config, params, to_float(FRAMES), np.asarray([[[1, 0, 2]]])))
    for column in (0, 2):
        alone = encode(config, params, to_float(FRAMES[:, :, :, 32 * column : 32 * (column + 1)]))
        np.testing.assert_allclose(canvas[:, :, :, column : column + 1], alone, atol=1e-5)


def make_latents(frames=3):
    return np.random.default_rng(1).normal(size=(1, frames, 1, 2, 4)).astype(np.float32)


def test_a_clip_is_decoded_as_a_whole_with_the_noise_of_its_seed():
    params, latents = make_params(VAE), make_latents()
    streams = {seed: list(decode_stream(VAE, params, [latents], chunk=1, seeds=[seed])) for seed in (0, 1)}
    assert [frames.shape for frames in streams[0]] == [(1, 17, 32, 64, 3)]
    assert (streams[0][0] != streams[1][0]).any()
    np.testing.assert_array_equal(streams[0][0], next(decode_stream(VAE, params, [latents], chunk=3, seeds=[0])))
    with pytest.raises(UserError, match="tiles are invalid: this decoder takes noise"):
        list(decode_stream(VAE, params, [latents], tiles=Tiles(height=32, width=32, overlap=0)))


@pytest.mark.nightly
def test_frames_depend_on_later_latents_on_time_and_on_noise():
    params, latents, keys = make_params(VAE), make_latents(), jax.random.split(jax.random.key(0), 1)
    frames = np.asarray(decode(VAE, params, latents, 0.05, keys))
    later = latents.copy()
    later[:, 2] += 1
    assert np.abs(decode(VAE, params, later, 0.05, keys) - frames)[:, 0].max() > 1e-3
    assert np.abs(decode(VAE, params, latents, 0.5, keys) - frames).max() > 1e-3
    clean = np.asarray(decode(VAE, params, latents, 0.05, None))
    assert np.abs(clean - frames).max() > 1e-3
    # Noise of layers is the same for all frames, and the share of noise in latents is added before.
    quiet = replace(VAE, decode_noise=0.0)
    assert np.abs(decode(quiet, params, latents, 0.05, keys) - frames).max() > 1e-3
    np.testing.assert_array_equal(decode(VAE, params, latents, 0.05, None), clean)


def test_configs_of_published_versions_survive_json():
    for config in (LtxVaeConfig.ltx_090(), LtxVaeConfig.ltx_091(), LtxVaeConfig.ltx_095(), RESIDUAL_VAE):
        assert config.stride == (8, 32, 32)
        assert config_json.from_json(config_json.to_json(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "use channels, patch, widths and factors of at least 1"),
        ({"decode_time": 1.5}, r"decode_time=1.5, .* must lie in \[0, 1\]"),
        ({"downsampling": ("conv", "conv", "spatial")}, "use none and conv, or spatial, temporal, spatiotemporal"),
        ({"widths": (4, 4)}, "do not fit 3 levels"),
        ({"noise": (True, False)}, "are 3 levels"),
        ({"upsampling": (True, True, False)}, "undoes strides of 4 in time and 16 in space"),
        ({"decoder_widths": (2, 4, 4)}, "level 2 goes from 4 to 2 channels in a block"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(VAE, **changes)
    with pytest.raises(UserError, match="spatiotemporal downsampling of 4 to 12 channels does not divide"):
        replace(RESIDUAL_VAE, widths=(4, 4, 4, 12, 8))
