"""The loss of denoisers with first-frame conditioning, on fakes whose predictions are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.core.rng import example_keys, key
from dit_video.diffusion import FlowMatching
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.conditioning import ConditioningLatents, FrameConditioning
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack, stack_rows
from dit_video.training.losses.denoiser import DenoiserLoss
from support.random_params import make_random_params

TEXT = ByteEncoderConfig(width=8, layers=1, heads=1, max_tokens=16)
TOKENIZE = TEXT.make_tokenizer()
SHAPE = PackedShape(tokens=20, text=56, segments=3)
TOLD = DiTConfig(channels=1, context_width=8, patch=Grid(1, 2, 2), width=12, layers=1, heads=1, time="token")
CHANNELS = dataclasses.replace(TOLD, time="segment", cond_channels=3)
PARAMS = {"backbone": {}, "text": make_random_params(TEXT.make)}


class FakeDenoiser(DiT):
    """A denoiser that predicts its noisy tokens, or its clean conditioning."""

    def __init__(self, config):
        self.config = config

    def __call__(self, noisy, time, layout, conditioning, state=None):
        latents = conditioning.get(ConditioningLatents)
        if latents is None:
            return noisy, state
        return latents.values.reshape(*noisy.shape[:2], 4, 3)[..., 2], state


def make_loss(config, **fields):
    made = {
        "backbone": get_graph_def(lambda rngs: FakeDenoiser(config)),
        "frame_conditioning": FrameConditioning(prob=1.0),
    } | fields
    return DenoiserLoss(
        text_encoder=get_graph_def(TEXT.make),
        objective=FlowMatching(),
        caption_dropout=0.0,
        empty_caption=TOKENIZE(""),
        seed=3,
        **made,
    )


def item(grid: Grid, example: int) -> PackedExample:
    tokens = np.random.default_rng(example).normal(size=(grid.volume, 4)).astype(np.float32)
    return PackedExample(tokens, compute_positions(grid), TOKENIZE("a"), example)


def batch(*rows) -> PackedBatch:
    return stack_rows([pack(row, SHAPE, width=4) for row in rows])


CLIP, IMAGE = item(Grid(3, 1, 2), 5), item(Grid(1, 1, 3), 6)
ROWS = jax.device_put(batch([CLIP, IMAGE]))


STEP = jnp.zeros((), jnp.int32)


def draw_noise_and_times(loss, step=STEP):
    """Return noise and time of the tokens of the clip, and of the image."""
    keys = example_keys(key(loss.seed, "noise"), step, ROWS.examples)
    noise = np.asarray(ROWS.layout.sample_noise(keys, ROWS.tokens.shape[-1]))[0]
    times = np.asarray(loss.draw_times(ROWS, step))[0]
    return (noise[:6], times[0]), (noise[6:9], times[1])


def value(loss):
    return jax.jit(lambda rows, step: loss(PARAMS, rows, step)[0])(ROWS, STEP)


def test_tokens_at_time_zero_hold_no_noise_and_do_not_count():
    loss = make_loss(TOLD)
    (noise, time), (of_image, image_time) = draw_noise_and_times(loss)
    clip = np.square((1 - time) * CLIP.tokens + time * noise - (noise - CLIP.tokens))[2:].mean()
    image = np.square((1 - image_time) * IMAGE.tokens + image_time * of_image - (of_image - IMAGE.tokens)).mean()
    result = value(loss)
    np.testing.assert_allclose(result, (clip + image) / 2, rtol=1e-5)


def test_clean_latents_as_channels_leave_all_tokens_in_the_loss():
    loss = make_loss(CHANNELS)
    (noise, _), (of_image, _) = draw_noise_and_times(loss)
    predicted = np.where(np.arange(6)[:, None] < 2, CLIP.tokens, 0)
    clip, image = np.square(predicted - (noise - CLIP.tokens)).mean(), np.square(of_image - IMAGE.tokens).mean()
    result = value(loss)
    np.testing.assert_allclose(result, (clip + image) / 2, rtol=1e-5)


def test_every_example_draws_its_own_first_frame_conditioning():
    loss = make_loss(TOLD, frame_conditioning=FrameConditioning(prob=0.5))
    clips = [item(Grid(2, 1, 1), example) for example in range(200)]
    draw_cond_mask = jax.jit(lambda rows, step: loss.draw_cond_mask(rows, step))
    alone = np.asarray(draw_cond_mask(batch(*([clip] for clip in clips)), 4))
    assert 0.4 < alone[:, 0].mean() < 0.6
    assert not alone[:, 1:].any()
    behind = np.asarray(draw_cond_mask(batch(*([IMAGE, clip] for clip in clips)), 4))
    np.testing.assert_array_equal(behind[:, 3], alone[:, 0])
    assert (np.asarray(draw_cond_mask(batch(*([clip] for clip in clips)), 5)) != alone).any()


def test_without_known_frames_each_token_has_its_clips_time():
    conditioned, plain = (
        make_loss(TOLD, frame_conditioning=None),
        make_loss(dataclasses.replace(TOLD, time="segment"), frame_conditioning=None),
    )
    np.testing.assert_array_equal(value(conditioned), value(plain))
