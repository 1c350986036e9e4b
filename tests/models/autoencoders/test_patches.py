import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.autoencoders.patch_vae import from_patches, to_patches
from dit_video.tokens import Grid


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
