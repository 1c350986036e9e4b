"""Extraction of features by networks that read one size, in batches."""

import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_functions import NetworkInput, make_extractor
from dit_video.video import Clip
from support.devices import check_on_eight_devices


class MeanColour(nnx.Module):
    """The mean colour of clips or images, times a parameter."""

    def __init__(self, *, rngs):
        self.gain = nnx.Param(np.float32(1))

    def __call__(self, pixels):
        return self.gain[...] * pixels.mean(axis=tuple(range(1, pixels.ndim - 1)))


def make_clips(*sizes):
    generator = np.random.default_rng(0)
    return [Clip(generator.integers(0, 256, (*size, 3)).astype(np.uint8), fps=8) for size in sizes]


def make(**options):
    return make_extractor(lambda rngs: MeanColour(rngs=rngs), {"gain": np.float32(2)}, **options)


def test_clips_of_all_lengths_keep_their_order():
    clips = make_clips((3, 8, 8), (2, 8, 8), (3, 8, 8), (1, 8, 8), (3, 8, 8))
    features = make(network_input=NetworkInput(side=8), batch=2)(clips)
    expected = [2 * (clip.frames.mean(axis=(0, 1, 2)) / 127.5 - 1) for clip in clips]
    np.testing.assert_allclose(features, expected, atol=1e-6)


@pytest.mark.slow
def test_eight_devices_share_batches_of_any_number_of_clips():
    check_on_eight_devices("features_on_eight_devices.py")


def test_features_of_images_have_a_row_for_each_frame_in_its_order():
    clips = make_clips((2, 8, 8), (3, 8, 8))
    features = make(network_input=NetworkInput(side=8), batch=2, is_image=True)(clips)
    frames = np.concatenate([clip.frames for clip in clips])
    np.testing.assert_allclose(features, 2 * (frames.mean(axis=(1, 2)) / 127.5 - 1), atol=1e-6)


def test_aligned_corners_keep_the_pixels_at_corners():
    frames = make_clips((1, 5, 7))[0].frames
    resized = NetworkInput(side=16, has_aligned_corners=True).interpolate(frames)
    corners = np.ix_([0], [0, -1], [0, -1])
    np.testing.assert_allclose(resized[corners], frames[corners], atol=1e-3)
    assert np.abs(NetworkInput(side=16).interpolate(frames)[0, 1, 1] - resized[0, 1, 1]).max(axis=0) > 1


def test_resized_frames_are_equal_for_equal_sizes():
    frames = make_clips((2, 8, 8))[0].frames
    np.testing.assert_array_equal(NetworkInput(side=8).resize(frames), frames)


@pytest.mark.parametrize(
    ("options", "message"), [({"min_frames": 4}, "at least 4"), ({"frames": 16}, "exactly 16")], ids=["few", "other"]
)
def test_clips_of_other_lengths_are_refused(options, message):
    extract = make(network_input=NetworkInput(side=8, **options), batch=2)
    with pytest.raises(UserError, match=f"3 frames.*{message}"):
        extract(make_clips((3, 8, 8)))
