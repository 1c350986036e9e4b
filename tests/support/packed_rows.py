"""Two clips with every input of a denoiser, alone and packed into rows whose padding is not zero."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dit_video.core.trees import flatten
from dit_video.models.conditioning import ClassIds, Conditioning, ConditioningLatents, ImageTokens, TextTokens
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedRows, compute_positions

GRIDS = (Grid(2, 2, 2), Grid(1, 2, 3))
TEXTS = (3, 2)
"""Numbers of context tokens of the clips."""
IMAGES = (2, 3)
"""Numbers of image tokens of the clips."""
TOKEN_WIDTH, TEXT_WIDTH, COND_WIDTH, IMAGE_WIDTH, CLASSES = 8, 6, 12, 5, 4
TOKENS, TEXT, IMAGE, SEGMENTS = 18, 7, 6, 3
FIRST, SECOND = slice(0, 8), slice(8, 14)
"""The clips' tokens in a row of both."""


class Batch(NamedTuple):
    """Inputs of a denoiser for some rows."""

    noisy: Array
    time: Array
    segments: Array
    positions: Array
    context: Array
    context_segments: Array
    token_time: Array
    latents: Array
    labels: Array
    image: Array
    image_segments: Array
    weights: Array
    """Weight of every output in a loss; zero on padding."""

    @property
    def layout(self) -> PackedRows:
        return PackedRows(segments=self.segments, positions=self.positions, count=self.time.shape[1])

    @property
    def text(self) -> TextTokens:
        return TextTokens(self.context, self.context_segments)

    def get_time(self, config) -> Array:
        """Return the times that the config asks for."""
        return self.token_time if config.time == "token" else self.time

    def get_conditioning(self, config) -> Conditioning:
        """Return the conditioning that the config asks for."""
        records = (
            self.text,
            ConditioningLatents(self.latents),
            ClassIds(self.labels),
            ImageTokens(self.image, self.image_segments),
        )
        own = (self._prepare(each) for each in config.conditioning if each.field.alignment == "grid")
        return Conditioning(*(record for record in records if type(record) in config.conditioning_kinds), *own)

    def _prepare(self, conditioning):
        """Return the record of a conditioning on the grid: its values are the latents, with strengths of the clips."""
        shape = conditioning.strength_shape
        factors = 1 + jnp.arange(np.prod(shape)).reshape(shape)
        strengths = factors * self.time.reshape(*self.time.shape, *(1,) * len(shape))
        return conditioning.prepare(
            self.latents, self.layout, jax.random.split(jax.random.key(0), self.time.shape), strengths
        )


def make_batch(*members: tuple[int, ...]) -> Batch:
    """Make a batch with a row of each of these tuples of clips."""
    return Batch(
        *(jax.device_put(np.stack(arrays)) for arrays in zip(*(_row(numbers) for numbers in members), strict=True))
    )


def _row(numbers: tuple[int, ...]) -> Batch:
    row = Batch(
        noisy=np.full((TOKENS, TOKEN_WIDTH), 9, np.float32),
        time=np.full(SEGMENTS, 0.9, np.float32),
        segments=np.zeros(TOKENS, np.int32),
        positions=np.full((TOKENS, 3), 5, np.float32),
        context=np.full((TEXT, TEXT_WIDTH), 9, np.float32),
        context_segments=np.zeros(TEXT, np.int32),
        token_time=np.full(TOKENS, 0.4, np.float32),
        latents=np.full((TOKENS, COND_WIDTH), 9, np.float32),
        labels=np.full(SEGMENTS, CLASSES, np.int32),
        image=np.full((IMAGE, IMAGE_WIDTH), 9, np.float32),
        image_segments=np.zeros(IMAGE, np.int32),
        weights=np.zeros((TOKENS, TOKEN_WIDTH), np.float32),
    )
    start = text_start = image_start = 0
    for index, number in enumerate(numbers):
        draw = np.random.default_rng(number)
        grid = GRIDS[number]
        stop, text_stop, image_stop = start + grid.volume, text_start + TEXTS[number], image_start + IMAGES[number]
        tokens, text, image = slice(start, stop), slice(text_start, text_stop), slice(image_start, image_stop)
        row.noisy[tokens] = draw.normal(size=(grid.volume, TOKEN_WIDTH))
        row.weights[tokens] = draw.normal(size=(grid.volume, TOKEN_WIDTH))
        row.time[index] = draw.uniform()
        row.segments[tokens] = index + 1
        row.positions[tokens] = compute_positions(grid)
        row.context[text] = draw.normal(size=(TEXTS[number], TEXT_WIDTH))
        row.context_segments[text] = index + 1
        frames = np.full(grid, row.time[index])
        frames[0, 0] = 0  # the first frame is known, thus at time 0
        row.token_time[tokens] = frames.reshape(-1)
        row.latents[tokens] = draw.normal(size=(grid.volume, COND_WIDTH))
        row.labels[index] = number + 1
        row.image[image] = draw.normal(size=(IMAGES[number], IMAGE_WIDTH))
        row.image_segments[image] = index + 1
        start, text_start, image_start = stop, text_stop, image_stop
    return row


@functools.partial(jax.jit, static_argnums=2)
def predict(params, batch: Batch, config) -> Array:
    backbone = nnx.merge(get_graph_def(config.make), params)
    prediction, _ = backbone(batch.noisy, batch.get_time(config), batch.layout, batch.get_conditioning(config))
    return prediction


@functools.partial(jax.jit, static_argnums=2)
def predict_with_gradients(params, batch: Batch, config):
    """Return the prediction, and the gradients of its weighted sum with respect to parameters and context."""

    def loss(params, context):
        prediction = predict(params, batch._replace(context=context), config)
        return (prediction * batch.weights).sum(), prediction

    gradients, prediction = jax.grad(loss, (0, 1), has_aux=True)(params, batch.context)
    return prediction, *gradients


def change_other_segments(batch: Batch, segment: int) -> Batch:
    """Change everything outside of a segment: tokens, times, positions, texts, images, padding."""

    def change(ids: Array, values: Array) -> Array:
        outside = (ids != segment).reshape(ids.shape + (1,) * (values.ndim - ids.ndim))
        return jnp.where(outside, 3 - 2 * values, values)

    ids = jnp.arange(1, batch.time.shape[1] + 1)[None] + 0 * batch.labels
    return batch._replace(
        noisy=change(batch.segments, batch.noisy),
        time=jnp.where(ids == segment, batch.time, 0.5 * batch.time),
        positions=change(batch.segments, batch.positions),
        context=change(batch.context_segments, batch.context),
        token_time=jnp.where(batch.segments == segment, batch.token_time, 0.5 * batch.token_time),
        latents=change(batch.segments, batch.latents),
        labels=jnp.where(ids == segment, batch.labels, (batch.labels + 1) % CLASSES),
        image=change(batch.image_segments, batch.image),
    )


def assert_packed_is_unpacked(params, config, *, tolerance=1e-5) -> None:
    """Assert that values and gradients of two clips in one row are those of the two in separate rows."""
    packed, packed_gradients, packed_context = predict_with_gradients(params, make_batch((0, 1), ()), config)
    alone, alone_gradients, alone_context = predict_with_gradients(params, make_batch((0,), (1,)), config)
    assert np.std(packed[0, :14]) > 0.1
    np.testing.assert_allclose(packed[0, FIRST], alone[0, :8], atol=tolerance)
    np.testing.assert_allclose(packed[0, SECOND], alone[1, :6], atol=tolerance)
    for path, gradient in flatten(packed_gradients).items():
        assert np.abs(gradient).max() > 1e-3, f"{path} has no gradient: the comparison would say nothing"
    assert_trees_are_close(packed_gradients, alone_gradients)
    np.testing.assert_allclose(packed_context[0, :3], alone_context[0, :3], atol=2 * tolerance)
    np.testing.assert_allclose(packed_context[0, 3:5], alone_context[1, :2], atol=2 * tolerance)


def assert_segments_are_apart(params, config) -> None:
    """Assert that a segment's prediction is bit for bit the same whatever else is in the row."""
    batch = make_batch((0, 1), (1, 0))
    before, _, _ = predict_with_gradients(params, batch, config)
    after, _, _ = predict_with_gradients(params, change_other_segments(batch, 1), config)
    np.testing.assert_array_equal(after[0, FIRST], before[0, FIRST])
    np.testing.assert_array_equal(after[1, :6], before[1, :6])
    assert (after[0, SECOND] != before[0, SECOND]).any(axis=-1).all()
    assert np.isfinite(after).all()


def assert_trees_are_close(actual, expected) -> None:
    expected = flatten(expected)
    for path, leaf in flatten(actual).items():
        scale = np.abs(expected[path]).max()
        assert np.abs(leaf - expected[path]).max() <= 1e-5 * max(scale, 1), path
