import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.autoencoders import fit_linear
from dit_video.models.autoencoders.patch_vae import to_patches
from dit_video.tokens import Grid

STRIDE, CHANNELS = Grid(2, 2, 2), 5


def clips():
    """Return clips of correlated pixels whose mean is not zero."""
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(6, 5, 6, 8, 3)).cumsum(axis=1).cumsum(axis=2).cumsum(axis=3)
    return np.tanh(0.3 + 0.2 * noise).astype(np.float32)


CLIPS = clips()
PATCHES = to_patches(CLIPS, STRIDE).reshape(-1, 24)
LINEAR = fit_linear([CLIPS], stride=STRIDE, channels=CHANNELS)


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
    parts = fit_linear((CLIPS[index : index + 1] for index in range(6)), stride=STRIDE, channels=CHANNELS)
    np.testing.assert_allclose(parts.basis @ parts.basis.T, LINEAR.basis @ LINEAR.basis.T, atol=1e-5)
    np.testing.assert_allclose(parts.mean, LINEAR.mean, atol=1e-6)
    assert parts.scale == pytest.approx(LINEAR.scale, rel=1e-5)


def test_all_channels_lose_nothing():
    whole = fit_linear([CLIPS], stride=STRIDE, channels=24)
    np.testing.assert_allclose(whole.reconstruct(PATCHES), PATCHES, atol=1e-5)


def test_constant_clips_have_a_finite_scale():
    flat = fit_linear([np.full((1, 1, 4, 4, 3), 0.5, np.float32)], stride=STRIDE, channels=3)
    assert flat.scale > 0
    np.testing.assert_allclose(flat.reconstruct(np.full((1, 24), 0.5, np.float32)), 0.5, atol=1e-6)


def test_more_channels_than_values_of_a_patch_are_refused():
    with pytest.raises(UserError, match=r"channels=25 .* 24 values.* Use fewer"):
        fit_linear([CLIPS], stride=STRIDE, channels=25)
    with pytest.raises(UserError, match="at least one clip"):
        fit_linear([], stride=STRIDE, channels=3)
