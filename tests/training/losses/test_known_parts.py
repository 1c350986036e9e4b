"""The loss of denoisers that complete clips of a task mix, on fakes whose predictions are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.rng import example_keys, key
from dit_video.diffusion import FlowMatching
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.conditioning import ConditioningLatents, Ending, FrameConditioning, make_mask_fields
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedExample, PackedShape, compute_positions, pack, patchify, stack_rows
from dit_video.training.losses.denoiser import DenoiserLoss
from support.random_params import make_random_params

TEXT = ByteEncoderConfig(width=8, layers=1, heads=1, max_tokens=16)
PATCH, STRIDE, CHANNELS = Grid(1, 2, 2), 3, 2
CONCATENATING = DiTConfig(
    channels=CHANNELS, context_width=8, patch=PATCH, width=12, layers=1, heads=1, cond_channels=STRIDE + CHANNELS
)
CLEAN = dataclasses.replace(CONCATENATING, cond_channels=0, time="token")
PARAMS = {"backbone": {}, "text": make_random_params(TEXT.make)}
FIELDS = make_mask_fields(channels=CHANNELS, temporal_stride=STRIDE)
GRID = Grid(2, 2, 4)


class Recorder(DiT):
    """A denoiser that predicts its noisy tokens, or the first channels of its conditioning."""

    def __init__(self, config):
        self.config = config

    def __call__(self, noisy, time, layout, conditioning, state=None):
        latents = conditioning.get(ConditioningLatents)
        return (noisy if latents is None else latents.values[..., : noisy.shape[-1]]), state


def make_loss(config):
    return DenoiserLoss(
        backbone=get_graph_def(lambda rngs: Recorder(config)),
        text_encoder=get_graph_def(TEXT.make),
        objective=FlowMatching(),
        caption_dropout=0.0,
        empty_caption=TEXT.make_tokenizer()(""),
        seed=3,
        frame_conditioning=FrameConditioning(prob=1.0, rest="grey", masks=(Ending(),)),
    )


def make_rows(latents, cond_latents, shares):
    values = {
        FIELDS[0].name: FIELDS[0].patchify(cond_latents, PATCH),
        FIELDS[1].name: FIELDS[1].patchify(shares, PATCH),
    }
    grid = Grid(GRID.t, 1, 2)
    example = PackedExample(patchify(latents, PATCH), compute_positions(grid), TEXT.make_tokenizer()("a"), 5, values)
    fields = [field.to_rows(PATCH) for field in FIELDS]
    row = pack([example], PackedShape(tokens=6, text=8, segments=1), width=4 * CHANNELS, fields=fields)
    return jax.device_put(stack_rows([row]))


def draw_noise_and_time(loss, rows):
    keys = example_keys(key(loss.seed, "noise"), 0, rows.examples)
    noise = np.asarray(rows.layout.sample_noise(keys, rows.tokens.shape[-1]))[0, :4]
    return noise, float(np.asarray(loss.draw_times(rows, jnp.zeros((), jnp.int32)))[0, 0])


LATENTS, COND = (np.random.default_rng(seed).normal(size=(*GRID, CHANNELS)).astype(np.float32) for seed in (0, 1))


@pytest.mark.slow
def test_mask_shares_and_latents_of_the_blanked_clip_are_next_to_each_other():
    shares = np.random.default_rng(2).uniform(size=(*GRID, STRIDE)).astype(np.float32)
    rows, loss = make_rows(LATENTS, COND, shares), make_loss(CONCATENATING)
    noise, _ = draw_noise_and_time(loss, rows)
    channels = patchify(np.concatenate([shares, COND], axis=-1), PATCH)
    target = noise - patchify(LATENTS, PATCH)
    expected = np.square(channels[:, : 4 * CHANNELS] - target).mean()
    np.testing.assert_allclose(loss(PARAMS, rows, jnp.zeros((), jnp.int32))[0], expected, rtol=1e-5)


@pytest.mark.slow
def test_clean_tokens_are_those_of_the_blanked_clip_and_do_not_count():
    shares = np.zeros((*GRID, STRIDE), np.float32)
    shares[1, :, :2] = 1  # the third token
    shares[0, 0, 0] = 1  # a part of the first token, which the model does not get
    rows, loss = make_rows(LATENTS, COND, shares), make_loss(CLEAN)
    noise, time = draw_noise_and_time(loss, rows)
    data = patchify(LATENTS, PATCH)
    noisy = (1 - time) * data + time * noise
    counted = [0, 1, 3]
    expected = np.square(noisy - (noise - data))[counted].mean()
    np.testing.assert_allclose(loss(PARAMS, rows, jnp.zeros((), jnp.int32))[0], expected, rtol=1e-5)
