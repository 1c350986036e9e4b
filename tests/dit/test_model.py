"""The denoiser from random parameters: a fresh one predicts zero whatever it computes."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from dit_video import configs
from dit_video.dit import DitConfig, packed_denoise
from dit_video.dit.model import _distances
from dit_video.errors import UserError
from dit_video.nn import graph_of, init_params, param_shapes, sinusoidal
from dit_video.tokens import Grid, Rotary3d, coordinates, to_tokens
from dit_video.tree import flatten
from rough import rough_params

CONFIG = DitConfig(channels=2, context_width=6, patch=Grid(1, 2, 2), width=24, layers=2, heads=2, mlp_ratio=2.0)
GRIDS = (Grid(2, 2, 2), Grid(1, 2, 3))
CONTEXT = (3, 2)
"""context tokens of each clip"""
TOKENS, TEXT, SEGMENTS = 18, 7, 3


PARAMS = rough_params(CONFIG.make)


class Batch(NamedTuple):
    noisy: Array
    time: Array
    segments: Array
    coordinates: Array
    context: Array
    context_segments: Array
    weights: Array
    """of every output in a loss; zero on padding"""


def batch(*members: tuple[int, ...]) -> Batch:
    """Rows that hold these clips, with padding that is not zero."""
    return Batch(
        *(jnp.asarray(np.stack(arrays)) for arrays in zip(*(row(numbers) for numbers in members), strict=True))
    )


def row(numbers: tuple[int, ...]):
    found = Batch(
        np.full((TOKENS, CONFIG.token_width), 9, np.float32),
        np.full(SEGMENTS, 0.9, np.float32),
        np.zeros(TOKENS, np.int32),
        np.full((TOKENS, 3), 5, np.float32),
        np.full((TEXT, 6), 9, np.float32),
        np.zeros(TEXT, np.int32),
        np.zeros((TOKENS, CONFIG.token_width), np.float32),
    )
    start = text_start = 0
    for index, number in enumerate(numbers):
        draw = np.random.default_rng(number)
        stop, text_stop = start + GRIDS[number].volume, text_start + CONTEXT[number]
        found.noisy[start:stop] = draw.normal(size=(stop - start, CONFIG.token_width))
        found.weights[start:stop] = draw.normal(size=(stop - start, CONFIG.token_width))
        found.time[index] = draw.uniform()
        found.segments[start:stop] = index + 1
        found.coordinates[start:stop] = coordinates(GRIDS[number])
        found.context[text_start:text_stop] = draw.normal(size=(text_stop - text_start, 6))
        found.context_segments[text_start:text_stop] = index + 1
        start, text_start = stop, text_stop
    return found


def predict(params, batch: Batch, config=CONFIG):
    return nnx.merge(graph_of(config.make), params)(
        batch.noisy,
        batch.time,
        segments=batch.segments,
        coordinates=batch.coordinates,
        context=batch.context,
        context_segments=batch.context_segments,
    )


@functools.partial(jax.jit, static_argnums=2)
def run(params, batch, config=CONFIG):
    """The prediction, and the gradients of its weighted sum to parameters and context."""

    def loss(params, context):
        prediction = predict(params, batch._replace(context=context), config)
        return (prediction * batch.weights).sum(), prediction

    gradients, prediction = jax.grad(loss, (0, 1), has_aux=True)(params, batch.context)
    return prediction, *gradients


FIRST, SECOND = slice(0, 8), slice(8, 14)


def assert_trees_are_close(found, expected):
    expected = flatten(expected)
    for path, leaf in flatten(found).items():
        scale = np.abs(expected[path]).max()
        assert np.abs(leaf - expected[path]).max() <= 1e-5 * max(scale, 1), path


def test_packed_is_unpacked_in_values_and_gradients():
    packed, packed_gradients, packed_context = run(PARAMS, batch((0, 1), ()))
    alone, alone_gradients, alone_context = run(PARAMS, batch((0,), (1,)))
    assert np.std(packed[0, :14]) > 0.3
    np.testing.assert_allclose(packed[0, FIRST], alone[0, :8], atol=1e-5)
    np.testing.assert_allclose(packed[0, SECOND], alone[1, :6], atol=1e-5)
    for path, gradient in flatten(packed_gradients).items():
        assert np.abs(gradient).max() > 1e-3, f"{path} has no gradient: the comparison would say nothing"
    assert_trees_are_close(packed_gradients, alone_gradients)
    np.testing.assert_allclose(packed_context[0, :3], alone_context[0, :3], atol=2e-5)
    np.testing.assert_allclose(packed_context[0, 3:5], alone_context[1, :2], atol=2e-5)
    assert np.abs(packed_context[0, :5]).min() > 1e-4


def test_a_clip_sees_neither_another_nor_its_text_time_and_place_bit_for_bit():
    given = batch((0, 1), (1, 0))
    before, _, _ = run(PARAMS, given)
    other, other_text = (given.segments != 1)[..., None], (given.context_segments != 1)[..., None]
    changed = given._replace(
        noisy=jnp.where(other, 3 - given.noisy, given.noisy),
        time=given.time.at[:, 1:].multiply(0.5),
        coordinates=jnp.where(other, given.coordinates + 2.5, given.coordinates),
        context=jnp.where(other_text, 3 - given.context, given.context),
    )
    after, _, _ = run(PARAMS, changed)
    np.testing.assert_array_equal(after[0, FIRST], before[0, FIRST])
    np.testing.assert_array_equal(after[1, :6], before[1, :6])
    assert (after[0, SECOND] != before[0, SECOND]).any(axis=-1).all()


def test_padding_says_nothing_bit_for_bit():
    given = batch((0, 1), (1,))
    before, gradients, _ = run(PARAMS, given)
    padding, text_padding = (given.segments == 0)[..., None], (given.context_segments == 0)[..., None]
    changed = given._replace(
        noisy=jnp.where(padding, -50.0, given.noisy),
        coordinates=jnp.where(padding, 99.0, given.coordinates),
        context=jnp.where(text_padding, -50.0, given.context),
    )
    after, after_gradients, _ = run(PARAMS, changed)
    np.testing.assert_array_equal(jnp.where(padding, 0, after), jnp.where(padding, 0, before))
    assert np.isfinite(after).all()
    for path, gradient in flatten(gradients).items():
        np.testing.assert_array_equal(flatten(after_gradients)[path], gradient, err_msg=path)


def test_everything_that_is_given_counts():
    given = batch((0, 1), ())
    before, _, _ = run(PARAMS, given)
    for changed in (
        given._replace(time=given.time.at[0, 0].add(0.1)),
        given._replace(context=given.context.at[0, 2, 0].add(1.0)),
        given._replace(coordinates=given.coordinates.at[0, 3, 0].add(1.0)),
        given._replace(noisy=given.noisy.at[0, 3, 0].add(1.0)),
    ):
        after, _, _ = run(PARAMS, changed)
        assert (np.abs(after[0, FIRST] - before[0, FIRST]).max(axis=-1) > 1e-4).all()


def test_the_order_of_tokens_says_nothing():
    given = batch((0, 1), ())
    before, _, _ = run(PARAMS, given)
    order = np.concatenate([np.random.default_rng(0).permutation(8), np.arange(8, TOKENS)])
    shuffled, _, _ = run(PARAMS, given._replace(noisy=given.noisy[:, order], coordinates=given.coordinates[:, order]))
    np.testing.assert_allclose(shuffled[0, :14], before[0, order[:14]], atol=2e-5)


def test_without_absolute_positions_only_differences_of_coordinates_count():
    config = dataclasses.replace(CONFIG, absolute_position="none")
    params = {path: leaf for path, leaf in PARAMS.items() if path != "position"}
    assert flatten(param_shapes(config.make)).keys() == flatten(params).keys()
    given = batch((0, 1), ())
    moved = given._replace(coordinates=given.coordinates + jnp.asarray([3.0, -8.0, 20.0]))
    predicted = jax.jit(lambda batch: predict(params, batch, config))
    np.testing.assert_allclose(predicted(moved)[0, :14], predicted(given)[0, :14], atol=2e-5)
    assert np.abs(run(PARAMS, moved)[0] - run(PARAMS, given)[0])[0, :14].max() > 0.01


def test_absolute_positions_are_distances_to_the_first_and_to_the_last_token():
    given = batch((0, 1), (1, 0))
    found = _distances(given.coordinates, given.segments, count=SEGMENTS)
    for place, grid in (((0, FIRST), GRIDS[0]), ((0, SECOND), GRIDS[1]), ((1, slice(6, 14)), GRIDS[0])):
        at = coordinates(grid)
        both = jnp.asarray(np.concatenate([at, np.asarray(grid, np.float32) - 1 - at], axis=-1))
        np.testing.assert_allclose(found[place], sinusoidal(both, 32, period=100.0).reshape(len(at), -1), atol=1e-6)


def test_a_fresh_denoiser_predicts_zero_and_learns():
    fresh = init_params(CONFIG.make, jax.random.key(0))
    prediction, gradients, _ = run(fresh, batch((0, 1), ()))
    assert not prediction.any()
    assert np.abs(gradients["head"]["kernel"]).max() > 1e-3


def test_remat_and_chunks_change_nothing():
    config = dataclasses.replace(CONFIG, remat="full", attention="chunked")
    given = batch((0, 1), ())
    expected, found = run(PARAMS, given), run(PARAMS, given, config)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    assert_trees_are_close(found[1], expected[1])


def test_bfloat16_products_of_float32_parameters():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    given = batch((0, 1), ())
    exact, _, _ = run(PARAMS, given)
    found = jax.jit(lambda params: predict(params, given, config))(PARAMS)
    assert found.dtype == jnp.float32
    error = np.abs(found - exact)[0, :14].mean() / np.abs(exact)[0, :14].mean()
    assert 1e-4 < error < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(param_shapes(config.make))} == {jnp.dtype("float32")}


def test_denoise_takes_the_time_of_every_token():
    given = batch((0, 1), ())

    @jax.jit
    def denoised(time):
        denoise = packed_denoise(
            nnx.merge(graph_of(CONFIG.make), PARAMS),
            segments=given.segments,
            coordinates=given.coordinates,
            context=given.context,
            context_segments=given.context_segments,
            count=SEGMENTS,
        )
        return denoise(given.noisy, time)

    time = jnp.where(given.segments > 0, to_tokens(given.time, given.segments), 0.123)
    expected, _, _ = run(PARAMS, given)
    np.testing.assert_allclose(denoised(time)[0, :14], expected[0, :14], atol=1e-5)


def test_config():
    assert CONFIG.token_width == 8
    assert CONFIG.rotary == Rotary3d(split=(4, 4, 4))
    assert configs.from_json(configs.to_json(CONFIG)) == CONFIG
    with pytest.raises(UserError, match="its 0 heads, at least 1"):
        DitConfig(channels=2, context_width=6, width=24, heads=0)
    with pytest.raises(UserError, match="width 25 must be divisible by its 2 heads"):
        DitConfig(channels=2, context_width=6, width=25, heads=2)
    with pytest.raises(UserError, match=r"rotary split \(4, 4, 6\) .* head width 12"):
        DitConfig(channels=2, context_width=6, width=24, heads=2, rotary=Rotary3d(split=(4, 4, 6)))
    with pytest.raises(UserError, match="head width 5"):
        DitConfig(channels=2, context_width=6, width=10, heads=2)
