"""Latents with a strength are held until the sample's time falls to theirs."""

import jax.numpy as jnp
import numpy as np

from dit_video.diffusion import RectifiedFlow
from dit_video.sampling.plan import HELD_LATENTS, HELD_STRENGTH, HeldTokens, StepInputs
from dit_video.tokens import PackedBatch, PackedRows

STRENGTHS = np.asarray([[[1.0], [0.6], [0.0]]], np.float32)
LATENTS, NOISE, SAMPLE, STEP_NOISE = np.random.default_rng(0).normal(size=(4, 1, 3, 2)).astype(np.float32)
IDS = np.ones((1, 3), np.int32)
ROWS = PackedBatch(
    tokens=NOISE,
    layout=PackedRows(segments=IDS, positions=np.zeros((1, 3, 3), np.float32), count=1),
    text=IDS,
    text_segments=IDS,
    examples=np.zeros((1, 1), np.uint32),
    valid=np.ones((1, 1), bool),
    fields={HELD_LATENTS: LATENTS, HELD_STRENGTH: STRENGTHS},
)
FLOW = RectifiedFlow()


def change_sample(transform, *, start, end):
    inputs = StepInputs(ROWS, FLOW, jnp.asarray(end), jnp.asarray(STEP_NOISE), jnp.asarray(start))
    return np.asarray(transform.change_sample(jnp.asarray(SAMPLE), inputs))[0]


def test_held_latents_have_the_noise_and_the_time_of_their_strength():
    start = np.asarray(HeldTokens().change_start(jnp.asarray(NOISE), ROWS))[0]
    mixed = 0.6 * LATENTS[0, 1] + 0.4 * NOISE[0, 1]
    np.testing.assert_allclose(start, [LATENTS[0, 0], mixed, NOISE[0, 2]], atol=1e-6)
    for time, expected in ((0.9, [0, 0.4, 0.9]), (0.2, [0, 0.2, 0.2])):
        _, times = HeldTokens().change_input(jnp.asarray(SAMPLE), jnp.full((1, 3), time), ROWS, FLOW)
        np.testing.assert_allclose(times[0], expected, atol=1e-6)
    early = change_sample(HeldTokens(), start=0.5, end=0.3)
    np.testing.assert_allclose(early, [LATENTS[0, 0], mixed, SAMPLE[0, 2]], atol=1e-6)
    late = change_sample(HeldTokens(), start=0.4, end=0.2)
    np.testing.assert_allclose(late, [LATENTS[0, 0], *SAMPLE[0, 1:]], atol=1e-6)


def test_kept_latents_are_seen_with_noise_that_vanishes_with_the_time():
    noisy = HeldTokens(noise_scale=0.15)
    start = np.asarray(noisy.change_start(jnp.asarray(NOISE), ROWS))[0, 0]
    np.testing.assert_allclose(start, LATENTS[0, 0] + 0.15 * NOISE[0, 0], atol=1e-6)
    later = change_sample(noisy, start=0.7, end=0.5)[0]
    np.testing.assert_allclose(later, LATENTS[0, 0] + 0.15 * 0.25 * STEP_NOISE[0, 0], atol=1e-6)
    np.testing.assert_array_equal(change_sample(noisy, start=0.1, end=0.0)[0], LATENTS[0, 0])
