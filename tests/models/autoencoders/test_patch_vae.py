"""The patch autoencoder with random parameters: the network of a new one adds nothing to its linear path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.autoencoders import (
    PatchVaeConfig,
    Posterior,
    fit_linear,
    from_patches,
    make_linear_path,
    to_patches,
)
from dit_video.nn import get_graph_def, get_param_shapes, init_params
from dit_video.tokens import Grid
from support.random_params import make_random_params

PLAIN = PatchVaeConfig(stride=Grid(2, 2, 2), channels=3, width=8, blocks=2)
CONFIGS = {
    "plain": PLAIN,
    "preactivated": dataclasses.replace(PLAIN, preactivated=True, init_std=0.01),
    "a finer level": dataclasses.replace(PLAIN, fine_widths=(5,)),
}
CLIPS = np.tanh(np.random.default_rng(0).normal(size=(2, 7, 6, 8, 3)).cumsum(axis=2)).astype(np.float32)


class Model:
    """An autoencoder with random parameters, and the latents of the clips."""

    def __init__(self, config):
        self.config, self.params = config, make_random_params(config.make)
        self.latents = np.asarray(self.encode(CLIPS))

    def encode(self, clips):
        return self.call("encode", self.params, clips)

    def decode(self, latents):
        return self.call("decode", self.params, latents)

    def call(self, method, params, *arrays):
        return _call(self.config, method, params, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(config, method, params, *arrays):
    return getattr(nnx.merge(get_graph_def(config.make), params), method)(*arrays)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return Model(CONFIGS[request.param])


def test_latents_and_frames_have_the_expected_sizes(model):
    assert model.latents.shape == (2, 4, 3, 4, 3)
    assert model.decode(model.latents).shape == CLIPS.shape
    assert np.std(model.latents) > 0.3


def test_an_image_is_the_first_frame_of_a_video(model):
    np.testing.assert_allclose(model.encode(CLIPS[:, :1]), model.latents[:, :1], atol=1e-5)
    np.testing.assert_allclose(model.decode(model.latents[:, :1]), model.decode(model.latents)[:, :1], atol=1e-5)


def test_the_start_of_a_video_is_coded_the_same_without_the_rest(model):
    np.testing.assert_allclose(model.encode(CLIPS[:, :5]), model.latents[:, :3], atol=1e-5)
    np.testing.assert_allclose(model.decode(model.latents[:, :3]), model.decode(model.latents)[:, :5], atol=1e-5)


def test_latents_see_no_later_frame_and_frames_no_later_latents_bit_for_bit(model):
    later = CLIPS.copy()
    later[:, 4:] = -later[:, 4:]
    changed = np.asarray(model.encode(later))
    # Frames 0 | 1 2 | 3 4 | 5 6: frame 4 is in the third latent frame.
    np.testing.assert_array_equal(changed[:, :2], model.latents[:, :2])
    assert (np.abs(changed[:, 2:] - model.latents[:, 2:]).max(axis=(0, 2, 3, 4)) > 1e-3).all()

    before, after = (
        model.decode(model.latents),
        model.decode(np.concatenate([model.latents[:, :2], -model.latents[:, 2:]], axis=1)),
    )
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (np.abs(after[:, 3:] - before[:, 3:]).max(axis=(0, 2, 3, 4)) > 1e-3).all()


def test_a_latent_depends_on_past_and_neighbouring_pixels(model):
    changed = CLIPS.copy()
    changed[:, 0, 0, 0] += 1.0
    difference = np.abs(np.asarray(model.encode(changed)) - model.latents).max(axis=(0, 4))
    # Two blocks: two positions further in space, four latent frames further in time.
    assert (difference[:, :3, :3] > 1e-6).all()
    assert not difference[:, :, 3].any()


def test_clips_of_a_batch_do_not_see_each_other(model):
    changed = CLIPS.copy()
    changed[1] = -changed[1]
    np.testing.assert_array_equal(np.asarray(model.encode(changed))[0], model.latents[0])


def test_clips_on_a_canvas_do_not_see_each_other(model):
    # Two clips of 3x4 positions, one below the other, a position apart.
    canvas = np.full((1, 7, 14, 8, 3), -1, np.float32)
    canvas[0, :, :6], canvas[0, :, 8:] = CLIPS
    inside = np.zeros((1, 7, 4), np.int32)
    inside[0, :3], inside[0, 4:] = 1, 2
    together = np.asarray(model.call("encode", model.params, canvas, inside))
    np.testing.assert_allclose(together[0, :, :3], model.latents[0], atol=1e-5)
    np.testing.assert_allclose(together[0, :, 4:], model.latents[1], atol=1e-5)


def test_encoding_is_the_normalised_mean_and_decoding_restores_it(model):
    normalizer = model.params["normalizer"]
    posterior = model.call("posterior", model.params, CLIPS)
    np.testing.assert_allclose(model.latents, (posterior.mean - normalizer["mean"]) / normalizer["std"], atol=1e-5)
    np.testing.assert_allclose(
        model.decode(model.latents), model.call("reconstruct", model.params, posterior.mean), atol=1e-5
    )
    assert posterior.log_variance.shape == posterior.mean.shape
    assert -12 <= posterior.log_variance.min() < posterior.log_variance.max() <= 2


def test_an_autoencoder_initialised_from_principal_components_is_linear(model):
    linear = fit_linear([CLIPS], stride=model.config.stride, channels=model.config.channels)
    # What decides is that the networks' outputs are zero at first.
    fresh = jax.jit(init_params, static_argnums=0)(dataclasses.replace(model.config, blocks=0).make, jax.random.key(0))
    random = {name: model.params[name] for name in ("encoder", "decoder")}
    params = model.params | fresh | random | make_linear_path(linear)
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        path: leaf.shape for path, leaf in flatten(get_param_shapes(model.config.make)).items()
    }
    latents = model.call("encode", params, CLIPS)
    assert np.sqrt(np.square(latents).mean()) == pytest.approx(1, rel=1e-3)
    expected = from_patches(linear.reconstruct(to_patches(CLIPS, model.config.stride)), model.config.stride)
    np.testing.assert_allclose(model.call("decode", params, latents), expected, atol=1e-5)
    # It stands before training: what the network learns is a change of this.
    assert np.exp(0.5 * model.call("posterior", params, CLIPS).log_variance).max() == pytest.approx(
        model.config.init_std, rel=1e-3
    )


def test_convolutions_in_bfloat16_change_what_is_rounded_alone(model):
    config = dataclasses.replace(model.config, bfloat16=True)
    latents = _call(config, "encode", model.params, CLIPS)
    assert latents.dtype == jnp.float32
    difference = np.abs(latents - model.latents)
    assert 0 < difference.mean() < 0.01 * np.std(model.latents)
    assert get_param_shapes(config.make) == get_param_shapes(model.config.make)  # float32


def test_a_posterior_sample_is_the_mean_plus_scaled_noise():
    mean, log_variance = jnp.full((1, 1, 2, 2, 3), 2.0), jnp.full((1, 1, 2, 2, 3), np.log(0.25))
    posterior = Posterior(mean, log_variance)
    np.testing.assert_array_equal(posterior.sample(jnp.zeros_like(mean)), mean)
    np.testing.assert_allclose(posterior.sample(jnp.ones_like(mean)), 2.5, rtol=1e-6)


def test_the_divergence_is_that_of_a_normal_from_the_standard_one():
    mean = jnp.zeros((2, 1, 2, 2, 3)).at[1].set(2.0)
    log_variance = jnp.zeros_like(mean).at[1].set(np.log(0.25))
    one_channel = np.log(1 / 0.5) + (0.25 + 4) / 2 - 0.5
    np.testing.assert_allclose(Posterior(mean, log_variance).kl(), [0, 3 * one_channel], rtol=1e-5)


def test_a_clip_that_the_stride_does_not_divide_is_refused(model):
    with pytest.raises(UserError, match=r"T=6 .* use 5 or 7"):
        model.encode(CLIPS[:, :6])
    with pytest.raises(UserError, match=r"height 5 .* use 4 or 6"):
        model.encode(CLIPS[:, :, :5])


def test_an_initial_deviation_outside_the_posteriors_range_is_refused():
    with pytest.raises(UserError, match=r"init_std=0.001 .* 0.0025 to 2.7"):
        PatchVaeConfig(init_std=0.001)


@pytest.mark.parametrize(
    ("stride", "widths", "factors"),
    [
        (Grid(4, 8, 8), (), [(4, 8, 8)]),
        (Grid(4, 8, 8), (6, 5), [(2, 2, 2), (2, 2, 2), (1, 2, 2)]),
        (Grid(1, 2, 6), (6,), [(1, 2, 2), (1, 1, 3)]),
        (Grid(2, 4, 4), (6, 5), [(2, 2, 2), (1, 2, 2), (1, 1, 1)]),
    ],
)
def test_each_finer_level_doubles_the_resolution_as_far_as_the_stride_allows(stride, widths, factors):
    assert PatchVaeConfig(stride=stride, fine_widths=widths).list_factors() == factors


def test_more_finer_levels_than_the_stride_allows_are_refused():
    with pytest.raises(UserError, match=r"fine_widths=\(6, 5, 4\) .* a stride of 2x4x4 has room for 2 finer levels"):
        PatchVaeConfig(stride=Grid(2, 4, 4), fine_widths=(6, 5, 4))
    with pytest.raises(UserError, match="at least 1"):
        PatchVaeConfig(fine_widths=(0,))


def test_pixels_at_the_border_of_a_patch_see_the_next_one_by_finer_levels_alone():
    """Without blocks at latent resolution, a patch of a plain decoder is its own latent's."""
    seen = {}
    for widths in ((), (5,)):
        model = Model(PatchVaeConfig(stride=Grid(2, 2, 4), channels=3, width=8, blocks=0, fine_widths=widths))
        changed = model.latents.copy()
        changed[:, :, :, 0] += 1.0
        difference = np.abs(np.asarray(model.decode(changed)) - np.asarray(model.decode(model.latents)))
        seen[widths] = (difference.max(axis=(0, 1, 2, 4)) > 1e-6).tolist()
    assert seen == {(): [True] * 4 + [False] * 4, (5,): [True] * 6 + [False] * 2}


# Patches


def clip(frames, height=8, width=12, batch=2):
    return np.random.default_rng(0).normal(size=(batch, frames, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize(("frames", "stride"), [(9, Grid(4, 4, 4)), (1, Grid(4, 8, 2)), (5, Grid(1, 2, 4))])
def test_from_patches_inverts_to_patches(xp, frames, stride):
    pixels = xp.asarray(clip(frames))
    patches = to_patches(pixels, stride)
    assert isinstance(patches, type(pixels))
    assert patches.shape == (2, 1 + (frames - 1) // stride.t, 8 // stride.h, 12 // stride.w, stride.volume * 3)
    np.testing.assert_array_equal(from_patches(patches, stride), pixels)


def test_the_first_frame_fills_a_patch_of_its_own():
    pixels, stride = clip(9), Grid(4, 4, 4)
    patches = to_patches(pixels, stride).reshape(2, 3, 2, 3, 4, 4, 4, 3)
    for offset in range(4):
        np.testing.assert_array_equal(patches[:, 0, 0, 1, offset], pixels[:, 0, :4, 4:8])
        np.testing.assert_array_equal(patches[:, 2, 1, 2, offset], pixels[:, 5 + offset, 4:, 8:])


def test_an_image_is_the_first_patch_of_a_video():
    pixels, stride = clip(9), Grid(4, 4, 4)
    np.testing.assert_array_equal(to_patches(pixels[:, :1], stride), to_patches(pixels, stride)[:, :1])
    np.testing.assert_array_equal(to_patches(pixels[:, :5], stride), to_patches(pixels, stride)[:, :2])


def test_a_clip_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"T=8 .* use 5 or 9"):
        to_patches(clip(8), Grid(4, 4, 4))
    with pytest.raises(UserError, match=r"width 12 .* use 8 or 16"):
        to_patches(clip(9), Grid(4, 4, 8))


# Linear


STRIDE, CHANNELS = Grid(2, 2, 2), 5


def clips():
    """Return clips of correlated pixels whose mean is not zero."""
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(6, 5, 6, 8, 3)).cumsum(axis=1).cumsum(axis=2).cumsum(axis=3)
    return np.tanh(0.3 + 0.2 * noise).astype(np.float32)


LINEAR_CLIPS = clips()
PATCHES = to_patches(LINEAR_CLIPS, STRIDE).reshape(-1, 24)
LINEAR = fit_linear([LINEAR_CLIPS], stride=STRIDE, channels=CHANNELS)


def error(linear) -> float:
    return float(np.square(linear.reconstruct(PATCHES) - PATCHES).sum())


def test_no_linear_autoencoder_of_so_many_channels_is_better():
    centred = PATCHES.astype(np.float64) - PATCHES.mean(axis=0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    assert error(LINEAR) == pytest.approx(np.square(singular[CHANNELS:]).sum(), rel=1e-4)


def test_the_subspace_is_that_of_the_svd():
    centred = PATCHES.astype(np.float64) - PATCHES.mean(axis=0, dtype=np.float64)
    right = np.linalg.svd(centred, full_matrices=False)[2][:CHANNELS]
    np.testing.assert_allclose(LINEAR.mean, PATCHES.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(LINEAR.basis.T @ LINEAR.basis, np.eye(CHANNELS), atol=1e-6)
    np.testing.assert_allclose(LINEAR.basis @ LINEAR.basis.T, right.T @ right, atol=1e-4)


def test_small_changes_of_basis_or_mean_make_it_worse():
    draw = np.random.default_rng(1)
    for _ in range(5):
        basis = np.linalg.qr(LINEAR.basis + 0.05 * draw.normal(size=LINEAR.basis.shape))[0].astype(np.float32)
        assert error(LINEAR._replace(basis=basis)) > error(LINEAR)
        mean = LINEAR.mean + 0.05 * draw.normal(size=24).astype(np.float32)
        assert error(LINEAR._replace(mean=mean)) > error(LINEAR)


def test_the_scale_is_the_root_mean_square_of_the_latents():
    latents = (PATCHES - LINEAR.mean) @ LINEAR.basis
    assert LINEAR.scale == pytest.approx(np.sqrt(np.square(latents).mean()), rel=1e-4)


def test_statistics_accumulate_over_batches():
    parts = fit_linear((LINEAR_CLIPS[index : index + 1] for index in range(6)), stride=STRIDE, channels=CHANNELS)
    np.testing.assert_allclose(parts.basis @ parts.basis.T, LINEAR.basis @ LINEAR.basis.T, atol=1e-5)
    np.testing.assert_allclose(parts.mean, LINEAR.mean, atol=1e-6)
    assert parts.scale == pytest.approx(LINEAR.scale, rel=1e-5)


def test_all_channels_lose_nothing():
    whole = fit_linear([LINEAR_CLIPS], stride=STRIDE, channels=24)
    np.testing.assert_allclose(whole.reconstruct(PATCHES), PATCHES, atol=1e-5)


def test_constant_clips_have_a_finite_scale():
    flat = fit_linear([np.full((1, 1, 4, 4, 3), 0.5, np.float32)], stride=STRIDE, channels=3)
    assert flat.scale > 0
    np.testing.assert_allclose(flat.reconstruct(np.full((1, 24), 0.5, np.float32)), 0.5, atol=1e-6)


def test_more_channels_than_values_of_a_patch_are_refused():
    with pytest.raises(UserError, match=r"channels=25 .* 24 values.* Use fewer"):
        fit_linear([LINEAR_CLIPS], stride=STRIDE, channels=25)
    with pytest.raises(UserError, match="at least one clip"):
        fit_linear([], stride=STRIDE, channels=3)
