"""Properties of the default denoiser that hold for every option: packed equals unpacked, and segments are apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.backbones.denoise import make_denoise_fn
from dit_video.models.backbones.dit import (
    ClassLabels,
    CrossAttention,
    DitConfig,
    FactorizedEmbedding,
    ImageSineCosine,
    JointAttention,
    NoContext,
    PooledContext,
    SineCosine,
    TemporalLayers,
    TimeEmbedding,
)
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import ClassIds, Conditioning
from dit_video.nn import get_graph_def, get_param_shapes, init_params
from dit_video.nn.attention import CausalFrames, RelativeBias, SlidingWindow, SpaceOnly, SparseCausal, TimeOnly
from dit_video.tokens import Rotary3d
from support.marks import mark_slow_except
from support.packed_rows import (
    CLASSES,
    FIRST,
    IMAGE_WIDTH,
    SECOND,
    TEXT_WIDTH,
    assert_packed_is_unpacked,
    assert_segments_are_apart,
    make_batch,
    predict,
)
from support.random_params import make_random_params

CONFIG = DitConfig(channels=2, context_width=TEXT_WIDTH, width=24, layers=2, heads=2, mlp_ratio=2.0)
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
    "joint": {"context": JointAttention()},
    "pooled, labels": {
        "context": PooledContext(),
        "labels": ClassLabels(classes=CLASSES),
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
    "temporal": {"pattern": SpaceOnly(), "temporal": TemporalLayers(spatial_layers=2), "modulation": "own"},
    "most": {
        "context": JointAttention(pooled=False),
        "order": "parallel",
        "modulation": "own",
        "time": "token",
        "cond_channels": 3,
        "registers": 1,
        "pattern": (CausalFrames(), SparseCausal()),
        "relative_bias": RelativeBias(buckets=(4, 4, 4), max_distance=(None, None, None)),
        "labels": ClassLabels(classes=CLASSES),
    },
}
"""Configs to test. Options that do not affect each other are combined, so that fewer programs are compiled."""
WANS = {
    "wan with images": {"cond_channels": 3, "image_width": IMAGE_WIDTH, "image_positions": 4},
    "wan with a time per token": {"time": "token", "pattern": (TimeOnly(), SpaceOnly())},
}
CONFIGS = {name: dataclasses.replace(CONFIG, **fields) for name, fields in OPTIONS.items()}
CONFIGS |= {name: dataclasses.replace(WAN, **fields) for name, fields in WANS.items()}
QUICK = ("most", "wan with images")
"""Configs of the default suite, which hold most options; all others are tested by the slow tests."""


@pytest.mark.parametrize("name", mark_slow_except(QUICK, CONFIGS))
def test_packed_is_unpacked_and_segments_are_apart(name):
    config = CONFIGS[name]
    params = make_random_params(config.make)
    assert_packed_is_unpacked(params, config)
    assert_segments_are_apart(params, config)


def test_a_model_can_be_conditioned_on_class_labels_alone():
    config = dataclasses.replace(
        CONFIG, context=NoContext(), context_width=0, labels=ClassLabels(classes=CLASSES), time="token"
    )
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
    unlabelled = dataclasses.replace(config, labels=None)
    assert np.isfinite(predict(make_random_params(unlabelled.make), batch, unlabelled)).all()


@pytest.mark.parametrize("name", ["joint", "rotary, own modulation"])
def test_fresh_denoisers_predict_zero(name):
    config = CONFIGS[name]
    fresh = jax.jit(init_params, static_argnums=0)(config.make, jax.random.key(0))
    assert not predict(fresh, make_batch((0, 1), (1, 0)), config).any()


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
    config = CONFIGS["wan with a time per token"]
    params = make_random_params(config.make)
    batch = make_batch((0, 1), ())
    backbone = nnx.merge(get_graph_def(config.make), params)
    denoise = make_denoise_fn(backbone, batch.layout, batch.get_conditioning(config))
    expected = predict(params, batch, config)
    result, _ = jax.jit(denoise)(batch.noisy, batch.token_time, None)
    np.testing.assert_allclose(result[0, :14], expected[0, :14], atol=1e-5)


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


def test_conditioning_that_the_config_does_not_declare_is_refused():
    params = make_random_params(CONFIG.make)
    model, batch = nnx.merge(get_graph_def(CONFIG.make), params), make_batch((0, 1), ())
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
    assert {"blocks/video/own/kernel", "blocks/context/own/kernel"} <= paths("most")
    assert get_param_shapes(CONFIGS["factorised, full norm"].make)["blocks"]["query_norm"]["scale"].shape == (2, 24)


def test_interpolated_positions_are_those_of_a_smaller_clip():
    stretched = dataclasses.replace(
        CONFIG, absolute_position=None, rotary=Rotary3d(split=(4, 4, 4), scale=(0.5, 0.25, 1.0))
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
