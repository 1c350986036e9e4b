"""The denoiser with random parameters; a new one would predict zero whatever it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.backbones.denoise import make_denoise_fn
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.positions import BoundaryEmbedding, FactorizedEmbedding, ImageSineCosine, SineCosine
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.models.backbones.transformer import CrossAttention, PooledContext, TimeEmbedding
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import ClassIds, Conditioning
from dit_video.nn import get_graph_def, get_param_shapes, init_params, sinusoidal_embedding
from dit_video.nn.attention import CausalFrames, RelativeBias, SlidingWindow, SpaceOnly, SparseCausal, TimeOnly
from dit_video.tokens import Grid, Rotary3d, compute_positions, expand_to_tokens, take_tokens
from support.marks import mark_slow_except
from support.packed_rows import (
    CLASSES,
    FIRST,
    GRIDS,
    IMAGE_WIDTH,
    SECOND,
    SEGMENTS,
    TEXT_WIDTH,
    TOKENS,
    assert_packed_is_unpacked,
    assert_segments_are_apart,
    assert_trees_are_close,
    make_batch,
    predict,
    predict_with_gradients,
)
from support.random_params import make_random_params

CONFIG = DiTConfig(channels=2, context_width=6, patch=Grid(1, 2, 2), width=24, layers=2, heads=2, mlp_ratio=2.0)

PARAMS = make_random_params(CONFIG.make)


@pytest.mark.nightly
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


# Properties of the default denoiser that hold for every option: packed equals unpacked, and segments are apart


SIZES = {"channels": 2, "context_width": TEXT_WIDTH, "width": 24, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
DEFAULT_CONFIG = DiTConfig(**SIZES)
WAN = WanDitConfig(
    channels=2, context_width=TEXT_WIDTH, text_length=5, width=24, mlp_dim=40, layers=2, heads=2, time_width=32
)
OPTIONS = {
    "sine-cosine, no norm": {"absolute_position": SineCosine(), "rotary": "none", "qk_norm": "none"},
    "factorised, full norm": {
        "absolute_position": FactorizedEmbedding(sizes=(3, 4, 5)),
        "rotary": "none",
        "qk_norm": "full",
    },
    "rotary, own modulation": {
        "absolute_position": None,
        "rotary": Rotary3d(split=(2, 6, 4), scale=(0.5, 1.0, 1.0), stretch=(1.0, 2.0, 2.0)),
        "modulation": "own",
    },
    "pooled, labels": {
        "context": PooledContext(),
        "classes": CLASSES,
        "absolute_position": ImageSineCosine(side=2),
        "variance": "dropped",
        "time_embedding": TimeEmbedding(scale=1.0, max_period=100.0, reversed=True),
        "mlp_norm_eps": 0.1,
    },
    "parallel": {"order": "parallel", "mlp": "swiglu", "bias": False},
    "registers, not pooled": {
        "registers": 2,
        "context": CrossAttention(pooled=False),
        "pattern": SlidingWindow(radius=(None, 0, 1)),
    },
    "token time, factorised": {
        "time": "token",
        "cond_channels": 3,
        "pattern": (SpaceOnly(), TimeOnly()),
        "attention": "chunked",
    },
    "most": {
        "order": "parallel",
        "modulation": "own",
        "time": "token",
        "cond_channels": 3,
        "registers": 1,
        "pattern": (CausalFrames(), SparseCausal()),
        "relative_bias": RelativeBias(buckets=(4, 4, 4), max_distance=(None, None, None)),
        "classes": CLASSES,
    },
}
"""Configs to test. Options that do not affect each other are combined, so that fewer programs are compiled."""
WANS = {
    "wan with images": {"cond_channels": 3, "image_width": IMAGE_WIDTH, "image_positions": 4},
    "wan with a time per token": {"time": "token", "pattern": (TimeOnly(), SpaceOnly())},
}
CONFIGS = {name: dataclasses.replace(DEFAULT_CONFIG, **fields) for name, fields in OPTIONS.items()} | {
    "joint": MMDiTConfig(**SIZES),
    "joint, most": MMDiTConfig(
        **SIZES,
        pooled=False,
        mlp="swiglu",
        time="token",
        cond_channels=3,
        rotary="none",
        pattern=(CausalFrames(), SparseCausal()),
    ),
    "spatio-temporal": SpatioTemporalDiTConfig(
        **SIZES, temporal=TemporalLayers(spatial_layers=2), modulation="own", time="token", cond_channels=3
    ),
}
CONFIGS |= {name: dataclasses.replace(WAN, **fields) for name, fields in WANS.items()}
QUICK = ("most", "joint, most", "spatio-temporal")
"""Configs of the default suite, which hold most options; all others are tested by the slow tests."""


@pytest.mark.parametrize("name", mark_slow_except(QUICK, CONFIGS))
def test_packed_is_unpacked_and_segments_are_apart(name):
    config = CONFIGS[name]
    params = make_random_params(config.make)
    assert_packed_is_unpacked(params, config)
    assert_segments_are_apart(params, config)


def test_a_model_can_be_conditioned_on_class_labels_alone():
    config = dataclasses.replace(DEFAULT_CONFIG, context_width=0, classes=CLASSES, time="token")
    params = make_random_params(config.make)
    assert not any(path.startswith("context") or "cross" in path for path in flatten(params))
    batch = make_batch((0, 1), ())
    before = predict(params, batch, config)
    np.testing.assert_array_equal(predict(params, batch._replace(context=5 - batch.context), config), before)
    after = predict(params, batch._replace(labels=batch.labels.at[0, 0].set(CLASSES)), config)
    assert np.abs(after[0, FIRST] - before[0, FIRST]).max() > 1e-3
    np.testing.assert_array_equal(after[0, SECOND], before[0, SECOND])
    none = predict(params, batch._replace(labels=batch.labels.at[0, 0].set(CLASSES + 1)), config)
    assert np.isnan(none[0, FIRST]).all()
    unlabelled = dataclasses.replace(config, classes=0)
    assert np.isfinite(predict(make_random_params(unlabelled.make), batch, unlabelled)).all()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["joint", "rotary, own modulation"])
def test_fresh_denoisers_predict_zero(name):
    config = CONFIGS[name]
    fresh = jax.jit(init_params, static_argnums=0)(config.make, jax.random.key(0))
    assert not predict(fresh, make_batch((0, 1), (1, 0)), config).any()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name", [pytest.param("token time, factorised", marks=pytest.mark.slow), "wan with a time per token"]
)
def test_one_time_for_all_tokens_is_the_time_of_the_segment(name):
    config = CONFIGS[name]
    params = make_random_params(config.make)
    batch = make_batch((0, 1), ())
    same = batch._replace(token_time=jnp.where(batch.segments == 1, batch.time[:, :1], batch.time[:, 1:2]))
    single = dataclasses.replace(config, time="segment")
    np.testing.assert_allclose(predict(params, same, config)[0, :14], predict(params, same, single)[0, :14], atol=1e-5)
    assert np.abs(predict(params, batch, config) - predict(params, same, config))[0, FIRST].max() > 1e-3


def test_denoise_passes_every_token_its_time():
    config = dataclasses.replace(CONFIG, time="token")
    params = make_random_params(config.make)
    batch = make_batch((0, 1), ())
    backbone = nnx.merge(get_graph_def(config.make), params)
    denoise = make_denoise_fn(backbone, batch.layout, batch.get_conditioning(config))
    expected = predict(params, batch, config)
    result, _ = jax.jit(denoise)(batch.noisy, batch.token_time, None)
    np.testing.assert_allclose(result[0, :14], expected[0, :14], atol=1e-5)


@pytest.mark.nightly
def test_wans_texts_are_padded_with_zeros_that_are_seen():
    """Explicit zeros instead of padding change nothing; a longer padding does."""
    params = make_random_params(WAN.make)
    batch = make_batch((1,))
    segments = batch.context_segments.at[0, 2:5].set(1)
    explicit = batch._replace(context=batch.context.at[0, 2:5].set(0), context_segments=segments)
    expected = predict(params, batch, WAN)
    np.testing.assert_allclose(predict(params, explicit, WAN)[0, :6], expected[0, :6], atol=1e-5)
    longer = predict(params, batch, dataclasses.replace(WAN, text_length=9))
    assert np.abs(longer - expected)[0, :6].max() > 1e-3


def test_a_text_longer_than_wans_padding_is_refused_not_cut():
    params = make_random_params(WAN.make)
    result = predict(params, make_batch((0, 1), ()), dataclasses.replace(WAN, text_length=2))
    assert np.isnan(result[0, FIRST]).all()
    assert np.isfinite(result[0, SECOND]).all()


def test_tokens_of_a_joint_model_without_its_text_are_refused_not_taken_for_text():
    config = CONFIGS["joint"]
    model, batch = nnx.merge(get_graph_def(config.make), make_random_params(config.make)), make_batch((0, 1), ())
    conditioning = batch.get_conditioning(config)
    x, inputs = model.embed_inputs(batch.noisy, batch.get_time(config), batch.layout, conditioning)
    numbers = jnp.tile(jnp.arange(x.shape[1]), (len(x), 1))

    def apply(kept):
        return model.apply_blocks(take_tokens(x, kept), inputs.take(kept))[0]

    assert np.isfinite(apply(numbers[:, 2:])).all()
    assert np.isnan(apply(numbers[:, :-2])[0, FIRST]).all()
    with pytest.raises(UserError, match=r"2 kept tokens are invalid: all \d+ tokens of the text"):
        inputs.take(numbers[:, -2:])


def test_conditioning_that_the_config_does_not_declare_is_refused():
    params = make_random_params(DEFAULT_CONFIG.make)
    model, batch = nnx.merge(get_graph_def(DEFAULT_CONFIG.make), params), make_batch((0, 1), ())
    text = Conditioning(batch.text)
    with pytest.raises(UserError, match="does not take ClassIds"):
        model(batch.noisy, batch.time, batch.layout, text.add(ClassIds(batch.labels)))
    wan = CONFIGS["wan with images"]
    model = nnx.merge(get_graph_def(wan.make), make_random_params(wan.make))
    with pytest.raises(UserError, match="needs ConditioningLatents"):
        model(batch.noisy, batch.time, batch.layout, text)


def test_options_add_and_remove_parameters():
    def paths(name):
        return flatten(get_param_shapes(CONFIGS[name].make)).keys()

    assert not any(path.endswith("_norm/scale") for path in paths("sine-cosine, no norm"))
    assert "blocks/gate/kernel" in paths("parallel")
    assert not any(path.startswith("blocks") and path.endswith("bias") for path in paths("parallel"))
    assert {"blocks/video/own/kernel", "blocks/context/own/kernel"} <= paths("joint")
    assert get_param_shapes(CONFIGS["factorised, full norm"].make)["blocks"]["query_norm"]["scale"].shape == (2, 24)


@pytest.mark.nightly
def test_interpolated_positions_are_those_of_a_smaller_clip():
    stretched = dataclasses.replace(
        DEFAULT_CONFIG, absolute_position=None, rotary=Rotary3d(split=(4, 4, 4), scale=(0.5, 0.25, 1.0))
    )
    plain = dataclasses.replace(stretched, rotary="even")
    params, batch = make_random_params(plain.make), make_batch((0, 1), ())
    larger = batch._replace(positions=batch.positions * jnp.asarray([2.0, 4.0, 1.0]))
    np.testing.assert_allclose(
        predict(params, larger, stretched)[0, :14], predict(params, batch, plain)[0, :14], atol=1e-5
    )


def test_factorised_positions_are_fractions_of_the_clip():
    config = CONFIGS["factorised, full norm"]
    params, batch = make_random_params(config.make), make_batch((0, 1), ())
    larger = batch._replace(positions=7 * batch.positions)
    np.testing.assert_allclose(
        predict(params, larger, config)[0, :14], predict(params, batch, config)[0, :14], atol=1e-5
    )


def test_a_learned_variance_is_returned_next_to_the_prediction():
    dropped = CONFIGS["pooled, labels"]
    params, batch = make_random_params(dropped.make), make_batch((0, 1), ())
    both = predict(params, batch, dataclasses.replace(dropped, variance="predicted"))
    assert both.shape == (*batch.noisy.shape[:2], 2 * dropped.token_width)
    halves = both.reshape(*both.shape[:2], dropped.patch.volume, 2, dropped.channels)
    expected = predict(params, batch, dropped)
    np.testing.assert_array_equal(halves[:, :, :, 0].reshape(expected.shape)[0, :14], expected[0, :14])
    assert np.std(halves[0, :14, :, 1]) > 0.1


def test_a_reversed_time_reverses_the_velocity():
    config = CONFIGS["pooled, labels"]
    params, batch = make_random_params(config.make), make_batch((0, 1), ())
    forward = dataclasses.replace(config, time_embedding=TimeEmbedding(scale=1.0, max_period=100.0))
    expected = -predict(params, batch._replace(time=1 - batch.time), forward)
    np.testing.assert_allclose(predict(params, batch, config)[0, :14], expected[0, :14], atol=1e-5)


@pytest.mark.parametrize("fields", [{"scale": 0.0}, {"max_period": -1.0}])
def test_invalid_time_embeddings_are_refused(fields):
    with pytest.raises(UserError, match="use positive values"):
        TimeEmbedding(**fields)
