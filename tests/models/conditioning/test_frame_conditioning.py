"""First frames that are known in training: their tokens, and the conditioning channels."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.conditioning import FrameConditioning, make_cond_latents, mask_first_frames
from dit_video.tokens import Grid, PackedRows, compute_positions, patchify

CLIP, IMAGE = Grid(3, 1, 2), Grid(1, 2, 1)
SEGMENTS = np.asarray([[1] * 6 + [2] * 2 + [3] * 6 + [0] * 2])
PLACES = np.concatenate(
    [compute_positions(CLIP), compute_positions(IMAGE), compute_positions(CLIP), np.zeros((2, 3), np.float32)]
)[None]


def test_the_first_frame_of_clips_is_known_and_nothing_of_images():
    layout = PackedRows(segments=SEGMENTS, positions=PLACES, count=3)
    result = mask_first_frames(layout, jnp.asarray([[True, True, False]]))
    np.testing.assert_array_equal(result[0], np.arange(16) < 2)
    assert not mask_first_frames(layout, jnp.zeros((1, 3), bool)).any()


def test_conditioning_channels_are_the_mask_and_clean_latents():
    """The channels are in the order of patches of concatenated channels."""
    patch, draw = Grid(1, 2, 2), np.random.default_rng(0)
    latents = draw.normal(size=(2, 4, 6, 5)).astype(np.float32)
    of_frames = np.asarray([1, 0], np.float32)[:, None, None, None]
    mask = np.broadcast_to(of_frames, (2, 4, 6, 3))
    expected = patchify(np.concatenate([mask, of_frames * latents], axis=-1), patch)
    tokens = patchify(latents, patch)
    of_tokens = jnp.arange(len(tokens)) < len(tokens) // 2
    result = make_cond_latents(tokens[None], of_tokens[None], patch_volume=patch.volume, channels=8)
    np.testing.assert_array_equal(result[0], expected)


@pytest.mark.parametrize("prob", [-0.1, 1.5, float("nan")])
def test_a_probability_outside_0_to_1_is_refused(prob):
    with pytest.raises(UserError, match="is invalid: a probability must lie in"):
        FrameConditioning(prob=prob)
