"""Vector-quantised autoencoders with random parameters: sizes, indices, chunks, canvases, modulated norms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json, pixels
from dit_video.core.errors import UserError
from dit_video.core.trees import count_values, flatten
from dit_video.models.autoencoders import (
    Autoencoder,
    AutoencoderConfig,
    CausalVaeConfig,
    CodebookConfig,
    ImageLevels,
    ImageVaeConfig,
    VqConfig,
    decode_stream,
    encode_stream,
)
from dit_video.models.autoencoders.codebook import Codebook, find_nearest_codes
from dit_video.models.autoencoders.vae import BlockInputs, PositionNorm
from dit_video.models.autoencoders.vq import SpatialNorm, VqAutoencoder
from dit_video.nn import ConvCache, get_graph_def, get_param_shapes, init_params
from dit_video.tokens import Grid
from support.marks import mark_slow_except
from support.random_params import make_random_params

VIDEO = CausalVaeConfig(channels=5, width=4, multipliers=(1, 2), factors=(Grid(2, 2, 2),), blocks=1)
IMAGE = ImageVaeConfig(channels=6, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2, attention=(1,)))
BOOK = CodebookConfig(codes=32, width=3)
CONFIGS = {
    "video": VqConfig(network=VIDEO, codebook=BOOK, modulated=True),
    "image": VqConfig(network=IMAGE, codebook=BOOK, modulated=True),
    "spherical": VqConfig(network=VIDEO, codebook=CodebookConfig(codes=32, width=3, spherical=True)),
}
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 7, 4, 6, 3), np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(config, method, params, *arrays):
    return getattr(nnx.merge(get_graph_def(config.make), params), method)(*arrays)


@functools.cache
def setting(name):
    """Return a config, parameters, a clip, its latents and their pixels."""
    config = CONFIGS[name]
    params = make_random_params(config.make)
    clip = jnp.asarray(pixels.to_float(FRAMES))
    latents = call(config, "encode", params, clip)
    return config, params, clip, latents, call(config, "decode", params, latents)


@pytest.mark.parametrize("name", mark_slow_except(("spherical",), CONFIGS))
def test_every_network_has_the_interface_of_autoencoders(name):
    config, _, clip, latents, decoded = setting(name)
    assert isinstance(config, AutoencoderConfig)
    assert issubclass(VqAutoencoder, Autoencoder)
    assert config.stride == config.network.stride
    assert latents.shape == (2, 4 if config.stride.t == 2 else 7, 2, 3, config.channels)
    assert decoded.shape == clip.shape
    assert np.std(decoded) > 0.1


@pytest.mark.nightly
@pytest.mark.parametrize("name", mark_slow_except(("video",), CONFIGS))
def test_indices_determine_the_latents(name):
    config, params, clip, latents, decoded = setting(name)
    indices = call(config, "encode_indices", params, clip)
    assert indices.shape == latents.shape[:-1]
    assert len(np.unique(indices)) > 2
    np.testing.assert_allclose(call(config, "decode_indices", params, indices), decoded, atol=1e-5)
    quantized = call(config, "quantize", params, clip)
    np.testing.assert_array_equal(quantized.indices, indices)
    np.testing.assert_allclose(call(config, "reconstruct", params, quantized.vectors), decoded, atol=1e-4)
    # Latents that are not codes give other pixels.
    assert np.abs(call(config, "reconstruct", params, quantized.latents) - decoded).max() > 0.1


def test_latents_are_decoded_as_they_are_if_the_config_says_so():
    """As Kandinsky's pipelines do; codes are decoded alike."""
    config = CONFIGS["image"]
    plain = dataclasses.replace(config, quantized_decoding=False)
    model, other = (each.make(nnx.Rngs(0)) for each in (config, plain))
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 4, 4, config.channels)), jnp.float32)
    np.testing.assert_array_equal(other.decode(latents), other.reconstruct(other.normalizer.denormalize(latents)))
    assert np.abs(model.decode(latents) - other.decode(latents)).max() > 1e-3
    indices = jnp.zeros((1, 1, 4, 4), jnp.int32)
    np.testing.assert_array_equal(model.decode_indices(indices), other.decode_indices(indices))


def test_an_index_out_of_range_is_refused():
    config, params, _, _, _ = setting("video")
    model = nnx.merge(get_graph_def(config.make), params)
    with pytest.raises(UserError, match=r"index 32 .* 0 to 31.* Use the codebook"):
        model.decode_indices(np.full((1, 1, 2, 3), 32))


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        pytest.param("video", 1, marks=pytest.mark.nightly),
        pytest.param("video", 3, marks=pytest.mark.slow),
        pytest.param("image", 2, marks=pytest.mark.slow),
    ],
)
def test_streamed_chunks_equal_the_whole_clip(name, chunk):
    config, params, _, latents, decoded = setting(name)
    encoded = list(encode_stream(config, params, [FRAMES[:, :4], FRAMES[:, 4:]], chunk=chunk))
    np.testing.assert_allclose(np.concatenate(encoded, axis=1), latents, atol=1e-5)
    frames = np.concatenate(list(decode_stream(config, params, [np.asarray(latents)], chunk=chunk)), axis=1)
    difference = np.abs(frames.astype(int) - pixels.to_uint8(np.asarray(decoded)))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("name", mark_slow_except(["video"], ["video", "image"]))
def test_clips_on_a_canvas_do_not_see_each_other(name):
    config, params, clip, latents, _ = setting(name)
    canvas = jnp.concatenate([clip[:1], jnp.full((1, 7, 4, 2, 3), -1.0), clip[1:]], axis=3)
    inside = jnp.asarray([[[1, 1, 1, 0, 2, 2, 2]] * 2], jnp.int32)
    together = call(config, "encode", params, canvas, inside)
    np.testing.assert_allclose(together[0, :, :, :3], latents[0], atol=1e-5)
    np.testing.assert_allclose(together[0, :, :, 4:], latents[1], atol=1e-5)


@pytest.mark.nightly
def test_frames_are_modulated_by_the_latents_of_their_places():
    norm = SpatialNorm(PositionNorm(4), 4, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 4, 6, 4))
    latents = jax.random.normal(jax.random.key(1), (1, 3, 2, 3, 3))
    np.testing.assert_allclose(
        norm(x, BlockInputs(latents=latents)), norm.norm(x, BlockInputs()), atol=1e-6
    )  # at the start it is the norm alone
    norm.scale.kernel[...] = jax.random.normal(jax.random.key(2), (3, 4))
    norm.shift.kernel[...] = jax.random.normal(jax.random.key(3), (3, 4))
    whole = norm(x, BlockInputs(latents=latents))
    for t, h, w in ((0, 0, 0), (1, 3, 5), (2, 2, 0), (3, 1, 4), (4, 3, 3)):
        latent = latents[0, (t + 1) // 2, h // 2, w // 2]
        expected = norm.norm(x, BlockInputs())[0, t, h, w] * norm.scale(latent) + norm.shift(latent)
        np.testing.assert_allclose(whole[0, t, h, w], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm(x[:, :1], BlockInputs(latents=latents[:, :1])), whole[:, :1], atol=1e-6)
    np.testing.assert_allclose(
        norm(x[:, 1:], BlockInputs(latents=latents[:, 1:], cache=ConvCache(()))), whole[:, 1:], atol=1e-6
    )


@pytest.mark.parametrize(("name", "norms"), [("video", 2 * 6 + 2), ("image", 2 * 6 + 2 + 2)])
def test_codes_modulate_all_norms_of_the_decoder_alone(name, norms):
    """There are two norms in each of 6 residual blocks, one in each attention, and a last one."""
    paths = [path.split("/") for path in flatten(get_param_shapes(CONFIGS[name].make)) if path.endswith("shift/kernel")]
    assert {path[0] for path in paths} == {"decoder"}
    assert len(paths) == norms


def test_the_config_of_kandinsky_has_its_size():
    assert round(count_values(get_param_shapes(VqConfig.kandinsky().make)) / 1e6) == 68


@pytest.mark.nightly
def test_a_fresh_autoencoder_is_finite_and_its_codes_differ():
    config = CONFIGS["video"]
    params = jax.jit(lambda key: init_params(config.make, key))(jax.random.key(0))
    result = call(config, "quantize", params, jnp.asarray(pixels.to_float(FRAMES)))
    assert np.isfinite(result.vectors).all()
    assert len(np.unique(result.indices)) > 2


def test_a_config_is_the_same_after_json():
    config = CONFIGS["spherical"]
    assert config_json.from_json(config_json.to_json(config)) == config


def test_networks_that_cannot_be_quantised_are_refused():
    with pytest.raises(UserError, match=r"network.std=0\.1 .*Use None"):
        VqConfig(network=CausalVaeConfig(std=0.1))
    with pytest.raises(UserError, match=r"network.std=0\.0 .*Use None"):
        VqConfig(network=ImageVaeConfig(std=0.0))
    with pytest.raises(UserError, match=r"use_quant_conv=False.*Use True for both"):
        VqConfig(network=ImageVaeConfig.flux())


def test_clips_that_the_stride_does_not_divide_are_refused():
    config, params, clip, _, _ = setting("video")
    with pytest.raises(UserError, match=r"T=6 is not 1 \+ 2k"):
        call(config, "encode_indices", params, clip[:, :6])


# Quantisation: nearest codes, the straight-through gradient, and indices


DRAW = np.random.default_rng(0)


def book(codes, **options):
    codes = np.asarray(codes, np.float32)
    made = Codebook(CodebookConfig(codes=len(codes), width=codes.shape[1], **options), rngs=nnx.Rngs(0))
    made.codes[...] = jnp.asarray(codes)
    return made


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 64])
def test_the_nearest_code_is_chosen_whatever_the_chunk(chunk):
    codes = DRAW.normal(size=(11, 3)).astype(np.float32)
    latents = DRAW.normal(size=(2, 3, 5, 3)).astype(np.float32)
    distances = np.square(latents[..., None, :] - codes).sum(axis=-1)
    np.testing.assert_array_equal(
        find_nearest_codes(jnp.asarray(latents), jnp.asarray(codes), chunk=chunk), distances.argmin(axis=-1)
    )


def test_the_first_of_equal_codes_is_chosen():
    codes = jnp.ones((7, 2))
    for chunk in (2, 7):
        assert (np.asarray(find_nearest_codes(jnp.zeros((4, 2)), codes, chunk=chunk)) == 0).all()


def test_memory_grows_with_the_chunk_and_not_with_the_codes():
    def temporary(codes, chunk):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, 4), (codes, 4))]
        compiled = (
            jax.jit(lambda latents, codes: find_nearest_codes(latents, codes, chunk=chunk)).lower(*shapes).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096, 4096) > 4096**2 * 4
    assert temporary(4096, 256) < 1.2 * temporary(1024, 256)
    assert temporary(4096, 256) < 4096**2


def test_a_quantised_latent_is_its_code_and_passes_gradients_on():
    codes = book([[0, 0], [4, 0], [0, 4]])
    latents = jnp.asarray([[3.0, 1.0], [0.5, -1.0]]).reshape(1, 1, 1, 2, 2)
    result = codes(latents)
    np.testing.assert_array_equal(result.indices.reshape(-1), [1, 0])
    np.testing.assert_allclose(result.vectors.reshape(2, 2), [[4, 0], [0, 0]], atol=1e-6)
    assert result.commitment_loss.shape == (1,)
    # Squared distances 1 + 1 and 0.25 + 1, over four values.
    np.testing.assert_allclose(result.commitment_loss, [3.25 / 4])
    np.testing.assert_array_equal(result.commitment_loss, result.codebook_loss)
    weights = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    graph, _ = nnx.split(codes)

    def through(part):
        def value(latents, codes):
            quantized = nnx.merge(graph, {"codes": codes})(latents)
            values = {"vectors": quantized.vectors.reshape(2, 2) * weights}
            return {**values, "commitment": quantized.commitment_loss, "attraction": quantized.codebook_loss}[
                part
            ].sum()

        return jax.grad(value, argnums=(0, 1))(latents, codes.codes[...])

    by_latents, by_codes = through("vectors")
    np.testing.assert_array_equal(by_latents.reshape(2, 2), weights)
    assert not by_codes.any()
    by_latents, by_codes = through("commitment")
    np.testing.assert_allclose(by_latents.reshape(2, 2), [[-0.5, 0.5], [0.25, -0.5]])
    assert not by_codes.any()
    by_latents, by_codes = through("attraction")
    assert not by_latents.any()
    np.testing.assert_allclose(by_codes, [[-0.25, 0.5], [0.5, -0.5], [0, 0]])


def test_spherical_codes_are_compared_by_their_direction():
    codes = book([[10, 0], [0, 0.1]], spherical=True)
    latents = jnp.asarray([[0.1, 0.2], [5.0, 4.0], [0.0, 0.0]]).reshape(1, 1, 1, 3, 2)
    result = codes(latents)
    np.testing.assert_array_equal(result.indices.reshape(-1)[:2], [1, 0])
    np.testing.assert_allclose(result.vectors.reshape(3, 2)[:2], [[0, 1], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(result.latents.reshape(3, 2)[:2], axis=-1), 1, rtol=1e-6)
    gradient = jax.grad(lambda x: codes(x).commitment_loss.sum())(latents)
    assert np.isfinite(gradient).all()


def test_looked_up_codes_are_found_again():
    codes = book(DRAW.normal(size=(5, 3)))
    indices = np.asarray([[4, 0], [2, 2]], np.int32).reshape(1, 1, 2, 2)
    vectors = codes.look_up(indices)
    np.testing.assert_array_equal(vectors, np.asarray(codes.codes[...])[indices])
    np.testing.assert_array_equal(codes.find_nearest(vectors), indices)


@pytest.mark.parametrize("wrong", [5, -1])
def test_an_index_out_of_range_is_refused_by_the_quantizer(wrong):
    codes = book(DRAW.normal(size=(5, 3)))
    indices = np.asarray([0, wrong], np.int32).reshape(1, 1, 1, 2)
    with pytest.raises(UserError, match=f"index {wrong} .* 0 to 4.* Use the codebook"):
        codes.look_up(indices)
    traced = jax.jit(lambda indices: codes.look_up(indices))(indices).reshape(2, 3)
    assert np.isfinite(traced[0]).all()
    assert np.isnan(traced[1]).all()


@pytest.mark.parametrize(("codes", "width"), [(0, 4), (8, 0)])
def test_an_empty_codebook_is_refused(codes, width):
    with pytest.raises(UserError, match="=0 is invalid: it must be at least 1"):
        CodebookConfig(codes=codes, width=width)
