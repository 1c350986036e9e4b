"""The loss of an image-to-video Wan, whose rows hold the first frame of each segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.conditioning import KnownFrames
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import FlowMatching
from dit_video.nn import get_graph_def
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack
from dit_video.training.losses.denoiser import DenoiserLoss
from support.random_params import make_random_params
from support.tiny_wan import ANIMATING

SHAPE = PackedShape(tokens=20, text=6, segments=2)
TEXT = FrozenTextConfig(folder="none", width=ANIMATING.context_width)
PARAMS = {"dit": make_random_params(ANIMATING.make), "text": {}}
WIDTH, IMAGE = ANIMATING.token_width, (3, ANIMATING.image_width)
STEP = jnp.zeros((), jnp.int32)


def make_loss(chance):
    return DenoiserLoss(
        dit=get_graph_def(ANIMATING.make),
        text=get_graph_def(TEXT.make),
        objective=FlowMatching(),
        caption_dropout=0.0,
        empty_caption=np.zeros((1, TEXT.width), np.float32),
        seed=3,
        known=KnownFrames(chance=chance, rest="grey"),
    )


def item(grid: Grid, example: int) -> PackedExample:
    draw = np.random.default_rng(example)

    def normal(*shape):
        return draw.normal(size=shape).astype(np.float32)

    text, tokens = normal(2, TEXT.width), normal(grid.volume, WIDTH)
    return PackedExample(
        tokens, compute_positions(grid), text, example, shown=normal(*tokens.shape), image=normal(*IMAGE)
    )


def batch(*rows) -> PackedBatch:
    packed = [pack(row, SHAPE, width=WIDTH, text_width=TEXT.width) for row in rows]
    return PackedBatch(*map(np.stack, zip(*packed, strict=True)))


CLIPS = [item(Grid(3, 1, 2), 5), item(Grid(2, 2, 2), 6)]
PACKED = batch(CLIPS)
value = jax.jit(jax.value_and_grad(lambda params, rows: make_loss(1.0)(params, rows, STEP)[0]))


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


def test_a_segment_sees_its_own_first_frame_alone():
    def compute_first_loss(**changes):
        """Return the loss of the first clip alone."""
        return np.asarray(value(PARAMS, PACKED._replace(valid=np.asarray([[True, False]]), **changes))[0])

    before = compute_first_loss()
    ids = {"shown": PACKED.segments, "image": PACKED.image_segments}
    for name, segments in ids.items():
        values = getattr(PACKED, name)
        for segment, same in ((0, True), (2, True), (1, False)):
            changed = np.where(segments[..., None] == segment, 3 - 2 * values, values)
            assert (compute_first_loss(**{name: changed}) == before) == same, (name, segment)


def test_a_clip_without_a_known_first_frame_gets_no_image_conditioning():
    result = jax.jit(lambda rows: make_loss(0.0)(PARAMS, rows, STEP)[0])
    other = PACKED._replace(shown=1 - PACKED.shown, image=1 - PACKED.image)
    assert result(other) == result(PACKED)
    assert result(PACKED) != value(PARAMS, PACKED)[0]


def test_rows_have_room_for_every_segments_image():
    assert PACKED.image.shape == (1, 2 * 3, IMAGE[1])
    np.testing.assert_array_equal(PACKED.image_segments, [[1, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(PACKED.shown[0, 6:14], CLIPS[1].shown)
    alone = batch(CLIPS[1:])
    np.testing.assert_array_equal(alone.image_segments, [[1, 1, 1, 0, 0, 0]])
    plain = batch([clip._replace(shown=None, image=None) for clip in CLIPS])
    assert (plain.shown.shape, plain.image.shape) == ((1, 20, 0), (1, 0, 0))
    for changes in ({"image": None}, {"image": CLIPS[0].image[:2]}, {"shown": None}):
        with pytest.raises(UserError, match=r"must have the same conditioning: .* pack them into different rows"):
            batch([CLIPS[0], CLIPS[1]._replace(**changes)])
