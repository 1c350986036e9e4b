"""CLIP: its towers, and the preprocessing of images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.models.features import ClipConfig, ClipImageProcessor
from dit_video.models.features.clip import preprocess_frames, resize_bicubic
from dit_video.nn import get_graph_def, get_param_shapes
from support.random_params import make_random_params
from support.tiny_clip import CONFIG, END, START, TEXT, VISION

PARAMS = make_random_params(CONFIG.make)
CLIP = get_graph_def(CONFIG.make)
IDS = jnp.asarray([[START, 3, 9, 4, END, 0, 0, 0], [START, 7, END, 0, 0, 0, 0, 0]], jnp.int32)
MASK = (jnp.arange(8) < jnp.asarray([[5], [3]])).astype(jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12, 3)), jnp.float32)


@jax.jit
def read(ids, mask):
    return nnx.merge(CLIP, PARAMS).text(ids, mask)


@jax.jit
def look(images):
    return nnx.merge(CLIP, PARAMS).vision(images)


def test_a_token_sees_itself_and_those_before_it():
    before = read(IDS, MASK)
    assert np.std(before.values[MASK == 1]) > 0.3
    after = read(IDS.at[0, 3].set(5), MASK)
    np.testing.assert_array_equal(after.values[0, :3], before.values[0, :3])
    assert np.abs(after.values[0, 3:5] - before.values[0, 3:5]).max(axis=1).min() > 1e-3
    np.testing.assert_array_equal(after.values[1], before.values[1])


def test_padding_is_not_seen():
    before = read(IDS, MASK)
    after = read(jnp.where(MASK == 1, IDS, 11), MASK)
    for one, other in zip(before[:2], after[:2], strict=True):
        np.testing.assert_array_equal(one[MASK == 1], other[MASK == 1])
    np.testing.assert_array_equal(after.projected, before.projected)
    in_front = jnp.roll(IDS, 3, axis=1), jnp.roll(MASK, 3, axis=1)
    changed = in_front[0].at[:, :3].set(11), in_front[1]
    np.testing.assert_array_equal(read(*changed).values[:, 3:5], read(*in_front).values[:, 3:5])


def test_a_text_is_pooled_at_its_first_end():
    features = read(IDS, MASK)
    np.testing.assert_array_equal(features.pooled, jnp.stack([features.values[0, 4], features.values[1, 2]]))
    twice = read(IDS.at[0, 5:].set(END), jnp.ones_like(MASK))
    np.testing.assert_array_equal(twice.pooled[0], twice.values[0, 4])
    np.testing.assert_allclose(
        features.projected, features.pooled @ PARAMS["text"]["projection"]["kernel"], rtol=1e-4, atol=1e-5
    )


def test_folders_of_before_2023_end_at_the_largest_id():
    old = dataclasses.replace(TEXT, end_token=2)
    features = nnx.merge(get_graph_def(old.make), PARAMS["text"])(IDS.at[0, 1].set(2), MASK)
    np.testing.assert_array_equal(features.pooled, jnp.stack([features.values[0, 4], features.values[1, 2]]))


def test_image_features_depend_on_every_pixel():
    features = look(IMAGES)
    assert features.values.shape == (2, VISION.tokens, 12) == (2, 10, 12)
    for place in ((0, 0, 0), (11, 11, 2), (5, 8, 1)):
        changed = look(IMAGES.at[0, *place].add(1.0))
        assert np.abs(changed.projected[0] - features.projected[0]).max() > 1e-4, place
        np.testing.assert_array_equal(changed.projected[1], features.projected[1])


def test_image_features_depend_on_the_places_of_patches():
    turned = look(IMAGES[:, ::-1])
    assert np.abs(turned.pooled - look(IMAGES).pooled).max() > 1e-2


def test_the_penultimate_states_enter_the_last_layer():
    fewer = dataclasses.replace(VISION, layers=2)
    params = PARAMS["vision"] | {"blocks": jax.tree.map(lambda value: value[:2], PARAMS["vision"]["blocks"])}
    values = nnx.merge(get_graph_def(fewer.make), params)(IMAGES).values
    np.testing.assert_allclose(look(IMAGES).penultimate, values, atol=1e-5)


def test_similarity_is_a_scaled_cosine():
    texts, images = read(IDS, MASK).projected, look(IMAGES).projected
    result = nnx.merge(CLIP, PARAMS).similarity(texts, images)
    for a, b in np.ndindex(2, 2):
        one, other = np.asarray(texts[a], np.float64), np.asarray(images[b], np.float64)
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        np.testing.assert_allclose(result[a, b], np.exp(PARAMS["logit_scale"]) * cosine, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_bfloat16_is_close():
    half = ClipConfig(
        text=dataclasses.replace(TEXT, dtype="bfloat16"), vision=dataclasses.replace(VISION, dtype="bfloat16")
    )
    clip = nnx.merge(get_graph_def(half.make), PARAMS)
    for rounded, exact in (
        (clip.text(IDS, MASK).values, read(IDS, MASK).values),
        (clip.vision(IMAGES).values, look(IMAGES).values),
    ):
        assert rounded.dtype == jnp.float32
        assert 1e-4 < np.abs(rounded - exact).mean() < 0.05


def test_sizes_are_those_of_the_published_models():
    large = dataclasses.replace(
        VISION, width=1280, layers=32, heads=16, mlp_width=5120, size=224, patch=14, projection=None
    )
    assert large.tokens == 257  # Wan's
    shapes = get_param_shapes(large.make)
    assert shapes["position"].shape == (257, 1280)
    assert shapes["blocks"]["up"]["kernel"].shape == (32, 1280, 5120)


def test_configs_are_the_same_after_json():
    assert config_json.from_json(config_json.to_json(CONFIG)) == CONFIG


def test_inputs_of_another_size_are_refused():
    clip = nnx.merge(CLIP, PARAMS)
    with pytest.raises(UserError, match=r"12x16 .*12x12.* Prepare"):
        clip.vision(jnp.zeros((1, 12, 16, 3)))
    with pytest.raises(UserError, match=r"13 tokens .*up to 12"):
        clip.text(jnp.zeros((1, 13), jnp.int32), jnp.ones((1, 13), jnp.int32))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TEXT, {"layers": 0, "positions": 0}, "layers=0.*at least 1"),
        (TEXT, {"positions": 0}, "positions=0 .*at least 1"),
        (TEXT, {"projection": 0}, "projection=0 .*at least 1"),
        (TEXT, {"heads": 3}, "width=16 .*heads=3"),
        (TEXT, {"dtype": "float16"}, "dtype='float16' .*float32 or bfloat16"),
        (VISION, {"patch": 5}, "size=12 .*patch=5"),
        (CONFIG, {"vision": dataclasses.replace(VISION, projection=7)}, "=6, vision.projection=7 .*the same"),
        (CONFIG, {"text": dataclasses.replace(TEXT, projection=None)}, "=None, vision.projection=6 .*the same"),
    ],
)
def test_invalid_shapes_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)


# Images


FRAMES = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)


def plain(**fields):
    return ClipImageProcessor(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **fields)


def test_resizing_keeps_constants_and_linear_ramps():
    flat = np.full((1, 30, 50, 3), 77, np.uint8)
    assert (resize_bicubic(flat, 13, 90) == 77).all()
    assert resize_bicubic(FRAMES, 40, 60) is not FRAMES
    np.testing.assert_array_equal(resize_bicubic(FRAMES, 40, 60), FRAMES)
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, None, :, None], (1, 8, 120, 3))
    half = resize_bicubic(ramp, 4, 60)[0, 0, 4:-4, 0]
    np.testing.assert_array_equal(half, np.arange(0, 240, 4)[4:-4] + 1)


def test_the_response_to_an_impulse_is_the_kernel():
    """Keys' cubic with a = -1/2 at distances of an eighth, three eighths, … of a pixel, of four times the width."""
    line = np.zeros((1, 1, 9, 3), np.uint8)
    line[0, 0, 4] = 200
    result = resize_bicubic(line, 1, 36)[0, 0, :, 0].astype(float)
    x = np.abs((np.arange(36) + 0.5) / 4 - 4.5)
    kernel = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    np.testing.assert_allclose(result, np.clip(200 * kernel, 0, 255), atol=0.51)


def test_the_shorter_side_is_resized_and_the_centre_is_cropped():
    images = plain(resize=20, crop=(20, 20))
    assert images.compute_size(40, 60) == (20, 30)
    assert images.compute_size(60, 40) == (30, 20)
    assert images.compute_size(37, 50) == (20, 27)  # 27.03
    assert images.compute_size(30, 30) == (20, 20)
    expected = resize_bicubic(FRAMES, 20, 30)[:, :, 5:25].astype(np.float32) / 255
    np.testing.assert_allclose(preprocess_frames(FRAMES, images), expected, atol=1e-6)


def test_other_sizes_are_resized_or_cropped_as_configured():
    squashed = preprocess_frames(FRAMES, plain(resize=(16, 24), crop=None))
    np.testing.assert_allclose(squashed * 255, resize_bicubic(FRAMES, 16, 24), atol=1e-4)
    cropped = preprocess_frames(FRAMES, plain(resize=None, crop=(31, 20)))
    np.testing.assert_allclose(cropped * 255, FRAMES[:, 4:35, 20:40], atol=1e-4)


def test_colours_are_normalised():
    images = ClipImageProcessor(resize=None, crop=None, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    result = preprocess_frames(FRAMES, images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, (FRAMES / 255 - [0.1, 0.2, 0.3]) / [1, 2, 4], atol=1e-6)


def test_invalid_settings_and_frames_are_refused():
    with pytest.raises(UserError, match=r"crop=50x20 .*40x60"):
        preprocess_frames(FRAMES, plain(resize=None, crop=(50, 20)))
    for change in ({"resize": 0}, {"resize": (4, 0)}, {"crop": (0, 4)}):
        with pytest.raises(UserError, match=r"resize=.*crop=.*at least 1"):
            dataclasses.replace(ClipImageProcessor(), **change)
    with pytest.raises(UserError, match=r"std=\(1.0, 0.0, 1.0\) .*above 0"):
        ClipImageProcessor(std=(1.0, 0.0, 1.0))
