"""Known pixels: what is encoded of them, and their masks on the grid of latents."""

import numpy as np

from dit_video.core.pixels import to_float
from dit_video.models.conditioning import blank_unknown, find_known_latents, find_partly_known_latents, fold_mask
from dit_video.tokens import Grid


def make_frame_mask(*frames: int, count: int, side: int = 2) -> np.ndarray:
    is_known = np.zeros((count, side, side), bool)
    is_known[list(frames)] = True
    return is_known


def test_unknown_pixels_are_grey_which_is_zero():
    frames = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3), dtype=np.uint8)
    is_known = np.zeros((5, 2, 3), bool)
    is_known[0], is_known[4, 1, 2] = True, True
    pixels = blank_unknown(frames, is_known)
    np.testing.assert_array_equal(pixels[0], frames[0])
    np.testing.assert_array_equal(pixels[4, 1, 2], frames[4, 1, 2])
    np.testing.assert_allclose(pixels[1:4] * (2 / 255) - 1, 0, atol=1e-7)
    np.testing.assert_allclose(pixels[:1] * (2 / 255) - 1, to_float(frames[:1]), atol=1e-6)


def test_a_mask_is_folded_with_the_first_frame_repeated():
    is_known, stride = make_frame_mask(0, 3, 8, count=9), Grid(4, 2, 2)
    np.testing.assert_array_equal(fold_mask(is_known, stride)[:, 0, 0], [[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(fold_mask(is_known[:1], stride)[:, 0, 0], [[1, 1, 1, 1]])
    np.testing.assert_array_equal(fold_mask(is_known[:3], Grid(1, 2, 2))[:, 0, 0], [[1], [0], [0]])


def test_a_folded_mask_holds_the_share_of_known_pixels_in_each_cell():
    is_known = np.zeros((5, 4, 4), bool)
    is_known[1, :, :3] = True
    shares = fold_mask(is_known, Grid(4, 2, 2))
    assert shares.shape == (2, 2, 2, 4)
    np.testing.assert_array_equal(shares[1, :, :, 0], [[1, 0.5], [1, 0.5]])
    assert not shares[0].any()
    assert not shares[1, ..., 1:].any()


def test_a_latent_is_known_if_all_pixels_of_its_frames_are():
    is_known, stride = make_frame_mask(0, 1, 2, 3, 4, 6, count=9), Grid(4, 2, 2)
    np.testing.assert_array_equal(find_known_latents(is_known, stride)[:, 0, 0], [True, True, False])
    is_known[2, 0, 0] = False
    np.testing.assert_array_equal(find_known_latents(is_known, stride)[:, 0, 0], [True, False, False])


def test_a_latent_is_partly_known_if_some_of_its_pixels_are():
    is_known, stride = make_frame_mask(0, 1, 2, 3, 4, 6, count=9), Grid(4, 2, 2)
    np.testing.assert_array_equal(find_partly_known_latents(is_known, stride)[:, 0, 0], [False, False, True])
    is_known[6] = False  # nothing of the last latent is known
    assert not find_partly_known_latents(is_known, stride).any()
    region = np.ones((9, 4, 4), bool)
    region[2, 0, 0] = False
    np.testing.assert_array_equal(np.argwhere(find_partly_known_latents(region, stride)), [[1, 0, 0]])
