"""Clips that are encoded as they come: few programs, and the latents that each clip has alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video import pixels
from dit_video.autoencoder import PatchVaeConfig
from dit_video.errors import UserError
from dit_video.live import LiveEncoder
from dit_video.nn import graph_of
from dit_video.tokens import Grid
from rough import rough_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = PatchVaeConfig(stride=Grid(2, 4, 4), channels=3, width=8, blocks=1)
SIZES = [Grid(t, 4 * h, 4 * w) for t in (1, 3, 5) for h in (2, 3) for w in (2, 4)]


def test_latents_are_those_of_each_clip_alone():
    params = rough_params(CONFIG.make)
    generator = np.random.default_rng(0)
    clips = [generator.integers(0, 256, (*SIZES[index], 3), np.uint8) for index in generator.integers(0, 12, 9)]
    encoder = LiveEncoder(CONFIG, params, SIZES)
    assert len(encoder.canvases) <= 8
    model = nnx.merge(graph_of(CONFIG.make), params)
    latents = encoder(clips)
    for clip, found in zip(clips, latents, strict=True):
        expected = np.asarray(model.encode(pixels.to_float(jnp.asarray(clip[None]))))[0]
        np.testing.assert_allclose(found, expected, atol=2e-5)
    again = encoder(clips[::-1])[::-1]
    for one, other in zip(latents, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert encoder([]) == []


def test_a_clip_that_was_not_announced():
    encoder = LiveEncoder(CONFIG, rough_params(CONFIG.make), [Grid(3, 8, 8)])
    with pytest.raises(UserError, match="a clip of 5x8x8 is larger than all that were announced"):
        encoder([np.zeros((5, 8, 8, 3), np.uint8)])
