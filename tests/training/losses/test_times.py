"""Diffusion times of the clips and the frames of a row in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_video.core.rng import example_keys, key
from dit_video.diffusion import ClipSize, FlowMatching, LinearShift, RectifiedFlow, Uniform
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack, stack_rows
from dit_video.training.losses.denoiser import DenoiserLoss, get_clip_sizes
from support.random_params import make_random_params

TEXT = ByteEncoderConfig(width=8, layers=1, heads=1, max_tokens=16)
TOKENIZE = TEXT.make_tokenizer()
SHAPE = PackedShape(tokens=24, text=56, segments=3)
DIT = DiTConfig(channels=1, context_width=8, patch=Grid(1, 2, 2), width=12, layers=1, heads=1, time="token")
PARAMS = {"backbone": {}, "text": make_random_params(TEXT.make)}
STEP = jnp.zeros((), jnp.int32)


class FakeDenoiser(DiT):
    """A denoiser that predicts its noisy tokens."""

    def __init__(self, config):
        self.config = config

    def __call__(self, noisy, time, layout, conditioning, state=None):
        return noisy, state


def make_loss(time_per="frame", **fields):
    return DenoiserLoss(
        backbone=get_graph_def(lambda rngs: FakeDenoiser(DIT)),
        text_encoder=get_graph_def(TEXT.make),
        caption_dropout=0.0,
        empty_caption=TOKENIZE(""),
        seed=3,
        time_per=time_per,
        **({"objective": FlowMatching()} | fields),
    )


def item(grid: Grid, example: int, interval: float = 1.0) -> PackedExample:
    tokens = np.random.default_rng(example).normal(size=(grid.volume, 4)).astype(np.float32)
    return PackedExample(tokens, compute_positions(grid, step=(interval, 1.0, 1.0)), TOKENIZE("a"), example)


def batch(*rows) -> PackedBatch:
    packed = (pack(row, SHAPE, width=4) for row in rows)
    return jax.device_put(stack_rows(packed))


CLIP, IMAGE, LONG = item(Grid(3, 1, 2), 5), item(Grid(1, 1, 3), 6), item(Grid(4, 1, 3), 7, interval=0.4)
ROWS = batch([CLIP, IMAGE, LONG], [IMAGE])


def token_times(loss, rows, step=STEP):
    return np.asarray(jax.jit(loss.draw_token_times)(rows, step))


@pytest.mark.nightly
def test_every_frame_has_its_own_time():
    """The times of an example do not depend on the mesh or on its place."""
    times = token_times(make_loss(), ROWS)
    clip, image, long = times[0, :6].reshape(3, 2), times[0, 6:9], times[0, 9:21].reshape(4, 3)
    for frames in (clip, image[None], long):
        assert (np.ptp(frames, axis=1) == 0).all()
    assert len({float(value) for value in times[0, :21]}) == 3 + 1 + 4
    elsewhere = token_times(make_loss(), batch([LONG], [IMAGE, CLIP]))
    np.testing.assert_array_equal(elsewhere[0, :12], long.reshape(-1))
    np.testing.assert_array_equal(elsewhere[1, :9], times[0, [6, 7, 8, 0, 1, 2, 3, 4, 5]])
    assert (token_times(make_loss(), ROWS, STEP + 1)[0, :21] != times[0, :21]).all()


def test_the_times_of_frames_are_those_of_the_objective():
    loss = make_loss(objective=FlowMatching(process=RectifiedFlow(shift=3.0), times=Uniform()))
    rows = batch(*([item(Grid(12, 1, 2), example)] for example in range(64)))
    times = token_times(loss, rows)[:, ::2].reshape(-1)
    assert stats.kstest(times / (3 - 2 * times), "uniform").pvalue > 1e-3
    shuffled = np.abs(np.corrcoef(times[:-1], times[1:])[0, 1])
    assert shuffled < 0.15  # neighbours are independent


@pytest.mark.nightly
def test_the_loss_is_of_every_frame_at_its_own_time():
    loss = make_loss(frame_conditioning=FrameConditioning(prob=1.0))
    keys = example_keys(key(3, "noise"), STEP, ROWS.examples)
    noise = np.asarray(ROWS.layout.sample_noise(keys, ROWS.tokens.shape[-1]))[0]
    time = token_times(loss, ROWS)[0, :, None]
    data = np.asarray(ROWS.tokens)[0]
    error = np.square((1 - time) * data + time * noise - (noise - data))
    # The first frame of a clip is known, and has no loss.
    segments = [error[2:6], error[6:9], error[12:21]]
    single = jax.tree.map(lambda values: values[:1], ROWS)
    result = jax.jit(lambda rows, step: loss(PARAMS, rows, step)[0])(single, STEP)
    np.testing.assert_allclose(result, np.mean([values.mean() for values in segments]), rtol=1e-5)


# --- the shift of a clip's size --------------------------------------------------------------------------------------

SHIFT = LinearShift(tokens=(2, 3), shifts=(1.0, 1.5))


def test_clip_sizes_are_computed_for_every_clip_of_a_row():
    sizes = get_clip_sizes(ROWS)
    np.testing.assert_array_equal(sizes.frames, [[3, 1, 4], [1, 1, 1]])
    np.testing.assert_array_equal(sizes.frame_tokens, [[2, 3, 3], [3, 1, 1]])


@pytest.mark.nightly
@pytest.mark.parametrize("time_per", ["clip", "frame"])
def test_clips_of_one_row_are_trained_at_the_shift_of_their_own_size(time_per):
    by_size = RectifiedFlow(shift=2.0, size_shift=SHIFT)
    result = token_times(make_loss(time_per, objective=FlowMatching(process=by_size)), ROWS)
    for tokens, size in ((slice(0, 6), (3, 2)), (slice(6, 9), (1, 3)), (slice(9, 21), (4, 3))):
        constant = by_size.specialize(ClipSize(*size))
        assert constant.shift == pytest.approx(2 * (1.0 if size[1] == 2 else 1.5) * size[0] ** 0.5)
        expected = token_times(make_loss(time_per, objective=FlowMatching(process=constant)), ROWS)
        np.testing.assert_allclose(result[0, tokens], expected[0, tokens], rtol=1e-6)


def test_times_of_training_follow_the_shift():
    plain, shifted = (
        make_loss("clip", objective=FlowMatching(process=RectifiedFlow(shift=shift))) for shift in (1.0, 3.0)
    )
    times = token_times(plain, ROWS)[0, :21]
    np.testing.assert_allclose(token_times(shifted, ROWS)[0, :21], 3 * times / (1 + 2 * times), rtol=1e-5)


def test_clips_have_one_time_by_default():
    loss = dataclasses.replace(make_loss(), time_per=DenoiserLoss.time_per)
    times = token_times(loss, ROWS)[0, :21]
    of_clips = np.asarray(loss.draw_times(ROWS, STEP))[0]
    np.testing.assert_array_equal(times, np.repeat(of_clips, [6, 3, 12]))
