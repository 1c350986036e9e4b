import numpy as np

from dit_video.conditioning import fill_unknown_frames, fold_frame_mask
from dit_video.core.pixels import to_float


def test_unknown_frames_are_grey_which_is_zero():
    first, last = (np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8) for seed in range(2))
    pixels, is_known = fill_unknown_frames({0: first, 4: last}, 5)
    np.testing.assert_array_equal(is_known, [True, False, False, False, True])
    np.testing.assert_array_equal(pixels[0], first)
    np.testing.assert_array_equal(pixels[4], last)
    np.testing.assert_allclose(pixels[1:4] * (2 / 255) - 1, 0, atol=1e-7)
    np.testing.assert_allclose(pixels[:1] * (2 / 255) - 1, to_float(first)[None], atol=1e-6)


def test_a_mask_is_folded_with_the_first_frame_repeated():
    is_known = np.asarray([True, False, False, True, False, False, False, False, True])
    np.testing.assert_array_equal(fold_frame_mask(is_known, 4), [[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(fold_frame_mask(is_known[:1], 4), [[1, 1, 1, 1]])
    np.testing.assert_array_equal(fold_frame_mask(is_known[:3], 1), [[1], [0], [0]])
