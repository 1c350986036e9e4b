"""Clips, and calls, of tests of generation tasks with small pipelines of Wan."""

import numpy as np
import pytest

import dit_video
from dit_video.sampling.known_pixels import collect_known_pixels
from dit_video.sampling.request import Request
from support.latents import generate_latents
from support.marks import mark_slow_except

PROMPT, SIZE, FPS = "a red ball moves left", (9, 16, 16), 12.0
OPTIONS = {"steps": 4, "guidance": 2.0}
TIMES = (1.0, 0.9, 0.75, 0.5)
"""Times at which steps start; with two experts, the second one takes the last two."""
FRAMES = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
CLIP = dit_video.Clip(FRAMES, FPS)
WITHOUT_TRAINING = "not trained for what is known of the clip: it is kept without training"

UNTRAINED, OF_TEXT = ("text_to_video", "two_experts"), ("text_to_video", "two_experts", "knowing")
ALL = (*OF_TEXT, "animating")


def each(names):
    """Run a test with each of these pipelines; with all but the first in the slow tests."""
    return pytest.mark.parametrize("pipeline", mark_slow_except(names[:1], names), indirect=True)


def sample_latents(pipeline, prompt=PROMPT, **options):
    return generate_latents(pipeline, prompt, **{"size": SIZE, **OPTIONS} | options)


def warns():
    return pytest.warns(UserWarning, match=WITHOUT_TRAINING)


def encode(pipeline, frames):
    return pipeline.encode(dit_video.Clip(np.ascontiguousarray(frames), FPS))


def add_noise(latents, noise, time):
    """Return the sample of rectified flow."""
    return (1 - time) * latents + time * noise


def get_first_image(pipeline):
    """Return the options of a clip that begins with that of the clip, for models that need it."""
    conditioning = pipeline.config.model.frame_conditioning
    return {"image": FRAMES[0]} if conditioning is not None and conditioning.prob == 1 else {}


def sample_and_put_in_place(pipeline, is_known, **options):
    """Return sampled latents, and what they should be: those before, with the known frames put in the decoded clip.

    The latter are complete for latent frames of which a part is known.
    """
    estimates = []
    latents = sample_latents(pipeline, callback=lambda each: estimates.append(each.progress), **options)
    (before,) = estimates[-1].estimate_latents().values()
    pixels = np.where(is_known[:, None, None, None], FRAMES, pipeline.decode(before).frames)
    assert np.abs(latents - before).max() > 1e-2
    return latents, encode(pipeline, pixels)


def select_frames(*numbers):
    return np.isin(np.arange(SIZE[0]), numbers)


def decode_kept(pipeline, latents, **pictures):
    """Return decoded latents with the pixels that a request keeps in their places."""
    known = collect_known_pixels(Request(PROMPT, SIZE, **pictures))
    return known.restore(pipeline.decode(latents).frames)
