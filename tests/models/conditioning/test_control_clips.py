"""Second clips as conditioning: their values by hand, from training clips and requests, and their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.resize import resize
from dit_video.models.autoencoders import PatchVaeConfig
from dit_video.models.conditioning import ClipView, ControlClip, FrameCrop, LowResolutionClip
from dit_video.models.conditioning.control_clips import fold_pixels
from dit_video.nn import ONE_DEVICE, init_params
from dit_video.tokens import Grid, PackedRows
from dit_video.video import Clip

STRIDE = Grid(4, 8, 8)
LATENTS = Grid(3, 2, 4)
FRAMES = np.random.default_rng(0).integers(0, 256, (9, 16, 32, 3), np.uint8)
VIEW = ClipView(name="a.apng", frames=FRAMES, fps=8.0, frame_stride=1.0, latents=LATENTS, stride=STRIDE)


class Codec:
    """An autoencoder whose latents are the means of the pixels."""

    config = PatchVaeConfig(stride=STRIDE, channels=3)

    def encode_pixels(self, pixels):
        return fold_pixels(resize(pixels, 2, 4), STRIDE.t, Grid(1, 1, 1))


def test_pixels_are_folded_in_the_order_of_frames_rows_and_columns():
    frames = np.zeros((5, 2, 4, 3), np.uint8)
    frames[..., 0] = np.arange(5)[:, None, None] * 8 + np.arange(8).reshape(2, 4)
    folded = (fold_pixels(frames, 4, Grid(2, 2, 2)) + 1) * 127.5
    assert folded.shape == (2, 1, 2, 24)
    red = folded[..., ::3]
    np.testing.assert_allclose(red[0, 0, 0], [0, 1, 4, 5] * 2, atol=1e-4)  # the first frame, twice
    np.testing.assert_allclose(
        red[1, 0, 1], [14, 15, 18, 19, 30, 31, 34, 35], atol=1e-4
    )  # means of 8 and 16, 24 and 32
    with pytest.raises(UserError, match=r"pixels=3x1x1 is invalid: a latent has 4 frames"):
        fold_pixels(frames, 4, Grid(3, 1, 1))


@pytest.mark.parametrize("latent_channels", [0, 3])
def test_a_training_clip_and_a_request_of_its_low_resolution_have_the_same_values(latent_channels):
    config = LowResolutionClip(pixels=Grid(4, 2, 2), latent_channels=latent_channels).use_codec(Codec())
    values = config.from_clip(VIEW)
    assert values.shape == config.field.get_shape(LATENTS)
    small = resize(FRAMES, 4, 8)
    for frames in (small, np.concatenate([small, small[:3]])):  # later frames are left out
        for given in (frames, Clip(frames, fps=8.0)):
            np.testing.assert_array_equal(config.from_request(given, LATENTS), values)
    expected = (
        fold_pixels(small, 4, Grid(4, 2, 2)) if not latent_channels else Codec().encode_pixels(resize(small, 16, 32))
    )
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (FRAMES[:8], "low_resolution of 8 frames is invalid: it must have the sampled clip's 9 frames"),
        (FRAMES[0], r"low_resolution of ndarray is invalid: it must be a clip, or its frames \[T H W 3\] of uint8"),
        (0.5, "low_resolution of float is invalid"),
        (FRAMES.astype(np.float32), "low_resolution of ndarray is invalid"),
    ],
)
def test_what_is_no_clip_of_the_length_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        LowResolutionClip().use_codec(Codec()).from_request(value, LATENTS)


def test_other_channels_of_latents_than_the_autoencoder_has_are_refused():
    with pytest.raises(UserError, match=r"latent_channels=4 is invalid: the autoencoder has 3\. Use 3"):
        LowResolutionClip(latent_channels=4).use_codec(Codec()).from_clip(VIEW)


def test_noise_has_the_level_that_the_model_reads():
    """Half of the strength is noise of half the deviation, full strength is none; a level of its own in training."""
    config = LowResolutionClip(dropout=0.0)
    layout = PackedRows(segments=jnp.asarray([[1] * 400 + [2] * 400]), positions=jnp.zeros((1, 800, 3)), count=2)
    values, keys = jnp.zeros((1, 800, 12)), jax.random.split(jax.random.key(3), (1, 2))
    result = np.asarray(config.prepare(values, layout, keys, jnp.asarray([[1.0, 0.5]])).values)
    assert result.shape == (1, 800, 13)
    assert not result[0, :400].any()
    assert result[0, 400:, :12].std() == pytest.approx(0.5, rel=0.05)
    assert set(result[0, 400:, 12]) == {0.5}
    trained = np.asarray(config.prepare(values, layout, keys, None).values)[0].reshape(2, 400, 13)
    for part in trained:
        assert part[:, :12].std() == pytest.approx(part[0, 12], rel=0.05)
    assert trained[0, 0, 12] != trained[1, 0, 12]


@pytest.mark.parametrize("is_flipped", [False, True])
def test_the_control_of_a_training_clip_is_its_file_sampled_cropped_and_mirrored_alike(is_flipped, tmp_path):
    whole = np.random.default_rng(1).integers(0, 256, (12, 24, 40, 3), np.uint8)
    Clip(whole, fps=8.0).save(tmp_path / "a.apng")
    config = ControlClip(folder=str(tmp_path), pixels=Grid(4, 8, 8)).use_codec(Codec())
    view = VIEW._replace(start=3, crop=FrameCrop(24, 40, 5, 6), is_flipped=is_flipped)
    expected = whole[3:, 5:21, 6:38]
    expected = expected[:, :, ::-1] if is_flipped else expected
    np.testing.assert_array_equal(config.from_clip(view), fold_pixels(expected, 4, Grid(4, 8, 8)))


def test_missing_control_is_named(tmp_path):
    with pytest.raises(MissingError, match=r"a\.apng does not exist. Name the folder of the control"):
        ControlClip(folder=str(tmp_path)).use_codec(Codec()).from_clip(VIEW)
    with pytest.raises(MissingError, match=r"folder='', and the control of a\.apng, does not exist"):
        ControlClip().use_codec(Codec()).from_clip(VIEW)


def test_an_enlarged_clip_is_the_given_one_where_it_is_reduced():
    config = LowResolutionClip(pixels=Grid(4, 4, 4)).use_codec(Codec())
    original = np.repeat(np.repeat(np.random.default_rng(2).integers(60, 190, (9, 4, 8, 3)), 4, axis=1), 4, axis=2)
    low = resize(original.astype(np.uint8), 8, 16)
    sampled = np.clip(original + np.random.default_rng(3).normal(12, 8, original.shape), 0, 255).astype(np.uint8)
    finished = config.finish(sampled, Clip(low, fps=8))
    before, after = (np.abs(resize(each, 8, 16).astype(float) - low).mean() for each in (sampled, finished))
    assert after < 0.1 * before
    errors = [np.square(each.astype(float) - original).mean() for each in (sampled, finished)]
    assert errors[1] < 0.5 * errors[0]


def test_a_new_embedding_adds_nothing():
    config = LowResolutionClip(pixels=Grid(2, 1, 1))
    options = {"patch": Grid(1, 2, 2), "dtype": jnp.float32, "partitioner": ONE_DEVICE}
    params = init_params(lambda rngs: config.make_embedding(8, **options | {"rngs": rngs}), jax.random.key(0))
    assert params["linear"]["kernel"].shape == (4 * 6 + 1, 8)
    assert not np.asarray(params["linear"]["kernel"]).any()
