"""The denoiser with random parameters; a new one would predict zero whatever it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.trees import flatten
from dit_video.models.backbones.denoise import make_denoise_fn
from dit_video.models.backbones.dit import BoundaryEmbedding, DitConfig
from dit_video.nn import get_graph_def, get_param_shapes, init_params, sinusoidal_embedding
from dit_video.tokens import Grid, compute_positions, expand_to_tokens
from support.packed_rows import (
    FIRST,
    GRIDS,
    SECOND,
    SEGMENTS,
    TOKENS,
    assert_packed_is_unpacked,
    assert_segments_are_apart,
    assert_trees_are_close,
    make_batch,
    predict,
    predict_with_gradients,
)
from support.random_params import make_random_params

CONFIG = DitConfig(channels=2, context_width=6, patch=Grid(1, 2, 2), width=24, layers=2, heads=2, mlp_ratio=2.0)

PARAMS = make_random_params(CONFIG.make)


def test_packed_is_unpacked_in_values_and_gradients():
    assert_packed_is_unpacked(PARAMS, CONFIG)


def test_a_clip_does_not_depend_on_others_in_its_row_bit_for_bit():
    assert_segments_are_apart(PARAMS, CONFIG)


def test_padding_has_no_influence_bit_for_bit():
    batch = make_batch((0, 1), (1,))
    before, gradients, _ = predict_with_gradients(PARAMS, batch, CONFIG)
    padding, text_padding = (batch.segments == 0)[..., None], (batch.context_segments == 0)[..., None]
    changed = batch._replace(
        noisy=jnp.where(padding, -50.0, batch.noisy),
        positions=jnp.where(padding, 99.0, batch.positions),
        context=jnp.where(text_padding, -50.0, batch.context),
    )
    after, after_gradients, _ = predict_with_gradients(PARAMS, changed, CONFIG)
    np.testing.assert_array_equal(jnp.where(padding, 0, after), jnp.where(padding, 0, before))
    assert np.isfinite(after).all()
    for path, gradient in flatten(gradients).items():
        np.testing.assert_array_equal(flatten(after_gradients)[path], gradient, err_msg=path)


def test_predictions_depend_on_every_input():
    batch = make_batch((0, 1), ())
    before, _, _ = predict_with_gradients(PARAMS, batch, CONFIG)
    for changed in (
        batch._replace(time=batch.time.at[0, 0].add(0.1)),
        batch._replace(context=batch.context.at[0, 2, 0].add(1.0)),
        batch._replace(positions=batch.positions.at[0, 3, 0].add(1.0)),
        batch._replace(noisy=batch.noisy.at[0, 3, 0].add(1.0)),
    ):
        after, _, _ = predict_with_gradients(PARAMS, changed, CONFIG)
        assert (np.abs(after[0, FIRST] - before[0, FIRST]).max(axis=-1) > 1e-4).all()


def test_the_order_of_tokens_does_not_matter():
    batch = make_batch((0, 1), ())
    before, _, _ = predict_with_gradients(PARAMS, batch, CONFIG)
    order = np.concatenate([np.random.default_rng(0).permutation(8), np.arange(8, TOKENS)])
    shuffled, _, _ = predict_with_gradients(
        PARAMS, batch._replace(noisy=batch.noisy[:, order], positions=batch.positions[:, order]), CONFIG
    )
    np.testing.assert_allclose(shuffled[0, :14], before[0, order[:14]], atol=2e-5)


def test_without_absolute_positions_only_differences_of_coordinates_matter():
    config = dataclasses.replace(CONFIG, absolute_position=None)
    params = {path: leaf for path, leaf in PARAMS.items() if path != "position"}
    assert flatten(get_param_shapes(config.make)).keys() == flatten(params).keys()
    inputs = make_batch((0, 1), ())
    moved = inputs._replace(positions=inputs.positions + jnp.asarray([3.0, -8.0, 20.0]))
    predicted = jax.jit(lambda batch: predict(params, batch, config))
    np.testing.assert_allclose(predicted(moved)[0, :14], predicted(inputs)[0, :14], atol=2e-5)
    change = predict_with_gradients(PARAMS, moved, CONFIG)[0] - predict_with_gradients(PARAMS, inputs, CONFIG)[0]
    assert np.abs(change)[0, :14].max() > 0.01


def test_absolute_positions_are_distances_to_the_first_and_to_the_last_token():
    batch = make_batch((0, 1), (1, 0))
    result = BoundaryEmbedding().compute_features(batch.positions, batch.segments, count=SEGMENTS, width=24)
    for place, grid in (((0, FIRST), GRIDS[0]), ((0, SECOND), GRIDS[1]), ((1, slice(6, 14)), GRIDS[0])):
        coordinates = compute_positions(grid)
        both = jnp.asarray(np.concatenate([coordinates, np.asarray(grid, np.float32) - 1 - coordinates], axis=-1))
        np.testing.assert_allclose(
            result[place], sinusoidal_embedding(both, 32, max_period=100.0).reshape(len(coordinates), -1), atol=1e-6
        )


def test_a_fresh_denoiser_predicts_zero_and_learns():
    fresh = jax.jit(init_params, static_argnums=0)(CONFIG.make, jax.random.key(0))
    prediction, gradients, _ = predict_with_gradients(fresh, make_batch((0, 1), ()), CONFIG)
    assert not prediction.any()
    assert np.abs(gradients["head"]["kernel"]).max() > 1e-3


@pytest.mark.slow
def test_rematerialisation_and_chunked_attention_do_not_change_results():
    config = dataclasses.replace(CONFIG, remat="full", attention="chunked")
    batch = make_batch((0, 1), ())
    expected, result = predict_with_gradients(PARAMS, batch, CONFIG), predict_with_gradients(PARAMS, batch, config)
    np.testing.assert_allclose(result[0], expected[0], atol=2e-5)
    assert_trees_are_close(result[1], expected[1])


def test_bfloat16_products_of_float32_parameters_are_close():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    batch = make_batch((0, 1), ())
    exact, _, _ = predict_with_gradients(PARAMS, batch, CONFIG)
    result = jax.jit(lambda params: predict(params, batch, config))(PARAMS)
    assert result.dtype == jnp.float32
    error = np.abs(result - exact)[0, :14].mean() / np.abs(exact)[0, :14].mean()
    assert 1e-4 < error < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(get_param_shapes(config.make))} == {jnp.dtype("float32")}


def test_denoise_takes_the_time_of_every_token():
    batch = make_batch((0, 1), ())

    @jax.jit
    def denoised(time):
        backbone = nnx.merge(get_graph_def(CONFIG.make), PARAMS)
        denoise = make_denoise_fn(backbone, batch.layout, batch.get_conditioning(CONFIG))
        return denoise(batch.noisy, time, None)[0]

    time = jnp.where(batch.segments > 0, expand_to_tokens(batch.time, batch.segments), 0.123)
    expected, _, _ = predict_with_gradients(PARAMS, batch, CONFIG)
    np.testing.assert_allclose(denoised(time)[0, :14], expected[0, :14], atol=1e-5)
