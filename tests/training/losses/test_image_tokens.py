"""The loss of an image-to-video Wan, whose rows hold the first frame of each segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.trees import flatten
from dit_video.diffusion import FlowMatching
from dit_video.models.conditioning import COND_LATENTS, IMAGE_TOKENS, FrameConditioning
from dit_video.models.encoders import FrozenTextConfig
from dit_video.nn import get_graph_def
from dit_video.tokens import Field, Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack, stack_rows
from dit_video.training.losses.denoiser import DenoiserLoss
from support.random_params import make_random_params
from support.tiny_wan import ANIMATING

SHAPE = PackedShape(tokens=20, text=6, segments=2)
TEXT = FrozenTextConfig(folder="none", width=ANIMATING.context_width)
PARAMS = {"backbone": make_random_params(ANIMATING.make), "text": {}}
WIDTH, IMAGE = ANIMATING.token_width, (3, ANIMATING.image_width)
STEP = jnp.zeros((), jnp.int32)


FIELDS = (
    Field(name=COND_LATENTS, alignment="grid", shape=(WIDTH,)),
    Field(name=IMAGE_TOKENS, alignment="sequence", shape=IMAGE[1:], length=IMAGE[0]),
)


def make_loss(prob):
    return DenoiserLoss(
        backbone=get_graph_def(ANIMATING.make),
        text_encoder=get_graph_def(TEXT.make),
        objective=FlowMatching(),
        caption_dropout=0.0,
        empty_caption=np.zeros((1, TEXT.width), np.float32),
        seed=3,
        frame_conditioning=FrameConditioning(prob=prob, rest="grey"),
    )


def item(grid: Grid, example: int) -> PackedExample:
    draw = np.random.default_rng(example)

    def normal(*shape):
        return draw.normal(size=shape).astype(np.float32)

    text, tokens = normal(2, TEXT.width), normal(grid.volume, WIDTH)
    fields = {COND_LATENTS: normal(*tokens.shape), IMAGE_TOKENS: normal(*IMAGE)}
    return PackedExample(tokens, compute_positions(grid), text, example, fields)


def batch(*rows) -> PackedBatch:
    packed = [pack(row, SHAPE, width=WIDTH, text_width=TEXT.width, fields=FIELDS) for row in rows]
    return stack_rows(packed)


CLIPS = [item(Grid(3, 1, 2), 5), item(Grid(2, 2, 2), 6)]
PACKED = batch(CLIPS)
value = jax.jit(jax.value_and_grad(lambda params, rows: make_loss(1.0)(params, rows, STEP)[0]))


@pytest.mark.slow
def test_a_packed_row_has_the_values_and_gradients_of_clips_in_rows_of_their_own():
    packed, gradients = value(PARAMS, PACKED)
    first, first_gradients = value(PARAMS, batch(CLIPS[:1]))
    second, second_gradients = value(PARAMS, batch(CLIPS[1:]))
    np.testing.assert_allclose(packed, (first + second) / 2, rtol=1e-5)
    expected = flatten(jax.tree.map(lambda a, b: (a + b) / 2, first_gradients, second_gradients))
    for path, gradient in flatten(gradients).items():
        np.testing.assert_allclose(gradient, expected[path], atol=1e-5 * max(1, np.abs(gradient).max()), err_msg=path)
        if "image" in path:
            assert np.abs(gradient).max() > 1e-4, f"{path} is not trained"


@pytest.mark.slow
def test_a_segment_sees_its_own_first_frame_alone():
    def compute_first_loss(**changes):
        """Return the loss of the first clip alone."""
        return np.asarray(value(PARAMS, PACKED._replace(valid=np.asarray([[True, False]]), **changes))[0])

    before = compute_first_loss()
    ids = {COND_LATENTS: PACKED.segments, IMAGE_TOKENS: np.asarray(PACKED.layout.get_sequence_segments(IMAGE[0]))}
    for name, segments in ids.items():
        values = PACKED.fields[name]
        for segment, same in ((0, True), (2, True), (1, False)):
            changed = np.where(segments[..., None] == segment, 3 - 2 * values, values)
            assert (compute_first_loss(fields=PACKED.fields | {name: changed}) == before) == same, (name, segment)


@pytest.mark.nightly
def test_a_clip_without_a_known_first_frame_gets_no_image_conditioning():
    result = jax.jit(lambda rows: make_loss(0.0)(PARAMS, rows, STEP)[0])
    other = PACKED._replace(fields={name: 1 - values for name, values in PACKED.fields.items()})
    assert result(other) == result(PACKED)
    assert result(PACKED) != value(PARAMS, PACKED)[0]


def test_rows_have_room_for_every_segments_image():
    assert PACKED.fields[IMAGE_TOKENS].shape == (1, 2 * 3, IMAGE[1])
    np.testing.assert_array_equal(PACKED.layout.get_sequence_segments(3), [[1, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(PACKED.fields[COND_LATENTS][0, 6:14], CLIPS[1].fields[COND_LATENTS])
    alone = batch(CLIPS[1:])
    np.testing.assert_array_equal(alone.layout.get_sequence_segments(3), [[1, 1, 1, 0, 0, 0]])
