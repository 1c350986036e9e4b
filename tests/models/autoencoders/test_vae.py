"""The convolutional VAE with random parameters: sizes, causality, chunks, canvases, configs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import count_values, flatten
from dit_video.models.autoencoders import CausalVaeConfig
from dit_video.models.autoencoders.vae import make_encoder_inputs
from dit_video.nn import ConvCache, get_graph_def, get_param_shapes
from dit_video.tokens import Grid
from support.marks import mark_slow_except
from support.random_params import make_random_params

PLAIN = CausalVaeConfig(channels=4, width=4, multipliers=(1, 2, 2), factors=(Grid(1, 2, 2), Grid(2, 2, 2)), blocks=1)
SHORTCUTS = dataclasses.replace(PLAIN, patch=2, shortcuts=True, decoder_width=6)
ODD = CausalVaeConfig(channels=4, width=4, multipliers=(1, 2, 1), factors=(Grid(2, 1, 1), Grid(2, 2, 2)), blocks=1)
CONFIGS = {"plain": PLAIN, "shortcuts": SHORTCUTS, "time alone": ODD}


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(config, method, params, cached, *arrays):
    """Call a method on a chunk; return its result and its cache."""
    memory = ConvCache(cached)
    model = nnx.merge(get_graph_def(config.make), params)
    return getattr(model, method)(*arrays, cache=memory), memory.features


@functools.cache
def setting(name):
    """Return a config, parameters, a clip, its latents and their pixels."""
    config = CONFIGS[name]
    params = make_random_params(config.make)
    stride = config.stride
    shape = (2, 1 + 3 * stride.t, 2 * stride.h, 3 * stride.w, 3)
    clip = np.tanh(np.random.default_rng(0).normal(size=shape).cumsum(axis=2)).astype(np.float32)
    latents, _ = call(config, "encode", params, None, clip)
    decoded, _ = call(config, "decode", params, None, latents)
    return config, params, clip, np.asarray(latents), np.asarray(decoded)


@pytest.mark.parametrize("name", mark_slow_except(["plain"], CONFIGS))
def test_latents_and_frames_have_the_expected_sizes(name):
    _, _, clip, latents, decoded = setting(name)
    assert latents.shape == (2, 4, 2, 3, 4)
    assert decoded.shape == clip.shape
    assert np.std(latents) > 0.1
    assert np.std(decoded) > 0.1


def test_strides_follow_from_the_factors():
    assert PLAIN.stride == Grid(2, 4, 4)
    assert SHORTCUTS.stride == Grid(2, 8, 8)
    assert ODD.stride == Grid(4, 2, 2)
    assert CausalVaeConfig.wan21().stride == Grid(4, 8, 8)
    assert CausalVaeConfig.wan22().stride == Grid(4, 16, 16)


@pytest.mark.parametrize(
    ("stride", "channels", "options"),
    [
        pytest.param(Grid(1, 4, 4), 4, {}, marks=pytest.mark.slow),
        pytest.param(Grid(2, 8, 8), 16, {}, marks=pytest.mark.slow),
        (Grid(4, 16, 16), 48, {"patch": 2, "shortcuts": True}),
        pytest.param(Grid(8, 32, 32), 128, {}, marks=pytest.mark.slow),
        (Grid(8, 4, 4), 128, {"shortcuts": True}),
    ],
    ids=str,
)
def test_strides_and_channels_of_any_size(stride, channels, options):
    """The first levels halve height and width, the last ones time."""
    space = int(math.log2(stride.h // options.get("patch", 1)))
    time = int(math.log2(stride.t))
    levels = max(space, time)
    factors = [(1 + (level >= levels - time), 1 + (level < space)) for level in range(levels)]
    config = CausalVaeConfig(
        channels=channels,
        width=4,
        multipliers=(1,) * (levels + 1),
        factors=tuple(Grid(t, side, side) for t, side in factors),
        blocks=1,
        **options,
    )
    assert config.stride == stride
    graph, params = get_graph_def(config.make), get_param_shapes(config.make)
    clip = jax.ShapeDtypeStruct((1, 1 + 2 * stride.t, stride.h, 3 * stride.w, 3), jnp.float32)
    latents = jax.eval_shape(lambda params, clip: nnx.merge(graph, params).encode(clip), params, clip)
    assert latents.shape == (1, 3, 1, 3, channels)
    decoded = jax.eval_shape(lambda params, latents: nnx.merge(graph, params).decode(latents), params, latents)
    assert decoded.shape == clip.shape


def test_configs_of_open_models_have_their_sizes():
    assert round(count_values(get_param_shapes(CausalVaeConfig.wan21().make)) / 1e6) == 127
    assert round(count_values(get_param_shapes(CausalVaeConfig.wan22().make)) / 1e6) == 705


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("plain", (1, 2, 3)),
        pytest.param("shortcuts", (2,), marks=pytest.mark.slow),
        pytest.param("time alone", (1, 2, 3), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_streamed_chunks_equal_the_whole_clip(name, cuts):
    config, params, clip, latents, decoded = setting(name)
    stride = config.stride.t
    cached, encoded = None, []
    for first, last in zip((0, *cuts), (*cuts, 4), strict=True):
        start = 0 if first == 0 else 1 + (first - 1) * stride
        chunk, cached = call(config, "encode", params, cached, clip[:, start : 1 + (last - 1) * stride])
        encoded.append(chunk)
    np.testing.assert_allclose(np.concatenate(encoded, axis=1), latents, atol=1e-5)
    cached, frames = None, []
    for first, last in zip((0, *cuts), (*cuts, 4), strict=True):
        chunk, cached = call(config, "decode", params, cached, latents[:, first:last])
        frames.append(chunk)
    np.testing.assert_allclose(np.concatenate(frames, axis=1), decoded, atol=1e-5)


@pytest.mark.parametrize("name", mark_slow_except(["plain"], CONFIGS))
def test_no_value_depends_on_later_frames(name):
    config, params, clip, latents, decoded = setting(name)
    stride = config.stride.t
    later = clip.copy()
    later[:, 1 + stride :] *= -1
    changed, _ = call(config, "encode", params, None, later)
    np.testing.assert_array_equal(changed[:, :2], latents[:, :2])
    assert (np.abs(changed[:, 2:] - latents[:, 2:]).max(axis=(0, 2, 3, 4)) > 1e-4).all()
    later = latents.copy()
    later[:, 2:] *= -1
    changed, _ = call(config, "decode", params, None, later)
    np.testing.assert_array_equal(changed[:, : 1 + stride], decoded[:, : 1 + stride])
    assert (np.abs(changed[:, 1 + stride :] - decoded[:, 1 + stride :]).max(axis=(0, 2, 3, 4)) > 1e-4).all()


@pytest.mark.parametrize("name", mark_slow_except(["plain"], CONFIGS))
def test_clips_on_a_canvas_do_not_see_each_other(name):
    config, params, clip, latents, _ = setting(name)
    stride = config.stride
    # Two clips of 2x3 positions, one of them a latent frame shorter, a position apart.
    t, h, w = clip.shape[1:4]
    canvas = np.full((1, t, h, 2 * w + stride.w, 3), -1, np.float32)
    canvas[0, :, :, :w] = clip[0]
    canvas[0, : t - stride.t, :, w + stride.w :] = clip[1, : t - stride.t]
    inside = np.asarray([[[1, 1, 1, 0, 2, 2, 2]] * 2], np.int32)
    together, _ = call(config, "encode", params, None, canvas, jnp.asarray(inside))
    np.testing.assert_allclose(together[0, :, :, :3], latents[0], atol=1e-5)
    np.testing.assert_allclose(together[0, :3, :, 4:], latents[1, :3], atol=1e-5)


@pytest.mark.parametrize(
    "form", mark_slow_except(["offsets", "native"], ["offsets", "winograd", "native"])
)  # in so narrow a model `auto` is `stacked`
def test_forms_of_the_convolution_agree(form):
    config, params, clip, latents, _ = setting("plain")
    chosen = dataclasses.replace(config, form=form)
    forms = {
        part.form
        for _, part in nnx.iter_modules(nnx.merge(get_graph_def(chosen.make), params))
        if hasattr(part, "form")
    }
    assert forms == {form}
    np.testing.assert_allclose(call(chosen, "encode", params, None, clip)[0], latents, atol=1e-5)


@pytest.mark.nightly
def test_bfloat16_is_close_to_float32():
    config, params, clip, latents, _ = setting("plain")
    near, _ = call(dataclasses.replace(config, bfloat16=True), "encode", params, None, clip)
    assert near.dtype == jnp.float32
    assert 0 < np.abs(near - latents).max() < 0.1 * np.abs(latents).max()


def squared_error(config, clip):
    """Return the squared error of a clip's reconstruction as a function of the parameters."""

    def error(params):
        model = nnx.merge(get_graph_def(config.make), params)
        return jnp.square(model.decode(model.encode(jnp.asarray(clip))) - clip).mean()

    return error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "shortcuts"])
def test_rematerialisation_stores_less_for_the_backward_pass(name):
    config, params, clip, *_ = setting(name)

    def count_stored_values(config):  # by the backward pass, beside the parameters
        shapes = jax.eval_shape(lambda params: jax.vjp(squared_error(config, clip), params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes)) - count_values(params)

    assert count_stored_values(dataclasses.replace(config, remat=True)) < 0.6 * count_stored_values(config)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    config, clip = dataclasses.replace(PLAIN, multipliers=(1,), factors=()), setting("plain")[2][:, :3, :4, :4]
    params = make_random_params(config.make)
    expected, result = (
        flatten(jax.jit(jax.grad(squared_error(one, clip)))(params))
        for one in (config, dataclasses.replace(config, remat=True))
    )
    for path, gradient in expected.items():
        np.testing.assert_allclose(result[path], gradient, rtol=1e-4, atol=1e-6, err_msg=path)


def test_a_fixed_variance_is_that_of_the_config():
    config, params, clip, _, _ = setting("plain")
    fixed = dataclasses.replace(config, std=0.3)
    posterior, _ = call(fixed, "posterior", params, None, clip[:1, :1])
    np.testing.assert_allclose(np.exp(0.5 * posterior.log_variance), 0.3, rtol=1e-6)


def test_no_variance_is_a_plain_autoencoder():
    config, params, clip, _, _ = setting("plain")
    plain = dataclasses.replace(config, std=0.0)
    posterior, _ = call(plain, "posterior", params, None, clip[:1, :1])
    noise = jnp.ones_like(posterior.mean)
    np.testing.assert_allclose(posterior.sample(noise), posterior.mean, atol=1e-6)
    assert np.isfinite(posterior.kl()).all()


def test_a_config_is_the_same_after_json():
    written = config_json.to_json(SHORTCUTS)
    assert written["type"] == "dit_video.models.autoencoders:CausalVaeConfig"
    assert config_json.from_json(written) == SHORTCUTS
    assert isinstance(config_json.from_json(written).factors[0], Grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": (1, 2)}, "2 factors .* 2 multipliers.* one less"),
        ({"factors": (Grid(1, 2, 2), Grid(1, 1, 1))}, "use 1 or 2"),
        ({"factors": (Grid(1, 2, 2), Grid(4, 2, 2))}, "use 1 or 2"),
        ({"factors": (Grid(1, 2, 2), Grid(2, 2, 1))}, "the same in h and w"),
        ({"channels": 0}, "at least 1"),
        ({"std": -0.1}, "std=-0.1 .*not negative"),
        ({"shortcuts": True, "multipliers": (1, 2, 3)}, "does not divide"),
        ({"width": 3, "multipliers": (1, 2, 1)}, "even widths"),
    ],
)
def test_invalid_configs_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **options)


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 4, 8, 8, 3), "T=4 is not 1 [+] 2k"), ((1, 3, 6, 8, 3), "height 6 is not divisible")]
)
def test_clips_that_the_stride_does_not_divide_are_refused(shape, message):
    config, params, *_ = setting("plain")
    with pytest.raises(UserError, match=message):
        nnx.merge(get_graph_def(config.make), params).encode(jnp.zeros(shape))


def test_pixels_without_three_channels_are_refused():
    with pytest.raises(UserError, match=r"4 channels.* use 3"):
        make_encoder_inputs(jnp.zeros((1, 1, 8, 8, 4)), PLAIN.stride, None, None)


def test_a_chunk_of_invalid_length_is_refused():
    config, params, clip, *_ = setting("plain")
    _, cached = call(config, "encode", params, None, clip[:, :1])
    with pytest.raises(UserError, match=r"a chunk of 3 frames .* use 2 or 4"):
        call(config, "encode", params, cached, clip[:, 1:4])
